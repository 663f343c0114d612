"""What the demo measures: every kind in every structure, γ along training, and what an update asks of each example.

Uses the package the way a user would, by its public operations alone. Knows neither tables nor pictures.
"""

from __future__ import annotations

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
from tqdm.auto import tqdm

from fisherkit.cli.demo_training import Checkpoint, Digits
from fisherkit.evaluation import approximation_quality, loss_gradient
from fisherkit.fisher import STRUCTURES, FisherApproximation
from fisherkit.kinds import EmpiricalFisher, ExactFisher, ImprovedEmpiricalFisher, SampledFisher, TruncatedFisher
from fisherkit.operators import RelativeDamping

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
class Structures:
    """The table of kinds and structures, and the spectra that were computed on the way.

    Args:
        cells: one for each kind and structure.
        unit_ms: median time of one forward and backward pass.
        spectra: eigenvalues in descending order of each kind in the full structure ...
        structure_spectra: ... and of each structure of the exact kind.
    """

    cells: list[Cell]
    unit_ms: float
    spectra: dict[str, list[float]]
    structure_spectra: dict[str, list[float]]


@dataclass(frozen=True)
class Quality:
    """γ/γ_SGD of every kind's update at one checkpoint: mean and standard deviation over batches."""

    epoch: int
    mean: dict[str, float]
    deviation: dict[str, float]


@dataclass(frozen=True)
class Projection:
    """What updates of the same total ask of each example of a batch, to first order.

    Args:
        logit_gradient_norm: ‖∂ℓ_n/∂z_n‖, near zero for an example that is fit.
        share: for each kind, the part of the batch's loss reduction that falls to example n; the parts sum to 1.
    """

    logit_gradient_norm: list[float]
    share: dict[str, list[float]]


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
    spectra: dict[tuple[str, str], list[float]] = {}
    pairs = [(kind, structure) for structure in STRUCTURES for kind in KINDS]
    for kind, structure in tqdm(pairs, desc="kinds and structures", leave=False):
        build = partial(KINDS[kind], model, batch, structure=structure)
        fisher = build()
        eigenvalues = fisher.eigenvalues()
        spectra[kind, structure] = eigenvalues[eigenvalues > 0].tolist()
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
    for checkpoint in tqdm(checkpoints, desc="γ over training", unit="checkpoint", leave=False):
        model = checkpoint.network(torch.float64)
        ratios = torch.stack([_relative_qualities(model, (x.double(), y), seed) for seed, (x, y) in enumerate(drawn)])
        deviation = ratios.std(0) if batches > 1 else torch.zeros_like(ratios[0])
        named = (dict(zip(KINDS, values.tolist(), strict=True)) for values in (ratios.mean(0), deviation))
        found.append(Quality(checkpoint.epoch, *named))
    return found


def project(checkpoint: Checkpoint, batch: Batch) -> Projection:
    """The loss reduction that each kind's update asks of each example: its first-order loss change, normalized."""
    model, (x, y) = checkpoint.network(torch.float64), batch
    data = (x.double(), y)
    gradient = loss_gradient(model, data)
    updates = {kind: build(model, data).solve(gradient, DAMPING) for kind, build in KINDS.items()}
    with torch.no_grad():
        logits = model(data[0])
    logit_gradient = torch.softmax(logits, 1) - F.one_hot(y, logits.shape[1])
    shares = {}
    for kind, update in updates.items():
        change = (logit_gradient * _output_change(model, data[0], update)).sum(1)
        shares[kind] = (change / change.sum()).tolist()
    return Projection(logit_gradient.norm(dim=1).tolist(), shares)


def _relative_qualities(model: nn.Module, batch: Batch, seed: int) -> Float[Tensor, "kinds"]:
    gradient = loss_gradient(model, batch)
    exact = ExactFisher(model, batch)
    updates = [gradient]
    for build in KINDS.values():
        fisher = build(model, batch, generator=torch.Generator().manual_seed(seed))
        updates.append(fisher.solve(gradient, DAMPING))
    quality = approximation_quality(torch.stack(updates, 1), exact, gradient)
    return quality[1:] / quality[0]


def _output_change(model: nn.Module, inputs: Tensor, update: Float[Tensor, "D"]) -> Float[Tensor, "B C"]:
    """J Δ, the change of the outputs along the update."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    pieces = update.split([p.numel() for p in parameters])
    primal = {name: p.detach() for name, p in zip(names, parameters, strict=True)}
    tangent = {n: piece.view_as(p) for n, p, piece in zip(names, parameters, pieces, strict=True)}
    _, change = torch.func.jvp(lambda p: torch.func.functional_call(model, p, (inputs,)), (primal,), (tangent,))
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
