"""Scores as one HTML page that needs nothing beside it: no script, no font, no file, nothing from the network.

Owns the markup and its style. Every text that comes from data or options is escaped.
"""

from __future__ import annotations

from html import escape

from fisherkit.cli.scores.result import Computed, Example, Query, Result, Scored, unit
from fisherkit.cli.scores.table import described, signed

LONGEST = 800
"""Characters of a text that the page shows; the JSON has all."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1e; --soft: #5b6167; --line: #d9dde1; --back: #fff; --card: #f6f7f9;
  --helpful: #0072b2; --harmful: #c24a00; --wrong: #b00020; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a0a7ae; --line: #3a4046; --back: #15181b;
  --card: #1e2226; --helpful: #56b4e9; --harmful: #f0915a; --wrong: #ff8a8a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 0 0 .5rem; }
.soft { color: var(--soft); }
.small { font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .75rem 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; }
nav a { display: flex; align-items: center; gap: .4rem; padding: .2rem .6rem; border: 1px solid var(--line);
  border-radius: 1rem; color: inherit; text-decoration: none; font-size: .85rem; }
nav img { width: 1.5rem; height: 1.5rem; object-fit: contain; image-rendering: pixelated; }
section { margin-top: 2rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
.query { display: flex; gap: 1rem; align-items: flex-start; margin-bottom: 1rem; }
.query img { width: 7rem; }
img { display: block; height: auto; image-rendering: pixelated; border-radius: 4px; border: 1px solid var(--line); }
.columns { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.columns > div { flex: 1 1 20rem; min-width: 0; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .5rem; align-content: start; }
.own ol { display: flex; flex-wrap: wrap; }
.own li { flex: 1 1 22rem; }
li { display: flex; gap: .75rem; background: var(--card); border-radius: 6px; padding: .6rem; }
li img { width: 3.5rem; flex: none; align-self: flex-start; }
li > div { flex: 1; min-width: 0; }
.text { margin: .25rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.score { display: flex; align-items: center; gap: .5rem; font-variant-numeric: tabular-nums; font-weight: 600; }
.score > span { min-width: 3.6rem; }
.track { flex: 1; height: .5rem; border-radius: .25rem; background: var(--line); overflow: hidden; }
.track span { display: block; height: 100%; }
.helpful .track span { background: var(--helpful); }
.helpful .score, h3.helpful { color: var(--helpful); }
.harmful .track span { background: var(--harmful); }
.harmful .score, h3.harmful { color: var(--harmful); }
.formula { white-space: nowrap; }
.wrong { color: var(--wrong); }
"""


def page(found: Result) -> str:
    """All of it.

    Args:
        found: what is shown.

    Returns:
        A whole HTML document, in UTF-8.
    """
    body = [_header(found)]
    if len(found.queries) > 1:
        body.append(_contents(found))
    body += [_query(query, found.computed) for query in found.queries]
    if found.self_influence:
        body.append(_own(found.self_influence))
    title = f"Influence scores – {found.computed.model}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _header(found: Result) -> str:
    c = found.computed
    relative = "" if c.relative_damping is None else f", {c.relative_damping:g} × the mean eigenvalue"
    source = f"built in {c.fisher_seconds:.1f} s" if c.fisher_seconds is not None else f"from the file {c.fisher_file}"
    facts = {
        "Model": f"{c.model}, D = {c.parameters:,} parameters",
        "Data": f"{c.train:,} training examples, {c.queries:,} queries",
        "Fisher": f"{c.kind}, {c.structure}, N = {c.examples:,}, {source}",
        "Damping": f"λ = {c.damping:.3g}{relative}",
        "Of what": f"{c.measurement} of each query, likelihood {c.likelihood}"
        + ("" if c.normalize is None else f", normalized by {c.normalize}"),
        "Scores": f"computed in {c.score_seconds:.1f} s",
        "Versions": ", ".join(f"{name} {version}" for name, version in c.versions.items()),
    }
    rows = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    notes = "\n".join(f"<p>{escape(note)}</p>" for note in found.notes)
    return (
        "<header>\n<h1>Influence scores</h1>\n"
        '<p class="soft">Which training examples these predictions hang on.</p>\n'
        f"<dl>\n{rows}\n</dl>\n"
        f"<p><strong>How to read it.</strong> {escape(unit(c))} "
        '<span class="formula">score = (1/N) ∇ℓ<sub>q</sub>ᵀ (F + λI)⁻¹ ∇ℓ<sub>n</sub>.</span> '
        "Read scores as a ranking: how far a loss really moves depends on how the model is trained on, and training "
        "anew often changes it by more than one example does. "
        "Bars are relative to the largest score of their query.</p>\n"
        f"{notes}\n</header>"
    )


def _contents(found: Result) -> str:
    links = []
    for query in found.queries:
        e = query.example
        words = e.place if e.label is None else f"{e.place}: {_short(e.label, 24)} → {_short(e.prediction or '', 24)}"
        links.append(f'<a href="#{_anchor(e)}">{_picture(e)}{escape(words)}</a>')
    return '<nav aria-label="Queries">\n' + "\n".join(links) + "\n</nav>"


def _query(query: Query, computed: Computed) -> str:
    largest = max((abs(s.score) for s in (*query.helpful, *query.harmful)), default=1.0)
    columns = [
        f'<div class="{side}">\n<h3 class="{side}">{title}</h3>\n{_list(scored, largest, empty)}\n</div>'
        for side, title, scored, empty in (
            ("helpful", "Helpful: without it the query fares worse", query.helpful, "No score is above 0."),
            ("harmful", "Harmful: without it the query fares better", query.harmful, "No score is below 0."),
        )
    ]
    e = query.example
    return (
        f'<section id="{_anchor(e)}">\n<div class="query">{_picture(e)}<div>\n<h2>{escape(_capital(e.place))}</h2>\n'
        f"{_text(e)}<p>{_described(e)}</p>\n</div></div>\n"
        '<div class="columns">\n' + "\n".join(columns) + "\n</div>\n</section>"
    )


def _own(scored: tuple[Scored, ...]) -> str:
    largest = max(abs(s.score) for s in scored) or 1.0
    return (
        '<section id="self" class="own harmful">\n<h2>Training examples that stand alone</h2>\n'
        "<p>The largest self-influence: how much an example's own loss would rise without it. Wrong labels are often "
        "among them; so are rare and hard examples. The loss beside it says much the same.</p>\n"
        f"{_list(scored, largest, '')}\n</section>"
    )


def _list(scored: tuple[Scored, ...], largest: float, empty: str) -> str:
    if not scored:
        return f'<p class="soft small">{escape(empty)}</p>'
    return "<ol>\n" + "\n".join(_item(one, largest) for one in scored) + "\n</ol>"


def _item(scored: Scored, largest: float) -> str:
    e, share = scored.example, 100 * abs(scored.score) / (largest or 1.0)
    return (
        f'<li>{_picture(e)}<div><div class="score"><span>{escape(signed(scored.score))}</span>'
        f'<div class="track"><span style="width: {share:.1f}%"></span></div></div>'
        f'{_text(e)}<div class="small">{_described(e)}</div>'
        f'<div class="small soft">{escape(e.place)}</div></div></li>'
    )


def _described(example: Example) -> str:
    """Label, prediction and loss; marked where the first two differ."""
    wrong = example.prediction is not None and example.probability is not None and example.label != example.prediction
    text = escape(described(example))
    return f'<span class="wrong">{text}</span>' if wrong else text


def _text(example: Example) -> str:
    return "" if example.text is None else f'<p class="text">{escape(_short(example.text, LONGEST))}</p>'


def _picture(example: Example) -> str:
    if example.picture is None:
        return ""
    return f'<img src="{escape(example.picture)}" alt="{escape(_capital(example.place))}">'


def _anchor(example: Example) -> str:
    return f"query-{example.index}"


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
