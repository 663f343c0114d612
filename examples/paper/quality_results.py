"""The results files of `examples.paper.quality`, and what they say on average. Measures nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.paper.training import Checkpoint

Array = NDArray[np.float64]


@dataclass
class Results:
    """What was measured of one task.

    Args:
        settings: what all cells have in common.
        environment: machine, versions, date, commit.
        checkpoints: epoch, training loss and test accuracy of each.
        cost: seconds by kind, of one batch; None before it is measured.
        cells: by epoch and then by batch.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    checkpoints: list[dict[str, Any]]
    cost: dict[str, float] | None = None
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    def has(self, epoch: int, batch: int) -> bool:
        """Whether a cell is there."""
        return str(batch) in self.cells.get(str(epoch), {})

    def put(self, epoch: int, batch: int, cell: dict[str, Any]) -> None:
        """Add a cell."""
        self.cells.setdefault(str(epoch), {})[str(batch)] = cell


def resume(
    path: Path, settings: dict[str, Any], environment: dict[str, Any], checkpoints: Sequence[Checkpoint], *, keep: bool
) -> Results:
    """Results to add to: those of the file if they are kept, else none.

    Raises:
        ValueError: the file's results were measured otherwise.
    """
    rows = [{"epoch": c.epoch, "loss": c.loss, "accuracy": c.accuracy} for c in checkpoints]
    if not (keep and path.exists()):
        return Results(settings, environment, rows)
    old = read(path)
    differing = [name for name, value in settings.items() if old.settings.get(name) != value]
    if old.checkpoints != rows:
        differing.append("checkpoints")
    if differing:
        raise ValueError(f"--keep: {path} was measured with other {differing}; measure anew, or into another --out")
    return old


def read(path: Path) -> Results:
    """From a file."""
    return Results(**json.loads(path.read_text("utf-8")))


def write(path: Path, results: Results) -> None:
    """To a file; a reader finds the old one or the whole new one."""
    write_json(path, asdict(results))


def write_json(path: Path, content: Any) -> None:
    """A JSON file, put in place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")
    os.replace(part, path)


@dataclass(frozen=True)
class Curve:
    """γ/γ_SGD of one kind in one structure; arrays are ``[checkpoint, damping]``.

    Args:
        mean: over batches.
        std: their standard deviation.
        over_exact: mean of the ratio to the exact kind's γ on the same batch at the same damping, full structure.
        worst: the largest such ratio.
    """

    mean: Array
    std: Array
    over_exact: Array
    worst: Array


@dataclass(frozen=True)
class Summary:
    """A task's results on average.

    Args:
        name: of the task.
        settings: of its results.
        environment: of its results.
        checkpoints: those with a cell.
        batches: of each checkpoint.
        cost: seconds by kind.
        seconds: of an average cell.
        curves: by structure and kind.
    """

    name: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    checkpoints: list[dict[str, Any]]
    batches: list[int]
    cost: dict[str, float]
    seconds: float
    curves: dict[tuple[str, str], Curve]

    @property
    def dampings(self) -> list[float]:
        """Every λ."""
        return list(self.settings["dampings"])

    @property
    def epochs(self) -> list[int]:
        """Of the checkpoints."""
        return [c["epoch"] for c in self.checkpoints]

    def curve(self, kind: str, structure: str = "full") -> Curve:
        """Of one kind."""
        return self.curves[structure, kind]


def summarize(name: str, results: Results) -> Summary:
    """Means and standard deviations over batches."""
    checkpoints = [c for c in results.checkpoints if results.cells.get(str(c["epoch"]))]
    cells = [list(results.cells[str(c["epoch"])].values()) for c in checkpoints]
    curves = {}
    for structure, kinds in results.settings["kinds"].items():
        for kind in kinds:
            if kind != "sgd":
                curves[structure, kind] = _curve(cells, structure, kind)
    seconds = float(np.mean([cell["seconds"] for group in cells for cell in group]))
    return Summary(
        name, results.settings, results.environment, checkpoints, [len(group) for group in cells], results.cost or {},
        seconds, curves,
    )  # fmt: skip


def _curve(cells: list[list[dict[str, Any]]], structure: str, kind: str) -> Curve:
    mean, std, over_exact, worst = [], [], [], []
    for group in cells:
        values = np.array([cell[structure][kind] for cell in group])
        ratio = values / np.array([cell["full"]["exact"] for cell in group])
        mean.append(values.mean(0))
        std.append(values.std(0, ddof=1) if len(group) > 1 else np.zeros(values.shape[1]))
        over_exact.append(ratio.mean(0))
        worst.append(ratio.max(0))
    return Curve(np.array(mean), np.array(std), np.array(over_exact), np.array(worst))
