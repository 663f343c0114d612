"""Plain text for the terminal and from it: tables, numbers, progress, lists between commas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import typer
from tqdm.auto import tqdm

Item = TypeVar("Item")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns of equal width, two spaces apart, with a rule under the header.

    Args:
        header: names of the columns.
        rows: cells.
        left: how many of the first columns are text, aligned to the left; the others are numbers, to the right.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def number(value: float, digits: int = 3) -> str:
    """A number with some significant digits and no exponent where it is of ordinary size."""
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else digits - 1
    return f"{value:,.{decimals}f}"


def progress(items: Sequence[Item]) -> Iterable[Item]:
    """The items, with a bar on the error stream where that is a terminal."""
    return tqdm(items, leave=False, disable=None)


def words(text: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str, option: str, expected: str = "a list of numbers such as 1e-7,1e-3") -> tuple[float, ...]:
    """The numbers between commas.

    Args:
        text: an option's value.
        option: its name, for errors.
        expected: what it might be.

    Raises:
        typer.BadParameter: a word that is no number.
    """
    try:
        return tuple(float(word) for word in words(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not {expected}", param_hint=option) from error
