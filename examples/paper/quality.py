"""How good every kind's update is over training and over damping: the iEF paper's figures 2 and 3 on three tasks.

At checkpoints of each task's baseline, on random batches of 160 examples, γ/γ_SGD of every kind's update at every
damping. Owns the order of the measurements and the command; the formulas are `fisherkit.evaluation.compare`'s.
Run ``python -m examples.paper.quality --help``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.benchmarks.environment import environment
from examples.paper import quality_report
from examples.paper.quality_cost import costs
from examples.paper.quality_pictures import draw
from examples.paper.quality_results import Results, read, resume, write
from examples.paper.quality_summary import Summary, summarize
from examples.paper.training import Checkpoint, baseline
from examples.shared.results import write_json
from examples.shared.tasks import TASKS, Batch, Task, docstring_text, logits
from fisherkit.evaluation import compare

FULL = (
    "sgd", "ef", "ief:0.25", "ief:0.5", "ief:0.75", "ief", "sf", "truncated:1", "truncated:2", "truncated:3",
    "truncated:4", "truncated:6", "truncated:0.01", "exact",
)  # fmt: skip
"""Kinds in the full structure."""

KFAC = ("ef", "ief", "sf", "exact")
"""Kinds in the Kronecker-factored one: EF-KFAC, ieKFAC, KFAC by one drawn label and by all labels."""

DAMPINGS = tuple(10.0**k for k in range(-7, 1))
"""λ of the update in the paper's sum convention: added to the Gram matrix (EF, iEF) or to F (the others)."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        tasks: names.
        batches: random batches a checkpoint.
        size: examples a batch.
        kinds: in the full structure.
        kfac: in the Kronecker-factored one.
        dampings: λ.
        epochs: end the baselines earlier than their recipes do.
        seed: of the model, its training and the batches.
        data: a file ``text<TAB>label`` that takes the place of the docstrings.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    batches: int = 30
    size: int = 160
    kinds: tuple[str, ...] = FULL
    kfac: tuple[str, ...] = KFAC
    dampings: tuple[float, ...] = DAMPINGS
    epochs: int | None = None
    seed: int = 0
    data: Path | None = None

    def settings(self, task: Task) -> dict[str, Any]:
        """What results of one table must agree in."""
        return {
            "title": task.title,
            "dtype": str(task.dtype).removeprefix("torch."),
            "recipe": f"{task.recipe.optimizer}, step {task.recipe.learning_rate:g}, batches of {task.recipe.batch}",
            "size": self.size,
            "seed": self.seed,
            "dampings": list(self.dampings),
            "kinds": {"full": list(self.kinds), "kfac": list(self.kfac)},
        }


TINY = Plan(("digits",), batches=1, size=16, epochs=1)
"""Every path, no figure."""


def run(out: Path, tiny: bool = False, plan: Plan | None = None, *, anew: bool = False) -> dict[str, Any]:
    """Measure what is not there yet, and write ``quality-<task>.json`` after each cell; then draw.

    Args:
        out: folder for results, checkpoints and pictures.
        tiny: one task and one small batch: does everything work? The figures mean nothing.
        plan: what is measured; None for everything, which takes hours.
        anew: measure again what is there.

    Returns:
        Means and standard deviations of all tasks that the folder has, for `report`.
    """
    plan = plan or (TINY if tiny else Plan())
    for name in plan.tasks:
        task = docstring_text(0, plan.data) if name == "docstrings" else TASKS[name](0)
        checkpoints = baseline(task, out / "checkpoints", seed=plan.seed, epochs=plan.epochs)
        path = out / f"quality-{name}.json"
        results = resume(path, plan.settings(task), environment(torch.device("cpu")), checkpoints, anew=anew)
        _task(task, plan, checkpoints, results, path)
    return figures(out)


def figures(out: Path) -> dict[str, Any]:
    """Draw and return what is there.

    Raises:
        ValueError: nothing is.
    """
    paths = {name: out / f"quality-{name}.json" for name in TASKS}
    summaries = {name: summarize(read(path)) for name, path in paths.items() if path.exists()}
    if not summaries:
        raise ValueError(f"{out} has no results yet")
    draw(summaries, out)
    return {"tasks": {name: summary.to_dict() for name, summary in summaries.items()}}


def report(found: dict[str, Any], pictures: str = "../assets/paper") -> str:
    """The figures in Markdown.

    Args:
        found: what `run` returned.
        pictures: the folder of the pictures, relative to the page.
    """
    summaries = {name: Summary.from_dict(summary) for name, summary in found["tasks"].items()}
    return quality_report.report(summaries, pictures)


def _task(task: Task, plan: Plan, checkpoints: list[Checkpoint], results: Results, path: Path) -> None:
    """All cells of a task: every checkpoint on a batch before the next batch, so that a run cut short is balanced."""
    generator = torch.Generator().manual_seed(plan.seed + 1)
    drawn = [task.evaluated(task.train.draw(plan.size, generator)) for _ in range(plan.batches)]
    models = [checkpoint.model(task, plan.seed) for checkpoint in checkpoints]
    if results.cost is None:
        results.cost = costs(models[-1], drawn[0])
        write(path, results)
    for number, batch in enumerate(drawn):
        start = time.perf_counter()
        for checkpoint, model in zip(checkpoints, models, strict=True):
            if not results.has(checkpoint.epoch, number):
                results.put(checkpoint.epoch, number, cell(model, batch, plan, seed=number))
                write(path, results)
        _say(f"{task.name}: batch {number + 1} of {plan.batches}, {time.perf_counter() - start:.0f} s")


def cell(model: nn.Module, batch: Batch, plan: Plan, *, seed: int) -> dict[str, Any]:
    """γ/γ_SGD of one batch at one checkpoint: by structure and kind, a number for each damping."""
    start = time.perf_counter()
    measured = partial(compare, model, batch, gram_dampings=plan.dampings, seed=seed)
    tables = {"full": measured(kinds=plan.kinds, structures=("full",))}
    if plan.kfac:
        tables["kfac"] = measured(kinds=plan.kfac, structures=("kfac",))
    found: dict[str, Any] = {"gamma_sgd": next(r.gamma for r in tables["full"].rows if r.kind == "sgd")}
    for structure, table in tables.items():
        found[structure] = {}
        for row in table.rows:
            if row.kind != "sgd":
                found[structure].setdefault(row.kind, []).append(float(f"{row.relative_gamma:.6g}"))
    found["least_p"] = least_probability(model, batch)
    found["imbalance"] = float(f"{tables['full'].rows[0].imbalance:.4g}")
    found["seconds"] = round(time.perf_counter() - start, 2)
    return found


def least_probability(model: nn.Module, batch: Batch) -> float:
    """The probability of the label that the model is most wrong about."""
    inputs, labels = batch
    with torch.no_grad():
        p = torch.softmax(logits(model, inputs), 1)
    return float(f"{p.gather(1, labels.unsqueeze(1)).min().item():.4g}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(prog="python -m examples.paper.quality", description=__doc__)
    add = parser.add_argument
    add("--task", nargs="+", choices=list(TASKS), default=list(TASKS), help="which (default: all)")
    add("--batches", type=int, default=30, help="random batches a checkpoint (default: 30)")
    add("--size", type=int, default=160, help="examples a batch (default: 160, the paper's)")
    add("--epochs", type=int, default=None, help="end the baselines after so many epochs")
    add("--kfac", nargs="*", default=list(KFAC), help=f"kinds in the kfac structure (default: {' '.join(KFAC)})")
    add("--data", type=Path, default=None, help="your own examples for the text task, one text<TAB>label a line")
    add("--out", type=Path, default=Path("paper"), help="folder for results and pictures (default: paper)")
    add("--anew", action="store_true", help="measure again what is there")
    add("--report", action="store_true", help="measure nothing: draw and write what is there")
    return parser.parse_args(arguments)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: measure, draw, print the tables, and write them and the figures."""
    options = parse(arguments)
    plan = Plan(
        tuple(options.task), options.batches, options.size, FULL, tuple(options.kfac), epochs=options.epochs,
        data=options.data,
    )  # fmt: skip
    try:
        found = figures(options.out) if options.report else run(options.out, plan=plan, anew=options.anew)
    except ValueError as error:
        sys.exit(str(error))
    write_json(options.out / "quality.json", found)
    body = report(found, ".")
    (options.out / "quality.md").write_text(body + "\n", "utf-8")
    print(body)


if __name__ == "__main__":
    main()
