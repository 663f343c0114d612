"""Scores as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from fisherkit.cli.scores.result import Computed, Example, Query, Result, Scored, unit
from fisherkit.cli.text import WIDTH, table

WIDEST = 60
"""Characters of a text that a row shows."""


def as_text(found: Result) -> str:
    """All of it, a table a query."""
    parts = ["\n".join(fill(line, WIDTH) for line in computed_line(found.computed).splitlines())]
    parts += [fill(text, WIDTH) for text in (unit(found.computed), *found.notes)]
    parts += [_query(query, found.computed.measurement) for query in found.queries]
    if found.self_influence:
        title = "Training examples whose own loss hangs most on themselves. Wrong labels are often among them; so are\n"
        rows = [_row("", scored) for scored in found.self_influence]
        parts.append(title + "rare and hard examples.\n\n" + _table(rows))
    # Texts come from anywhere: nothing in them may steer the terminal.
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in "\n\n".join(parts))


def computed_line(computed: Computed) -> str:
    """What was computed, in two sentences."""
    c = computed
    λ = "" if c.relative_damping is None else f", {c.relative_damping:g} × the mean eigenvalue"
    seconds = f"scores {c.score_seconds:.1f} s"
    if c.fisher_seconds is not None:
        seconds = f"Fisher {c.fisher_seconds:.1f} s, {seconds}"
    return (
        f"{c.model}: {c.queries:,} queries, {c.train:,} training examples, D = {c.parameters:,} parameters.\n"
        f"Fisher: {c.kind}, {c.structure}, N = {c.examples:,}, λ = {c.damping:.3g}{λ}; {seconds}."
    )


def signed(score: float) -> str:
    """A score with its sign."""
    return f"{score:+.3g}"


def described(example: Example) -> str:
    """Label, prediction and loss, as far as there are any."""
    parts = [] if example.label is None else [f"label {example.label}"]
    if example.prediction is not None:
        sure = "" if example.probability is None else f" ({example.probability:.2f})"
        parts.append(f"predicted {example.prediction}{sure}")
    return ", ".join([*parts, f"loss {example.loss:.3g}"])


def _query(query: Query, measurement: str) -> str:
    title = f"{query.example.place}: {described(query.example)}"
    if query.example.text is not None:
        title += f"\n{_short(query.example.text)}"
    rows = [_row("helpful", scored) for scored in query.helpful] + [_row("harmful", scored) for scored in query.harmful]
    return f"{title}\n\n" + (_table(rows) if rows else f"No training example moves its {measurement}.")


def _row(side: str, scored: Scored) -> tuple[str, ...]:
    e = scored.example
    sure = "" if e.probability is None else f" {e.probability:.2f}"
    predicted = "" if e.prediction is None else f"{e.prediction}{sure}"
    return (
        side, e.place, "" if e.label is None else e.label, predicted, _short(e.text or ""), signed(scored.score),
        f"{e.loss:.3g}",
    )  # fmt: skip


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Without the columns that no row fills."""
    header = ("", "training example", "label", "predicted", "text", "score", "loss")
    filled = [i for i in range(len(header)) if any(row[i] for row in rows)]
    left = sum(i < header.index("score") for i in filled)
    return table([header[i] for i in filled], [[row[i] for i in filled] for row in rows], left=left)


def _short(text: str) -> str:
    """The beginning of a text, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= WIDEST else line[: WIDEST - 1] + "…"
