"""The tables of `examples.paper.optimisation` in Markdown, and what they say of each claim. Reads summaries alone."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

from examples.benchmarks.report import markdown

Summary = Mapping[str, Any]

ARGUMENTS = {"lr": "η", "gram_damping": "λ of JJᵀ", "damping": "λ", "trust_region": "δ", "row_damping": "ε"}
"""How tables call the arguments of a grid."""

PAPER = {
    "adamw": ("77.1", "80.1", "93.9", "56.6 (Adam)"), "sgd": ("67.4", "77.3", "91.3", "54.4"),
    "ef": ("48.1", "63.1", "31.0", "29.2"), "sf": ("69.7", "76.5", "92.8", "55.2"),
    "ief": ("79.3", "79.3", "94.3", "58.6"),
}  # fmt: skip
"""Its tables 1 and 5: GLUE with prompt tuning (there, AdamW or Adafactor) and with LoRA, CIFAR-100, CIFAR-10 from
scratch."""

CLAIMS = (
    ("the paper: iEF trains to a lower loss than AdamW", "ief", "adamw"),
    ("the paper: iEF … than SGD", "ief", "sgd"),
    ("the paper: iEF … than SF", "ief", "sf"),
    ("the paper: iEF … than EF", "ief", "ef"),
    ("the paper: SF … than EF", "sf", "ef"),
    ("the paper: SGD … than EF", "sgd", "ef"),
    ("iEF with momentum … than iEF", "ief-momentum", "ief"),
    ("iEF with λ beside F and a trust region … than the paper's iEF", "ief-trust", "ief"),
    ("truncated, rank 2, with a trust region … than without", "truncated-2", "truncated-2-free"),
    ("truncated, rank 2, with a trust region … than iEF", "truncated-2", "ief"),
    ("truncated, rank 2, with a trust region … than iEF with one", "truncated-2", "ief-trust"),
    ("truncated, rank 2, with a trust region … than AdamW", "truncated-2", "adamw"),
    ("truncated, rank 2, … than rank 1", "truncated-2", "truncated-1"),
    ("truncated, rank 3, … than rank 2", "truncated-3", "truncated-2"),
    ("truncated, rank 3, … than iEF", "truncated-3", "ief"),
    ("exact, with a trust region … than truncated, rank 2", "exact", "truncated-2"),
    ("exact, with a trust region … than iEF", "exact", "ief"),
    ("with momentum and a trust region: rank 2 … than iEF with momentum", "truncated-2-momentum", "ief-momentum"),
    ("truncated, rank 2, with row damping … than without", "rows-2", "truncated-2"),
    ("truncated, rank 2, with row damping … than iEF", "rows-2", "ief"),
    ("truncated, rank 2, with row damping … than iEF with a trust region", "rows-2", "ief-trust"),
    ("truncated, rank 2, with row damping … than AdamW", "rows-2", "adamw"),
    ("truncated, rank 2, with row damping … than rank 1 with it", "rows-2", "rows-1"),
    ("truncated, rank 1, with row damping … than iEF with a trust region", "rows-1", "ief-trust"),
    ("exact, with row damping … than truncated, rank 2, with it", "rows-exact", "rows-2"),
    ("exact, with row damping … than without", "rows-exact", "exact"),
    ("KFAC of truncated, rank 2, with row damping … than ieKFAC", "kfac-rows-2", "kfac-ief"),
    ("ieKFAC … than KFAC of EF", "kfac-ief", "kfac-ef"),
    ("ieKFAC without momentum … than iEF", "kfac-ief-plain", "ief"),
    ("ieKFAC … than AdamW", "kfac-ief", "adamw"),
)
"""One method's final training loss below another's."""


def report(tasks: Mapping[str, Summary], pictures: str) -> str:
    """Everything, for a page.

    Args:
        tasks: summaries.
        pictures: the folder of the picture, relative to the page.
    """
    parts = [_setting(tasks), _beside_paper(tasks), _claims(tasks), f"![Training loss]({pictures}/optimisation.png)"]
    for name, summary in tasks.items():
        parts.append(f"### {name}\n\n{_table(summary)}")
    parts.append(_dampings(tasks))
    return "\n\n".join(filter(None, parts))


def final(method: Summary, what: str = "losses") -> list[float]:
    """Final training losses, or "accuracy" or "milliseconds", of the seeds that did not diverge."""
    ended = [run for run in method["seeds"] if run["diverged"] is None]
    return [run["losses"][-1] if what == "losses" else run[what] for run in ended]


def verdict(a: Summary, b: Summary) -> str:
    """Whether a's final loss is below b's: "yes" or "no" where the means differ by more than the seeds' deviations do.

    Returns:
        "yes", "no", or "level"; a method some of whose seeds diverged is above one none of whose did.
    """
    (low, high), lost = (final(a), final(b)), [len(m["seeds"]) - len(final(m)) for m in (a, b)]
    if lost[0] != lost[1]:
        return "yes" if lost[0] < lost[1] else "no"
    if not low or not high:
        return "level"
    spread = (_deviation(low) ** 2 + _deviation(high) ** 2) ** 0.5
    if abs(fmean(low) - fmean(high)) <= spread:
        return "level"
    return "yes" if fmean(low) < fmean(high) else "no"


def _setting(tasks: Mapping[str, Summary]) -> str:
    lines = []
    for name, s in tasks.items():
        some = ", every other configuration of the grids" if s["coarse"] else ""
        lines.append(f"- **{name}**: {s['title']}; {s['epochs']} epochs, batches of {s['batch']}{some}.")
    first = next(iter(tasks.values()))
    e, seeds = first["environment"], first["seeds"]
    lines.append(
        "- Six configurations a method, in grids placed by a coarse search on seed 0 of digits (those of EF and of row "
        "damping on mnist1d too). A configuration is chosen by the training loss at the end of seed "
        f"{first['tuning']}'s run; then mean ± standard deviation over seeds {', '.join(map(str, seeds))}. No dropout, "
        "no weight decay. Momentum is 0.9. EF and SF take normalized steps whose length falls linearly to zero; all "
        "others have constant rates. "
        "Kronecker factors are averaged (0.95) and renewed every 10 steps. "
        "Row damping ε adds ε ûûᵀ to each example's output Fisher, û its loss gradient over its norm; all methods with "
        "it have a trust region (δ) too."
    )
    lines.append(
        f"- {e['processor']}, one thread, torch {e['versions']['torch']}; {e['date']}. Time is the processor's."
    )
    return "\n".join(lines)


def _table(summary: Summary) -> str:
    """Every method of a task."""
    methods = summary["methods"]
    base = final(methods["sgd"], "milliseconds") if "sgd" in methods else []
    rows = []
    for method in methods.values():
        failed = sum(one["diverged"] is not None for one in method["grid"])
        losses = final(method)
        lost = len(method["seeds"]) - len(losses)
        cells = [
            _settings(method),
            f"{_spread(losses)}{f', {lost} diverged' if lost else ''}",
            _spread([100 * x for x in final(method, "accuracy")], 1),
            f"{fmean(final(method, 'milliseconds')) / fmean(base):.1f}" if base and losses else "",
            f"{failed} of {len(method['grid'])}",
        ]
        rows.append((method["name"], *cells))
    header = ("", "chosen", "training loss", "test accuracy, %", "time a step / SGD's", "diverged in the grid")
    return markdown((header, rows))


def _settings(method: Summary) -> str:
    """The chosen configuration; a value at the end of its axis is in italics: the best may lie outside."""
    if method["chosen"] is None:
        return "all diverged"
    cells = []
    for name, value in method["chosen"].items():
        tried = sorted({one["settings"][name] for one in method["grid"]})
        edge = len(tried) > 2 and value in (tried[0], tried[-1])
        cells.append(f"{ARGUMENTS[name]} {f'*{value:g}*' if edge else f'{value:g}'}")
    return ", ".join(cells)


def _beside_paper(tasks: Mapping[str, Summary]) -> str:
    """Our test accuracies and its."""
    rows = []
    for key, theirs in PAPER.items():
        found = [s["methods"].get(key) for s in tasks.values()]
        name = next((m["name"] for m in found if m), None)
        if name is not None:
            ours = [_spread([100 * x for x in final(m, "accuracy")], 1) if m else "" for m in found]
            rows.append((name, *ours, *theirs))
    header = ("test accuracy, %", *tasks, "GLUE, prompt", "GLUE, LoRA", "CIFAR-100, LoRA", "CIFAR-10, MLP")
    return "Ours, and to the right the paper's (tables 1 and 5):\n\n" + markdown((header, rows))


def _claims(tasks: Mapping[str, Summary]) -> str:
    """Every claim on every task that has both methods."""
    rows = []
    for claim, a, b in CLAIMS:
        cells = []
        for summary in tasks.values():
            first, second = (summary["methods"].get(key) for key in (a, b))
            if not first or not second or not first["seeds"] or not second["seeds"]:
                cells.append("")
                continue
            numbers = " / ".join(f"{fmean(final(m)):.3g}" if final(m) else "diverged" for m in (first, second))
            cells.append(f"{numbers}: **{verdict(first, second)}**")
        if any(cells):
            rows.append((claim, *cells))
    return "Final training losses; *level* where the means differ by less than the seeds do:\n\n" + markdown((
        ("claim", *tasks), rows,
    ))  # fmt: skip


def _dampings(tasks: Mapping[str, Summary]) -> str:
    """The paper's updates at each damping: the best of the grid on the tuning seed."""
    rows = []
    for name, summary in tasks.items():
        for key in ("ef", "sf", "ief", "ief-half"):
            method = summary["methods"].get(key)
            if not method:
                continue
            best: dict[float, float] = {}
            for one in method["grid"]:
                damping = one["settings"]["gram_damping"]
                loss = float("inf") if one["diverged"] is not None else one["loss"]
                best[damping] = min(loss, best.get(damping, float("inf")))
            cells = " / ".join(f"{loss:.3g} at {damping:g}" for damping, loss in sorted(best.items()))
            rows.append((f"{name}, {method['name']}", cells))
    if not rows:
        return ""
    return "The least training loss at each damping of JJᵀ, tuning seed (a large one turns EF and SF into SGD):\n\n" + (
        markdown((("", "loss at λ"), rows))
    )


def _deviation(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _spread(values: list[float], digits: int | None = None) -> str:
    """Mean ± standard deviation."""
    if not values:
        return ""
    if digits is not None:
        return f"{fmean(values):.{digits}f} ± {_deviation(values):.{digits}f}"
    return f"{fmean(values):.3g} ± {_deviation(values):.2g}"
