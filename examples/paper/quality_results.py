"""The results files of `examples.paper.quality`, one a task, a cell at a time. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from examples.paper.training import Checkpoint
from examples.shared.results import write_json


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
    path: Path, settings: dict[str, Any], environment: dict[str, Any], checkpoints: Sequence[Checkpoint], *, anew: bool
) -> Results:
    """Results to add to: those of the file if there are any, else none.

    Args:
        path: of the file.
        settings: of what is measured now.
        environment: where.
        checkpoints: what is measured.
        anew: leave the file's results out.

    Raises:
        ValueError: the file's results were measured otherwise.
    """
    rows = [{"epoch": c.epoch, "loss": c.loss, "accuracy": c.accuracy} for c in checkpoints]
    if anew or not path.exists():
        return Results(settings, environment, rows)
    old = read(path)
    differing = [name for name, value in settings.items() if old.settings.get(name) != value]
    if old.checkpoints != rows:
        differing.append("checkpoints")
    if differing:
        raise ValueError(f"{path} was measured with other {differing}; measure into another --out, or --anew")
    return old


def read(path: Path) -> Results:
    """From a file."""
    return Results(**json.loads(path.read_text("utf-8")))


def write(path: Path, results: Results) -> None:
    """To a file; a reader finds the old one or the whole new one."""
    write_json(path, asdict(results))
