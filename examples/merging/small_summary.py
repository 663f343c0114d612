"""What a suite's results say: numbers over seeds by family and setting, and choices between settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

Cells = dict[str, list[float]]
"""By measure ("test", "train", "residual"), a number for each seed."""

NAMES = {
    "ef": "EF", "ief": "iEF", "truncated:1": "truncated, rank 1", "truncated:2": "truncated, rank 2", "sf": "SF",
    "exact": "exact", "jtj": "JᵀJ",
}  # fmt: skip
"""What tables and pictures call the kinds."""


@dataclass(frozen=True)
class Spread:
    """A mean and a standard deviation over seeds."""

    mean: float
    std: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of numbers, one a seed."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.std:.1f}"


@dataclass(frozen=True)
class Family:
    """One way of merging at all its settings.

    Args:
        settings: by setting, its numbers over seeds.
    """

    settings: Mapping[str, Cells]

    def test(self, setting: str) -> list[float]:
        """Held-out accuracy at a setting, for each seed."""
        return self.settings[setting]["test"]

    def best(self, *, among: Callable[[str], bool] = lambda _: True) -> str:
        """The setting with the best mean held-out accuracy: what looking at the test data would choose."""
        return max(filter(among, self.settings), key=lambda setting: fmean(self.test(setting)))

    def chosen(self) -> list[float]:
        """Held-out accuracy at each seed's setting of best accuracy on all tasks' training examples."""
        seeds = range(len(next(iter(self.settings.values()))["test"]))
        picks = [max(self.settings.values(), key=lambda cells: cells["train"][seed]) for seed in seeds]
        return [cells["test"][seed] for seed, cells in enumerate(picks)]


def summarize(results: Mapping[str, Any]) -> dict[str, Any]:
    """Of a suite: by family and setting, lists over the seeds that have it.

    Args:
        results: as `small.run` writes them.
    """
    seeds = list(results["seeds"].values())
    families: dict[str, dict[str, Cells]] = {}
    for seed in seeds:
        for group in seed["families"].values():
            for setting, cell in group.items():
                cells = families.setdefault(cell["family"], {}).setdefault(setting, {})
                for measure in ("test", "train"):
                    cells.setdefault(measure, []).append(_short(cell[measure]))
                if cell["residual"] is not None:
                    cells.setdefault("residual", []).append(float(f"{cell['residual']:.2g}"))
    records = [seed["training"] for seed in seeds]
    own = [task for record in records for task in record["tasks"]]
    training = {
        "start": _spread([fmean(record["start"]) for record in records]),
        "own": _spread([task["accuracy"] for task in own]),
        "loss": max(task["loss"] for task in own),
        "joint": [_short(fmean(record["joint"]["accuracy"])) for record in records],
    }
    return {
        **results["settings"], "environment": results["environment"], "seeds": len(seeds), "training": training,
        "families": families,
    }  # fmt: skip


def _spread(values: list[float]) -> str:
    return str(Spread.of(values))


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def families(summary: Mapping[str, Any]) -> dict[str, Family]:
    """Of a summary."""
    return {name: Family(settings) for name, settings in summary["families"].items()}
