"""Outputs as positions by classes, and what to say of outputs and labels that do not fit together.

Owns shapes alone; knows no likelihood.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import DataError


def label_advice(z: Tensor, target: Tensor) -> str:
    """What would make labels of a wrong shape fit outputs, as the user might have meant them."""
    if target.shape == z.shape:
        return "labels.argmax(-1) if they are one-hot"
    if target.shape == (*z.shape[:-1], 1):
        return "labels.squeeze(-1)"
    return "logits.movedim(1, -1) in the model if classes come second"


def shape_text(x: Tensor) -> str:
    """A tensor's shape in words."""
    # Sizes without the batch's, which may be that of a probe and not the caller's.
    return f"({', '.join(['B', *map(str, x.shape[1:])])})"


def as_positions(z: Tensor, call: str) -> Float[Tensor, "B P C"]:
    """Outputs (B, C) or (B, T, C) as ``[B, P, C]``.

    Raises:
        DataError: another number of axes.
    """
    if z.ndim not in (2, 3):
        raise DataError(
            call=call,
            got=f"outputs of shape {shape_text(z)}",
            expected="(B, C) or (B, T, C)",
            why="outputs are positions by classes, the classes last",
            try_="z.movedim(1, -1).flatten(1, -2) in the model for images of logits (B, C, H, W)",
        )
    return z.unsqueeze(1) if z.ndim == 2 else z
