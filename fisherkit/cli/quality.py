"""``fisherkit quality``: γ of every kind on a user's own model."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import typer

from fisherkit.cli.command import make_folder, require
from fisherkit.cli.estimate import load_pair
from fisherkit.cli.info import environment
from fisherkit.cli.options import (
    KIND,
    LIKELIHOOD,
    STRUCTURE,
    Example,
    Overwrite,
    argument,
    each,
    kind_check,
    likelihood_check,
    numbers,
    numbers_or,
    option,
    structure_check,
    words,
)
from fisherkit.cli.sources import load_likelihood
from fisherkit.cli.text import progress, table
from fisherkit.data import Source, no_batch
from fisherkit.evaluation import QualityTable, compare
from fisherkit.evaluation.compare import average, plot_damping
from fisherkit.io import replace_text
from fisherkit.words import number

CALL = "fisherkit quality SPEC"
FILES = "quality.csv", "quality.json", "quality.png"


@dataclass(frozen=True)
class Quality:
    """Say how good each kind's update is on a model of yours.

    Every kind's preconditioned update is compared with the natural gradient, by γ of Wu and others (NeurIPS 2024). The
    model is any module in eval mode, the data one batch or a list or DataLoader of batches. Prints a table.

    Examples:
        fisherkit quality mymodule:make
        fisherkit quality mymodule:make --kinds sgd,ef,ief,truncated:2 --out quality
        fisherkit quality mymodule:make --dampings 1e-7,1e-3 --drop-duplicates 0.99 --batches 10
    """

    spec: str = argument("SPEC", '"package.module:function" that returns (model, data).')
    kinds: str = option(
        "sgd,ef,ief,sf,truncated:1,truncated:2,exact", "LIST", f"sgd, {KIND}",
        parser=each(partial(kind_check, also=("sgd",))),
    )  # fmt: skip
    structures: str = option("full", "LIST", f"Of {STRUCTURE}", parser=each(structure_check))
    dampings: str = option(
        "1e-7,1e-5,1e-3,1e-1", "LIST", "λ > 0, each compared, on the scale of sums over examples.", parser=numbers_or()
    )
    likelihood: str = option("categorical", "NAME", LIKELIHOOD, parser=likelihood_check)
    example: Example = "sequence"
    batches: int = option(1, "N", "Batches that are averaged over.", min=1)
    drop_duplicates: float | None = option(None, "COSINE", "Leave near-duplicates out of the updates.", "all are kept")
    seed: int = option(0, "N", "Seed of sampled labels.", min=0)
    out: Path | None = option(None, "FOLDER", "Write quality.csv, quality.json and quality.png there.")
    overwrite: Overwrite = False

    def run(self) -> None:
        """Compare, print, write."""
        if self.out is not None:
            require("demo", "matplotlib")
            make_folder(self.out, FILES, CALL, overwrite=self.overwrite)
        model, data = load_pair(self.spec, CALL)
        batches = [batch.raw for batch in itertools.islice(Source(data, model).once(), self.batches)]
        if not batches:
            raise no_batch()
        likelihood = load_likelihood(self.likelihood, CALL)
        tables = [
            compare(
                model, batch, kinds=words(self.kinds), structures=words(self.structures),
                gram_dampings=numbers(self.dampings), likelihood=likelihood, example=self.example,
                drop_duplicates=self.drop_duplicates, seed=self.seed + i,
            )
            for i, batch in enumerate(progress(batches))
        ]  # fmt: skip
        paths = [] if self.out is None else self._write(tables, self.out)
        typer.echo(_report(tables))
        if paths:
            typer.echo(f"\nWrote {', '.join(map(str, paths))}.")

    def _write(self, tables: Sequence[QualityTable], folder: Path) -> list[Path]:
        paths = [folder / name for name in FILES]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["batch", *asdict(tables[0].rows[0])])
        writer.writerows([i, *asdict(row).values()] for i, found in enumerate(tables) for row in found.rows)
        replace_text(paths[0], text.getvalue())
        lists = {"kinds": words(self.kinds), "structures": words(self.structures), "dampings": numbers(self.dampings)}
        figures = {
            "environment": environment(),
            "settings": asdict(self) | lists | {"out": str(folder)},
            "batches": [found.to_dict() for found in tables],
        }
        replace_text(paths[1], json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
        if any(row.damping is not None for row in tables[0].rows):
            plot_damping(tables, paths[2])
            return paths
        paths[2].unlink(missing_ok=True)  # that of another comparison
        return paths[:2]


def _report(tables: Sequence[QualityTable]) -> str:
    """The mean over batches as a table for the terminal."""
    examples, dropped = sum(t.examples for t in tables), sum(t.dropped for t in tables)
    count = "1 batch" if len(tables) == 1 else f"{len(tables)} batches"
    title = f"γ/γ_SGD, mean of {count}, {examples:,} examples.\nLower is better; 1 is the gradient itself."
    if dropped:
        title += f"\n{dropped:,} near-duplicates left out of the updates."
    rows = []
    for i, ((kind, structure, damping), (mean, deviation)) in enumerate(average(tables).items()):
        norm = sum(t.rows[i].update_norm for t in tables) / len(tables)
        spread = f"{deviation:.3f}" if len(tables) > 1 else ""
        strength = "" if damping is None else f"{damping:g}"
        rows.append((kind, structure, strength, f"{mean:.3f}", spread, number(norm), f"{tables[0].rows[i].rows:,}"))
    return f"{title}\n\n" + table(("kind", "structure", "damping", "γ/γ_SGD", "±", "‖Δ‖", "rows"), rows, left=2)
