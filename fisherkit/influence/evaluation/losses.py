"""What is trained on and what is measured: a number for each example, from outputs and targets.

ℓ of the package's likelihoods, the margin, and the sign that makes larger better.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fisherkit.errors import DataError, InvalidArgumentError, InvalidTypeError
from fisherkit.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    GaussianNLL,
    Likelihood,
    LogProbabilities,
    Poisson,
    is_known_loss,
    resolve,
)

PerExample = Callable[[Tensor, Tensor], Tensor]
"""Outputs ``[B, …]`` and targets ``[B, …]`` to ``[B]``."""

Loss = str | Likelihood | PerExample
"""What models are trained on: a likelihood, a loss module of torch's, or a loss of the user's."""

Measurements = str | Sequence[str] | Mapping[str, PerExample]


def _categorical(z: Tensor, y: Tensor, likelihood: Categorical) -> Float[Tensor, " B"]:
    """Weighted and smoothed cross-entropy, summed over an example's positions that are not ignored."""
    z = z if likelihood.class_axis == 1 else z.movedim(-1, 1)
    if z.ndim != y.ndim + 1 and z.shape != y.shape:
        raise _misfit(z, y)
    if y.is_floating_point() != (z.shape == y.shape) or (y.is_floating_point() and likelihood.strict):
        raise _misfit(z, y)
    weight = None if likelihood.weight is None else likelihood.weight.to(z)
    losses = F.cross_entropy(
        z, y, weight, reduction="none", ignore_index=likelihood.ignore_index, label_smoothing=likelihood.label_smoothing
    )
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses


def _gaussian(z: Tensor, y: Tensor, likelihood: Gaussian) -> Float[Tensor, " B"]:
    """½‖z − y‖² / σ²."""
    variance = likelihood.variance.to(z) if isinstance(likelihood.variance, Tensor) else likelihood.variance
    return (0.5 * (z - _shaped(y, z)).square() / variance).reshape(len(z), -1).sum(1)


def _gaussian_nll(z: Tensor, y: Tensor, likelihood: GaussianNLL) -> Float[Tensor, " B"]:
    """½((z − y)² / σ² + log σ²), the variance behind each number observed."""
    if y.shape != (*z.shape, 2):
        raise _misfit(z, y)
    losses = F.gaussian_nll_loss(z, y[..., 0], y[..., 1], reduction="none", eps=likelihood.eps)
    return losses.reshape(len(z), -1).sum(1)


def _poisson(z: Tensor, y: Tensor, _: Poisson) -> Float[Tensor, " B"]:
    """exp(z) − y z."""
    return (z.exp() - _shaped(y, z) * z).reshape(len(z), -1).sum(1)


def _bernoulli(z: Tensor, y: Tensor, likelihood: Bernoulli) -> Float[Tensor, " B"]:
    """Σ_c binary cross-entropy with logits."""
    y, z = (x.movedim(likelihood.class_axis, -1) for x in (_shaped(y, z), z))
    weights = [None if w is None else torch.as_tensor(w).to(z) for w in (likelihood.weight, likelihood.pos_weight)]
    losses = F.binary_cross_entropy_with_logits(z, y, weights[0], pos_weight=weights[1], reduction="none")
    return losses.reshape(len(z), -1).sum(1)


def _shaped(y: Tensor, z: Tensor) -> Tensor:
    if y.numel() != z.numel():
        raise DataError(
            call="retrain", got=f"targets of shape {list(y.shape)} for outputs {list(z.shape)}",
            expected="one target for each output",
        )  # fmt: skip
    return y.reshape(z.shape).to(z.dtype)


def _misfit(z: Tensor, y: Tensor) -> DataError:
    return DataError(
        call="retrain", got=f"outputs of {z.ndim} axes and targets of {y.ndim} axes and {y.dtype}",
        expected="outputs [B, C] with class indices [B], or [B, T, C] with [B, T]", why="likelihood='categorical'",
        try_="another object of fk.likelihoods, or the loss module, for others",
    )  # fmt: skip


def _categorical_margin(z: Tensor, y: Tensor, likelihood: Categorical) -> Float[Tensor, " B"]:
    """z_y − logsumexp of the other classes, which does not cancel; summed over positions as the loss is."""
    if y.is_floating_point() or z.ndim != y.ndim + 1:
        raise _misfit(z, y)
    z = z.movedim(likelihood.class_axis, -1)
    counts = y != likelihood.ignore_index
    label = torch.where(counts, y, 0).unsqueeze(-1)
    others = torch.logsumexp(z.scatter(-1, label, float("-inf")), -1)
    margins = torch.where(counts, z.gather(-1, label).squeeze(-1) - others, 0.0)
    return margins.reshape(len(z), -1).sum(1)


def _bernoulli_margin(z: Tensor, y: Tensor, _: Bernoulli) -> Float[Tensor, " B"]:
    """±z with the label's sign, summed over outputs."""
    return (z * (2 * _shaped(y, z) - 1)).reshape(len(z), -1).sum(1)


_Rules = Mapping[type[Likelihood], Callable[[Tensor, Tensor, Any], Tensor]]
_LOSSES: _Rules = {
    Categorical: _categorical, Gaussian: _gaussian, Bernoulli: _bernoulli, Poisson: _poisson,
    GaussianNLL: _gaussian_nll, LogProbabilities: _categorical,  # whose softmax they are
}  # fmt: skip
_MARGINS: _Rules = {
    Categorical: _categorical_margin, Bernoulli: _bernoulli_margin, LogProbabilities: _categorical_margin,
}  # fmt: skip


def _of(rules: _Rules, likelihood: Likelihood) -> PerExample | None:
    rule = rules.get(type(likelihood))
    return None if rule is None else functools.wraps(rule)(lambda z, y: rule(z, y, likelihood))


def resolved_loss(likelihood: Loss) -> Likelihood | None:
    """The likelihood; None for a function of the user's."""
    known = (
        is_known_loss(likelihood) if isinstance(likelihood, nn.Module) else isinstance(likelihood, (str, Likelihood))
    )
    return resolve(likelihood) if known else None  # type: ignore[arg-type]


def loss_of(likelihood: Loss, call: str) -> PerExample:
    """ℓ of a likelihood, or the user's own."""
    resolved = resolved_loss(likelihood)
    if resolved is None:
        if not callable(likelihood):
            raise InvalidTypeError(
                call=call, got=f"a {type(likelihood).__name__} as likelihood",
                expected="a likelihood's name, an object of fk.likelihoods, or a function of outputs and targets that "
                "returns a loss an example",
            )  # fmt: skip
        return likelihood
    found = _of(_LOSSES, resolved)
    if found is None:
        raise InvalidArgumentError(
            call=call, got=f"a {type(resolved).__name__} as likelihood",
            expected=f"one of {[kind.__name__ for kind in _LOSSES]}", why="others say gradients, not the loss itself",
            try_="its loss as a function of outputs and targets",
        )  # fmt: skip
    return found


def measurements_of(measurements: Measurements, likelihood: Loss, call: str) -> dict[str, PerExample]:
    """What is recorded of every trained model, by name; larger = better."""
    known: dict[str, PerExample] = {"loss": _negative(loss_of(likelihood, call))}
    own = resolved_loss(likelihood)
    margin = None if own is None else _of(_MARGINS, own)
    if margin is not None:
        known["margin"] = margin
    if isinstance(measurements, Mapping):
        if not all(callable(function) for function in measurements.values()):
            raise InvalidTypeError(
                call=call, got=f"measurements={measurements}", expected="functions of outputs and targets"
            )
        found = {name: _negative(function) for name, function in measurements.items()}
    else:
        names = (measurements,) if isinstance(measurements, str) else tuple(measurements)
        if unknown := [name for name in names if name not in known]:
            raise InvalidArgumentError(
                call=call, got=f"measurements {unknown}", expected=f"among {list(known)} for this likelihood",
                try_="a dict of functions of outputs and targets for others",
            )  # fmt: skip
        found = {name: known[name] for name in names}
    if not found:
        raise InvalidArgumentError(call=call, got="no measurements", expected="at least one", try_='("loss",)')
    return found


def _negative(function: PerExample) -> PerExample:
    return functools.wraps(function)(lambda z, y: -function(z, y))
