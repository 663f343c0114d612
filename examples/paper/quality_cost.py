"""What one update of each kind costs, alone: rows, Gram matrix and solve of one batch, in seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

from torch import nn

import fisherkit as fk
from examples.shared.tasks import Batch
from fisherkit.evaluation import loss_gradient

ROUNDS, DAMPING = 3, 1e-3


def costs(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Median seconds of each kind's Fisher and one solve, and of the gradient; everybody once a round."""
    gradient = loss_gradient(model, batch, normalization="sum")
    builds: dict[str, Callable[..., fk.FisherApproximation]] = {
        "ef": fk.EmpiricalFisher,
        "ief": fk.ImprovedEmpiricalFisher,
        "sf": fk.SampledFisher,
        "truncated:1": partial(fk.TruncatedFisher, rank=1),
        "truncated:2": partial(fk.TruncatedFisher, rank=2),
        "truncated:3": partial(fk.TruncatedFisher, rank=3),
        "exact": fk.ExactFisher,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("sgd", *builds)}
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        loss_gradient(model, batch, normalization="sum")
        seconds["sgd"].append(time.perf_counter() - start)
        for name, build in builds.items():
            start = time.perf_counter()
            build(model, batch, normalization="sum").solve(gradient, DAMPING)
            seconds[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(times[1:]), 5) for name, times in seconds.items()}  # the first warms up
