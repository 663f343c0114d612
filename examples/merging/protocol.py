"""All ways of merging in one protocol: one model a task, a shared start, individual and joint training as bounds.

As FusionBench has it (Tang et al., arXiv 2406.03280), on small networks: normalised accuracy is a merged model's
held-out accuracy on a task over that of the task's own model. Owns the rows of its table; suites, training and formulas
are other modules'.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from examples.benchmarks.environment import environment
from examples.merging import baselines, methods
from examples.merging.methods import Merged, State, doubled
from examples.merging.small import RECIPES, Judge, _model, _sample
from examples.merging.small_summary import Spread
from examples.merging.suites import suite
from examples.merging.training import Recipe, trained
from examples.shared.results import half_interval, markdown, write_json
from fisherkit.space import ParameterSpace

CHOSEN = ("digits-classes", "digits-halves", "mnist1d-halves", "mnist1d-classes", "digits-domains", "mnist1d-domains")
"""Suites whose seed 0 the defaults of `fk.merging.merge_layers` were chosen on."""

JUDGED = ("digits-deep", "mnist1d-deep", "digits-sizes", "mnist1d-sizes")
"""Suites that nothing of it was chosen on."""

EXAMPLES = 200
"""Of each task, that Fishers are measured on."""

SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
"""Of task vectors; each seed takes the one of best accuracy on the tasks' training examples."""

SUMMED = 20
"""Examples whose gradients are summed before they are squared, in the Fisher that is none."""

OURS = "merge_layers, ief kfac (default)"
RIVALS = ("average", "RegMean, 0.9", "RegMean, 1", "RegMean++")

Cell = dict[str, Any]


def run(out: Path, tiny: bool = False, *, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """Measure every suite and seed that is not there yet.

    Args:
        out: folder for results and models.
        tiny: one suite, one epoch: does everything work? The figures mean nothing.
        seeds: of split, start, order and sampled examples.
    """
    measure(out / "protocol-cells.json", _cell, (0,) if tiny else seeds, tiny)
    return figures(out)


def figures(out: Path) -> dict[str, Any]:
    """What is there.

    Raises:
        ValueError: nothing is.
    """
    suites: dict[str, dict[str, Cell]] = {}
    for key, cell in cells_of(out / "protocol-cells.json").items():
        name, seed = key.split()
        suites.setdefault(name, {})[seed] = cell
    ordered = {name: suites[name] for name in (*JUDGED, *CHOSEN) if name in suites}
    return {"environment": environment(torch.device("cpu")), "suites": ordered}


def measure(
    path: Path, cell: Callable[[str, int, Path, int | None], Any], seeds: Sequence[int], tiny: bool
) -> None:  # fmt: skip
    """Add to a file what it lacks: a cell for each suite and seed, by its name and the seed."""
    cells: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    names = ("digits-classes",) if tiny else (*JUDGED, *CHOSEN)
    for seed, name in itertools.product(seeds, names):
        if f"{name} {seed}" not in cells:
            begin = time.perf_counter()
            cells[f"{name} {seed}"] = cell(name, seed, path.parent / "models", 1 if tiny else None)
            write_json(path, cells)
            print(f"{time.strftime('%H:%M:%S')}  {name}, seed {seed}: {time.perf_counter() - begin:.0f} s", flush=True)


def cells_of(path: Path) -> dict[str, Any]:
    """What `measure` has written.

    Raises:
        ValueError: nothing.
    """
    if not path.exists():
        raise ValueError(f"{path.parent} has no results yet")
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


# -- measuring ---------------------------------------------------------------------------------------------------------


def _cell(name: str, seed: int, folder: Path, epochs: int | None) -> Cell:
    """One suite and seed: every row's held-out accuracy of each task, and what bounds it."""
    own, recipe = suite(name, seed), RECIPES[name.rpartition("-")[0]]
    begin = trained(own, folder, seed, recipe if epochs is None else Recipe(start=recipe.start, epochs=epochs))
    models, judge = [_model(own, state) for state in begin.models], Judge(own)
    data = [_sample(task.train.inputs, task.train.labels, EXAMPLES, seed) for task in own.tasks]
    rows: dict[str, Any] = {}
    for label, states in _methods(models, doubled(begin.start), data):
        judged = [judge(Merged(label, "", state)) for state in states]
        rows[label] = max(judged, key=lambda found: found["train"])["tests"]
    return {
        "title": own.title, "rows": rows, "joint": begin.record["joint"]["accuracy"],
        "start": begin.record["start"], "individual": [task["accuracy"] for task in begin.record["tasks"]],
    }  # fmt: skip


def _methods(
    models: list[nn.Module], start: State, data: list[tuple[Tensor, Tensor]]
) -> Iterator[tuple[str, list[State]]]:
    """Every row's label, and the states between which training accuracy chooses."""
    merging, states = fk.merging, [doubled(model.state_dict()) for model in models]
    yield "average", [merging.average(models)]
    yield "task arithmetic", [merging.task_arithmetic(models, start, scale) for scale in SCALES]
    yield "TIES", [baselines.ties(states, start, scale) for scale in SCALES]
    yield "DARE", [baselines.dare(states, start, scale) for scale in SCALES]
    yield "Iso-C", [baselines.iso_c(states, start, scale) for scale in SCALES]
    yield "WUDI", [baselines.wudi(states, start)]
    iterated: dict[str, Any] = {
        "policy": merging.MergePolicy(method="cg", max_steps=5000)
    }  # the same solutions, sooner
    plain: dict[str, Any] = {"normalize": "norm", "output_damping": 0, "damping": fk.RelativeDamping(1e-6)}
    yield "diagonal, squares of summed gradients", [merging.merge(models, _summed(models, data), **plain)]
    for kind in ("ef", "exact"):
        fishers = methods.fishers(kind, "diagonal", models, data)
        yield f"diagonal, {kind}, as published", [merging.merge(models, fishers, **plain)]
    yield "diagonal, exact (default)", [merging.merge(models, fishers)]
    fishers = methods.fishers("exact", "kfac", models, data)
    yield "kfac, exact (default)", [merging.merge(models, fishers, **iterated)]
    yield "RegMean, 0.9", [merging.regmean(models, fishers, **iterated)]
    yield "RegMean, 1", [merging.regmean(models, fishers, shrink=1, **iterated)]
    activations: dict[str, Any] = {"normalize": "output", "output_damping": 1e9, "damping": fk.RelativeDamping(1e-6)}
    yield "RegMean++", [merging.merge_layers(models, data, **activations, **iterated)]
    for kind in ("exact", "ef"):
        yield f"merge_layers, {kind} kfac", [merging.merge_layers(models, data, fisher=_kfac(kind), **iterated)]
    yield OURS, [merging.merge_layers(models, data, **iterated)]


def _kfac(kind: str) -> Any:
    return lambda model, data, params: methods.KINDS[kind](model, data, structure="kfac", params=params)


def _summed(models: Sequence[nn.Module], data: Sequence[tuple[Tensor, Tensor]]) -> list[fk.FisherOperator]:
    """The mean of squares of gradients that were summed over a batch, which is no Fisher matrix's diagonal."""
    found: list[fk.FisherOperator] = []
    for model, (inputs, labels) in zip(models, data, strict=True):
        space, total, parts = ParameterSpace.of(model, None), torch.tensor(0.0), inputs.split(SUMMED)
        for x, y in zip(parts, labels.split(SUMMED), strict=True):
            grads = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), list(model.parameters()))
            total = total + torch.cat([grad.reshape(-1) for grad in grads]).square() / len(parts)
        found.append(fk.operators.DiagonalOperator(space, total))
    return found


# -- the page ----------------------------------------------------------------------------------------------------------


def report(found: Mapping[str, Any]) -> str:
    """The tables in Markdown.

    Args:
        found: what `run` returned.
    """
    suites: Mapping[str, Mapping[str, Cell]] = found["suites"]
    e, seeds = found["environment"], max(len(cells) for cells in suites.values())
    lines = [
        f"- **{name}**: {next(iter(cells.values()))['title']}; {len(cells)} seeds." for name, cells in suites.items()
    ]
    judged = [name for name in JUDGED if name in suites]
    first = (
        f"Held-out accuracy, percent, mean over tasks, ± standard deviation over {seeds} seeds; in the last column "
        f"normalised accuracy, the mean over tasks, seeds and {', '.join(judged)}, the suites that nothing was "
        f"chosen on; on seed 0 of the others the default of merge_layers was. Fishers of {EXAMPLES} examples a task. "
        "Task arithmetic, TIES (20% kept), DARE (half dropped) and Iso-C have the scale of seven that is best on the "
        "tasks' training examples, for each seed; "
        "all others one setting."
    )
    second = (
        f"{OURS}: points above others, by suite, with 95% intervals over seeds (Student's t of paired differences):"
    )
    where = f"{e['processor']}, {e['threads']} thread, torch {e['versions']['torch']}; {e['date']}."
    return "\n\n".join(("\n".join(lines), first, _table(suites), second, _differences(suites), where))


def _table(suites: Mapping[str, Mapping[str, Cell]]) -> str:
    labels = list(next(iter(next(iter(suites.values())).values()))["rows"])
    rows = [_row("start", suites, lambda cell: cell["start"])]
    rows += [_row(label, suites, lambda cell, label=label: cell["rows"][label]) for label in labels]
    rows.append(_row("trained on all tasks at once", suites, lambda cell: cell["joint"]))
    rows.append(_row("each model on its own task", suites, lambda cell: cell["individual"]))
    return markdown(("", *suites, "normalised"), rows)


def _row(label: str, suites: Mapping[str, Mapping[str, Cell]], read: Any) -> list[str]:
    cells = [str(Spread.of([fmean(read(cell)) for cell in own.values()])) for own in suites.values()]
    shares = [
        100 * mine / bound
        for name, own in suites.items() if name not in CHOSEN
        for cell in own.values() for mine, bound in zip(read(cell), cell["individual"], strict=True)
    ]  # fmt: skip
    return [label, *cells, f"{fmean(shares):.1f}" if shares else "–"]


def _differences(suites: Mapping[str, Mapping[str, Cell]]) -> str:
    rows = []
    for rival in RIVALS:
        row = [rival]
        for own in suites.values():
            gaps = [fmean(cell["rows"][OURS]) - fmean(cell["rows"][rival]) for cell in own.values()]
            row.append(f"{fmean(gaps):+.1f} ± {half_interval(gaps):.1f}" if len(gaps) > 1 else f"{gaps[0]:+.1f}")
        rows.append(row)
    return markdown(("above", *suites), rows)
