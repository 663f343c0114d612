"""Scores against what retraining showed: a results file for each setting. Owns the figures; knows no method.

The intervals of two methods hold the same resamples, so that their difference has an interval of its own, which is far
narrower than either's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.benchmarks.environment import environment
from examples.influence.evaluation import Retraining, linear_datamodeling_score, noise_ceiling
from examples.influence.evaluation.datamodeling import RankCorrelation
from examples.influence.methods import methods
from examples.influence.outcomes import SCORED, accuracy
from examples.influence.scoring import Scored, scored
from examples.influence.settings import SETTINGS, Setting
from examples.shared import results

MEASUREMENT = "loss"
REFERENCES = ("full, EF", "full, exact")
"""What others are compared with, at λ = 1 × the mean eigenvalue."""

Results = dict[str, Any]


def path_of(out: Path, setting: str) -> Path:
    """The file of a setting's results."""
    return out / f"{setting}.json"


def read(out: Path) -> dict[str, Results]:
    """The results that are there, by setting."""
    return {name: results.read(path_of(out, name)) for name in SETTINGS if path_of(out, name).exists()}


def compare(setting: Setting, models: Sequence[nn.Module], runs: Retraining, out: Path, *, tiny: bool) -> None:
    """Write the linear datamodeling score of everything that was scored.

    Args:
        setting: whose.
        models: the scored ones.
        runs: what retraining showed.
        out: the folder of scores and results.
        tiny: do the figures mean anything?
    """
    outputs = runs.outputs[MEASUREMENT]
    found = [s for s in scored(setting.name, models, out) if s.method in methods()]
    means = {id(s): _lds(s, runs, resamples=1).mean for s in found}
    full = {s.method: _lds(s, runs, resamples=1000) for s in found if s.damping in (None, 1.0)}
    ceiling = noise_ceiling(outputs)
    rows = []
    for s in sorted(found, key=lambda s: (list(methods()).index(s.method), s.damping or 0.0)):
        row: dict[str, Any] = {
            "method": s.method, "damping": s.damping, "mean": means[id(s)], "fit_seconds": s.fit, "seconds": s.seconds
        }  # fmt: skip
        if s.damping in (None, 1.0):
            own = full[s.method]
            row |= {"interval": own.interval, "over_queries": own.over_queries, "over_subsets": own.over_cases}
            row["minus"] = {name: own.difference(full[name]) for name in REFERENCES if name in full}
        rows.append(row)
    results.write(
        path_of(out, setting.name),
        {
            "title": setting.title, "environment": environment(torch.device("cpu")), "tiny": tiny,
            "subsets": len(runs.masks), "seeds": outputs.shape[1], "models": SCORED, "train": len(setting.train[1]),
            "queries": len(setting.queries[1]),
            "parameters": sum(p.numel() for p in models[0].parameters() if p.requires_grad),
            "accuracy": accuracy(setting, list(models)), "ceiling": [ceiling.mean, *ceiling.interval], "rows": rows,
        },
    )  # fmt: skip


def _lds(s: Scored, runs: Retraining, resamples: int) -> RankCorrelation:
    return linear_datamodeling_score(s.scores(), runs.masks, runs.outputs[MEASUREMENT], resamples=resamples)
