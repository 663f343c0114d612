"""``fisherkit quality``: γ of every kind on a user's own model, or on the demo's network.

Owns what is printed and which files are written; the numbers are `fisherkit.evaluation`'s.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from fisherkit._version import __version__
from fisherkit.cli.command import make_folder
from fisherkit.cli.factories import load_factory
from fisherkit.cli.text import number, progress, table
from fisherkit.data import Source
from fisherkit.evaluation import QualityTable, compare
from fisherkit.evaluation.plots import plot_damping
from fisherkit.evaluation.table import average
from fisherkit.io import replace_text

CALL = "fisherkit quality SPEC"
FILES = "quality.csv", "quality.json", "quality.png"
EPOCHS, BATCH = 10, 160
"""Of the demo's network, where no SPEC is given; 160 is the paper's batch."""


@dataclass(frozen=True)
class QualitySettings:
    """The command's options.

    Args:
        spec: "package.module:function", or None for the demo's network.
        out: folder of the files; None to write none.
        batches: how many are compared and averaged.
        kinds: as in `compare`, like all that follow.
        structures: of the Fishers.
        dampings: λ.
        likelihood: by name.
        example: "sequence" or "token".
        drop_duplicates: a cosine, or None.
        seed: of sampled labels, and of the demo's network.
        overwrite: replace files that are there.
    """

    spec: str | None
    out: Path | None
    batches: int
    kinds: tuple[str, ...]
    structures: tuple[str, ...]
    dampings: tuple[float, ...]
    likelihood: str
    example: str
    drop_duplicates: float | None
    seed: int
    overwrite: bool


def run(settings: QualitySettings) -> None:
    """Compare, print, write."""
    if settings.out is not None:
        make_folder(settings.out, FILES, CALL, overwrite=settings.overwrite)
    model, batches = _digits(settings) if settings.spec is None else _users(settings.spec, settings.batches)
    tables = [
        compare(
            model, batch, kinds=settings.kinds, structures=settings.structures, gram_dampings=settings.dampings,
            likelihood=settings.likelihood, example=settings.example, drop_duplicates=settings.drop_duplicates,
            seed=settings.seed + i,
        )
        for i, batch in enumerate(progress(batches))
    ]  # fmt: skip
    typer.echo(report(tables))
    if settings.out is not None:
        typer.echo(f"\nWrote {', '.join(str(path) for path in _write(settings, tables, settings.out))}.")


def report(tables: Sequence[QualityTable]) -> str:
    """The mean over batches as a table for the terminal."""
    examples, dropped = sum(t.examples for t in tables), sum(t.dropped for t in tables)
    count = "1 batch" if len(tables) == 1 else f"{len(tables)} batches"
    title = f"γ/γ_SGD, mean of {count}, {examples:,} examples. Lower is better; 1 is the gradient itself."
    if dropped:
        title += f"\n{dropped:,} near-duplicates left out of the updates."
    rows = []
    for i, ((kind, structure, damping), (mean, deviation)) in enumerate(average(tables).items()):
        norm = sum(t.rows[i].update_norm for t in tables) / len(tables)
        spread = f"{deviation:.3f}" if len(tables) > 1 else ""
        cells = (
            "" if damping is None else f"{damping:g}",
            f"{mean:.3f}",
            spread,
            number(norm),
            f"{tables[0].rows[i].rows:,}",
        )
        rows.append((kind, structure, *cells))
    return f"{title}\n\n" + table(("kind", "structure", "damping", "γ/γ_SGD", "±", "‖Δ‖", "rows"), rows, left=2)


def _write(settings: QualitySettings, tables: Sequence[QualityTable], folder: Path) -> list[Path]:
    paths = [folder / name for name in FILES]
    lines = ["batch," + ",".join(asdict(tables[0].rows[0]))]
    for i, found in enumerate(tables):
        lines += [",".join("" if v is None else str(v) for v in (i, *asdict(row).values())) for row in found.rows]
    replace_text(paths[0], "\n".join(lines) + "\n")
    figures = {
        "environment": {
            "fisherkit": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "platform": platform.platform(terse=True), "threads": torch.get_num_threads(),
        },
        "settings": asdict(settings) | {"out": str(settings.out)},
        "batches": [found.to_dict() for found in tables],
    }  # fmt: skip
    replace_text(paths[1], json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    if any(row.damping is not None for row in tables[0].rows):
        plot_damping(tables, paths[2])
        return paths
    return paths[:2]


def _digits(settings: QualitySettings) -> tuple[nn.Module, list[Any]]:
    """The demo's network and random batches of its data, in float64."""
    from fisherkit.cli.digits.training import Digits, train

    generator = torch.Generator().manual_seed(settings.seed)
    digits = Digits.load(generator)
    typer.echo(f"No SPEC: training the demo's 64-64-32-10 network on scikit-learn's digits for {EPOCHS} epochs ...")
    model = train(digits, epochs=EPOCHS, seed=settings.seed, generator=generator)[-1].network(torch.float64)
    drawn = (digits.batch(BATCH, generator) for _ in range(settings.batches))
    return model, [(x.double(), y) for x, y in drawn]


def _users(spec: str, batches: int) -> tuple[nn.Module, list[Any]]:
    """What the user's function returns, and its first batches."""
    model, data = load_factory(spec, CALL)
    return model, [batch.raw for batch in itertools.islice(Source(data), batches)]
