"""The tables of `examples.paper.quality` in Markdown. Reads summaries alone."""

from __future__ import annotations

from collections.abc import Mapping

from examples.benchmarks.report import markdown
from examples.paper.quality_claims import CLAIMS, TRUNCATED, needed
from examples.paper.quality_summary import Summary

NAMES = {
    "ef": "EF", "ief": "iEF", "ief:0.25": "iEF, power ¼", "ief:0.5": "iEF, power ½", "ief:0.75": "iEF, power ¾",
    "sf": "SF", "truncated:1": "truncated, rank 1", "truncated:2": "truncated, rank 2",
    "truncated:3": "truncated, rank 3", "truncated:4": "truncated, rank 4", "truncated:6": "truncated, rank 6",
    "truncated:0.01": "truncated, 1e-2", "exact": "exact",
}  # fmt: skip
KFAC_NAMES = {"ef": "EF-KFAC", "ief": "ieKFAC", "sf": "KFAC, one drawn label", "exact": "KFAC, exact"}


def name_of(structure: str, kind: str) -> str:
    """How tables and pictures call a kind in a structure."""
    return (KFAC_NAMES if structure == "kfac" else NAMES).get(kind, kind)


def report(summaries: Mapping[str, Summary], pictures: str) -> str:
    """Everything, for a page.

    Args:
        summaries: by task.
        pictures: the folder of the pictures, relative to the page.
    """
    parts = [_tasks(summaries), claims(summaries), _ranks(summaries)]
    parts += [
        f"![γ/γ_SGD of each kind over training]({pictures}/quality-training.png)",
        f"![γ/γ_SGD of each kind over damping]({pictures}/quality-damping.png)",
    ]
    for name, summary in summaries.items():
        places = dict.fromkeys((0, len(summary.epochs) // 2, len(summary.epochs) - 1))
        parts.append(f"### {name}\n\n{over_training(summary)}")
        parts += [over_damping(summary, place) for place in places]
    return "\n\n".join(filter(None, parts))


def claims(summaries: Mapping[str, Summary]) -> str:
    """Every claim on every task."""
    rows = []
    for claim, tried in CLAIMS.items():
        for name, summary in summaries.items():
            if "KFAC" in claim and not {"ef", "ief"} <= summary.curves["kfac"].keys():
                continue
            finding = tried(summary)
            rows.append((claim, name, finding.numbers, "held" if finding.held else "**failed**"))
    return markdown((("claim", "task", "measured", "verdict"), rows))


def _tasks(summaries: Mapping[str, Summary]) -> str:
    """What was measured, how often, where."""
    lines = []
    for name, s in summaries.items():
        batches = sorted({c["batches"] for c in s.checkpoints})
        training = ", ".join(f"{c['epoch']}: {c['loss']:.3g} / {100 * c['accuracy']:.1f}%" for c in s.checkpoints)
        lines.append(
            f"- **{name}**: {s.settings['title']}; {s.settings['recipe']}; {'–'.join(map(str, batches))} batches of "
            f"{s.settings['size']} in {s.settings['dtype']}, {s.seconds:.1f} s a cell. "
            f"Epoch: training loss / test accuracy: {training}."
        )
    e = next(iter(summaries.values())).environment
    lines.append(f"- {e['processor']}, {e['threads']} thread, torch {e['versions']['torch']}; {e['date']}.")
    return "\n".join(lines)


def _ranks(summaries: Mapping[str, Summary]) -> str:
    """Where each truncation is, and which one it takes to be within 5% of the exact kind at every damping."""
    rows = []
    for name, s in summaries.items():
        for i, (epoch, first) in enumerate(zip(s.epochs, needed(s), strict=True)):
            worst = [f"{s.curves['full'][kind].over_exact[i].max():.3f}" for kind in TRUNCATED]
            two = s.curves["full"]["truncated:2"]
            batches = f"{two.median[i].max():.3f} / {two.worst[i].max():.3f}"
            correlation = s.checkpoints[i]["correlation"]
            said = "" if correlation is None else f"{correlation:.2f}"
            rows.append((f"{name}, epoch {epoch}", *worst, batches, said, NAMES.get(first, first)))
    kinds = [NAMES[kind].removeprefix("truncated, ") for kind in TRUNCATED]
    text = (
        "γ over the exact kind's, mean over batches, largest over the dampings; of rank 2 also the median and the "
        "worst batch, and the rank correlation over batches of that ratio with the least probability that the model "
        "gives a label (negative: rank 2 is poor where an example is confidently wrong):"
    )
    return f"{text}\n\n" + markdown((
        ("", *kinds, "rank 2, median / worst batch", "with least p", "first within 5%"), rows,
    ))  # fmt: skip


def over_training(s: Summary) -> str:
    """γ/γ_SGD of every kind at every checkpoint, near-zero damping."""
    rows = []
    for structure, kinds in s.curves.items():
        for kind, curve in kinds.items():
            cells = [f"{m:.3g} ± {d:.2g}" for m, d in zip(curve.mean[:, 0], curve.std[:, 0], strict=True)]
            rows.append((name_of(structure, kind), *cells))
    header = (f"γ/γ_SGD, λ = {s.dampings[0]:g}", *(f"epoch {epoch}" for epoch in s.epochs))
    return markdown((header, rows))


def over_damping(s: Summary, place: int) -> str:
    """γ/γ_SGD of every kind at every damping, at one checkpoint."""
    rows = [
        (name_of(structure, kind), *(f"{value:.3g}" for value in curve.mean[place]))
        for structure, kinds in s.curves.items()
        for kind, curve in kinds.items()
    ]
    return markdown(((f"epoch {s.epochs[place]}, λ =", *(f"{damping:g}" for damping in s.dampings)), rows))
