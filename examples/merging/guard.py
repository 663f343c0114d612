"""Is a merge worse than the plain average, and does a check on a few examples prevent it? Small networks.

Owns the settings, the checks and the tables. Suites, training and merges are other modules'.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from examples.benchmarks.environment import environment
from examples.merging import methods
from examples.merging.protocol import CHOSEN, JUDGED, cells_of, measure
from examples.merging.small import RECIPES, _model, _sample
from examples.merging.suites import suite
from examples.merging.training import Recipe, trained
from examples.shared.results import half_interval, markdown

KINDS = ("ef", "ief", "exact", "sf")
STRUCTURES = ("kfac", "diagonal")

DEFAULT = "default"
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    DEFAULT: {},
    **{f"λ = {damping:g}": {"damping": fk.RelativeDamping(damping)} for damping in (0.1, 0.3, 1, 3)},
    "ρ = 30": {"output_damping": 30},
    "each Fisher's trace normalised": {"normalize": "trace"},
    "ρ = 0": {"output_damping": 0},
    "as they are": {"output_damping": 0, "normalize": None, "damping": fk.RelativeDamping(0.01)},
}
"""Of `fk.merging.merge`, one thing changed in each."""

CHECKED = (DEFAULT, "ρ = 0", "as they are")
"""Settings whose merges are checked."""

CHECKS = (("held out", 4), ("held out", 8), ("held out", 32), ("held out, by errors", 32), ("trained on", 8))
"""Which examples, and how many of each task; by cross-entropy, or by the share that is classified wrongly."""

FISHER, HELD = 200, 32
"""Examples of each task that Fishers are measured on, and that are kept from the judge."""

Row = dict[str, Any]
Cell = dict[str, dict[str, dict[str, list[float]]]]
"""By structure and kind, setting and check: gain, noise, and the largest ratio of a merge or a checked one's share."""

Data = Sequence[tuple[Tensor, Tensor]]


def run(out: Path, tiny: bool = False, *, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """Measure every suite and seed that is not there yet.

    Args:
        out: folder for results and models.
        tiny: one suite, one epoch: does everything work? The figures mean nothing.
        seeds: of split, start, order and sampled examples.
    """
    measure(out / "guard-cells.json", _cell, (0,) if tiny else seeds, tiny)
    return figures(out)


def figures(out: Path) -> dict[str, Any]:
    """What is there.

    Raises:
        ValueError: nothing is.
    """
    return {"environment": environment(torch.device("cpu")), "cells": cells_of(out / "guard-cells.json")}


# -- measuring ---------------------------------------------------------------------------------------------------------


def _cell(name: str, seed: int, folder: Path, epochs: int | None) -> Cell:
    """One suite and seed: points above the average of every merge, and of every checked one."""
    own, recipe = suite(name, seed), RECIPES[name.rpartition("-")[0]]
    begin = trained(own, folder, seed, recipe if epochs is None else Recipe(start=recipe.start, epochs=epochs))
    models, network = [_model(own, state) for state in begin.models], own.build(0).double()
    fitted = [_sample(task.train.inputs, task.train.labels, FISHER, seed) for task in own.tasks]
    others = [_sample(task.test.inputs, task.test.labels, len(task.test), seed) for task in own.tasks]
    held, judged = [(x[:HELD], y[:HELD]) for x, y in others], [(x[HELD:], y[HELD:]) for x, y in others]
    average = fk.merging.average(models)
    base = _right(network, average, judged)

    def judge(state: Mapping[str, Tensor], more: float) -> list[float]:
        gains = [one - other for one, other in zip(_right(network, state, judged), base, strict=True)]
        error = sum(float(gain.var()) / len(gain) for gain in gains) ** 0.5 / len(gains)
        return [round(x, 3) for x in (100 * fmean(float(gain.mean()) for gain in gains), 196 * error, more)]

    cell: Cell = {}
    for structure, kind in itertools.product(STRUCTURES, KINDS):
        fishers, found = methods.fishers(kind, structure, models, fitted), cell.setdefault(f"{structure} {kind}", {})
        policy = fk.merging.MergePolicy(method="cg" if structure == "kfac" else "auto", tolerance=1e-8)
        for setting, options in SETTINGS.items():
            merged, info = fk.merging.merge(models, fishers, policy=policy, return_info=True, **options)
            found[setting] = {"none": judge(merged, max(block.worst for block in info.blocks))}
            for source, count in CHECKS if setting in CHECKED else ():
                some = [(x[:count], y[:count]) for x, y in (fitted if source == "trained on" else held)]
                loss = _errors(network, some) if "errors" in source else _loss(network, some)
                checked, info = fk.merging.line_search(average, merged, loss, return_info=True)
                found[setting][f"{count} {source}"] = judge(checked, info.share)
    return cell


def _rows(cells: Mapping[str, Cell]) -> list[Row]:
    keys = ("suite", "structure", "kind", "setting", "check", "gain", "noise", "ratio")
    return [
        dict(zip(keys, (cell.split()[0], *family.split(), setting, check, *numbers), strict=True))
        for cell, families in cells.items() for family, settings in families.items()
        for setting, checks in settings.items() for check, numbers in checks.items()
    ]  # fmt: skip


def _loss(network: nn.Module, data: Data) -> Callable[[dict[str, Tensor]], float]:
    """The mean over tasks of the mean cross-entropy, of a state."""

    def loss(state: dict[str, Tensor]) -> float:
        network.load_state_dict(state)
        with torch.no_grad():
            return fmean(float(F.cross_entropy(network(x), y)) for x, y in data)

    return loss


def _errors(network: nn.Module, data: Data) -> Callable[[dict[str, Tensor]], float]:
    """The mean over tasks of the share of examples that are classified wrongly, of a state."""
    return lambda state: 1 - fmean(float(right.mean()) for right in _right(network, state, data))


def _right(network: nn.Module, state: Mapping[str, Tensor], data: Data) -> list[Tensor]:
    """For each task, 1 for each example that is classified correctly, else 0."""
    network.load_state_dict(state)
    with torch.no_grad():
        return [(network(x).argmax(1) == y).double() for x, y in data]


# -- the page ----------------------------------------------------------------------------------------------------------


def report(found: Mapping[str, Any]) -> str:
    """The tables in Markdown.

    Args:
        found: what `run` returned.
    """
    rows, e = _rows(found["cells"]), found["environment"]
    parts = [
        f"{len(found['cells'])} suites and seeds, Fishers of {FISHER} examples a task of the kinds {', '.join(KINDS)}; "
        "points of held-out accuracy, mean over tasks, above the plain average. *Worse* counts merges below it by more "
        "than noise, which is 1.96 standard errors of the paired difference over examples. Of the suites, "
        f"{', '.join(JUDGED)} are those that nothing was chosen on.",
        _settings(rows), _by_suite(rows), _checks(rows), _ratios(rows),
        f"{e['processor']}, {e['threads']} thread, torch {e['versions']['torch']}; {e['date']}.",
    ]  # fmt: skip
    return "\n\n".join(parts)


def _said(rows: Sequence[Row]) -> str:
    """How many are worse than the average, the least and the mean gain."""
    if not rows:
        return "–"
    gains = [row["gain"] for row in rows]
    return f"{sum(map(_worse, rows))} of {len(rows)}; {min(gains):+.1f}; {fmean(gains):+.1f}"


def _worse(row: Row) -> bool:
    return bool(row["gain"] < -row["noise"])


def _table(rows: Sequence[Row], first: str, key: str) -> str:
    """`_said` by some key, for each structure, on the suites for choosing and the others."""
    groups = [(structure, suites) for structure in STRUCTURES for suites in (CHOSEN, JUDGED)]
    heads = [f"{structure}, {'chosen on' if suites is CHOSEN else 'judged'}" for structure, suites in groups]
    body = []
    for value in dict.fromkeys(row[key] for row in rows):
        own = [row for row in rows if row[key] == value]
        cells = [[r for r in own if r["structure"] == s and r["suite"] in suites] for s, suites in groups]
        body.append((value, *map(_said, cells)))
    return markdown((first, *heads), body)


def _settings(rows: Sequence[Row]) -> str:
    plain = [row for row in rows if row["check"] == "none"]
    kinds = [row for row in plain if row["setting"] == DEFAULT]
    text = "worse than the average; the least and the mean gain, over suites, seeds and"
    return (
        f"Settings ({text} kinds):\n\n{_table(plain, 'setting', 'setting')}\n\n"
        f"Kinds with the default ({text[:-4]}):\n\n{_table(kinds, 'kind', 'kind')}"
    )


def _by_suite(rows: Sequence[Row]) -> str:
    """The default by suite, with intervals over seeds."""
    names = [name for name in (*JUDGED, *CHOSEN) if any(row["suite"] == name for row in rows)]
    body = []
    for structure, kind, check in itertools.product(STRUCTURES, KINDS, ("none", "8 held out")):
        what = {"structure": structure, "kind": kind, "check": check, "setting": DEFAULT}
        own = [row for row in rows if all(row[key] == value for key, value in what.items())]
        line = [f"{structure}, {kind}{', checked' * (check != 'none')}"]
        for name in names:
            gains = [row["gain"] for row in own if row["suite"] == name]
            line.append(f"{fmean(gains):+.1f}" + (f" ± {half_interval(gains):.1f}" if len(gains) > 1 else ""))
        body.append(line)
    text = "The default by suite, with 95% intervals over seeds (Student's t), and checked on 8 held-out examples:"
    return f"{text}\n\n{markdown(('', *names), body)}"


def _checks(rows: Sequence[Row]) -> str:
    parts = []
    for setting in CHECKED:
        own = [row for row in rows if row["setting"] == setting]
        parts.append(f"Checked, {setting}:\n\n{_table(own, 'examples a task', 'check')}")
    return "\n\n".join(parts)


def _ratios(rows: Sequence[Row]) -> str:
    """What `against_average` says of merges, all settings together."""
    plain, body = [row for row in rows if row["check"] == "none"], []
    for limit, structure in itertools.product((1.01, 1.1, 2, 5), STRUCTURES):
        own = [row for row in plain if row["structure"] == structure]
        above = [[row for row in own if (row["ratio"] > limit) == side] for side in (True, False)]
        body.append((f"{structure}, {limit:g}", *(f"{sum(map(_worse, some))} of {len(some)}" for some in above)))
    text = "Worse than the average, by the largest `against_average` of any block, all settings and kinds:"
    return f"{text}\n\n{markdown(('limit', 'above', 'below'), body)}"
