"""Merging small networks by every method: accuracy on all tasks' held-out examples, over settings and seeds.

Owns what is measured and in which order. Fine-tuning, merging and tables are other modules'.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.benchmarks.environment import environment
from examples.merging import methods, small_report
from examples.merging.methods import KINDS, STRUCTURES, Merged, doubled
from examples.merging.small_pictures import draw
from examples.merging.small_summary import summarize
from examples.merging.suites import SUITES, Suite, suite
from examples.merging.training import Recipe, Trained, trained
from examples.shared.results import write_json

Results = dict[str, Any]
"""settings, environment, and by seed the training's record and what each method's settings gave."""

RECIPES = {"digits": Recipe(start=1), "mnist1d": Recipe(start=3)}
"""By data set."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        suites: names.
        seeds: of split, start, order, domains and sampled labels.
        kinds: of Fisher.
        structures: of them.
        examples: of each task, that Fishers are measured on.
        epochs: end every training earlier.
    """

    suites: tuple[str, ...] = SUITES
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    kinds: tuple[str, ...] = tuple(KINDS)
    structures: tuple[str, ...] = STRUCTURES
    examples: int = 500
    epochs: int | None = None

    def recipe(self, name: str) -> Recipe:
        """How a suite's models are trained."""
        recipe = RECIPES[name.rpartition("-")[0]]
        return recipe if self.epochs is None else Recipe(start=recipe.start, epochs=self.epochs)


TINY = Plan(("digits-classes",), (0,), ("ef",), ("diagonal", "kfac"), 20, 1)
"""Every path, no figure."""


def run(out: Path, tiny: bool = False, *, plan: Plan | None = None) -> dict[str, Any]:
    """Measure what is not there yet, and write ``small-<suite>.json`` after each kind and structure; then draw.

    Args:
        out: folder for results, models and pictures.
        tiny: one suite, one epoch: does everything work? The figures mean nothing.
        plan: what is measured; None for everything, which takes hours.

    Returns:
        A summary of all suites that the folder has, for `report`.
    """
    plan = plan or (TINY if tiny else Plan())
    # What is cheap comes first on all seeds, so that a run cut short has it.
    for structure in plan.structures:
        for seed in plan.seeds:
            for name in plan.suites:
                path = out / f"small-{name}.json"
                _seed(suite(name, seed), seed, structure, plan, _resume(path, name, plan), path)
    return figures(out)


def figures(out: Path) -> dict[str, Any]:
    """Draw and return what is there.

    Raises:
        ValueError: nothing is.
    """
    paths = {name: out / f"small-{name}.json" for name in SUITES}
    found = {name: summarize(json.loads(path.read_text("utf-8"))) for name, path in paths.items() if path.exists()}
    if not found:
        raise ValueError(f"{out} has no results yet")
    draw(found, out)
    return {"suites": found}


def report(found: dict[str, Any]) -> str:
    """The figures in Markdown.

    Args:
        found: what `run` returned.
    """
    return small_report.report(found["suites"])


def _resume(path: Path, name: str, plan: Plan) -> Results:
    """The file's results, or none; ValueError if they were made otherwise."""
    settings = {"title": suite(name, 0).title, "recipe": vars(plan.recipe(name)), "examples": plan.examples}
    if not path.exists():
        return {"settings": settings, "environment": environment(torch.device("cpu")), "seeds": {}}
    old: Results = json.loads(path.read_text("utf-8"))
    differing = [key for key, value in settings.items() if old["settings"].get(key) != value]
    if differing:
        raise ValueError(f"{path} was made with other {differing}; write into another --out")
    return old


def _seed(own: Suite, seed: int, structure: str, plan: Plan, results: Results, path: Path) -> None:
    """One seed of a suite: train, then every family of methods with a structure that is not there yet."""
    begin = trained(own, path.parent / "models", seed, plan.recipe(own.name))
    cells = results["seeds"].setdefault(str(seed), {"training": begin.record, "families": {}})
    models = [_model(own, state) for state in begin.models]
    judge = Judge(own)
    for family, merged in _families(own, begin, models, structure, plan, seed):
        if family not in cells["families"]:
            start = time.perf_counter()
            cells["families"][family] = {one.setting: judge(one) for one in merged}
            write_json(path, results)
            seconds = time.perf_counter() - start
            print(f"{time.strftime('%H:%M:%S')}  {own.name}, seed {seed}, {family}: {seconds:.1f} s", flush=True)


def _families(
    own: Suite, begin: Trained, models: list[nn.Module], structure: str, plan: Plan, seed: int
) -> Iterator[tuple[str, Iterable[Merged]]]:
    """Each with the merges that it consists of, made when they are asked for."""
    data = [_sample(task.train.inputs, task.train.labels, plan.examples, seed) for task in own.tasks]

    def regmean() -> Iterator[Merged]:
        yield from methods.by_regmean(models, methods.fishers("ef", "kfac", models, data))

    def by_fisher(kind: str) -> Iterator[Merged]:
        found = methods.fishers(kind, structure, models, data)
        for setting in methods.grid(structure):
            yield methods.merge(models, found, f"{structure}/{kind}", setting)

    yield "none", methods.without_fishers(models, doubled(begin.start))
    yield "regmean", regmean()
    for kind in plan.kinds:
        yield f"{structure}/{kind}", by_fisher(kind)


def _sample(inputs: Tensor, labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    return inputs[order].double(), labels[order]


def _model(own: Suite, state: dict[str, Tensor]) -> nn.Module:
    model = own.build(0).double()
    model.load_state_dict(doubled(state))
    return model


class Judge:
    """How good a merged model is.

    Args:
        own: the suite, on whose tasks it is tried.
    """

    def __init__(self, own: Suite) -> None:
        self._suite, self._model = own, own.build(0).double()
        self._train = [(task.train.inputs.double(), task.train.labels) for task in own.tasks]

    def __call__(self, merged: Merged) -> dict[str, Any]:
        """Percent correct on held-out and on training examples and the training loss, means over tasks."""
        self._model.load_state_dict(merged.state)
        tests, rights, losses = [], [], []
        with torch.no_grad():
            for task, (inputs, labels) in zip(self._suite.tasks, self._train, strict=True):
                z = self._model(task.test.inputs.double())
                tests.append(100 * float((z.argmax(1) == task.test.labels).double().mean()))
                z = self._model(inputs)
                rights.append(100 * float((z.argmax(1) == labels).double().mean()))
                losses.append(float(F.cross_entropy(z, labels)))
        count = len(tests)
        found = {"family": merged.family, "test": sum(tests) / count, "train": sum(rights) / count}
        return {**found, "loss": sum(losses) / count, "tests": tests, "residual": merged.residual}
