"""Does `against_average` tell which merges are worse than the plain average? Small networks that saw other labels.

Owns the cases and the table. Run ``python -m examples.merging.guard --out merging``.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fisherkit as fk
from examples.merging import methods
from examples.merging.methods import Merged
from examples.merging.small import RECIPES, Judge, _model, _sample
from examples.merging.suites import SUITES, suite
from examples.merging.training import trained

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "ρ = 0": {"output_damping": 0},
    "as they are": {"output_damping": 0, "normalize": None},
}
"""Of `fisherkit.merging.merge`."""

WORSE = 1.0
"""Points below the average that count as worse."""


@dataclass(frozen=True)
class Row:
    """One merge: points above the average, held out, and the largest ratio of any block and model."""

    name: str
    gain: float
    worst: float


def measure(name: str, seed: int, folder: Path, kinds: Sequence[str]) -> Iterator[Row]:
    """Every kind, structure and setting on one suite and seed."""
    own = suite(name, seed)
    begin = trained(own, folder, seed, RECIPES[name.rpartition("-")[0]])
    models, judge = [_model(own, state) for state in begin.models], Judge(own)
    data = [_sample(task.train.inputs, task.train.labels, 200, seed) for task in own.tasks]
    base = judge(Merged("average", "", fk.merging.average(models)))["test"]
    for kind in kinds:
        for structure in ("kfac", "diagonal"):
            fishers = methods.fishers(kind, structure, models, data)
            for label, settings in SETTINGS.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    state, info = fk.merging.merge(models, fishers, return_info=True, **settings)
                gain = judge(Merged(structure, label, state))["test"] - base
                yield Row(f"{name}, {seed}, {structure}, {kind}, {label}", gain, max(b.worst for b in info.blocks))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.merging.guard", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained models")
    parser.add_argument("--suites", nargs="+", default=SUITES, choices=SUITES, help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="default: 0 1 2")
    parser.add_argument("--kinds", nargs="+", default=("ef", "sf", "exact"), choices=tuple(methods.KINDS))
    options = parser.parse_args(arguments)
    rows = []
    for seed in options.seeds:
        for name in options.suites:
            for row in measure(name, seed, options.out / "models", options.kinds):
                rows.append(row)
                print(f"{row.name:<60} {row.gain:+6.1f} points, ratio {row.worst:.2f}", flush=True)
    for limit in (1.0, 1.1, 1.5):
        flagged, others = ([row for row in rows if (row.worst > limit) == above] for above in (True, False))
        lost = [sum(row.gain < -WORSE for row in some) for some in (flagged, others)]
        print(f"ratio above {limit}: {lost[0]} of {len(flagged)} worse; below: {lost[1]} of {len(others)} worse")


if __name__ == "__main__":
    main()
