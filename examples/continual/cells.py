"""One cell: a bench learned with one method in one regime, by every seed and at every strength at once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from examples.continual import members
from examples.continual.benches import Bench, TaskData
from examples.continual.fishers import Builder
from examples.continual.methods import DAMPED, MAMMOTH, METHODS, SQUARED, Method
from examples.continual.modules import ModuleBench
from examples.continual.penalties import Term
from examples.continual.stacked import Stack
from examples.continual.training import Outcome, Training, initial, joint, sequence

REGIMES = ("fit", "early")
"""To near zero loss; stopped early."""

RAW, TRACE = "none", "trace"
"""Fishers as they are; F·D / trace F."""


def half_decades(low: int, high: int) -> tuple[float, ...]:
    """From 10^low to 10^high, both included."""
    return tuple(float(f"{10 ** (low + step / 2):.3g}") for step in range(2 * (high - low) + 1))


@dataclass(frozen=True)
class Cell:
    """What is measured at once.

    Args:
        regime: of `REGIMES`.
        normalization: `RAW` or `TRACE`.
        method: what keeps the past.
    """

    regime: str
    normalization: str
    method: Method

    @property
    def key(self) -> str:
        """The name in files."""
        return f"{self.regime}/{self.normalization}/{self.method.key}"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        seeds: of data, initialization and order of the examples.
        strengths: by normalization.
        full: fewer of them for the full structure, which costs most, by bench and regime; there, normalized alone.
        short: fewer of them for ekfac, mammoth's and benches of modules, by kind; Fishers have those of "".
        examples: that a Fisher of the full structure is of; the other structures take all of the task's.
        epochs: by regime, instead of the bench's.
        tasks: the first ones of each bench; None for all.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    strengths: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {TRACE: half_decades(-6, 6), RAW: half_decades(-3, 11)}
    )
    full: Mapping[tuple[str, str], tuple[float, ...]] = field(
        default_factory=lambda: {("permuted-digits", "fit"): half_decades(-2, 3)}
    )
    short: Mapping[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "": half_decades(-2, 0)[:-1],
            "l2": half_decades(-4, -1),
            SQUARED: half_decades(0, 5),
            MAMMOTH: half_decades(0, 4),
            DAMPED: (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        }
    )
    examples: int = 256
    epochs: Mapping[str, int] = field(default_factory=dict)
    tasks: int | None = None

    def training(self, bench: Bench, regime: str) -> Training:
        """How a regime trains."""
        return Training(self.epochs.get(regime) or bench.epochs[regime])

    def settings(self, bench: Bench | ModuleBench) -> dict[str, Any]:
        """What results of one table must agree in."""
        if isinstance(bench, ModuleBench):
            return {
                "title": bench.title,
                "model": bench.model,
                "seeds": list(self.seeds[: bench.seeds]),
                "epochs": {"fit": self.epochs.get("fit") or bench.epochs["fit"]},
                "rate": bench.rate,
                "batch": bench.batch,
                "tasks": self.tasks,
            }
        training = {regime: self.training(bench, regime) for regime in REGIMES}
        return {
            "title": bench.title,
            "widths": list(bench.widths),
            "seeds": list(self.seeds),
            "examples": self.examples,
            "epochs": {regime: one.epochs for regime, one in training.items()},
            "rate": training["fit"].rate,
            "batch": training["fit"].batch,
            "tasks": self.tasks,
        }

    def strengths_of(self, bench: Bench | ModuleBench, cell: Cell) -> tuple[float, ...]:
        """The sweep of a cell; empty if there is none."""
        if not cell.method.swept:
            return ()
        if isinstance(bench, ModuleBench) or cell.method.structure == "ekfac" or cell.method.kind in (MAMMOTH, DAMPED):
            return self.short.get(cell.method.kind, self.short[""])
        few = self.full.get((bench.name, cell.regime)) if cell.method.structure == "full" else None
        return few or self.strengths[cell.normalization]

    def cells(self, bench: Bench | ModuleBench, keys: tuple[str, ...] | None = None) -> list[Cell]:
        """Every cell of a bench, the structures in the order of what they cost."""
        found = []
        for method in METHODS.values():
            if (keys is None or method.key in keys) and bench.includes(method.kind, method.structure):
                for normalization in _normalizations(bench, method):
                    for regime in bench.epochs:
                        few = method.structure == "full" and (bench.name, regime) in self.full
                        if normalization == TRACE or not few:
                            found.append(Cell(regime, normalization, method))
        return found


def _normalizations(bench: Bench | ModuleBench, method: Method) -> tuple[str, ...]:
    """Those that a method is measured with: other libraries have none, and what costs most has one."""
    if method.kind in (MAMMOTH, DAMPED) or (method.kind == SQUARED and isinstance(bench, ModuleBench)):
        return (RAW,)
    if not method.structure or method.structure == "ekfac" or isinstance(bench, ModuleBench):
        return (TRACE,)
    return (TRACE, RAW)


def measure(bench: Bench | ModuleBench, tasks: list[Any], cell: Cell, plan: Plan) -> dict[str, Any]:
    """The figures of a cell.

    Returns:
        strengths; by strength and then seed, in percent: accuracy (the mean over tasks after the last one) and
        forgetting (how much higher it was when a task was learned, the mean over all but the last); by strength and
        then task, means over seeds: final (accuracy after the last task), learned (accuracy when it was learned) and
        loss (on the training examples then); eigenvalues: trace F / D by task; the processor's seconds, and those of
        the Fishers.
    """
    strengths, normalize = plan.strengths_of(bench, cell), None if cell.normalization == RAW else cell.normalization
    start, seeds = time.process_time(), len(tasks) if isinstance(bench, ModuleBench) else len(plan.seeds)
    builder: Builder | members.Keeper | None = None
    if isinstance(bench, ModuleBench):
        epochs = plan.settings(bench)["epochs"][cell.regime]
        outcome, builder = members.measure(bench, tasks, cell.method, normalize, strengths, epochs)
    else:
        training, stack = plan.training(bench, cell.regime), initial(bench.widths, plan.seeds)
        if cell.method.kind == "joint":
            outcome = joint(stack, tasks, plan.seeds, training)
        elif not strengths:
            outcome = sequence(stack, tasks, plan.seeds, training)
        else:
            builder = Builder(cell.method, torch.tensor(strengths).repeat(seeds), normalize)
            consolidation = _Consolidation(builder, plan.examples)
            outcome = sequence(stack, tasks, plan.seeds, training, len(strengths), consolidation)
    return {
        "strengths": list(strengths),
        **_figures(outcome, seeds),
        "eigenvalues": [float(f"{value:.3g}") for value in builder.eigenvalues] if builder else [],
        "seconds": round(time.process_time() - start, 1),
        "build_seconds": round(builder.seconds, 1) if builder else 0.0,
    }


@dataclass(frozen=True)
class _Consolidation:
    """The terms of a builder, for `sequence`."""

    builder: Builder
    examples: int

    def __call__(self, stack: Stack, task: TaskData, number: int) -> Term:
        count = self.examples if self.builder.method.structure == "full" else task.train.shape[1]
        return self.builder.term(stack, task.train, task.train_labels, task.window, count=count, seed=number)


def _figures(outcome: Outcome, seeds: int) -> dict[str, Any]:
    """By strength and then seed or task."""

    def by_task(values: Tensor, factor: float, digits: int) -> list[list[float]]:
        means = factor * values.unflatten(1, (seeds, -1)).mean(1).T
        return [[float(f"{value:.{digits}g}") for value in row] for row in means.tolist()]

    lost = (outcome.learned - outcome.final)[:-1].mean(0)
    forgetting = 100 * lost.unflatten(0, (seeds, -1)).T
    accuracy = 100 * outcome.final.mean(0).unflatten(0, (seeds, -1)).T
    return {
        "accuracy": [[round(value, 3) for value in row] for row in accuracy.tolist()],
        "forgetting": [[round(value, 3) for value in row] for row in forgetting.tolist()],
        "final": by_task(outcome.final, 100, 4),
        "learned": by_task(outcome.learned, 100, 4),
        "loss": by_task(outcome.losses, 1, 3),
    }
