"""Every kind in every structure at one checkpoint: numbers, times and spectra.

Uses the package the way a user would, by its public operations alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fisherkit.cli.digits.kinds import DAMPING, KINDS, Batch
from fisherkit.cli.text import progress
from fisherkit.evaluation import approximation_quality, loss_gradient
from fisherkit.kinds import ExactFisher

STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")


@dataclass(frozen=True)
class Cell:
    """One kind in one structure.

    Args:
        kind: a name of `KINDS`.
        structure: "full", "block", "diagonal", "kfac" or "ekfac".
        rows: R.
        trace: sum of the eigenvalues.
        effective_rank: (Σλ)² / Σλ², the number of eigenvalues if all were equal.
        build_ms: median time of building it.
        build_units: the same in units of one forward and backward pass over the same examples.
        memory_bytes: of what is kept.
        relative_quality: γ/γ_SGD of (F + λI)⁻¹∇L against the exact full Fisher.
    """

    kind: str
    structure: str
    rows: int
    trace: float
    effective_rank: float
    build_ms: float
    build_units: float
    memory_bytes: int
    relative_quality: float


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues above rounding in descending order, of long spectra a few hundred, evenly spaced in the logarithm.

    Args:
        index: 1 for the largest.
        eigenvalue: the value there.
    """

    index: list[int]
    eigenvalue: list[float]

    @classmethod
    def of(cls, eigenvalues: Float[Tensor, "D"]) -> Spectrum:
        """From all eigenvalues in descending order."""
        count = int((eigenvalues > 1e-10 * eigenvalues[0]).sum())
        index = torch.logspace(0, math.log10(count), 200, dtype=torch.float64).round().long().unique()
        return cls(index.tolist(), eigenvalues[index - 1].tolist())


@dataclass(frozen=True)
class Structures:
    """The table of kinds and structures, and the spectra that were computed on the way.

    Args:
        cells: one for each kind and structure.
        unit_ms: median time of one forward and backward pass.
        spectra: of each kind in the full structure ...
        structure_spectra: ... and of each structure of the exact kind.
    """

    cells: list[Cell]
    unit_ms: float
    spectra: dict[str, Spectrum]
    structure_spectra: dict[str, Spectrum]


def compare_structures(model: nn.Module, batch: Batch, *, repeats: int) -> Structures:
    """Build every kind in all structures.

    Args:
        model: at a trained checkpoint.
        batch: examples.
        repeats: builds that a time is the median of.
    """
    pairs = [(kind, structure) for structure in STRUCTURES for kind in KINDS]
    builds = [partial(KINDS[kind], model, batch, structure=structure) for kind, structure in pairs]
    times = [_times((build, partial(_forward_backward, model, batch)), repeats) for build in progress(builds)]
    unit_ms = statistics.median(unit for _, units in times for unit in units)
    gradient = loss_gradient(model, batch)
    exact = ExactFisher(model, batch)
    reference = approximation_quality(gradient, exact, gradient)
    cells: list[Cell] = []
    spectra: dict[tuple[str, str], Spectrum] = {}
    for (kind, structure), build, (known, _) in zip(pairs, progress(builds), times, strict=True):
        fisher = build()
        eigenvalues = fisher.eigenvalues()
        spectra[kind, structure] = Spectrum.of(eigenvalues)
        quality = approximation_quality(fisher.solve(gradient, DAMPING), exact, gradient)
        cells.append(
            Cell(
                kind=kind,
                structure=structure,
                rows=fisher.rows,
                trace=fisher.trace().item(),
                effective_rank=(eigenvalues.sum().square() / eigenvalues.square().sum()).item(),
                build_ms=statistics.median(known),
                build_units=statistics.median(known) / unit_ms,
                memory_bytes=sum(entry.memory for entry in fisher.coverage().entries),
                relative_quality=(quality / reference).item(),
            )
        )
    return Structures(
        cells,
        unit_ms,
        {kind: spectra[kind, "full"] for kind in KINDS},
        {structure: spectra["exact", structure] for structure in STRUCTURES},
    )


def _forward_backward(model: nn.Module, batch: Batch) -> None:
    inputs, targets = batch
    torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(model.parameters()))


def _times(functions: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Milliseconds of functions called in turn, so that what else the machine does strikes all of them alike."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, known in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat > 0:  # what only a first call does is not the function's price
                known.append(1e3 * (time.perf_counter() - start))
    return times
