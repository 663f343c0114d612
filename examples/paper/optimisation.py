"""Every kind as an optimizer: the iEF paper's tables 1 and 5 on three small tasks.

Each method is tuned over a grid of six configurations by the training loss at the end of seed 0's run, and then run on
seeds of its own. Owns the order of the runs, their files and the command.
Run ``python -m examples.paper.optimisation --help``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.environment import environment
from examples.paper import optimisation_report
from examples.paper.optimisation_methods import METHODS, Settings
from examples.paper.optimisation_pictures import draw
from examples.paper.optimisation_training import train
from examples.shared.results import write_json
from examples.shared.tasks import TASKS, Task

Results = dict[str, Any]

EPOCHS: Mapping[str, int] = {"digits": 8, "mnist1d": 10, "docstrings": 3}
"""By task."""

TEXT = (
    "sgd", "sgd-momentum", "adamw", "ef", "sf", "ief", "ief-trust", "ief-momentum", "truncated-1", "truncated-2",
    "rows-1", "rows-2", "kfac-ief", "ekfac-ief", "kfac-ef",
)  # fmt: skip
"""Methods on docstrings, whose runs take longest."""


@dataclass(frozen=True)
class Plan:
    """What is run.

    Args:
        tasks: names.
        methods: keys of `METHODS`; None for all, on docstrings for some.
        epochs: of each run, by task.
        tuning: seed of the runs that choose a configuration.
        seeds: of the runs at the chosen configuration.
        coarse: tasks on which every other configuration is tried.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] | None = None
    epochs: Mapping[str, int] = field(default_factory=lambda: dict(EPOCHS))
    tuning: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    coarse: tuple[str, ...] = ("docstrings",)

    def chosen(self, task: str) -> tuple[str, ...]:
        """Methods on a task."""
        return self.methods or (TEXT if task == "docstrings" else tuple(METHODS))


TINY = Plan(("digits",), ("sgd", "ef", "ief", "truncated-2", "kfac-ief"), {"digits": 1}, 0, (1, 2), ("digits",))


def run(out: Path, tiny: bool = False, *, plan: Plan | None = None) -> dict[str, Any]:
    """Run what is not there yet, and write ``optimisation-<task>.json`` after each run; then draw.

    Args:
        out: folder for results and pictures.
        tiny: one task, one epoch: does everything work? The figures mean nothing.
        plan: what is run; None for everything, which takes hours.

    Returns:
        A summary of all tasks that the folder has, for `report`.
    """
    plan = plan or (TINY if tiny else Plan())
    for name in plan.tasks:
        task, path = TASKS[name](0), out / f"optimisation-{name}.json"
        results = _resume(path, _settings(task, plan))
        for key in plan.chosen(name):
            _method(task, key, plan, results, path)
    return figures(out)


def figures(out: Path) -> dict[str, Any]:
    """Draw and return what is there.

    Raises:
        ValueError: nothing is.
    """
    paths = {name: out / f"optimisation-{name}.json" for name in TASKS}
    found = {name: summarize(json.loads(path.read_text("utf-8"))) for name, path in paths.items() if path.exists()}
    if not found:
        raise ValueError(f"{out} has no results yet")
    draw(found, out / "optimisation.png")
    return {"tasks": found}


def report(found: dict[str, Any], pictures: str = "../assets/paper") -> str:
    """The figures in Markdown.

    Args:
        found: what `run` returned.
        pictures: the folder of the picture, relative to the page.
    """
    return optimisation_report.report(found["tasks"], pictures)


def _settings(task: Task, plan: Plan) -> dict[str, Any]:
    return {
        "title": task.title, "epochs": plan.epochs[task.name], "batch": task.recipe.batch, "tuning": plan.tuning,
        "seeds": list(plan.seeds), "coarse": task.name in plan.coarse,
    }  # fmt: skip


def _resume(path: Path, settings: dict[str, Any]) -> Results:
    """The file's results, or none; ValueError if they were made otherwise."""
    if not path.exists():
        return {"settings": settings, "environment": environment(torch.device("cpu")), "methods": {}, "runs": {}}
    old: Results = json.loads(path.read_text("utf-8"))
    differing = [name for name, value in settings.items() if old["settings"].get(name) != value]
    if differing:
        raise ValueError(f"{path} was made with other {differing}; write into another --out")
    return old


def _method(task: Task, key: str, plan: Plan, results: Results, path: Path) -> None:
    """All runs of a method on a task: the grid, then the seeds."""
    method, coarse = METHODS[key], task.name in plan.coarse
    if results["methods"].get(key) != method.to_dict():
        results["methods"][key], results["runs"][key] = method.to_dict(), {}
    runs = results["runs"][key]

    def one(settings: Settings, seed: int) -> None:
        known = runs.setdefault(json.dumps(settings), {})
        if str(seed) in known:
            return
        found = train(task, method, settings, seed=seed, epochs=plan.epochs[task.name])
        known[str(seed)] = _rounded(found)
        write_json(path, results)
        said = found["diverged"] or f"loss {found['losses'][-1]:.4f}, accuracy {found['accuracy']:.3f}"
        print(f"{time.strftime('%H:%M:%S')}  {task.name}, {method.name}, {settings}, seed {seed}: {said}", flush=True)

    for settings in method.grid(coarse):
        one(settings, plan.tuning)
    best = _best({label: runs[label] for label in map(json.dumps, method.grid(coarse))}, plan.tuning)
    for seed in plan.seeds if best is not None else ():
        one(json.loads(best or ""), seed)


def _best(runs: Mapping[str, Mapping[str, Any]], seed: int) -> str | None:
    """The configuration with the least final training loss on a seed; None if all diverged."""
    ended = {label: run[str(seed)] for label, run in runs.items() if str(seed) in run}
    losses = {label: run["losses"][-1] for label, run in ended.items() if run["diverged"] is None}
    return min(losses, key=losses.__getitem__) if losses else None


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    rounded = {**found, "losses": [float(f"{loss:.5g}") if math.isfinite(loss) else None for loss in found["losses"]]}
    if "milliseconds" in found:
        rounded["milliseconds"] = float(f"{found['milliseconds']:.4g}")
    return rounded


def summarize(results: Results) -> dict[str, Any]:
    """Of a task: by method, its grid with the losses on the tuning seed, its choice and the runs at it."""
    settings = results["settings"]
    found: dict[str, Any] = {}
    for key, method in METHODS.items():
        runs = results["runs"].get(key, {})
        tuned = {label: run[str(settings["tuning"])] for label, run in runs.items() if str(settings["tuning"]) in run}
        if not tuned:
            continue
        grid = [
            {"settings": json.loads(label), "loss": run["losses"][-1], "diverged": run["diverged"]}
            for label, run in tuned.items()
        ]
        best = _best(runs, settings["tuning"])
        seeds = [runs[best][str(s)] for s in settings["seeds"] if str(s) in runs[best]] if best is not None else []
        found[key] = {
            **method.to_dict(), "grid": grid, "chosen": None if best is None else json.loads(best), "seeds": seeds,
        }  # fmt: skip
    return {**settings, "environment": results["environment"], "methods": found}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: run, draw, print the tables, and write them and the figures."""
    parser = argparse.ArgumentParser(prog="python -m examples.paper.optimisation", description=__doc__)
    add = parser.add_argument
    add("--task", nargs="+", choices=list(TASKS), default=list(TASKS), help="which (default: all)")
    add("--methods", nargs="+", choices=list(METHODS), default=None, help="which (default: all, on docstrings some)")
    add("--out", type=Path, default=Path("paper"), help="folder for results and pictures (default: paper)")
    add("--report", action="store_true", help="run nothing: draw and write what is there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = Plan(tuple(options.task), tuple(options.methods) if options.methods else None)
    found = figures(options.out) if options.report else run(options.out, plan=plan)
    write_json(options.out / "optimisation.json", found)
    body = report(found, ".")
    (options.out / "optimisation.md").write_text(body + "\n", "utf-8")
    print(body)


if __name__ == "__main__":
    main()
