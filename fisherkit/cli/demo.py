"""``fisherkit demo``: train, measure, print, and write pictures and figures.json.

Owns the order of things and how the figures look as tables. Measuring and drawing have modules of their own.
"""

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
from fisherkit.cli.demo_measurements import (
    BATCH,
    DAMPING,
    KINDS,
    Projection,
    Quality,
    Structures,
    compare_structures,
    project,
    quality_over_training,
)
from fisherkit.cli.demo_pictures import draw
from fisherkit.cli.demo_training import Checkpoint, Digits, train
from fisherkit.cli.text import number, table
from fisherkit.fisher import STRUCTURES

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
    """

    out: Path
    seed: int
    epochs: int
    examples: int
    batches: int
    repeats: int
    threads: int


def run(settings: Settings) -> None:
    """Do everything; the folder is made first, so that a wrong path fails before the work."""
    settings.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with _threads(settings.threads):
        generator = torch.Generator().manual_seed(settings.seed)
        digits = Digits.load(generator)
        typer.echo("Training a 64-64-32-10 network on scikit-learn's digits ...")
        checkpoints = train(digits, epochs=settings.epochs, seed=settings.seed, generator=generator)
        typer.echo(_training_table(checkpoints))

        typer.echo("\nBuilding every kind in every structure ...")
        batch = digits.batch(settings.examples, generator)
        structures = compare_structures(checkpoints[-1].network(), batch, repeats=settings.repeats)
        typer.echo(_structures_report(structures, checkpoints[-1], len(batch[1])))

        typer.echo("\nJudging every kind's update along the training run ...")
        quality = quality_over_training(checkpoints, digits, batches=settings.batches, generator=generator)
        typer.echo(_quality_report(quality, settings.batches))

        typer.echo("\nLooking at what an update asks of each example ...")
        shown = checkpoints[len(checkpoints) // 2]
        projection = project(shown, digits.batch(BATCH, generator))
        typer.echo(_projection_report(projection, shown))
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


def _training_table(checkpoints: list[Checkpoint]) -> str:
    rows = [(str(c.epoch), f"{c.loss:.3f}", f"{c.accuracy:.1%}") for c in checkpoints]
    return table(("epoch", "training loss", "held-out accuracy"), rows, left=0)


def _structures_report(found: Structures, checkpoint: Checkpoint, examples: int) -> str:
    title = (
        f"N = {examples} examples, epoch {checkpoint.epoch}, float32. 1 unit = one forward and backward pass over the "
        f"same examples = {found.unit_ms:.2f} ms.\n"
        "For a network this small a build is mostly its fixed part: probing the model and verifying the layer rules.\n"
        f"γ judges (F + λI)⁻¹∇L, λ = {DAMPING.scale:g} × mean eigenvalue, by the exact full Fisher.\n\n"
    )
    header = ("structure", "kind", "rows", "trace", "eff. rank", "build ms", "units", "memory", "γ/γ_SGD")
    rows = []
    for structure in STRUCTURES:
        cells = [cell for cell in found.cells if cell.structure == structure]
        rows += [
            (
                structure if i == 0 else "",
                cell.kind,
                f"{cell.rows:,}",
                number(cell.trace),
                number(cell.effective_rank),
                number(cell.build_ms),
                number(cell.build_units),
                f"{cell.memory_bytes / 1e3:,.0f} kB",
                f"{cell.relative_quality:.3f}",
            )
            for i, cell in enumerate(cells)
        ]
    return title + table(header, rows, left=2)


def _quality_report(quality: list[Quality], batches: int) -> str:
    title = (
        f"γ/γ_SGD of (F + λI)⁻¹∇L, full structure, mean of {batches} batches of {BATCH}, float64.\n"
        "Lower is better; 1 is the gradient itself, the exact Fisher's own update the best there is.\n\n"
    )
    rows = [
        (str(q.epoch), *(f"{q.mean[kind]:.3f}" for kind in KINDS), f"{q.vectors['truncated, 1e-2']:.1f}")
        for q in quality
    ]
    return title + table(("epoch", *(_short(kind) for kind in KINDS), "vectors of 1e-2"), rows, left=0)


def _projection_report(projection: Projection, checkpoint: Checkpoint) -> str:
    """The batch in three equal groups by how well an example is fit."""
    norms = torch.tensor(projection.logit_gradient_norm)
    groups = norms.argsort().tensor_split(3)
    title = f"Share of the batch's loss reduction, {len(norms)} examples, epoch {checkpoint.epoch}.\n\n"
    rows = [
        (
            name,
            number(norms[group].median().item()),
            *(f"{torch.tensor(projection.share[kind])[group].sum().item():.1%}" for kind in KINDS),
        )
        for name, group in zip(("best fit", "middle", "worst fit"), groups, strict=True)
    ]
    return title + table(("third", "median ‖∂ℓ/∂z‖", *(_short(kind) for kind in KINDS)), rows)


def _short(kind: str) -> str:
    return kind.replace("truncated, ", "trunc. ").replace(", 1 draw", "")


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
