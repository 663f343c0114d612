"""What one update of each kind costs, alone: rows, Gram matrix and solve of one batch, in seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import fisherkit as fk
from examples.paper.tasks import Batch
from fisherkit.evaluation import loss_gradient

ROUNDS, DAMPING = 3, 1e-3


def costs(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Median seconds of each kind's Fisher and one solve, and of the gradient; everybody once a round."""
    gradient = loss_gradient(model, batch, normalization="sum")
    builds: dict[str, Callable[[], fk.FisherApproximation]] = {
        "ef": lambda: fk.EmpiricalFisher(model, batch, normalization="sum"),
        "ief": lambda: fk.ImprovedEmpiricalFisher(model, batch, normalization="sum"),
        "sf": lambda: fk.SampledFisher(model, batch, normalization="sum"),
        "truncated:1": lambda: fk.TruncatedFisher(model, batch, rank=1, normalization="sum"),
        "truncated:2": lambda: fk.TruncatedFisher(model, batch, rank=2, normalization="sum"),
        "truncated:3": lambda: fk.TruncatedFisher(model, batch, rank=3, normalization="sum"),
        "exact": lambda: fk.ExactFisher(model, batch, normalization="sum"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("sgd", *builds)}
    for _ in range(ROUNDS + 1):
        seconds["sgd"].append(_timed(lambda: loss_gradient(model, batch, normalization="sum")))
        for name, build in builds.items():
            seconds[name].append(_timed(lambda build=build: build().solve(gradient, DAMPING)))
    return {name: round(statistics.median(times[1:]), 5) for name, times in seconds.items()}  # the first warms up


def _timed(action: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
