"""What the demo measures: every kind in every structure, γ along training, and what an update asks of each example.

Uses the package the way a user would, by its public operations alone. Knows neither tables nor pictures.
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
from torch.func import functional_call, jvp

from fisherkit.cli.demo_training import Checkpoint, Digits
from fisherkit.cli.text import progress
from fisherkit.evaluation import approximation_quality, loss_gradient
from fisherkit.fisher import STRUCTURES, FisherApproximation
from fisherkit.kinds import EmpiricalFisher, ExactFisher, ImprovedEmpiricalFisher, SampledFisher, TruncatedFisher
from fisherkit.operators import RelativeDamping
from fisherkit.space import ParameterSpace

KINDS: dict[str, Callable[..., FisherApproximation]] = {
    "EF": EmpiricalFisher,
    "SF, 1 draw": SampledFisher,
    "iEF": ImprovedEmpiricalFisher,
    "truncated, rank 1": partial(TruncatedFisher, rank=1),
    "truncated, rank 2": partial(TruncatedFisher, rank=2),
    "truncated, rank 3": partial(TruncatedFisher, rank=3),
    "truncated, 1e-2": partial(TruncatedFisher, tolerance=1e-2),
    "exact": ExactFisher,
}
"""The kinds that are compared, by the names that tables and pictures give them."""

DAMPING = RelativeDamping(1e-4)
"""Near zero, as in the paper's evaluation: the update is the kind's own, and the linear solve still well posed."""

BATCH = 160
"""Examples of a batch on which γ is measured; the paper's number."""

Batch = tuple[Tensor, Tensor]


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
    """Build every kind in all structures.

    Args:
        model: at a trained checkpoint.
        batch: examples.
        repeats: builds that a time is the median of.
    """
    gradient = loss_gradient(model, batch)
    exact = ExactFisher(model, batch)
    reference = approximation_quality(gradient, exact, gradient)
    unit = _median_ms(partial(_forward_backward, model, batch), 10 * repeats)
    cells: list[Cell] = []
    spectra: dict[tuple[str, str], Spectrum] = {}
    pairs = [(kind, structure) for structure in STRUCTURES for kind in KINDS]
    for kind, structure in progress(pairs):
        build = partial(KINDS[kind], model, batch, structure=structure)
        fisher = build()
        eigenvalues = fisher.eigenvalues()
        spectra[kind, structure] = Spectrum.of(eigenvalues)
        quality = approximation_quality(fisher.solve(gradient, DAMPING), exact, gradient)
        build_ms = _median_ms(build, repeats)
        cells.append(
            Cell(
                kind=kind,
                structure=structure,
                rows=fisher.rows,
                trace=fisher.trace().item(),
                effective_rank=(eigenvalues.sum().square() / eigenvalues.square().sum()).item(),
                build_ms=build_ms,
                build_units=build_ms / unit,
                memory_bytes=sum(entry.memory for entry in fisher.coverage().entries),
                relative_quality=(quality / reference).item(),
            )
        )
    return Structures(
        cells,
        unit,
        {kind: spectra[kind, "full"] for kind in KINDS},
        {structure: spectra["exact", structure] for structure in STRUCTURES},
    )


def quality_over_training(
    checkpoints: Sequence[Checkpoint], digits: Digits, *, batches: int, generator: torch.Generator
) -> list[Quality]:
    """γ/γ_SGD of every kind in the full structure at each checkpoint, on the same random batches of `BATCH`.

    In float64, where near-zero damping shows the kinds and not rounding.
    """
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
    updates = {kind: build(model, data).solve(gradient, DAMPING) for kind, build in KINDS.items()}
    with torch.no_grad():
        logits = model(data[0])
    logit_gradient = torch.softmax(logits, 1) - F.one_hot(y, logits.shape[1])
    # The Gram matrix of EF's rows holds the products of the examples' gradients.
    norm = EmpiricalFisher(model, data, normalization="sum").gram().diagonal().sqrt()
    shares, steps = {}, {}
    for kind, update in updates.items():
        change = (logit_gradient * _output_change(model, data[0], update)).sum(1)
        share = change / change.sum()
        shares[kind], steps[kind] = share.tolist(), (share / norm).tolist()
    return Projection(logit_gradient.norm(dim=1).tolist(), shares, steps)


def _relative_qualities(
    model: nn.Module, batch: Batch, seed: int
) -> tuple[Float[Tensor, "kinds"], Float[Tensor, "kinds"]]:
    """γ/γ_SGD of every kind, and its vectors an example."""
    gradient = loss_gradient(model, batch)
    exact = ExactFisher(model, batch)
    fishers = [build(model, batch, generator=torch.Generator().manual_seed(seed)) for build in KINDS.values()]
    updates = torch.stack([gradient] + [fisher.solve(gradient, DAMPING) for fisher in fishers], 1)
    quality = approximation_quality(updates, exact, gradient)
    return quality[1:] / quality[0], torch.tensor([fisher.rows / fisher.examples for fisher in fishers])


def _output_change(model: nn.Module, inputs: Tensor, update: Float[Tensor, "D"]) -> Float[Tensor, "B C"]:
    """J Δ, the change of the outputs along the update."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    direction = ParameterSpace.of(model).unflatten(update)
    change: Tensor = jvp(lambda p: functional_call(model, p, (inputs,)), (parameters,), (direction,))[1]
    return change


def _forward_backward(model: nn.Module, batch: Batch) -> None:
    inputs, targets = batch
    torch.autograd.grad(F.cross_entropy(model(inputs), targets), list(model.parameters()))


def _median_ms(function: Callable[[], Any], repeats: int) -> float:
    times = []
    function()  # what only a first call does is not the function's price
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
