"""Texts and labels of a file, as jsonl, csv or tsv."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisherkit.errors import DataError, InvalidArgumentError, listed

SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class Columns:
    """Names of the columns.

    Args:
        text: of the text.
        pair: of a second text (a premise's hypothesis, a question's answer); None if there is none.
        label: of the label; None if the model needs none.
    """

    text: str = "text"
    pair: str | None = None
    label: str | None = "label"

    @property
    def wanted(self) -> list[str]:
        """All of them."""
        return [name for name in (self.text, self.pair, self.label) if name is not None]


@dataclass(frozen=True)
class Text:
    """One line of a file.

    Args:
        text: the text.
        pair: the second text, if any.
        label: as the file has it: a string, a number or a list.
        place: where it stands, for errors.
    """

    text: str
    pair: str | None
    label: Any
    place: str


def read_texts(path: Path, columns: Columns, call: str, *, examples: int | None = None, seed: int = 0) -> list[Text]:
    """The lines of a file.

    Args:
        path: .jsonl (or .json, an object a line), .csv or .tsv (with a header).
        columns: what is read of each line.
        call: the command, for errors.
        examples: how many to draw, without repetition and in the file's order; None for all.
        seed: of the draw.

    Raises:
        InvalidArgumentError: no such file, or another ending.
        DataError: a line that is not an object, a column that is missing, a text that is no string or not there, a
            table without a header, or no line at all.
    """
    if not path.is_file():
        raise InvalidArgumentError(call=call, got=f"no file at {path}", expected="a .jsonl, .csv or .tsv file")
    texts = [_text(record, place, columns, call) for record, place in _records(path, columns, call)]
    if not texts:
        raise DataError(call=call, got=f"{path}, which has no line", expected="a text a line")
    if examples is None or examples >= len(texts):
        return texts
    drawn = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:examples]
    return [texts[i] for i in sorted(drawn.tolist())]


def _records(path: Path, columns: Columns, call: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Objects with where they stand."""
    suffix = path.suffix.lower()
    if suffix not in {".jsonl", ".json", *SEPARATORS}:
        raise InvalidArgumentError(
            call=call, got=f"{path}", expected="a .jsonl, .csv or .tsv file", try_="another file, or rename it"
        )
    with path.open(encoding="utf-8-sig", newline="") as file:
        if suffix in SEPARATORS:
            reader = csv.DictReader(file, delimiter=SEPARATORS[suffix])
            _check_header(reader.fieldnames or [], path, columns, call)
            for record in reader:
                place = f"line {reader.line_num} of {path.name}"
                _check_cells(record, place, SEPARATORS[suffix], call)
                yield record, place
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(line, f"line {number} of {path.name}", call), f"line {number} of {path.name}"


def _check_header(names: Sequence[str], path: Path, columns: Columns, call: str) -> None:
    """The first line of a table names its columns, each once.

    Raises:
        DataError: the table is empty, or its first line does not have a column that is wanted.
    """
    missing = [name for name in columns.wanted if name not in names]
    if not names:
        raise DataError(call=call, got=f"{path}, which is empty", expected="a header and a text a line")
    if missing:
        names_line = SEPARATORS[path.suffix.lower()].join(columns.wanted)
        shown = listed((repr(name if len(name) <= 40 else f"{name[:39]}…") for name in names), 4)
        raise DataError(
            call=call, got=f"{path}, whose first line is {shown}",
            expected=f"a header with the columns {columns.wanted}, of which {missing} are missing",
            why="the first line of a table names its columns; without a header it would be lost as a text",
            try_=f"a first line with {names_line!r} if there is no header; else --text-column, --pair-column, "
            "--label-column",
        )  # fmt: skip
    twice = [name for name in columns.wanted if list(names).count(name) > 1]
    if twice:
        raise DataError(call=call, got=f"{path} with two columns {twice[0]!r}", expected="one of each name")


def _check_cells(record: dict[str, Any], place: str, separator: str, call: str) -> None:
    """As many cells as the header has.

    Raises:
        DataError: more; the reader has put them under None.
    """
    beyond: Any = record.get(None)  # type: ignore[call-overload]  # csv's own key for them
    if beyond:
        raise DataError(
            call=call, got=f"{place} with {len(beyond)} more cells than the header", expected="as many",
            why=f"a {separator!r} parts cells unless the cell is in quotes", try_='"…" around texts that have one',
        )  # fmt: skip


def _object(line: str, place: str, call: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(call=call, got=f"{place}, which is not JSON ({error})", expected="an object a line") from error
    if not isinstance(found, dict):
        raise DataError(call=call, got=f"a {type(found).__name__} in {place}", expected="an object a line")
    return found


def _text(record: dict[str, Any], place: str, columns: Columns, call: str) -> Text:
    missing = [name for name in columns.wanted if name not in record]
    if missing:
        raise DataError(
            call=call, got=f"{place} with columns {sorted(k for k in record if isinstance(k, str))}",
            expected=f"{columns.wanted}, of which {missing} are missing",
            try_="--text-column, --pair-column, --label-column",
        )  # fmt: skip
    null = [name for name in columns.wanted if record[name] is None]
    if null:
        raise DataError(
            call=call, got=f"{place}, where {null[0]!r} is null or not there", expected="a value in every line",
            why="a line without it is no example", try_="leave the line out",
        )  # fmt: skip
    text, pair = record[columns.text], None if columns.pair is None else record[columns.pair]
    if not isinstance(text, str) or not isinstance(pair, (str, type(None))):
        raise DataError(call=call, got=f"a text that is no string in {place}", expected="strings")
    return Text(text, pair, None if columns.label is None else record[columns.label], place)
