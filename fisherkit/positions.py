"""Outputs as positions by classes, and what to say of outputs and labels that do not fit together.

Owns shapes alone; knows no likelihood.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from fisherkit.errors import DataError


def label_advice(z: Tensor, target: Tensor) -> str:
    """What would make labels of a wrong shape fit outputs, as the user might have meant them."""
    if target.shape == z.shape:
        return "labels.argmax(-1) if they are one-hot"
    if target.shape == (*z.shape[:-1], 1):
        return "labels.squeeze(-1)"
    return "fk.likelihoods.Categorical(class_axis=1), or logits.movedim(1, -1) in the model, if classes come second"


def shape_text(x: Tensor) -> str:
    """A tensor's shape in words."""
    # Sizes without the batch's, which may be that of a probe and not the caller's.
    return f"({', '.join(['B', *map(str, x.shape[1:])])})"


def refuse_images(z: Tensor, call: str) -> NoReturn:
    """Refuse outputs with more axes than positions and outputs.

    Raises:
        DataError: always.
    """
    raise DataError(
        call=call,
        got=f"outputs of shape {shape_text(z)}",
        expected="(B, C) or (B, T, C)",
        why="outputs are positions by classes, the classes last",
        try_="z.movedim(1, -1).flatten(1, -2) in the model for images of logits (B, C, H, W), or a likelihood that "
        "says how to read them: fk.likelihoods.Categorical(class_axis=1), or torch's own loss, nn.CrossEntropyLoss(), "
        "nn.MSELoss() and others",
    )
