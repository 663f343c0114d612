"""Merging fine-tuned MiniLMs through the command line alone: ``fisherkit estimate``, then ``fisherkit merge``.

Three models are fine-tuned from one start on three subsets of one label set, their Fishers are estimated into files,
folders are merged into folders, and each folder is evaluated on all tasks. Owns the order of the commands and the
results; every step of fisherkit is a process of its own, and nothing of it is imported.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.environment import environment
from examples.merging import text_report, text_tasks
from examples.merging.evaluate import evaluate
from examples.merging.finetune import TRAINED, finetune, make_start
from examples.merging.text_methods import FEW, METHODS, Method
from examples.merging.text_tasks import TASKS
from examples.shared.results import write_json

Results = dict[str, Any]
"""settings, environment, and by seed what was trained and what each method gave."""

RESULTS = "text-results.json"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        seeds: of split, head and order.
        methods: by name.
        epochs: of each fine-tuning, at most.
        texts: of each label; None for all.
        width: of a random encoder in MiniLM's place; None for MiniLM itself.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    methods: Mapping[str, Method] | None = None
    epochs: int = 40
    texts: int | None = None
    width: int | None = None


TINY = Plan((0,), FEW, 1, 10, 16)
"""Every command, no figure."""


def run(out: Path, tiny: bool = False, *, plan: Plan | None = None) -> dict[str, Any]:
    """Measure what is not there yet, and write the results after each step.

    Args:
        out: folder for results, data and models.
        tiny: a small random encoder on few texts: does everything work? The figures mean nothing.
        plan: what is measured; None for everything, which takes hours.

    Returns:
        A summary for `report`.
    """
    plan = plan or (TINY if tiny else Plan())
    results = _resume(out / RESULTS, plan)
    for seed in plan.seeds:
        _Seed(out, seed, plan, results).run()
    return figures(out)


def figures(out: Path) -> dict[str, Any]:
    """What is there.

    Raises:
        ValueError: nothing is.
    """
    path = out / RESULTS
    if not path.exists():
        raise ValueError(f"{out} has no results yet")
    results: Results = json.loads(path.read_text("utf-8"))
    seeds = results["seeds"].values()
    methods = {
        name: [seed["methods"][name] for seed in seeds if name in seed["methods"]]
        for name in dict.fromkeys(name for seed in seeds for name in seed["methods"])
    }
    trained = [seed["trained"] for seed in seeds]
    return {**results["settings"], "environment": results["environment"], "trained": trained, "methods": methods}


def report(found: dict[str, Any]) -> str:
    """The figures in Markdown.

    Args:
        found: what `run` returned.
    """
    return text_report.report(found)


def _resume(path: Path, plan: Plan) -> Results:
    """The file's results, or none; ValueError if they were made otherwise."""
    settings = {"tasks": {name: list(labels) for name, labels in TASKS.items()}, "epochs": plan.epochs} | {
        "texts": plan.texts, "width": plan.width,
    }  # fmt: skip
    if not path.exists():
        return {"settings": settings, "environment": environment(torch.device("cpu")), "seeds": {}}
    old: Results = json.loads(path.read_text("utf-8"))
    differing = [key for key, value in settings.items() if old["settings"].get(key) != value]
    if differing:
        raise ValueError(f"{path} was made with other {differing}; write into another --out")
    return old


class _Seed:
    """All steps of one seed, in a folder of their own.

    Args:
        out: where the results are.
        seed: of everything.
        plan: what is measured.
        results: added to, and written after each step.
    """

    def __init__(self, out: Path, seed: int, plan: Plan, results: Results) -> None:
        self._path, self._plan, self._seed, self._results = out / RESULTS, plan, seed, results
        self._folder = out / f"text-{seed}"
        self._own = results["seeds"].setdefault(str(seed), {"trained": {}, "methods": {}})

    def run(self) -> None:
        """Data, models, Fishers as they are needed, merged folders."""
        methods = METHODS if self._plan.methods is None else self._plan.methods
        if all(name in self._own["methods"] for name in methods):
            return
        self._train()
        for name, method in methods.items():
            if name not in self._own["methods"]:
                self._own["methods"][name] = self._merge(method)
                self._save(name)

    def _train(self) -> None:
        data, start = self._folder / "data", self._folder / "start"
        if not (start / "config.json").exists():
            text_tasks.write(data, self._seed, self._plan.texts)
            make_start(start, self._seed, width=self._plan.width)
        for name in (*TASKS, "all"):
            if name not in self._own["trained"]:
                record = finetune(
                    start, data / f"{name}-train.jsonl", self._folder / name, epochs=self._plan.epochs, seed=self._seed
                )
                self._own["trained"][name] = {**record, "accuracy": self._evaluate(self._folder / name)}
                self._save(f"fine-tuned on {name}")

    def _merge(self, method: Method) -> dict[str, Any]:
        merged, begin = self._folder / "merged", time.perf_counter()
        options: list[Any] = []
        for name in TASKS:
            options += ["--model", self._folder / name]
            options += ["--fisher", self._fisher(name, method)] if method.structure else []
            options += ["--data", self._folder / "data" / f"{name}-train.jsonl"] if method.texts else []
        options += ["--base", self._folder / "start"] if method.based else []
        shutil.rmtree(merged, ignore_errors=True)
        _fisherkit("merge", *options, "--out", merged, *method.options)
        seconds = time.perf_counter() - begin
        report = json.loads((merged / "merge.json").read_text("utf-8"))
        residual = max((block["residual"] for block in report["blocks"]), default=None)
        found = {"seconds": round(seconds, 1), "residual": residual, "accuracy": self._evaluate(merged)}
        shutil.rmtree(merged)
        return found

    def _fisher(self, name: str, method: Method) -> Path:
        """The Fisher file of a task's model, estimated if it is not there."""
        path = (
            self._folder / f"{name}-{method.structure}-{method.kind.replace(':', '-')}-{method.likelihood}.safetensors"
        )
        if not path.exists():
            options: list[Any] = [self._folder / name, "--data", self._folder / "data" / f"{name}-train.jsonl"]
            options += ["--kind", method.kind, "--structure", method.structure, "--likelihood", method.likelihood]
            options += [word for pattern in TRAINED for word in ("--params", pattern)]
            _fisherkit("estimate", *options, "--seed", self._seed, "--out", path)
        return path

    def _evaluate(self, model: Path) -> dict[str, Any]:
        """By split, percent correct on each task."""
        files = [self._folder / "data" / f"{name}-{split}.jsonl" for split in ("test", "train") for name in TASKS]
        found = [one["accuracy"] for one in evaluate(model, files)]
        return {"test": found[: len(TASKS)], "train": found[len(TASKS) :]}

    def _save(self, what: str) -> None:
        write_json(self._path, self._results)
        print(f"{time.strftime('%H:%M:%S')}  seed {self._seed}: {what}", flush=True)


def _fisherkit(command: str, *options: Any) -> None:
    """Run a command.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    words = [sys.executable, "-m", "fisherkit", command, *map(str, options)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr.strip()}")
