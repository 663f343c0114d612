"""The results in Markdown. Reads results alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from examples.benchmarks.report import markdown
from examples.continual.methods import METHODS, Method
from examples.continual.report_claims import claims
from examples.continual.report_default import default
from examples.continual.report_libraries import laplace, libraries
from examples.continual.summary import Curve, Place, curves, of_method, span

NORMALIZED = {"trace": "trace", "none": "as it is"}


def report(results: Mapping[str, Mapping[str, Any]], pictures: str) -> str:
    """Everything, for a page.

    Args:
        results: by bench.
        pictures: the folder of the pictures, relative to the page.
    """
    found = curves(results)
    parts = [
        _setting(results, found),
        "### The defaults and other libraries' ways\n\n" + libraries(found),
        "### The best strength in units of the Laplace approximation\n\n" + laplace(found),
        "### A default\n\n" + default(found),
        "### Claims\n\n" + claims(found),
        "### How far the best strength moves\n\n" + _moves(found),
        f"![Best strengths]({pictures}/best-strengths.png)",
        *(f"### {bench}, {_REGIMES[regime]}\n\n{_table(own)}" for (bench, regime), own in found.items()),
        "### Curves",
        *(
            f"![{structure}, {normalization}]({pictures}/strength-{structure}-{normalization}.png)"
            for normalization in NORMALIZED
            for structure in dict.fromkeys(m.structure for m in METHODS.values() if m.structure)
            if any(
                f"{normalization}/{m.key}" in own
                for own in found.values()
                for m in METHODS.values()
                if m.structure == structure
            )
        ),
    ]
    return "\n\n".join(filter(None, parts))


_REGIMES = {"fit": "fit to near zero loss", "early": "early stopped"}


def _setting(results: Mapping[str, Mapping[str, Any]], found: Mapping[Place, Mapping[str, Curve]]) -> str:
    lines = []
    for bench, result in results.items():
        s, cells = result["settings"], result["cells"].values()
        model = s.get("model") or "MLP " + "-".join(map(str, s["widths"]))
        losses = []
        for regime, epochs in s["epochs"].items():
            none = found.get((bench, regime), {}).get("trace/none")
            if none is not None:
                row = none.cell["loss"][0]
                losses.append(
                    f"{regime}: {epochs} epochs, training loss without penalty {min(row):.2g} to {max(row):.2g}"
                )
        built, whole = (sum(cell[name] for cell in cells) for name in ("build_seconds", "seconds"))
        lines.append(
            f"- **{bench}**: {s['title']}; {model}, {len(s['seeds'])} seeds. {'; '.join(losses)}. "
            f"{len(result['cells'])} cells in {whole / 60:.0f} min, {100 * built / max(whole, 1e-9):.0f}% Fishers."
        )
    settings, environments = ([result[name] for result in results.values()] for name in ("settings", "environment"))
    rates = sorted({f"batches of {s['batch']} and first step {s['rate']:g}" for s in settings})
    examples = next((f", full ones of {s['examples']}" for s in settings if "examples" in s), "")
    e = environments[-1]
    lines += [
        f"- Adam, {', or '.join(rates)}, falling linearly to zero within each task; no "
        "weight decay. Adam's steps are bounded whatever the penalty's size, so that no strength diverges; a large one "
        "freezes. Squared batch gradients are of all of a task's batches, diagonal and Kronecker Fishers of all its "
        f"training examples{examples}.",
        "- Strengths in half decades. The strength of a method is chosen on the mean over seeds of the test accuracy, "
        "for every method alike; the deviation is over seeds. *Within 3* is how many decades around the best stay "
        "within 3 points of it. An edge of the sweep is marked with *.",
        f"- {e['processor']}, {e['threads']} thread, torch {e['versions']['torch']}; "
        f"{' to '.join(dict.fromkeys((min(x['date'] for x in environments), max(x['date'] for x in environments))))}.",
    ]
    return "\n".join(lines)


def _table(own: Mapping[str, Curve]) -> str:
    """Every method of a bench and regime, normalized to the left and as it is to the right."""
    names = ("accuracy, %", "best strength", "within 3")
    header = ("", *(f"{name}, {label}" for label in NORMALIZED.values() for name in names))
    rows = []
    for method in METHODS.values():
        pair = [own.get(f"{normalization}/{method.key}") for normalization in NORMALIZED]
        if any(pair):
            rows.append((title(method), *(cell for curve in pair for cell in _cells(curve))))
    return markdown((header, rows))


def _cells(curve: Curve | None) -> tuple[str, str, str]:
    """Accuracy at the best strength, that strength, and the decades near it."""
    if curve is None:
        return "", "", ""
    accuracy = f"{curve.best:.1f} ± {curve.deviation:.1f}"
    if not curve.strengths:
        return accuracy, "", ""
    return accuracy, f"{curve.strength:.2g}{'*' if curve.at_edge else ''}", f"{curve.decades():.1f}"


def title(method: Method) -> str:
    """A method's name with its structure."""
    return f"{method.structure}, {method.title}" if method.structure else method.title


def _moves(found: Mapping[Place, Mapping[str, Curve]]) -> str:
    """Best strengths of every method in all places, and how many decades lie between them."""
    places = list(found)
    rows = []
    for normalization, label in NORMALIZED.items():
        for method in METHODS.values():
            own = of_method(found, f"{normalization}/{method.key}")
            if not method.swept or len(own) < 2:
                continue
            cells = [f"{own[place].strength:.2g}" if place in own else "" for place in places]
            rows.append((f"{title(method)} ({label})", *cells, f"{_regimes(own):.1f}", f"{span(own):.1f}"))
    header = ("best strength", *(f"{bench}, {regime}" for bench, regime in places), "regimes, decades", "all, decades")
    text = (
        "Decades between the least and the greatest best strength: the largest move between the two regimes of a "
        "bench, and over everything.\n\n"
    )
    return text + markdown((header, rows))


def _regimes(own: Mapping[Place, Curve]) -> float:
    """The largest move between the regimes of one bench."""
    benches = dict.fromkeys(bench for bench, _ in own)
    return max(span({place: curve for place, curve in own.items() if place[0] == bench}) for bench in benches)
