"""What is trained on and what is measured: a number for each example, from outputs and targets.

The package's losses or the user's own, the margin, and the sign that makes larger better.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherkit.errors import DataError, InvalidArgumentError, InvalidTypeError
from fisherkit.likelihoods import Bernoulli, Categorical, Likelihood, is_known_loss, resolve

PerExample = Callable[[Tensor, Tensor], Tensor]
"""Outputs ``[B, …]`` and targets ``[B, …]`` to ``[B]``."""

Loss = str | Likelihood | PerExample
"""What models are trained on: a likelihood, a loss module of torch's, or a loss of the user's."""

Measurements = str | Sequence[str] | Mapping[str, PerExample]


def _margin(likelihood: Likelihood, raw: Tensor, y: Tensor, call: str) -> Float[Tensor, " B"]:
    """z_y − logsumexp of the other classes, which does not cancel, or ±z with a binary label's sign; summed up."""
    z, found, mask = likelihood.prepare(raw, y, call)
    target = torch.as_tensor(found)
    if isinstance(likelihood, Bernoulli):
        return ((2 * target - 1) * z).sum((1, 2))
    if target.is_floating_point():
        raise DataError(call=call, got="class probabilities", expected="labels", why="a margin is that of one label")
    label = target.masked_fill(~mask, 0).unsqueeze(-1)
    others = torch.logsumexp(z.scatter(-1, label, float("-inf")), -1)
    return torch.where(mask, z.gather(-1, label).squeeze(-1) - others, 0.0).sum(1)


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

    def losses(raw: Tensor, y: Tensor) -> Float[Tensor, " B"]:
        z, target, mask = resolved.prepare(raw, y, call)
        return (resolved.loss(z, torch.as_tensor(target)) * mask).sum(1)

    return losses


def measurements_of(measurements: Measurements, likelihood: Loss, call: str) -> dict[str, PerExample]:
    """What is recorded of every trained model, by name; larger = better."""
    known: dict[str, PerExample] = {"loss": _negative(loss_of(likelihood, call))}
    own = resolved_loss(likelihood)
    if isinstance(own, (Categorical, Bernoulli)):
        known["margin"] = lambda z, y: _margin(own, z, y, call)
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
