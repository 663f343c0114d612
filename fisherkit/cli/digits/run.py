"""The order of things: train, measure, print, draw, write figures.json."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import sklearn
import torch
import typer

from fisherkit._version import __version__
from fisherkit.cli.command import make_folder
from fisherkit.cli.digits.kinds import DAMPING
from fisherkit.cli.digits.pictures import PICTURES, draw
from fisherkit.cli.digits.report import projection_report, quality_report, structures_report, training_table
from fisherkit.cli.digits.structures import compare_structures
from fisherkit.cli.digits.training import Digits, train
from fisherkit.cli.digits.updates import BATCH, project, quality_over_training

FIGURES = "figures.json"


@dataclass(frozen=True)
class Settings:
    """The command's options.

    Args:
        out: folder of pictures and figures.
        seed: of everything random.
        epochs: of training.
        examples: N of the table of structures.
        batches: that γ over training is averaged over.
        repeats: builds that a time is the median of.
        threads: of PyTorch while the demo runs.
        overwrite: replace files that are there.
    """

    out: Path
    seed: int
    epochs: int
    examples: int
    batches: int
    repeats: int
    threads: int
    overwrite: bool


def run(settings: Settings) -> None:
    """Do everything."""
    make_folder(settings.out, (*PICTURES, FIGURES), "fisherkit demo", overwrite=settings.overwrite)
    start = time.perf_counter()
    with _threads(settings.threads):
        generator = torch.Generator().manual_seed(settings.seed)
        digits = Digits.load(generator)
        typer.echo("Training a 64-64-32-10 network on scikit-learn's digits ...")
        checkpoints = train(digits, epochs=settings.epochs, seed=settings.seed, generator=generator)
        typer.echo(training_table(checkpoints))

        typer.echo("\nBuilding every kind in every structure ...")
        batch = digits.batch(settings.examples, generator)
        structures = compare_structures(checkpoints[-1].network(), batch, repeats=settings.repeats)
        typer.echo(structures_report(structures, checkpoints[-1], len(batch[1])))

        typer.echo("\nJudging every kind's update along the training run ...")
        quality = quality_over_training(checkpoints, digits, batches=settings.batches, generator=generator)
        typer.echo(quality_report(quality, settings.batches))

        typer.echo("\nLooking at what an update asks of each example ...")
        shown = checkpoints[len(checkpoints) // 2]
        projection = project(shown, digits.batch(BATCH, generator))
        typer.echo(projection_report(projection, shown))
    written = draw(quality, projection, shown, structures, settings.out)
    seconds = time.perf_counter() - start
    figures = {
        "environment": _environment(settings),
        "settings": {**asdict(settings), "out": str(settings.out), "relative_damping": DAMPING.scale, "batch": BATCH},
        "seconds": seconds,
        "training": [{"epoch": c.epoch, "loss": c.loss, "accuracy": c.accuracy} for c in checkpoints],
        "structures": {"epoch": checkpoints[-1].epoch, **asdict(structures)},
        "quality_over_training": [asdict(q) for q in quality],
        "projection": {"epoch": shown.epoch, **asdict(projection)},
    }
    path = settings.out / FIGURES
    path.write_text(json.dumps(figures, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    typer.echo(f"\nWrote {', '.join(str(p) for p in [*written, path])} after {seconds:.0f} s.")


def _environment(settings: Settings) -> dict[str, Any]:
    return {
        "fisherkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "matplotlib": matplotlib.__version__,
        "platform": platform.platform(terse=True),
        "threads": settings.threads,
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
