"""Every way of merging that is measured, as a setting that a results file can hold, and how it is carried out.

Owns the grids and the calls of `fisherkit.merging`; knows no data set and computes no accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.data import Data

State = dict[str, Tensor]

KINDS: Mapping[str, Callable[..., fk.FisherApproximation]] = {
    "ef": fk.EmpiricalFisher,
    "ief": fk.ImprovedEmpiricalFisher,
    "truncated:1": lambda model, data, **options: fk.TruncatedFisher(model, data, rank=1, **options),
    "truncated:2": lambda model, data, **options: fk.TruncatedFisher(model, data, rank=2, **options),
    "sf": fk.SampledFisher,
    "exact": fk.ExactFisher,
    "jtj": lambda model, data, **options: fk.ExactFisher(model, data, likelihood="gaussian", **options),
}
"""How each kind is built; "jtj" has the outputs' metric I."""

STRUCTURES = ("diagonal", "kfac", "full")

RATIO, DAMPING = 3.0, 0.03
"""ρ and the relative λ that are proposed for everything."""

REGMEAN = 1e9
"""ρ that leaves nothing of the gradient factors."""


@dataclass(frozen=True)
class Setting:
    """How Fishers are merged.

    Args:
        normalize: as `fisherkit.merging.merge` has it.
        ratio: ρ, its ``output_damping``.
        damping: λ, relative to the mean eigenvalue.
    """

    normalize: str | None
    ratio: float
    damping: float

    @property
    def key(self) -> str:
        """As results have it."""
        return f"{self.normalize or 'none'}/{self.ratio:g}/{self.damping:g}"


DEFAULT = Setting("block", RATIO, DAMPING)
PLAIN = tuple(Setting(None, 0.0, damping) for damping in (1e-4, 1e-2, 1.0))
"""Fishers as they are."""

GRID = (
    *PLAIN,
    *(Setting("block", 0.0, damping) for damping in (1e-4, 1e-2, 1.0)),
    *(Setting("block", ratio, DAMPING) for ratio in (0.3, 1.0, 3.0, 10.0, 30.0)),
    *(Setting("block", RATIO, damping) for damping in (1e-3, 1e-2, 0.1, 0.3, 1.0)),
    Setting("trace", RATIO, DAMPING),
    Setting("output", RATIO, DAMPING),
)
"""Of diagonal and Kronecker-factored Fishers."""

SHORT = (*PLAIN[1:], Setting("block", 0.0, 1e-2), Setting("block", 1.0, DAMPING), DEFAULT)
"""Of full ones, whose systems are large."""

SCALES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0)
"""Of task arithmetic."""

SHRINKS = (1.0, 0.9, 0.5)
"""Of RegMean's second moments."""

DAMPED = (1e-2, DAMPING, 0.1, 0.3)
"""λ of RegMean with each layer's second moments at one scale."""


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Args:
        family: what is compared: "kfac/ief", "regmean"…
        setting: of the family.
        state: its parameters, float64.
        residual: the largest relative residual of its linear systems; None if there were none.
    """

    family: str
    setting: str
    state: State
    residual: float | None = None


def without_fishers(models: Sequence[nn.Module], start: Mapping[str, Tensor]) -> Iterator[Merged]:
    """The average, and task arithmetic at every scale."""
    yield Merged("average", "", fk.merging.average(models))
    for scale in SCALES:
        yield Merged("task arithmetic", f"{scale:g}", fk.merging.task_arithmetic(models, start, scale))


def by_regmean(models: Sequence[nn.Module], fishers: Sequence[fk.FisherOperator]) -> Iterator[Merged]:
    """RegMean as published, and damped towards the average with every layer's second moments at one scale.

    Args:
        models: what is merged.
        fishers: Kronecker-factored, of any kind.
    """
    for shrink in SHRINKS:
        yield _merged("regmean", f"{shrink:g}", fk.merging.regmean(models, fishers, shrink=shrink, return_info=True))
    for damping in DAMPED:
        yield merge(models, fishers, "regmean, damped", Setting("block", REGMEAN, damping))


def fishers(kind: str, structure: str, models: Sequence[nn.Module], data: Sequence[Data]) -> list[fk.FisherOperator]:
    """A Fisher of every model on its own data; full ones are written out, which all settings then share."""
    found = [KINDS[kind](model, own, structure=structure) for model, own in zip(models, data, strict=True)]
    if structure != "full":
        return list(found)
    return [fk.operators.DenseOperator(fisher.space, fisher.to_dense()) for fisher in found]


def merge(models: Sequence[nn.Module], found: Sequence[fk.FisherOperator], family: str, setting: Setting) -> Merged:
    """A merge by Fishers."""
    result = fk.merging.merge(
        models, found, normalize=setting.normalize, output_damping=setting.ratio,
        damping=fk.RelativeDamping(setting.damping), return_info=True,
        policy=fk.merging.MergePolicy(method="direct" if family.startswith("full") else "cg", max_steps=5000),
    )  # fmt: skip
    return _merged(family, setting.key, result)


def grid(structure: str) -> tuple[Setting, ...]:
    """What is tried with a structure."""
    return SHORT if structure == "full" else GRID


def _merged(family: str, setting: str, result: tuple[State, Any]) -> Merged:
    state, info = result
    return Merged(family, setting, state, info.residual)


def doubled(state: Mapping[str, Tensor]) -> State:
    """In float64."""
    return {name: tensor.to(torch.float64) for name, tensor in state.items()}
