"""The options of ``fisherkit demo``; what it does is `run`'s, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisherkit.cli.command import Command, readable_errors, require
from fisherkit.cli.options import Overwrite


def demo(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where pictures and figures.json go; made if missing.")
    ] = Path("demo"),
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of everything random.")] = 0,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Epochs of training.")] = 40,
    examples: Annotated[
        int, typer.Option(metavar="N", min=2, max=1437, help="Examples behind the table of structures.")
    ] = 256,
    batches: Annotated[int, typer.Option(metavar="N", min=1, help="Batches of 160 that γ is averaged over.")] = 6,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Builds that a time is the median of.")] = 5,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="Threads; the network is too small for two.")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Train a small network on handwritten digits and compare every kind of Fisher on it.

    Prints tables, and writes pictures and figures.json. Needs the packages of fisherkit[demo]. Takes a minute or two.
    """
    with readable_errors():
        require("demo", {"matplotlib": "matplotlib", "sklearn": "scikit-learn"})
        from fisherkit.cli.digits.run import Settings, run

        run(Settings(out, seed, epochs, examples, batches, repeats, threads, overwrite))


DEMO = Command(
    demo,
    "Train a small network and compare every kind of Fisher on it.",
    (
        "fisherkit demo",
        "fisherkit demo --out my-demo --seed 1",
        "fisherkit demo --epochs 5 --examples 64 --batches 1    (a quick look)",
    ),
)
