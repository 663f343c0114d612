"""What a call costs beside its arithmetic: builds and steps on a network so small that little else is left."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from examples.benchmarks.contestants import Case
from examples.benchmarks.measure import Record, Settings, measure
from examples.benchmarks.operations import cells
from examples.benchmarks.ours import NAME
from examples.benchmarks.steps import measure_steps
from examples.benchmarks.workloads import Workload

BUILDS = frozenset({"ef_diagonal", "kfac_ef_product", "ef_product", "exact_diagonal"})
"""Operations by name."""
STEPS = ("iEF", "truncated, rank 2", "ieKFAC, every 10")
"""Steps by name, beside those of torch's optimizers."""


def small() -> Workload:
    """The network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 56), nn.Tanh(), nn.Linear(56, 8)).eval()
    return Workload("small", "MLP 40-56-8, N = 48", model, torch.randn(48, 40), torch.randint(8, (48,)))


def measure_fixed(settings: Settings) -> Iterator[Record]:
    """Each build beside the peers, which agree with it, then steps beside SGD and AdamW; seconds of everybody."""
    workload = small().to(settings.device)
    for cell in cells(Case(workload), BUILDS):
        found = measure(cell, settings)
        seconds = {NAME: found["seconds"], **{p["name"]: p["seconds"] for p in found["peers"] if "seconds" in p}}
        yield {"what": found["title"], "seconds": seconds, "ratio": found["seconds"] / seconds[found["best_peer"]]}
    found = measure_steps(
        workload, settings.device, rounds=settings.rounds, slow=settings.slow, patience=settings.patience
    )
    for name in STEPS:
        peers = {one: found["seconds"][one] for one in ("SGD", "AdamW")}
        seconds = {NAME: found["seconds"][name], **peers}
        yield {"what": f"step: {name}", "seconds": seconds, "ratio": found["units"][name]}
