"""``fisherkit show``: what a Fisher file holds, for people and as JSON.

Owns the options, the text and the files that are written; the numbers are `summary`'s, the picture `show_picture`'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import fill
from typing import Annotated

import typer

from fisherkit.cli.command import Command, make_folder, readable_errors, require
from fisherkit.cli.options import AsJson, Overwrite
from fisherkit.cli.summary import Summary, summarize
from fisherkit.cli.text import WIDTH, pairs, table
from fisherkit.io import replace_text
from fisherkit.memory import readable

SHOWN = 10
"""Eigenvalues in the text; the JSON has more."""


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A Fisher file, or the index of one in shards.")],
    as_json: AsJson = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write show.json and show.png there; made if missing.", show_default="none"
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show a Fisher file: what was recorded, each layer's trace, and the largest eigenvalues.

    Reads one block at a time, so that a file need not fit in memory. The picture needs the packages of fisherkit[demo].
    """
    with readable_errors():
        if out is not None:
            require("demo", {"matplotlib": "matplotlib"})
            make_folder(out, ("show.json", "show.png"), "fisherkit show", overwrite=overwrite)
        found = summarize(file)
        text = json.dumps(found.to_dict(), indent=2, ensure_ascii=False)
        typer.echo(text if as_json else as_text(found))
        if out is not None:
            from fisherkit.cli.show_picture import draw

            replace_text(out / "show.json", text + "\n")
            draw(found, out / "show.png")
            typer.echo(f"wrote {out / 'show.json'} and {out / 'show.png'}", err=as_json)


SHOW = Command(
    show,
    "What a Fisher file holds: metadata, traces, eigenvalues.",
    (
        "fisherkit show fisher.safetensors",
        "fisherkit show fisher.safetensors.index.json --json > fisher.json",
        "fisherkit show fisher.safetensors --out picture",
    ),
)


def as_text(found: Summary) -> str:
    """The summary, for people."""
    recorded = {key: value for key, value in found.metadata.items() if key not in ("coverage", "checksums")}
    files = "1 file" if found.files == 1 else f"{found.files} files"
    lines = {
        "file": f"{found.file} ({readable(found.bytes)} in {files})",
        "operator": f"{found.operator}, {found.blocks:,} independent block{'s' if found.blocks > 1 else ''}",
        "D": f"{found.size:,} parameters, {found.dtype}",
        "trace": f"{found.trace:.4g}, mean eigenvalue {found.trace / found.size:.3g}",
        "checksums": "those of all values compared" if found.checksums else "none, so that damage may go unnoticed",
        **recorded,
    }
    rows = [
        (
            layer.name, layer.kind, f"{layer.size:,}", f"{layer.trace:.3g}", f"{100 * layer.share:.1f} %",
            f"{layer.mean_eigenvalue:.3g}",
        )
        for layer in found.layers
    ]  # fmt: skip
    if found.eigenvalues is None:
        spectrum = f"Eigenvalues: {found.no_eigenvalues}."
    else:
        largest = ", ".join(f"{value:.3g}" for value in found.eigenvalues[:SHOWN])
        spectrum = fill(f"Largest eigenvalues: {largest}", WIDTH)
    return "\n\n".join(
        [
            pairs(lines.items()),
            table(("layer", "block", "parameters", "trace", "share", "mean eigenvalue"), rows, left=2),
            spectrum,
        ]
    )
