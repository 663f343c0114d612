"""The demo's figures as tables for the terminal."""

from __future__ import annotations

import torch

from examples.demo.digits import BATCH, Checkpoint
from examples.demo.measure import STRUCTURES, DAMPING, KINDS, Projection, Quality, Structures
from examples.demo.uses import ANGLE, Uses
from fisherkit.cli.text import table
from fisherkit.words import number


def uses_report(found: Uses) -> str:
    """A table for each use."""
    task = f"The old task is upright digits, the new one digits turned by {ANGLE}°; accuracies are held out.\n\n"
    kept = [(name, f"{kept[-1]:.1%}", f"{found.learned[name][-1]:.1%}") for name, kept in found.kept.items()]
    merged = [(name, *(f"{accuracy:.1%}" for accuracy in tasks)) for name, tasks in found.merged.items()]
    losses = [(name, f"{losses[1]:.3f}", f"{losses[-1]:.4f}") for name, losses in found.losses.items()]
    return task + "\n\n".join(
        (
            table(("after learning the new task", "old", "new"), kept, left=1),
            table(("of two models", "old", "new"), merged, left=1),
            table(("training loss after epoch", "1", "the last"), losses, left=1),
        )
    )


def training_table(checkpoints: list[Checkpoint]) -> str:
    """Loss and accuracy of each checkpoint."""
    rows = [(str(c.epoch), f"{c.loss:.3f}", f"{c.accuracy:.1%}") for c in checkpoints]
    return table(("epoch", "training loss", "held-out accuracy"), rows, left=0)


def structures_report(found: Structures, checkpoint: Checkpoint, examples: int) -> str:
    """A row for each kind in each structure."""
    title = (
        f"N = {examples} examples, epoch {checkpoint.epoch}, float32. γ judges (F + λI)⁻¹∇L by the exact full Fisher;\n"
        f"λ is {DAMPING.scale:g} of the mean eigenvalue. A unit is one forward and backward pass over the same\n"
        f"examples, {found.unit_ms:.2f} ms. In a network this small most of a build is its fixed part, the layer\n"
        "rules' verification against autograd.\n\n"
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


def quality_report(quality: list[Quality], batches: int) -> str:
    """A row for each checkpoint."""
    title = (
        f"γ/γ_SGD of (F + λI)⁻¹∇L, full structure, mean of {batches} batches of {BATCH}, float64. Lower is better;\n"
        "1 is the gradient itself, and no update beats that of the exact Fisher. Ranks and tolerance 1e-2\n"
        "are the truncated kind's; the last column is how many vectors an example the tolerance took.\n\n"
    )
    rows = [
        (str(q.epoch), *(f"{q.mean[kind]:.3f}" for kind in KINDS), f"{q.vectors['truncated, 1e-2']:.1f}")
        for q in quality
    ]
    return title + table(("epoch", *(_short(kind) for kind in KINDS), "vectors"), rows, left=0)


def projection_report(projection: Projection, checkpoint: Checkpoint) -> str:
    """The batch in three equal groups by how well an example is fit."""
    norms = torch.tensor(projection.logit_gradient_norm)
    groups = norms.argsort().tensor_split(3)
    title = (
        f"Where an update seeks its loss reduction: {len(norms)} examples in thirds by how well they are fit, epoch "
        f"{checkpoint.epoch}.\n\n"
    )
    rows = [
        (
            name,
            number(norms[group].median().item()),
            *(f"{torch.tensor(projection.share[kind])[group].sum().item():.1%}" for kind in KINDS),
        )
        for name, group in zip(("best fit", "middle", "worst fit"), groups, strict=True)
    ]
    return title + table(("third", "‖∂ℓ/∂z‖", *(_short(kind) for kind in KINDS)), rows)


def _short(kind: str) -> str:
    return kind.replace("truncated, ", "").replace(", 1 draw", "")
