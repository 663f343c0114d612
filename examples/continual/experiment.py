"""All cells of the benches: one results file a bench, written after each cell, gone on with where it stopped.

Owns the order of the cells and the files. What a cell is, `cells` knows.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.environment import environment
from examples.continual.benches import BENCHES, Bench
from examples.continual.cells import Plan, measure
from examples.continual.modules import MODULES, ModuleBench
from examples.shared.results import write_json

Results = dict[str, Any]
ALL: dict[str, Bench | ModuleBench] = {**BENCHES, **MODULES}
"""Every bench by name."""


def path_of(out: Path, bench: str) -> Path:
    """The file of a bench's results."""
    return out / f"{bench}.json"


def run(out: Path, bench: Bench | ModuleBench, plan: Plan, keys: tuple[str, ...] | None = None) -> Results:
    """Measure what is not there yet, or was measured at other strengths.

    Args:
        out: the folder.
        bench: what is learned.
        plan: how.
        keys: of methods; None for all.

    Returns:
        All results of the bench.

    Raises:
        ValueError: the file was made by another plan.
    """
    path = path_of(out, bench.name)
    results = resume(path, plan.settings(bench))
    known = {key: tuple(cell["strengths"]) for key, cell in results["cells"].items()}
    wanted = [cell for cell in plan.cells(bench, keys) if known.get(cell.key) != plan.strengths_of(bench, cell)]
    if not wanted:
        return results
    if isinstance(bench, ModuleBench):
        tasks: list[Any] = [(model, own[: plan.tasks]) for model, own in bench.make(plan.seeds[: bench.seeds])]
    else:
        tasks = bench.make(plan.seeds)[: plan.tasks]
    for number, cell in enumerate(wanted, 1):
        found = measure(bench, tasks, cell, plan)
        results["cells"][cell.key] = found
        write_json(path, results)
        best = max((sum(row) / len(row) for row in found["accuracy"]), default=0.0)
        print(
            f"{time.strftime('%H:%M:%S')}  {bench.name}, {cell.key}: {best:.1f} at best, {found['seconds']:.0f} s, "
            f"{found['build_seconds']:.0f} s of it Fishers ({number} of {len(wanted)})",
            flush=True,
        )
    return results


def resume(path: Path, settings: dict[str, Any]) -> Results:
    """The file's results, or none yet.

    Args:
        path: of the file.
        settings: of what is measured now.

    Raises:
        ValueError: the file was made with other settings.
    """
    if not path.exists():
        return {"settings": settings, "environment": environment(torch.device("cpu")), "cells": {}}
    old: Results = json.loads(path.read_text("utf-8"))
    differing = [name for name, value in settings.items() if old["settings"].get(name) != value]
    if differing:
        raise ValueError(f"{path} was made with other {differing}; write into another --out")
    return old


def read(out: Path) -> dict[str, Results]:
    """All results that a folder has, by bench.

    Raises:
        ValueError: it has none.
    """
    paths = {name: path_of(out, name) for name in ALL}
    found = {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.exists()}
    if not found:
        raise ValueError(f"{out} has no results yet")
    return found
