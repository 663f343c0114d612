"""The tables of `examples.merging.small` in Markdown. Reads summaries alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from examples.merging.methods import DAMPING, DEFAULT, GRID, KINDS, PLAIN, RATIO, REGMEAN, STRUCTURES, Setting
from examples.merging.small_summary import NAMES, Family, Spread, families
from examples.shared.results import markdown

SAME = Setting("block", REGMEAN, DAMPING)
"""RegMean with the default's normalisation and damping."""

PROPOSED = "ief"
"""The kind whose default is held against RegMean."""

Suites = Mapping[str, Mapping[str, Any]]


def report(summaries: Suites) -> str:
    """Everything, for a page.

    Args:
        summaries: by suite.
    """
    parts = [_what(summaries), _defaults(summaries), claims(summaries)]
    parts += [
        "![held-out accuracy over ρ](../assets/merging/merging-ratio.png)",
        "![held-out accuracy over damping](../assets/merging/merging-damping.png)",
        _plain(summaries), _choices(summaries), _grid(summaries), _normalizations(summaries), _residuals(summaries),
    ]  # fmt: skip
    return "\n\n".join(filter(None, parts))


def _what(summaries: Suites) -> str:
    lines = []
    for name, s in summaries.items():
        t, recipe = s["training"], s["recipe"]
        lines.append(
            f"- **{name}**: {s['title']}; {s['seeds']} seeds; start {t['start']}% right on the tasks, each model "
            f"{t['own']}% on its own, training loss at most {t['loss']:.2g} (Adam, step {recipe['learning_rate']:g}, "
            f"batches of 64); Fishers of {s['examples']} examples a task."
        )
    e = next(iter(summaries.values()))["environment"]
    lines.append(f"- {e['processor']}, {e['threads']} thread, torch {e['versions']['torch']}; {e['date']}.")
    return "\n".join(lines)


def _rows(summaries: Suites) -> list[tuple[str, str, str]]:
    """(label, family, setting) of the table of defaults."""
    rows = [
        ("average", "average", ""),
        ("task arithmetic, scale 0.3", "task arithmetic", "0.3"),
        ("RegMean, as its paper has it (off the diagonal × 0.9)", "regmean", "0.9"),
        ("RegMean, not shrunk", "regmean", "1"),
        ("RegMean, blocks normalised, the same λ", "regmean, damped", SAME.key),
    ]
    found = {family for s in summaries.values() for family in s["families"]}
    for structure in ("kfac", "full", "diagonal"):
        rows += [
            (f"{structure}, {NAMES[kind]}", f"{structure}/{kind}", DEFAULT.key)
            for kind in KINDS
            if f"{structure}/{kind}" in found
        ]
    return rows


def _defaults(summaries: Suites) -> str:
    """Every method at one setting for all suites."""
    tables = {name: families(s) for name, s in summaries.items()}
    rows = [
        (label, *(_cell(tables[name], family, setting) for name in tables))
        for label, family, setting in _rows(summaries)
    ]
    rows.append(("trained on all tasks at once", *(str(Spread.of(s["training"]["joint"])) for s in summaries.values())))
    text = (
        "Held-out accuracy, percent, mean over tasks, ± standard deviation over seeds. Fishers: blocks normalised, "
        f"ρ = {RATIO:g}, λ = {DEFAULT.damping:g} of the mean eigenvalue, for every kind, structure and suite."
    )
    return f"{text}\n\n{markdown(('one setting for everything', *summaries), rows)}"


def _cell(found: Mapping[str, Family], family: str, setting: str) -> str:
    own = found.get(family)
    return str(Spread.of(own.test(setting))) if own is not None and setting in own.settings else "–"


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(summaries: Suites) -> str:
    """What the default is meant to do and what was expected of plain Fishers, on every suite."""
    rows = [(claim, name, *said) for name, s in summaries.items() for claim, *said in _claims(families(s))]
    return markdown(("claim", "suite", "measured", "verdict"), sorted(rows, key=lambda row: _place(rows, row[0])))


def _claims(found: Mapping[str, Family]) -> list[tuple[str, str, str]]:
    """(claim, measured, verdict) of a suite."""
    kfac = {kind: found[f"kfac/{kind}"] for kind in KINDS if f"kfac/{kind}" in found}
    default = {kind: fmean(family.test(DEFAULT.key)) for kind, family in kfac.items()}
    plain = {kind: fmean(family.test(family.best(among=_is_plain))) for kind, family in kfac.items()}
    diagonal = [fmean(f.test(f.best())) for key, f in found.items() if key.startswith("diagonal/")]
    published = found["regmean"].test("0.9")
    regmean = fmean(published)
    best = max((f.test(f.best()) for key, f in found.items() if key.startswith("regmean")), key=fmean)
    least, top = min(default, key=default.__getitem__), max(plain, key=plain.__getitem__)
    usual = kfac.get(PROPOSED, kfac[least]).test(DEFAULT.key)
    rows = [
        (f"the default with {NAMES[PROPOSED]} is at or above RegMean (0.9)", _against(usual, published),
         fmean(usual) >= regmean),
        ("… and at or above RegMean at the best of all its settings on the test data", _against(usual, best),
         fmean(usual) >= fmean(best)),
        ("the default with any kind is at or above RegMean (0.9)",
         f"least {default[least]:.1f} ({NAMES[least]}), RegMean {regmean:.1f}", default[least] >= regmean),
        ("plain kfac is below RegMean (0.9) at any damping",
         f"best {plain[top]:.1f} ({NAMES[top]}), RegMean {regmean:.1f}", plain[top] < regmean),
        ("diagonals are below RegMean (0.9) at every setting",
         f"{min(diagonal):.1f}–{max(diagonal):.1f}, RegMean {regmean:.1f}", max(diagonal) < regmean),
    ]  # fmt: skip
    return [(claim, measured, "held" if held else "**failed**") for claim, measured, held in rows]


def _against(ours: list[float], theirs: list[float]) -> str:
    """Two means, and the difference of each seed's two numbers."""
    # Seeds are measured in one order: while a run is going on, one method may have more of them.
    differences = [a - b for a, b in zip(ours, theirs, strict=False)]
    won = sum(difference >= 0 for difference in differences)
    spread = f"{fmean(differences):+.1f} ± {Spread.of(differences).std:.1f}"
    return f"{fmean(ours):.1f} against {fmean(theirs):.1f}: {spread} by seed, {won} of {len(differences)} seeds"


def _place(rows: Sequence[Sequence[str]], claim: str) -> int:
    return [row[0] for row in rows].index(claim)


def _is_plain(setting: str) -> bool:
    return setting in {plain.key for plain in PLAIN}


# -- more tables -------------------------------------------------------------------------------------------------------


def _by_kind(summaries: Suites, text: str, cell: Any, before: Sequence[Sequence[str]] = ()) -> str:
    """A row for each structure and kind, and others before them."""
    tables = {name: families(s) for name, s in summaries.items()}
    keys = [f"{structure}/{kind}" for structure in STRUCTURES for kind in KINDS]
    rows = [
        *before,
        *(
            (_label(key), *(cell(found.get(key)) for found in tables.values()))
            for key in keys
            if any(key in found for found in tables.values())
        ),
    ]
    return f"{text}\n\n{markdown(('', *summaries), rows)}"


def _label(key: str) -> str:
    structure, _, kind = key.partition("/")
    return f"{structure}, {NAMES[kind]}"


def _plain(summaries: Suites) -> str:
    def cell(family: Family | None) -> str:
        return "–" if family is None else str(Spread.of(family.test(family.best(among=_is_plain))))

    text = "Fishers as they are (ρ = 0, not normalised), at the damping that is best on the test data:"
    return _by_kind(summaries, text, cell)


def _choices(summaries: Suites) -> str:
    """What choosing by training accuracy gives, and what is the best there is."""

    def cell(family: Family | None, default: str = DEFAULT.key) -> str:
        if family is None:
            return "–"
        best = family.best()
        numbers = (family.test(default), family.chosen(), family.test(best))
        return f"{' / '.join(f'{fmean(one):.1f}' for one in numbers)} ({best})"

    text = (
        "One setting for everything / the setting of best accuracy on the tasks' training examples, chosen for each "
        "seed / the setting that is best on the test data (normalisation/ρ/λ, ρ = 1e9 for RegMean; or the share kept "
        "off the diagonal):"
    )
    tables = [families(s) for s in summaries.values()]
    rows = [
        ("RegMean", *(cell(found["regmean"], "0.9") for found in tables)),
        ("RegMean, blocks normalised", *(cell(found["regmean, damped"], SAME.key) for found in tables)),
    ]
    return _by_kind(summaries, text, cell, rows)


def _grid(summaries: Suites) -> str:
    """Mean over suites of training and of held-out accuracy, over ρ and λ: how they agree."""
    tables = [families(s) for s in summaries.values()]
    settings = sorted({s for s in GRID if s.normalize == "block" and s.ratio > 0}, key=lambda s: (s.ratio, s.damping))
    rows = []
    for kind in KINDS:
        found = [own[f"kfac/{kind}"] for own in tables if f"kfac/{kind}" in own]
        if found:
            rows.append((NAMES[kind], *(_pair([own.settings[setting.key] for own in found]) for setting in settings)))
    text = "kfac, blocks normalised: training / held-out accuracy, mean over suites, at ρ, λ ="
    return f"{text}\n\n{markdown(('', *(f'{s.ratio:g}, {s.damping:g}' for s in settings)), rows)}"


def _pair(cells: Sequence[Mapping[str, list[float]]]) -> str:
    train, test = (fmean(fmean(cell[measure]) for cell in cells) for measure in ("train", "test"))
    return f"{train:.1f} / {test:.1f}"


def _normalizations(summaries: Suites) -> str:
    tables = {name: families(s) for name, s in summaries.items()}
    settings = [s for s in GRID if s.ratio == RATIO and s.damping == DEFAULT.damping]
    rows = []
    for kind in KINDS:
        for setting in settings:
            cells = [_cell(found, f"kfac/{kind}", setting.key) for found in tables.values()]
            if set(cells) != {"–"}:
                rows.append((f"{NAMES[kind]}, {setting.normalize}", *cells))
    text = f"kfac by normalisation, at ρ = {RATIO:g} and λ = {DEFAULT.damping:g}:"
    return f"{text}\n\n{markdown(('', *summaries), rows)}"


def _residuals(summaries: Suites) -> str:
    worst = max(
        value
        for s in summaries.values()
        for settings in s["families"].values()
        for cells in settings.values()
        for value in cells.get("residual", [0.0])
    )
    return f"The largest relative residual of any linear system in these tables is {worst:.1e}."
