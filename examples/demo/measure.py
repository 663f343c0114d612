"""What the demo measures: every kind in every structure, and how good the kinds' updates are along training.

Uses the package the way a user would. Updates are judged in float64, where near-zero damping shows the kinds and not
rounding.
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
from torch import Tensor, nn
from torch.func import functional_call, jvp

import fisherkit as fk
from examples.demo.digits import BATCH, Batch, Checkpoint, Digits
from fisherkit.cli.text import progress
from fisherkit.evaluation import approximation_quality, loss_gradient
from fisherkit.space import ParameterSpace

STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")

KINDS: dict[str, Callable[..., Any]] = {
    "EF": fk.EmpiricalFisher,
    "SF, 1 draw": fk.SampledFisher,
    "iEF": fk.ImprovedEmpiricalFisher,
    "truncated, rank 1": partial(fk.TruncatedFisher, rank=1),
    "truncated, rank 2": partial(fk.TruncatedFisher, rank=2),
    "truncated, rank 3": partial(fk.TruncatedFisher, rank=3),
    "truncated, 1e-2": partial(fk.TruncatedFisher, tolerance=1e-2),
    "exact": fk.ExactFisher,
}
"""The kinds that are compared, by the names that tables and pictures give them."""

DAMPING = fk.RelativeDamping(1e-4)
"""Near zero, as in the paper's evaluation: the update is the kind's own, and the linear solve still well posed."""


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
    """Eigenvalues above rounding: a few hundred, evenly spaced in the logarithm of their index, which begins at 1."""

    index: list[int]
    eigenvalue: list[float]

    @classmethod
    def of(cls, eigenvalues: Tensor) -> Spectrum:
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


@dataclass(frozen=True)
class Quality:
    """γ/γ_SGD of every kind's update at one checkpoint.

    Args:
        epoch: which checkpoint.
        mean: over the batches ...
        deviation: ... and their standard deviation; 0 for a single batch.
        vectors: output vectors an example that the kind used.
    """

    epoch: int
    mean: dict[str, float]
    deviation: dict[str, float]
    vectors: dict[str, float]


@dataclass(frozen=True)
class Projection:
    """What updates of the same total ask of each example of a batch, to first order.

    Args:
        logit_gradient_norm: ‖∂ℓ_n/∂z_n‖, near zero for an example that is fit.
        share: for each kind, the part of the batch's loss reduction that falls to example n; the parts sum to 1.
        step: the length of the update along ∇ℓ_n that this takes: share / ‖∇ℓ_n‖.
    """

    logit_gradient_norm: list[float]
    share: dict[str, list[float]]
    step: dict[str, list[float]]


def compare_structures(model: nn.Module, batch: Batch, *, repeats: int) -> Structures:
    """Build every kind in all structures; times are medians of so many builds."""
    pairs = [(kind, structure) for structure in STRUCTURES for kind in KINDS]
    builds = [partial(KINDS[kind], model, batch, structure=structure) for kind, structure in pairs]
    times = [_times((build, partial(_forward_backward, model, batch)), repeats) for build in progress(builds)]
    unit_ms = statistics.median(unit for _, units in times for unit in units)
    gradient = loss_gradient(model, batch)
    exact = fk.ExactFisher(model, batch)
    reference = approximation_quality(gradient, exact, gradient)
    cells: list[Cell] = []
    spectra: dict[tuple[str, str], Spectrum] = {}
    for (kind, structure), build, (known, _) in zip(pairs, progress(builds), times, strict=True):
        fisher = build()
        eigenvalues = fisher.eigenvalues()
        spectra[kind, structure] = Spectrum.of(eigenvalues)
        quality = approximation_quality(fisher.solve(gradient, DAMPING), exact, gradient)
        rank = (eigenvalues.sum().square() / eigenvalues.square().sum()).item()
        build_ms, memory = statistics.median(known), sum(entry.memory for entry in fisher.coverage().entries)
        cells.append(
            Cell(kind, structure, fisher.rows, fisher.trace().item(), rank, build_ms, build_ms / unit_ms, memory,
                 (quality / reference).item())
        )  # fmt: skip
    kinds = {kind: spectra[kind, "full"] for kind in KINDS}
    return Structures(cells, unit_ms, kinds, {structure: spectra["exact", structure] for structure in STRUCTURES})


def quality_over_training(
    checkpoints: Sequence[Checkpoint], digits: Digits, *, batches: int, generator: torch.Generator
) -> list[Quality]:
    """γ/γ_SGD of every kind in the full structure at each checkpoint, on the same random batches of `BATCH`."""
    drawn = [digits.batch(BATCH, generator) for _ in range(batches)]
    found = []
    for checkpoint in progress(checkpoints):
        model = checkpoint.network(torch.float64)
        measured = [_relative_qualities(model, (x.double(), y), seed) for seed, (x, y) in enumerate(drawn)]
        ratios, vectors = (torch.stack(values) for values in zip(*measured, strict=True))
        deviation = ratios.std(0) if batches > 1 else torch.zeros_like(ratios[0])
        by_kind = [dict(zip(KINDS, x.tolist(), strict=True)) for x in (ratios.mean(0), deviation, vectors.mean(0))]
        found.append(Quality(checkpoint.epoch, *by_kind))
    return found


def project(checkpoint: Checkpoint, batch: Batch) -> Projection:
    """The first-order loss change of each example along each kind's update."""
    model, (x, y) = checkpoint.network(torch.float64), batch
    data = (x.double(), y)
    gradient = loss_gradient(model, data)
    with torch.no_grad():
        logits = model(data[0])
    logit_gradient = torch.softmax(logits, 1) - F.one_hot(y, logits.shape[1])
    # The Gram matrix of EF's rows holds the products of the examples' gradients.
    norm = fk.EmpiricalFisher(model, data, normalization="sum").gram().diagonal().sqrt()
    shares, steps = {}, {}
    for kind, build in KINDS.items():
        update = build(model, data).solve(gradient, DAMPING)
        change = (logit_gradient * _output_change(model, data[0], update)).sum(1)
        share = change / change.sum()
        shares[kind], steps[kind] = share.tolist(), (share / norm).tolist()
    return Projection(logit_gradient.norm(dim=1).tolist(), shares, steps)


def _relative_qualities(
    model: nn.Module, batch: Batch, seed: int
) -> tuple[Tensor, Tensor]:
    """γ/γ_SGD of every kind, and its vectors an example."""
    gradient = loss_gradient(model, batch)
    exact = fk.ExactFisher(model, batch)
    fishers = [build(model, batch, generator=torch.Generator().manual_seed(seed)) for build in KINDS.values()]
    updates = torch.stack([gradient] + [fisher.solve(gradient, DAMPING) for fisher in fishers], 1)
    quality = approximation_quality(updates, exact, gradient)
    return quality[1:] / quality[0], torch.tensor([fisher.rows / fisher.examples for fisher in fishers])


def _output_change(model: nn.Module, inputs: Tensor, update: Tensor) -> Tensor:
    """J Δ, the change of the outputs along the update, [B, C]."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    direction = ParameterSpace.of(model).unflatten(update)
    change: Tensor = jvp(lambda p: functional_call(model, p, (inputs,)), (parameters,), (direction,))[1]
    return change


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
