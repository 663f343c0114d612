"""The kinds' preconditioned updates: how good they are along training, and what they ask of each example.

In float64, where near-zero damping shows the kinds and not rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jvp

from fisherkit.cli.digits.kinds import DAMPING, KINDS, Batch
from fisherkit.cli.digits.training import Checkpoint, Digits
from fisherkit.cli.text import progress
from fisherkit.evaluation import approximation_quality, loss_gradient
from fisherkit.kinds import EmpiricalFisher, ExactFisher
from fisherkit.rows.whole import functional_call
from fisherkit.space import ParameterSpace

BATCH = 160
"""Examples of a batch; the paper's number."""


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
    change: Tensor = jvp(lambda p: functional_call(model, p, (inputs,), {}), (parameters,), (direction,))[1]
    return change
