"""The loss ℓ of each example, of the package's likelihoods, from outputs and targets as model and data have them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import DataError, InvalidArgumentError
from fisherkit.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    GaussianNLL,
    Likelihood,
    LogProbabilities,
    Poisson,
)

PerExample = Callable[[Tensor, Tensor], Tensor]
"""Outputs ``[B, …]`` and targets ``[B, …]`` to ``[B]``."""


def _categorical(z: Tensor, y: Tensor, likelihood: Categorical) -> Float[Tensor, " B"]:
    """Weighted and smoothed cross-entropy, summed over an example's positions that are not ignored."""
    soft, axis = y.is_floating_point(), likelihood.class_axis
    fits = z.ndim > 1 and y.shape == (z.shape if soft else z.movedim(axis, 1)[:, 0].shape)
    if not fits or (likelihood.strict and (soft or z.ndim > 3)):
        raise misfit(z, y)
    z, y = z.movedim(axis, 1), y.movedim(axis, 1) if soft else y
    weight = None if likelihood.weight is None else likelihood.weight.to(z)
    losses = F.cross_entropy(
        z, y, weight, reduction="none", ignore_index=likelihood.ignore_index, label_smoothing=likelihood.label_smoothing
    )
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses


def _gaussian(z: Tensor, y: Tensor, likelihood: Gaussian) -> Float[Tensor, " B"]:
    """½‖z − y‖² / σ²."""
    variance = likelihood.variance.to(z) if isinstance(likelihood.variance, Tensor) else likelihood.variance
    return (0.5 * (z - shaped(y, z)).square() / variance).reshape(len(z), -1).sum(1)


def _gaussian_nll(z: Tensor, y: Tensor, likelihood: GaussianNLL) -> Float[Tensor, " B"]:
    """½((z − y)² / σ² + log σ²), the variance behind each number observed."""
    if y.shape != (*z.shape, 2):
        raise misfit(z, y)
    losses = F.gaussian_nll_loss(z, y[..., 0], y[..., 1], reduction="none", eps=likelihood.eps)
    return losses.reshape(len(z), -1).sum(1)


def _poisson(z: Tensor, y: Tensor, _: Poisson) -> Float[Tensor, " B"]:
    """exp(z) − y z."""
    return (z.exp() - shaped(y, z) * z).reshape(len(z), -1).sum(1)


def _bernoulli(z: Tensor, y: Tensor, likelihood: Bernoulli) -> Float[Tensor, " B"]:
    """Σ_c binary cross-entropy with logits."""
    y, z = (x.movedim(likelihood.class_axis, -1) for x in (shaped(y, z), z))
    weights = [None if w is None else torch.as_tensor(w).to(z) for w in (likelihood.weight, likelihood.pos_weight)]
    losses = F.binary_cross_entropy_with_logits(z, y, weights[0], pos_weight=weights[1], reduction="none")
    return losses.reshape(len(z), -1).sum(1)


def shaped(y: Tensor, z: Tensor) -> Tensor:
    """Targets in the outputs' shape and dtype."""
    if y.numel() != z.numel():
        raise DataError(
            call="the loss of each example", got=f"targets of shape {list(y.shape)} for outputs {list(z.shape)}",
            expected="one target for each output",
        )  # fmt: skip
    return y.reshape(z.shape).to(z.dtype)


def misfit(z: Tensor, y: Tensor) -> DataError:
    """The error of classes that do not fit the outputs."""
    return DataError(
        call="the loss of each example", got=f"outputs {list(z.shape)} and targets {list(y.shape)} of {y.dtype}",
        expected="outputs [B, C] with class indices [B], or [B, T, C] with [B, T]", why="likelihood='categorical'",
        try_="another object of fk.likelihoods, or the loss module, for others",
    )  # fmt: skip


_LOSSES: Mapping[type[Likelihood], Callable[[Tensor, Tensor, Any], Tensor]] = {
    Categorical: _categorical, Gaussian: _gaussian, Bernoulli: _bernoulli, Poisson: _poisson,
    GaussianNLL: _gaussian_nll, LogProbabilities: _categorical,  # whose softmax they are
}  # fmt: skip


def loss_of(likelihood: Likelihood, call: str) -> PerExample:
    """ℓ of a likelihood, without constants of the targets."""
    rule = _LOSSES.get(type(likelihood))
    if rule is None:
        raise InvalidArgumentError(
            call=call, got=f"a {type(likelihood).__name__} as likelihood",
            expected=f"one of {[kind.__name__ for kind in _LOSSES]}", why="others say gradients, not the loss itself",
            try_="its loss as a function of outputs and targets",
        )  # fmt: skip
    return functools.wraps(rule)(lambda z, y: rule(z, y, likelihood))
