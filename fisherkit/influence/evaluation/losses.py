"""What is trained on and what is measured: a number for each example, from outputs and targets.

Owns ℓ of the package's likelihoods, the margin, and the sign that makes larger better. Knows no model; outputs may come
from many models at once, flattened into the batch axis.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import DataError, InvalidArgumentError, InvalidTypeError
from fisherkit.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, resolve

PerExample = Callable[[Tensor, Tensor], Tensor]
"""Outputs ``[B, …]`` and targets ``[B, …]`` to ``[B]``."""

Loss = str | Likelihood | PerExample
"""What models are trained on: a likelihood, or a loss of the user's."""

Measurements = str | Sequence[str] | Mapping[str, PerExample]


def _categorical(z: Tensor, y: Tensor, likelihood: Likelihood) -> Float[Tensor, " B"]:
    """−log softmax(z)_y, summed over an example's positions that are not ignored."""
    if y.is_floating_point() or z.ndim != y.ndim + 1:
        raise DataError(
            call="retrain", got=f"outputs of {z.ndim} axes and targets of {y.ndim} axes and {y.dtype}",
            expected="outputs [B, C] with class indices [B], or [B, T, C] with [B, T]", why="likelihood='categorical'",
        )  # fmt: skip
    losses = F.cross_entropy(z.movedim(-1, 1), y, reduction="none", ignore_index=likelihood.ignore_index)
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses


def _gaussian(z: Tensor, y: Tensor, _: Likelihood) -> Float[Tensor, " B"]:
    """½‖z − y‖²."""
    return 0.5 * (z - _shaped(y, z)).square().flatten(1).sum(1)


def _bernoulli(z: Tensor, y: Tensor, _: Likelihood) -> Float[Tensor, " B"]:
    """Σ_c binary cross-entropy with logits."""
    losses = F.binary_cross_entropy_with_logits(z, _shaped(y, z), reduction="none")
    return losses.reshape(len(z), -1).sum(1)


def _shaped(y: Tensor, z: Tensor) -> Tensor:
    if y.numel() != z.numel():
        raise DataError(
            call="retrain", got=f"targets of shape {list(y.shape)} for outputs {list(z.shape)}",
            expected="one target for each output",
        )  # fmt: skip
    return y.reshape(z.shape).to(z.dtype)


def _categorical_margin(z: Tensor, y: Tensor, likelihood: Likelihood) -> Float[Tensor, " B"]:
    """z_y − logsumexp of the other classes, which does not cancel; summed over positions as the loss is."""
    if y.is_floating_point() or z.ndim != y.ndim + 1:
        return _categorical(z, y, likelihood)  # which says what is wrong
    counts = y != likelihood.ignore_index
    label = torch.where(counts, y, 0).unsqueeze(-1)
    others = torch.logsumexp(z.scatter(-1, label, float("-inf")), -1)
    margins = torch.where(counts, z.gather(-1, label).squeeze(-1) - others, 0.0)
    return margins.reshape(len(z), -1).sum(1)


def _bernoulli_margin(z: Tensor, y: Tensor, _: Likelihood) -> Float[Tensor, " B"]:
    """±z with the label's sign, summed over outputs."""
    return (z * (2 * _shaped(y, z) - 1)).reshape(len(z), -1).sum(1)


_Rules = Mapping[type[Likelihood], Callable[[Tensor, Tensor, Likelihood], Tensor]]
_LOSSES: _Rules = {Categorical: _categorical, Gaussian: _gaussian, Bernoulli: _bernoulli}
_MARGINS: _Rules = {Categorical: _categorical_margin, Bernoulli: _bernoulli_margin}


def _of(rules: _Rules, likelihood: Likelihood) -> PerExample | None:
    rule = rules.get(type(likelihood))
    if rule is None:
        return None

    @functools.wraps(rule)
    def per_example(z: Tensor, y: Tensor) -> Tensor:
        return rule(z, y, likelihood)

    return per_example


def loss_of(likelihood: Loss, call: str) -> PerExample:
    """ℓ of a likelihood, or the user's own.

    Raises:
        InvalidArgumentError: an unknown name, or a likelihood of one's own, which does not say its loss.
        InvalidTypeError: neither a likelihood nor a function.
    """
    if not isinstance(likelihood, (str, Likelihood)):
        if not callable(likelihood):
            raise InvalidTypeError(
                call=call, got=f"a {type(likelihood).__name__} as likelihood",
                expected="a likelihood's name, an object of fk.likelihoods, or a function of outputs and targets that "
                "returns a loss an example",
            )  # fmt: skip
        return likelihood
    resolved = resolve(likelihood)
    found = _of(_LOSSES, resolved)
    if found is None:
        raise InvalidArgumentError(
            call=call, got=f"a {type(resolved).__name__} as likelihood",
            expected=f"one of {[kind.__name__ for kind in _LOSSES]}", why="others say gradients, not the loss itself",
            try_="its loss as a function of outputs and targets",
        )  # fmt: skip
    return found


def measurements_of(measurements: Measurements, likelihood: Loss, call: str) -> dict[str, PerExample]:
    """What is recorded of every trained model, by name; larger = better.

    Raises:
        InvalidArgumentError: none, an unknown name, or a margin of a likelihood without labels.
        InvalidTypeError: not names or functions.
    """
    known: dict[str, PerExample] = {"loss": _negative(loss_of(likelihood, call))}
    if isinstance(likelihood, (str, Likelihood)) and (margin := _of(_MARGINS, resolve(likelihood))) is not None:
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
    @functools.wraps(function)
    def negative(z: Tensor, y: Tensor) -> Tensor:
        return -function(z, y)

    return negative
