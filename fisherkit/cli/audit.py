"""``fisherkit audit``: a Fisher of any origin, in a file, beside the exact one in a Fisher file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from torch import Tensor

from fisherkit import io
from fisherkit.cli.checks import check_choice
from fisherkit.cli.text import number, table
from fisherkit.evaluation import Audit, audit
from fisherkit.operators import FisherOperator, load

CALL = "fisherkit audit"


def run(other: Path, exact: Path, *, compare: str | None, batch_size: int | None, as_json: bool) -> None:
    """Compare and print.

    Args:
        other: a Fisher file, or any safetensors file of a diagonal: parameter name -> tensor of its shape.
        exact: a Fisher file.
        compare: as in `audit`, like batch_size.
        batch_size: of squared batch gradients.
        as_json: print one JSON object.
    """
    check_choice(CALL, "--compare", compare, ("diagonal", "matrix"))
    found = audit(_read(other), load(exact), compare=compare, batch_size=batch_size)
    told = asdict(found) | {"strength_ratio": found.strength_ratio}
    typer.echo(json.dumps(_plain(told), ensure_ascii=False, allow_nan=False) if as_json else as_text(found))


def as_text(found: Audit) -> str:
    """The parts as a table, and what was found below it."""
    header = ("parameters", "cosine", "scale", "trace ratio")
    rows = [
        (part.name, f"{part.cosine:.4f}", number(part.scale), number(part.trace_ratio))
        for part in (*found.parts, found.total)
    ]
    return f"{table(header, rows)}\n\n{found}"


def _plain(value: Any) -> Any:
    """The same with null for what JSON has no number: the likeness of a part that is zero."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path) -> FisherOperator | dict[str, Tensor]:
    """An operator from a Fisher file, named tensors from another safetensors file."""
    if not path.is_file() or path.suffix == ".json":
        return load(path)
    header, tensors = io.read_tensors(path, "cpu", CALL, "fisher.save, or safetensors.torch.save_file")
    return load(path) if header.get("format") == io.FORMAT else tensors
