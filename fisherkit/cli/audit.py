"""``fisherkit audit``: a Fisher of any origin, in a file, beside the exact one in a Fisher file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from fisherkit import io
from fisherkit.cli.options import AsJson, argument, choice, option
from fisherkit.cli.text import number, table
from fisherkit.evaluation import audit
from fisherkit.operators import FisherOperator, load


@dataclass(frozen=True)
class Audit:
    """Compare a Fisher of any origin with an exact one.

    Says how alike they are, and by which factor OTHER is larger: a penalty's strength that was tuned for EXACT is
    divided by it to do the same with OTHER.

    Examples:
        fisherkit audit theirs.safetensors exact.safetensors
        fisherkit audit squared-gradients.safetensors exact.safetensors --batch-size 32
    """

    other: Annotated[
        Path,
        argument("OTHER", "A Fisher file, or any safetensors file of a diagonal: parameter name -> tensor."),
    ]
    exact: Annotated[Path, argument("EXACT", "A Fisher file.")]
    compare: Annotated[
        str | None, choice("What is compared", ("diagonal", "matrix"), "the matrix where both have one")
    ] = None
    batch_size: Annotated[
        int | None, option("B", "Size of the batches behind OTHER, to recognise their squares.", "unknown", min=1)
    ] = None
    as_json: AsJson = False

    def run(self) -> None:
        """Compare and print."""
        found = audit(_read(self.other), load(self.exact), compare=self.compare, batch_size=self.batch_size)
        if self.as_json:
            told = asdict(found) | {"strength_ratio": found.strength_ratio}
            typer.echo(json.dumps(_plain(told), ensure_ascii=False, allow_nan=False))
            return
        header = ("parameters", "cosine", "scale", "trace ratio")
        rows = [
            (part.name, f"{part.cosine:.4f}", number(part.scale), number(part.trace_ratio))
            for part in (*found.parts, found.total)
        ]
        typer.echo(f"{table(header, rows)}\n\n{found}")


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
    header, tensors = io.read_tensors(path, "cpu", "fisherkit audit", "fisher.save, or safetensors.torch.save_file")
    return load(path) if header.get("format") == io.FORMAT else tensors
