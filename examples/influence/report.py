"""The results in Markdown. Reads results alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from examples.influence.summary import ROBUST, TIMES, WITHIN, Aim, Curve, aims, curves
from examples.shared.results import markdown


def report(results: Mapping[str, Mapping[str, Any]], pictures: str) -> str:
    """Everything, for a page.

    Args:
        results: by setting.
        pictures: the folder of the pictures, relative to the page.
    """
    found = {name: curves(result) for name, result in results.items()}
    parts = [_settings(results)]
    for name, own in found.items():
        parts += [f"### {results[name]['title']}", _table(own)]
    goals = {name: aims(own) for name, own in found.items()}
    if any(goals.values()):
        parts += ["### Exact quality at the empirical Fisher's price", _aims(goals)]
    if any(len(curve.means) > 1 for own in found.values() for curve in own.values()):
        parts += ["### Damping", f"![Score over damping]({pictures}/damping.png)", _sweeps(found)]
    parts.append(f"![Score and time]({pictures}/time.png)")
    return "\n\n".join(parts)


def _settings(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, r in results.items():
        low, high = r["ceiling"][1:]
        tiny = " (tiny: the figures mean nothing)" if r["tiny"] else ""
        lines.append(
            f"- **{name}**{tiny}: {r['title']}; {r['parameters']:,} "
            f"parameters, {r['train']:,} training examples, {r['queries']} queries, {r['subsets']} random halves × "
            f"{r['seeds']} seeds. Scores of {r['models']} models, right on {100 * r['accuracy']:.1f}% of the queries. "
            f"Noise ceiling {r['ceiling'][0]:.3f} ({low:.3f} to {high:.3f})."
        )
    e = next(iter(results.values()))["environment"]
    lines.append(f"- {e['processor']}, {e['threads']} thread, torch {e['versions']['torch']}; {e['date']}.")
    return "\n".join(lines)


def _table(own: Mapping[str, Curve]) -> str:
    """Every method at λ = 1."""
    header = (
        "", "LDS", "95 % interval", "minus full, EF", "minus full, exact", "fit, s", "scores, s",
    )  # fmt: skip
    rows = [
        (
            name, f"{c.value:.3f}", "{:.3f} to {:.3f}".format(*c.row["interval"]), _difference(c, "full, EF"),
            _difference(c, "full, exact"), f"{c.row['fit_seconds']:.2f}", f"{c.row['seconds']:.2f}",
        )
        for name, c in own.items()
    ]  # fmt: skip
    return markdown(header, rows)


def _difference(curve: Curve, other: str) -> str:
    found = curve.minus(other)
    if found is None or curve.method == other:
        return ""
    mean, (low, high) = found
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def _aims(goals: Mapping[str, Mapping[str, Aim]]) -> str:
    """How far behind the exact Fisher, in how many times the empirical one's time, and how robust."""
    places = [name for name, own in goals.items() if own]
    methods = dict.fromkeys(method for name in places for method in goals[name])
    rows = []
    for method in methods:
        cells = []
        for name in places:
            aim = goals[name].get(method)
            if aim is None:
                cells += ["", "", ""]
            else:
                robust = "" if aim.robustness is None else f"{aim.robustness:.2f}"
                cells += [f"{aim.behind:+.3f}", f"{aim.times:.1f}", robust]
        present = [goals[name][method] for name in places if method in goals[name]]
        reached = bool(present) and all(aim.reached for aim in present)
        rows.append((method, *cells, "yes" if reached else ""))
    header = [""]
    for name in places:
        header += [f"behind exact, {name}", "× EF's time", "min/max"]
    text = (
        f"At λ = 1 × the mean eigenvalue: how far the score is below the exact Fisher's (aim: {WITHIN:g} at most), "
        f"fit and scores over the empirical Fisher's time (aim: under {TIMES:g}), and the least over the greatest "
        f"score for λ from 1e-6 to 10 mean eigenvalues (aim: {ROBUST:g} at least; empty where that was not measured). "
        "*All*: the three together in every setting that the method was measured in.\n\n"
    )
    return text + markdown((*header, "all"), rows)


def _sweeps(found: Mapping[str, Mapping[str, Curve]]) -> str:
    """Scores over dampings, a table a setting."""
    parts = []
    for name, own in found.items():
        swept = [curve for curve in own.values() if len(curve.means) > 1]
        if not swept:
            continue
        dampings = sorted({damping for curve in swept for damping in curve.means})
        rows = []
        for c in swept:
            cells = [_bold(c, damping) for damping in dampings]
            rows.append((c.method, *cells, "" if c.robustness is None else f"{c.robustness:.2f}"))
        header = (f"{name}, λ over the mean eigenvalue", *(f"{damping:g}" for damping in dampings), "min/max")
        parts.append(markdown(header, rows))
    return "\n\n".join(parts)


def _bold(curve: Curve, damping: float) -> str:
    """A score, bold where it is the method's best."""
    if damping not in curve.means:
        return ""
    text = f"{curve.means[damping]:.3f}"
    return f"**{text}**" if damping == curve.best else text
