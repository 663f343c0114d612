"""Plain text for the terminal: tables, numbers, progress."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from fisherkit.progress import bar, beside

Item = TypeVar("Item")

WIDTH = 80
"""Of a terminal."""
NARROWEST = 12
"""Of a column of texts."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns two spaces apart under a rule, the first ``left`` of them texts, which go on below to fit a terminal."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    while (over := sum(widths) + 2 * (len(widths) - 1) - WIDTH) > 0:
        widest = max(range(left), key=widths.__getitem__)
        if widths[widest] <= NARROWEST:
            break
        second = max([NARROWEST, *(widths[i] for i in range(left) if i != widest)])
        widths[widest] = max(widths[widest] - over, min(second, widths[widest] - 1), NARROWEST)

    def lines(cells: Sequence[str]) -> Iterator[str]:
        parts = [
            _wrapped(cell, w) if i < left else [cell] for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        for row in itertools.zip_longest(*parts, fillvalue=""):
            aligned = [
                cell.ljust(w) if i < left else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            yield "  ".join(aligned).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([*lines(header), rule, *(line for row in rows for line in lines(row))])


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """Names and what they are, a line each; long ones go on below."""
    found = list(items)
    width = max(len(name) for name, _ in found)
    lines = []
    for name, value in found:
        gap = " " if len(value) == WIDTH - width - 1 else "  "  # a hash is one word
        first, *others = _wrapped(value, WIDTH - width - len(gap))
        lines += [f"{name:<{width}}{gap}{first}".rstrip(), *(f"{'':<{width}}  {other}" for other in others)]
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    """A text in lines, broken where there is a space, else after a sign that parts names, else anywhere."""
    lines, rest = [], text
    while len(rest) > width:
        part = rest[: width + 1]
        place = part.rfind(" ")
        if place <= 0:
            place = max(part[:width].rfind(sign) for sign in "./_-,") + 1
        place = place if place > 0 else width
        lines.append(rest[:place].rstrip())
        rest = rest[place:].lstrip()
    return [*lines, rest]


def apart(values: Sequence[float], digits: int = 3) -> list[str]:
    """Numbers with some significant digits, and as many more as it takes to tell different ones apart."""
    enough = (d for d in range(digits, 17) if len({f"{value:.{d}g}" for value in values}) == len(set(values)))
    found = next(enough, 17)
    return [f"{value:.{found}g}" for value in values]


def progress(items: Sequence[Item]) -> Iterable[Item]:
    """The items, with a bar on the error stream."""
    shown = bar(len(items), "batches", "", shown=True)
    for item in beside(shown, items):
        yield item
        shown.update()
