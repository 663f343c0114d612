"""``fisherkit quality``: γ of every kind on a user's own model.

Owns the options, what is printed and which files are written; the numbers are `fisherkit.evaluation`'s.
"""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from fisherkit._version import __version__
from fisherkit.cli.checks import check_choice, check_likelihood
from fisherkit.cli.command import Command, make_folder, readable_errors, require
from fisherkit.cli.factories import load_factory, load_likelihood
from fisherkit.cli.options import Overwrite
from fisherkit.cli.text import number, numbers, progress, table, words
from fisherkit.data import Source
from fisherkit.evaluation import QualityTable, compare
from fisherkit.evaluation.plots import plot_damping
from fisherkit.evaluation.table import average
from fisherkit.fisher import STRUCTURES
from fisherkit.io import replace_text
from fisherkit.kind_specs import KindSpec

CALL = "fisherkit quality SPEC"
FILES = "quality.csv", "quality.json", "quality.png"


@dataclass(frozen=True)
class QualitySettings:
    """The command's options.

    Args:
        spec: "package.module:function".
        out: folder of the files; None to write none.
        batches: how many are compared and averaged.
        kinds: as in `compare`, like all that follow.
        structures: of the Fishers.
        dampings: λ.
        likelihood: by name.
        example: "sequence" or "token".
        drop_duplicates: a cosine, or None.
        seed: of sampled labels.
        overwrite: replace files that are there.
    """

    spec: str
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


def quality(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help='"package.module:function" that returns (model, data).')],
    kinds: Annotated[
        str, typer.Option(metavar="LIST", help="sgd, ef, ief[:POWER], sf[:DRAWS], truncated[:RANK], exact.")
    ] = "sgd,ef,ief,sf,truncated:1,truncated:2,exact",
    structures: Annotated[str, typer.Option(metavar="LIST", help="Of full, block, diagonal, kfac, ekfac.")] = "full",
    dampings: Annotated[
        str, typer.Option(metavar="LIST", help="Gram dampings λ > 0, beside sums over examples.")
    ] = "1e-7,1e-5,1e-3,1e-1",
    likelihood: Annotated[
        str, typer.Option(metavar="NAME", help="categorical, gaussian, bernoulli, poisson, or a module:function.")
    ] = "categorical",
    example: Annotated[str, typer.Option(metavar="NAME", help="sequence or token.")] = "sequence",
    batches: Annotated[int, typer.Option(metavar="N", min=1, help="Batches that are averaged over.")] = 1,
    drop_duplicates: Annotated[
        float | None,
        typer.Option(metavar="COSINE", help="Leave near-duplicates out of the updates.", show_default="all are kept"),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of sampled labels.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write quality.csv, quality.json and quality.png there.", show_default="none"
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare every kind's preconditioned update with the natural gradient, by γ of Wu and others (NeurIPS 2024).

    The model is any module in eval mode, the data one batch or a list or DataLoader of batches. Prints a table.
    """
    with readable_errors():
        if out is not None:
            require("demo", {"matplotlib": "matplotlib"})
        run(
            QualitySettings(
                spec, out, batches, words(kinds), words(structures), numbers(dampings, "--dampings"), likelihood,
                example, drop_duplicates, seed, overwrite,
            )
        )  # fmt: skip


QUALITY = Command(
    quality,
    "How good each kind's update is on a model of yours.",
    (
        "fisherkit quality mymodule:make",
        "fisherkit quality mymodule:make --kinds sgd,ef,ief,truncated:2 --out quality",
        "fisherkit quality mymodule:make --dampings 1e-7,1e-3 --drop-duplicates 0.99 --batches 10",
    ),
)


def run(settings: QualitySettings) -> None:
    """Compare, print, write."""
    for kind in settings.kinds:
        if kind != "sgd":
            KindSpec.parse(kind, call=CALL, also=("sgd",))
    for structure in settings.structures:
        check_choice(CALL, "--structures with the structure", structure, STRUCTURES)
    check_likelihood(CALL, settings.likelihood)
    check_choice(CALL, "--example", settings.example, ("sequence", "token"))
    if settings.out is not None:
        make_folder(settings.out, FILES, CALL, overwrite=settings.overwrite)
    model, batches = _users(settings.spec, settings.batches)
    likelihood = load_likelihood(settings.likelihood, CALL)
    tables = [
        compare(
            model, batch, kinds=settings.kinds, structures=settings.structures, gram_dampings=settings.dampings,
            likelihood=likelihood, example=settings.example, drop_duplicates=settings.drop_duplicates,
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


def _users(spec: str, batches: int) -> tuple[nn.Module, list[Any]]:
    """What the user's function returns, and its first batches."""
    model, data = load_factory(spec, CALL)
    return model, [batch.raw for batch in itertools.islice(Source(data, model).once(), batches)]
