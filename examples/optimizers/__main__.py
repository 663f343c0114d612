"""Optimizers of fisherkit against SGD, AdamW and Muon: each tuned over four learning rates, then three seeds.

A learning rate is chosen by the training loss at the end of seed 0's run. Owns the order of the runs, their files and
the tables. Run ``python -m examples.optimizers --help``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from examples.optimizers.methods import METHODS
from examples.optimizers.tasks import TASKS
from examples.paper.optimisation_training import fit
from examples.shared.results import environment, fill, markdown, write_json
from examples.shared.tasks import Task

USUAL = ("sgd", "adamw", "muon")
SEEDS = (1, 2, 3)
PAGE = Path(__file__).parents[2] / "docs" / "results" / "optimisation.md"

Run = dict[str, Any]


def run(out: Path, name: str, methods: Sequence[str], epochs: int | None = None) -> None:
    """Run what the folder lacks of a task, each run a file ``<task>-<method>-<rate>-<seed>.json``.

    Args:
        out: the folder.
        name: of the task.
        methods: keys of `METHODS`.
        epochs: instead of the task's own.
    """
    make, usual = TASKS[name]
    known: list[Task] = []

    def one(key: str, rate: float, seed: int) -> Run:
        path = _file(out, name, key, rate, seed)
        if not path.exists():
            known.extend([] if known else [make()])
            method = METHODS[key]
            found = fit(known[0], lambda m, steps: method.start(m, rate, steps), seed=seed, epochs=epochs or usual)
            found["losses"] = [loss if math.isfinite(loss) else None for loss in found["losses"]]
            write_json(path, {"title": known[0].title, "environment": environment(), **found})
            print(f"{path.stem}: {found['diverged'] or found['losses'][-1]}", flush=True)
        return _read(path)

    for key in methods:
        rates = METHODS[key].rates
        best = chosen({rate: one(key, rate, 0) for rate in rates})
        if best is not None:
            for seed in SEEDS:
                one(key, best, seed)


def chosen(runs: Mapping[float, Run]) -> float | None:
    """The learning rate with the least loss at the end; None if all diverged."""
    losses = {rate: found["losses"][-1] for rate, found in runs.items() if found["diverged"] is None}
    return min(losses, key=losses.__getitem__) if losses else None


def table(out: Path, name: str, times: bool) -> str:
    """Of a task, in Markdown: the methods whose runs are all there.

    Args:
        out: the folder of the runs.
        name: of the task.
        times: whether to have a column of processor times, which other work on the machine disturbs.
    """
    rows, title = [], ""
    ends = {key: found for key in METHODS if (found := _ends(out, name, key)) is not None}
    for key, (grid, best, runs) in ends.items():
        method = METHODS[key]
        title, lost = next(iter(grid.values()))["title"], sum(found["diverged"] is not None for found in grid.values())
        edge = "" if best is None or best not in (min(method.rates), max(method.rates)) else "*"
        cells = ["diverged", "diverged", ""]
        if runs:
            cells = [
                _spread([found["losses"][-1] for found in runs], lambda x: f"{x:.2g}"),
                _spread([100 * found["accuracy"] for found in runs], lambda x: f"{x:.1f}"),
                _needed(runs, ends["adamw"][2]) if "adamw" in ends else "",
            ]
        row = [method.name, "" if best is None else f"{edge}{best:g}{edge}", *cells, f"{lost} of {len(grid)}"]
        usual = ends["muon"][2] if "muon" in ends else []
        ratio = f"{_milliseconds(runs) / _milliseconds(usual):.1f}" if runs and usual else ""
        rows.append([*row, *([ratio] * times)])
    header = [
        "",
        "learning rate",
        "training loss",
        "test accuracy, %",
        "epochs to AdamW's loss",
        "diverged in the grid",
    ]
    return f"### {name}: {title}\n\n" + markdown([*header, *(["time a step / Muon's"] * times)], rows)


def _ends(out: Path, name: str, key: str) -> tuple[dict[float, Run], float | None, list[Run]] | None:
    """Seed 0's runs by learning rate, which was chosen, and its runs of all other seeds if none diverged.

    None where some are not there.
    """
    rates = METHODS[key].rates
    grid = {rate: _read(path) for rate in rates if (path := _file(out, name, key, rate, 0)).exists()}
    best = chosen(grid)
    paths = [] if best is None else [_file(out, name, key, best, seed) for seed in SEEDS]
    if len(grid) < len(rates) or not all(path.exists() for path in paths):
        return None
    runs = [_read(path) for path in paths]
    return grid, best, [] if any(found["diverged"] is not None for found in runs) else runs


def _needed(runs: Sequence[Run], usual: Sequence[Run]) -> str:
    """The mean number of epochs to the loss that AdamW ends at with the same seed; nothing where one never is there."""
    pairs = zip(runs, usual, strict=False)  # of none if AdamW diverged
    found = [epochs_to(other["losses"][-1], own["losses"]) for own, other in pairs]
    known = [epoch for epoch in found if epoch is not None]
    return f"{fmean(known):.1f}" if known and len(known) == len(found) else ""


def _milliseconds(runs: Sequence[Run]) -> float:
    return fmean(found["milliseconds"] for found in runs)


def epochs_to(goal: float, losses: Sequence[float]) -> int | None:
    """The epoch at whose end a loss is first no more than the goal; None if it never is."""
    return next((epoch for epoch, loss in enumerate(losses) if loss <= goal), None)


def _spread(values: Sequence[float], shown: Callable[[float], str]) -> str:
    return f"{shown(fmean(values))} ± {shown(stdev(values))}"


def _file(out: Path, task: str, key: str, rate: float, seed: int) -> Path:
    return out / f"{task}-{key}-{rate:g}-{seed}.json"


def _read(path: Path) -> Run:
    found: Run = json.loads(path.read_text("utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.optimizers", description=__doc__)
    usual = [name for name in TASKS if name != "text-large"]
    add = parser.add_argument
    add("--out", type=Path, default=Path("optimizers"), help="folder for the runs (default: optimizers)")
    add("--tasks", nargs="+", choices=list(TASKS), default=usual, help="which (default: all but text-large)")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="which (default: all)")
    add("--epochs", type=int, help="of each run (default: the task's own)")
    add("--report", action="store_true", help="run nothing: print what is there")
    add("--times", action="store_true", help="also processor times; measure them on a machine that does nothing else")
    add("--docs", action="store_true", help="also write each table into its place in the docs' page")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.tasks if not options.report else ():
        run(options.out, name, options.methods, options.epochs)
    there = [name for name in options.tasks if any(options.out.glob(f"{name}-*.json"))]
    tables = {name: table(options.out, name, options.times) for name in there}
    print(*tables.values(), sep="\n\n")
    for name, body in tables.items() if options.docs else ():
        fill(PAGE, f"optimizers-{name}", body)


if __name__ == "__main__":
    main()
