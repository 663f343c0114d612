"""What a training step's loss says about the outputs: targets, which positions count, and the loss gradient's scale.

The loss belongs to the user: its gradient at the model's outputs arrives times whatever the loss was divided or
multiplied by (the batch size, accumulation steps, a gradient scaler). Where the target can be read off the gradient,
the likelihood's own gradient is computed from it and the multiple is found by comparison, example by example. Knows
neither parameters nor kinds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import ModelError
from fisherkit.likelihoods import Likelihood
from fisherkit.outputs import Outputs


@dataclass(frozen=True)
class Seen:
    """The outputs of one forward pass and the user's loss gradient there.

    Args:
        outputs: outputs and targets; positions without a gradient do not count.
        gradient: u = ∂ℓ/∂z, the likelihood's own.
        multiple: the user's gradient is this times u; 0 for examples that do not count.
        calibrated: whether the multiple is known, by comparison or because the loss is a sum; else it is that of a mean
            over this pass's examples alone.
    """

    outputs: Outputs
    gradient: Float[Tensor, "B P C"]
    multiple: Float[Tensor, "B"]
    calibrated: bool

    def scale_of(self, v: Float[Tensor, "B P C"]) -> Float[Tensor, "B"]:
        """What turns the user's gradient into vectors v along u, by example; 0 where there is no gradient."""
        return _ratio(_dot(v, self.gradient), _dot(self.gradient, self.gradient) * self.multiple)

    def correction(self, passes: int) -> int:
        """What is missing in u after so many passes before a step, each with the mean of its own examples."""
        return 1 if self.calibrated else passes

    @property
    def squared_norm(self) -> Float[Tensor, "B"]:
        """s = ‖∂ℓ/∂z‖², float64."""
        return _dot(self.gradient, self.gradient)


def seen_outputs(raw: Tensor, gradient: Tensor, likelihood: Likelihood, reduction: str, start: int, call: str) -> Seen:
    """Join the model's outputs with the gradient of the user's loss.

    Args:
        raw: the model's outputs.
        gradient: of the user's loss in them.
        likelihood: p(y | z).
        reduction: "mean" or "sum", used where targets do not show in the gradient.
        start: a number that no other pass's examples reach, for random draws.
        call: the user's class, for errors.

    Raises:
        ModelError: the loss is not the likelihood's, or the likelihood cannot tell targets from gradients.
    """
    raw = raw.detach()
    place = f"{call}, forward pass"
    precise = raw if raw.dtype in {torch.float32, torch.float64} else raw.float()
    z, _, _ = likelihood.prepare(precise, None, place)
    found = gradient.reshape(z.shape).to(z.dtype)
    # A gradient of zero is a position that does not count where labels say so; elsewhere it is a perfect fit.
    counts = likelihood.labels_mask
    mask = (found != 0).any(-1) if counts else torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
    example = torch.arange(start, start + z.shape[0], device=z.device)
    keys = example.unsqueeze(1) * (1 << 24) + torch.arange(z.shape[1], device=z.device)
    multiple = torch.ones(len(z), dtype=torch.float64, device=z.device)
    if not likelihood.gradient_scale_free and reduction == "mean":
        multiple = multiple / len(z)
    target = likelihood.target_from_gradient(z, found / multiple.to(z.dtype)[:, None, None])
    if target is None:
        raise ModelError(
            call=place,
            got=f"the likelihood {likelihood.name!r}",
            expected="one with target_from_gradient",
            why="the targets are read off the gradient of your loss",
            try_="a class of fisherkit.likelihoods, or that method on yours",
        )
    outputs = Outputs(z, target, mask, keys, likelihood)
    u = outputs.gradient()
    if likelihood.gradient_scale_free:
        multiple = _ratio(_dot(found, u), _dot(u, u))
        _refuse_other_loss(found, u, multiple, raw.dtype, likelihood, call)
    return Seen(outputs, u, multiple, likelihood.gradient_scale_free or reduction == "sum")


def _refuse_other_loss(
    found: Tensor, u: Tensor, multiple: Tensor, dtype: torch.dtype, likelihood: Likelihood, call: str
) -> None:
    """The gradient must be a multiple of the likelihood's in each example, up to the rounding of p − 1."""
    expected = u * multiple.to(u.dtype)[:, None, None]
    rounding = 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    # Losses are often computed in float32, whatever the model's dtype is.
    relative = 16 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    scale = multiple.abs().to(u.dtype)
    allowed = relative * found.flatten(1).norm(dim=1) + rounding * scale * u.shape[1] ** 0.5
    wrong = (found - expected).flatten(1).norm(dim=1) > allowed
    if bool((wrong | (multiple < 0)).any()):
        raise ModelError(
            call=f"{call}, backward pass",
            got="a loss whose gradient at the outputs is no positive multiple of the likelihood's in every example",
            expected=f"−log p(y | z) of the {likelihood.name} likelihood with hard targets, weighted or not",
            why="the Fisher is that of the likelihood",
            try_="a loss without label smoothing or terms in the outputs, of the outputs that the model returns; or "
            "likelihood= to match it",
        )


def _dot(a: Float[Tensor, "B P C"], b: Float[Tensor, "B P C"]) -> Float[Tensor, "B"]:
    return (a.double() * b.double()).flatten(1).sum(1)


def _ratio(a: Float[Tensor, "B"], b: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    return torch.where(b != 0, a / torch.where(b != 0, b, torch.ones_like(b)), torch.zeros_like(a))
