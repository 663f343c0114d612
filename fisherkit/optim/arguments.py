"""What users pass to an optimizer, checked before anything is done: models, dampings, trust regions."""

from __future__ import annotations

import math

from torch import nn

from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.operators import RelativeDamping


def check_model(model: object, call: str) -> None:
    """Refuse what is no module, such as its parameters, which other optimizers take."""
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(
            call=call, got=f"a {type(model).__name__} as model", expected="a torch.nn.Module",
            why="per-example gradients come from its forward pass", try_=f"{call}(model, ..., params=names)",
        )  # fmt: skip


def check_trust_region(trust_region: object, call: str) -> None:
    """Refuse what is neither a positive number nor None."""
    if trust_region is None:
        return
    if isinstance(trust_region, bool) or not isinstance(trust_region, (int, float)) or not trust_region > 0:
        raise InvalidArgumentError(call=call, got=f"trust_region={trust_region!r}", expected="a positive number")


def check_damping_choice(damping: object, gram_damping: object, call: str) -> None:
    """Exactly one of the two dampings, and a fitting one."""
    if (damping is None) == (gram_damping is None):
        raise InvalidArgumentError(
            call=call, got=f"damping={damping!r} and gram_damping={gram_damping!r}", expected="one of them",
            why="F + λI and the Gram matrix + λI are different updates",
            try_="gram_damping=1e-3 for the paper's update, damping=1e-2 for (F + λI)⁻¹ times the mean gradient",
        )  # fmt: skip
    value, name = (damping, "damping") if gram_damping is None else (gram_damping, "gram_damping")
    if isinstance(value, RelativeDamping) and gram_damping is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidTypeError(call=call, got=f"{name} of type {type(value).__name__}", expected="a number")
    if not (math.isfinite(value) and value >= 0):
        raise InvalidArgumentError(call=call, got=f"{name}={value}", expected="a finite number, 0 or more")
