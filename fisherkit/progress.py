"""Progress bars on the error stream: how much there is, how much is done, and the time that is left.

Owns how a bar looks and where it is shown. Knows nothing of what is counted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, TextIO, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")

FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:.4g}/{total:.4g} {unit} [{elapsed}<{remaining}]"
SHARE = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
"""What bars whose end is known look like, with how many pieces there are or with the share alone."""

_lines_every: ContextVar[float | None] = ContextVar("lines_every", default=None)


def bar(total: float | None, description: str, unit: str, *, shown: bool, steps: bool = True) -> Any:
    """A `tqdm.tqdm` to be told of every piece that is done; the time that is left is known after the first.

    ``total`` is None if it is not known; without ``steps`` it shows the share that is done and not how many pieces.
    """
    if not shown:
        return _silent()
    options: dict[str, Any] = {} if total is None else {"bar_format": FORMAT if steps else SHARE, "smoothing": 0.1}
    every = _lines_every.get()
    if every is not None:
        options |= {"file": _Lines(sys.stderr), "delay": every, "mininterval": every, "maxinterval": every, "ncols": 80}
    elif _columns() == 0:  # a terminal that does not tell its size, where a bar would have none
        options |= {"ncols": 80, "nrows": 24}
    return tqdm(total=total, desc=description, unit=unit, leave=False, **options)


def say(text: str) -> None:
    """A line on the error stream, above whatever bar there is."""
    tqdm.write(text, file=sys.stderr)


def beside(shown: Any, items: Iterable[Item]) -> Iterator[Item]:
    """The items, with a bar that goes when they end, however they end; telling it of them is the caller's."""
    with shown:
        yield from items


@contextmanager
def in_lines(seconds: float) -> Iterator[None]:
    """Bars as a line every so many seconds, for streams that are no terminals: what takes less says nothing."""
    token = _lines_every.set(seconds)
    try:
        yield
    finally:
        _lines_every.reset(token)


class _Lines:
    """A stream on which whatever would overwrite a line is a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self._stream.flush()


@cache
def _silent() -> Any:
    """The bar that shows nothing: one for all, as making one takes locks."""
    return tqdm(disable=True)


def _columns() -> int | None:
    """The width of the terminal behind the error stream; None if there is none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError, AttributeError):
        return None
