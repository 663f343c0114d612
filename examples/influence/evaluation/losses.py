"""What is trained on and what is measured: a number for each example, from outputs and targets.

The package's losses or the user's own, the margin, and the sign that makes larger better.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.influence import losses
from fisherkit.influence.losses import PerExample, misfit, shaped
from fisherkit.likelihoods import Bernoulli, Categorical, Likelihood, LogProbabilities, is_known_loss, resolve

Loss = str | Likelihood | PerExample
"""What models are trained on: a likelihood, a loss module of torch's, or a loss of the user's."""

Measurements = str | Sequence[str] | Mapping[str, PerExample]


def _categorical_margin(z: Tensor, y: Tensor, likelihood: Categorical) -> Float[Tensor, " B"]:
    """z_y − logsumexp of the other classes, which does not cancel; summed over positions as the loss is."""
    if y.is_floating_point() or z.ndim != y.ndim + 1:
        raise misfit(z, y)
    z = z.movedim(likelihood.class_axis, -1)
    counts = y != likelihood.ignore_index
    label = torch.where(counts, y, 0).unsqueeze(-1)
    others = torch.logsumexp(z.scatter(-1, label, float("-inf")), -1)
    margins = torch.where(counts, z.gather(-1, label).squeeze(-1) - others, 0.0)
    return margins.reshape(len(z), -1).sum(1)


def _bernoulli_margin(z: Tensor, y: Tensor, _: Bernoulli) -> Float[Tensor, " B"]:
    """±z with the label's sign, summed over outputs."""
    return (z * (2 * shaped(y, z) - 1)).reshape(len(z), -1).sum(1)


_MARGINS: Mapping[type, Callable[[Tensor, Tensor, Any], Tensor]] = {
    Categorical: _categorical_margin, Bernoulli: _bernoulli_margin, LogProbabilities: _categorical_margin,
}  # fmt: skip


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
    return losses.loss_of(resolved, call)


def measurements_of(measurements: Measurements, likelihood: Loss, call: str) -> dict[str, PerExample]:
    """What is recorded of every trained model, by name; larger = better."""
    known: dict[str, PerExample] = {"loss": _negative(loss_of(likelihood, call))}
    own = resolved_loss(likelihood)
    margin = _MARGINS.get(type(own))
    if margin is not None:
        known["margin"] = functools.wraps(margin)(lambda z, y: margin(z, y, own))
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
