"""What a training step's loss says about the outputs: targets, which positions count, and the loss gradient's scale.

The loss belongs to the user: its gradient at the model's outputs arrives times whatever the loss was divided or
multiplied by (the batch size, accumulation steps, a gradient scaler). Where the target can be read off the gradient,
the likelihood's own gradient is computed from it and the multiple is found by comparison, example by example.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherkit.arithmetic import at_least_single
from fisherkit.errors import DataError, FisherkitError, ModelError
from fisherkit.likelihood import prepared
from fisherkit.optim.settings import StepSettings
from fisherkit.outputs import Outputs

BLOWN_UP = 1e3
"""Outputs of so many times their first size, or 1, make errors a diverged loss's; confident ones are below 100."""

E = TypeVar("E", bound=FisherkitError)


@dataclass(frozen=True)
class Seen:
    """The outputs of one forward pass and the user's loss gradient there.

    Args:
        outputs: outputs and targets; positions without a gradient do not count.
        gradient: u = ∂ℓ/∂z, the likelihood's own, an example a row.
        squared_norm: s = ‖u‖².
        multiple: the user's gradient is this times u; 0 for examples that do not count.
        counts: examples and positions that count.
        calibrated: whether the multiple is known, by comparison or because the loss is a sum; else it is that of a mean
            over this pass's examples alone.
    """

    outputs: Outputs
    gradient: Float[Tensor, "B PC"]
    squared_norm: Float[Tensor, "B"]
    multiple: Float[Tensor, "B"]
    counts: tuple[int, int]
    calibrated: bool

    def scale_of(self, v: Float[Tensor, "B P C"]) -> Float[Tensor, "B"]:
        """What turns the user's gradient into vectors v along u, by example; 0 where there is no gradient."""
        # Of an example that is fit so well that the rows' dtype does not hold it, the gradient is rounding or zero.
        most = torch.finfo(v.dtype).max
        if self.outputs.is_gradient(v):
            found = self.multiple.reciprocal()
            return found.masked_fill_(found.abs() > most, 0.0)
        return _ratio(_dot(v.double().flatten(1), self.gradient), self.squared_norm * self.multiple, most)

    def correction(self, passes: int) -> int:
        """What is missing in u after so many passes before a step, each with the mean of its own examples."""
        return 1 if self.calibrated else passes


def seen_outputs(raw: Tensor, gradient: Tensor, settings: StepSettings, start: int) -> Seen:
    """Join the model's outputs with the gradient of the user's loss in them.

    ``start`` is a number that no other pass's examples reach, for random draws.

    Raises:
        ModelError: the loss is not the likelihood's, or the likelihood cannot tell targets from gradients.
    """
    raw, likelihood, reduction, call = raw.detach(), settings.likelihood, settings.reduction, settings.call
    place = f"{call}, forward pass"
    precise = raw if raw.dtype in {torch.float32, torch.float64} else raw.float()
    z, _, _ = prepared(likelihood, precise, None, place)
    found = likelihood.gradient_at(z, likelihood.positions(gradient, place).to(z.dtype))
    # A gradient of zero is a position that does not count where labels say so; elsewhere it is a perfect fit.
    mask = found.ne(0).any(-1) if likelihood.labels_mask else torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    known = 1.0
    if not likelihood.gradient_scale_free and reduction == "mean":
        # A module of torch's takes the mean over all outputs, and not over examples.
        known = 1 / (z.numel() if likelihood.reduction == "mean" else len(z))
    try:
        target = likelihood.target_from_gradient(z, found if known == 1 else found / known)
    except DataError as error:
        raise error.at(place) from error
    if target is None:
        raise ModelError(
            place, f"the likelihood {likelihood.recorded!r}", "one whose targets show in the loss gradient",
            why="the targets are read off the gradient of your loss, and weights of 0, smoothing of two classes and "
            "variances of the data leave it open",
            try_="weights above 0, no smoothing, a variance that is the same for all; or target_from_gradient in a "
            "likelihood of your own",
        )  # fmt: skip
    outputs = Outputs(z, target, mask, start, likelihood)
    u = outputs.gradient().double().flatten(1)
    squared_norm = _dot(u, u)
    if likelihood.gradient_scale_free:
        own = found.double().flatten(1)
        multiple = _ratio(_dot(own, u), squared_norm)
        mismatched = _mismatched(own, outputs, u, multiple, raw.dtype).any()
    else:
        multiple, mismatched = torch.full_like(squared_norm, known), mask.new_zeros(())
    # The one wait for the device in a pass.
    several = [mask.any(1).sum()] if mask.shape[1] > 1 else []
    wrong, *examples, positions = torch.stack([mismatched, *several, mask.sum()]).tolist()
    if wrong:
        raise ModelError(
            f"{call}, backward pass",
            "a loss whose gradient at the outputs is no positive multiple of the likelihood's in every example",
            f"the loss of the {likelihood.recorded} likelihood with hard targets, times a factor for each "
            "example", why="the Fisher is that of the likelihood",
            try_="a loss without label smoothing or terms in the outputs, of the outputs that the model returns; or "
            "likelihood= to match it: the loss module that you train with, nn.CrossEntropyLoss(...), nn.NLLLoss() or "
            "others, or fk.likelihoods.Categorical(class_axis=...) for classes on another axis",
        )  # fmt: skip
    calibrated = likelihood.gradient_scale_free or reduction == "sum"
    counts = examples[0] if examples else positions, positions
    return Seen(outputs, u, squared_norm, multiple, counts, calibrated)


def _mismatched(
    found: Float[Tensor, "B PC"], outputs: Outputs, u: Float[Tensor, "B PC"], multiple: Float[Tensor, "B"],
    dtype: torch.dtype,
) -> Bool[Tensor, "B"]:  # fmt: skip
    """Examples whose gradient is no positive multiple of the likelihood's, up to the rounding of p − 1."""
    rounding = 16 * torch.finfo(at_least_single(dtype)).eps
    # Losses are often computed in float32, whatever the model's dtype is.
    relative = 16 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    scale, root = multiple, outputs.hessian_root()
    if root is not None:  # a weight multiplies what rounding leaves
        scale = scale * root.flatten(1).amax(1).square().clamp_min(1)
    rest = torch.linalg.vector_norm(torch.addcmul(found, u, multiple.unsqueeze(1), value=-1), dim=1)
    allowed = relative * torch.linalg.vector_norm(found, dim=1) + rounding * outputs.z.shape[1] ** 0.5 * scale
    return (rest > allowed) | (multiple < 0)


def _dot(a: Float[Tensor, "B PC"], b: Float[Tensor, "B PC"]) -> Float[Tensor, "B"]:
    return (a * b).sum(1)


def _ratio(a: Float[Tensor, "B"], b: Float[Tensor, "B"], most: float = math.inf) -> Float[Tensor, "B"]:
    """a / b, 0 where b is or where it is more than ``most``."""
    found = a / b
    return found.masked_fill_(b == 0 if most == math.inf else (b == 0) | (found > most), 0.0)


def explained(error: E, outputs: Sequence[Tensor], first: Tensor | None) -> E:
    """The error; or that the loss has diverged, where outputs have blown up since the first pass, or are not finite.

    ``first`` is the largest output of that pass. For where there is an error already: it waits for the device.
    """
    if not outputs or first is None:
        return error
    largest = float(torch.stack([z.detach().abs().max().to(first) for z in outputs]).max())
    if largest <= BLOWN_UP * max(1.0, float(first)):
        return error
    return type(error)(
        call=error.call,
        got=f"a loss that has diverged: outputs of up to {largest:.3g}, after {float(first):.3g} at first",
        expected="outputs that stay in range", why=f"met as {error.got}",
        try_="a smaller learning rate, a larger damping, or trust_region=",
    )  # fmt: skip
