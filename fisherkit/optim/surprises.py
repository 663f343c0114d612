"""Losses whose meaning a step would lose without a word: what is seen of them, and what is said.

Looks at the factors between the user's gradient and the likelihood's, and at what is in ``.grad`` beside the examples'
gradients. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.optim.passes import Captured

FIT = 1e-4
"""Below this ‖∂ℓ/∂z‖² an example's factor says nothing."""


def due(step: int) -> bool:
    """Whether to look in a step, counted from 1: ever more rarely, but not more rarely than every 64th."""
    return step % 64 == 0 or step & (step - 1) == 0


def wrong_reduction(captured: Sequence[Captured], reduction: str, examples: int) -> str:
    """What to say where the gradient is not that of the mean that a damped step takes it for; "" for nothing.

    The factors of all examples add up to 1 for a mean and to N for a sum; anything else is a scaler's, or weights.
    """
    total = float(torch.cat([one.seen.multiple for one in captured]).sum())
    expected, passes = (1 if reduction == "mean" else examples), len(captured)
    if examples == 1 or _close(total, expected):
        return ""
    if reduction == "mean" and _close(total, passes):
        advice = f"divide the loss of each of the {passes} passes by {passes}"
    elif _close(total, examples):
        advice = 'the loss is a sum: reduction="sum"'
    elif _close(total, 1):
        advice = 'the loss is a mean: reduction="mean"'
    else:
        return ""
    return (
        f"with reduction={reduction!r} the gradients' factors add up to {total:.4g} instead of {expected}, and the "
        f"step is as much too long. Try: {advice}."
    )


def lost_weights(captured: Sequence[Captured]) -> str:
    """What to say where examples of one pass have different factors, which the Gram-space update does not see."""
    for one in captured:
        # The factor of an example that is fit is all rounding.
        counting = one.seen.multiple[(one.seen.multiple > 0) & (one.seen.squared_norm > FIT)]
        if len(counting) and bool(counting.max() > 1.01 * counting.min()):
            return "weights of examples in the loss have no effect on the update of gram_damping=. Try: damping=."
    return ""


def lost_terms(captured: Sequence[Captured], gradient: Float[Tensor, "D"]) -> str:
    """What to say where the gradient is not the examples' alone, which the Gram-space update does not see."""
    if any(one.coupled for one in captured):
        return ""
    total = torch.zeros_like(gradient)
    for one in captured:
        for chunk in one.chunks:
            total += chunk.rows.rmatmul(one.seen.multiple[chunk.owner].unsqueeze(1).to(gradient.dtype))[:, 0]
    a, b = total.double(), gradient.double()
    if bool(a @ b >= 0.999 * a.norm() * b.norm()):
        return ""
    return (
        "the gradient is not the examples' alone (a penalty, an auxiliary loss, a change of .grad): the rest has no "
        "effect on the update of gram_damping=. Try: damping=, or weight_decay= for a penalty."
    )


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * b
