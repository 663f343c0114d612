"""Checksums: what tells a damaged file from the one that was written.

Every mebibyte of every tensor has a CRC-32 (that of gzip and zip), so that a part is compared without reading the rest;
one more is of the description, in which those of the tensors are, so that nothing that a reader uses changes unnoticed.
Against accidents, not forgery. Owns how checksums are written in a description; knows neither files nor what they are
for.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 20
"""Bytes of a tensor that have a checksum of their own; the last piece may be shorter."""

CHECKSUMS = "checksums"
"""The entry with the tensors' checksums."""
CHECKSUM = "checksum"
"""The entry with the description's own."""

_DIGITS = 8


@dataclass(frozen=True)
class TensorChecksum:
    """What a tensor was when it was written.

    Args:
        dtype: as ``str(tensor.dtype)`` without ``torch.``.
        shape: its shape.
        crc32: eight hexadecimal digits for each piece of its bytes, little-endian and row-major.
    """

    dtype: str
    shape: tuple[int, ...]
    crc32: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorChecksum:
        """That of a tensor on the CPU."""
        return cls(_dtype(tensor), tuple(tensor.shape), "".join(_pieces(_raw(tensor))))

    def check(self, tensor: Tensor) -> None:
        """Compare a whole tensor.

        Raises:
            ValueError: it is another.
        """
        self._check_form(tensor, tuple(tensor.shape))
        self._check_pieces(_raw(tensor), 0)

    def rows_around(self, start: int, stop: int) -> tuple[int, int]:
        """The rows along the first axis that must be read to compare those from start to stop."""
        width = self._row_bytes
        if width == 0:
            return start, stop
        first, end = start * width // PIECE * PIECE, -(-stop * width // PIECE) * PIECE
        return first // width, min(-(-end // width), self.shape[0])

    def check_rows(self, rows: Tensor, first: int, shape: tuple[int, ...]) -> None:
        """Compare the pieces that lie in some rows as a whole.

        Args:
            rows: as many as `rows_around` said.
            first: the place of the first of them.
            shape: the whole tensor's, as the file has it.

        Raises:
            ValueError: they are others.
        """
        self._check_form(rows, shape)
        begin = first * self._row_bytes
        number = -(-begin // PIECE)
        raw = _raw(rows)[number * PIECE - begin :]
        whole = first + len(rows) == self.shape[0]
        self._check_pieces(raw if whole else raw[: len(raw) // PIECE * PIECE], number)

    @property
    def _row_bytes(self) -> int:
        size: int = getattr(torch, self.dtype).itemsize
        for side in self.shape[1:]:
            size *= side
        return size

    def _check_form(self, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if (_dtype(tensor), shape) != (self.dtype, self.shape):
            raise ValueError(f"{_dtype(tensor)} {list(shape)} where {self.dtype} {list(self.shape)} was written")

    def _check_pieces(self, raw: memoryview, number: int) -> None:
        found = "".join(_pieces(raw))
        if found != self.crc32[number * _DIGITS : number * _DIGITS + len(found)]:
            raise ValueError("its values are not those that were written, by their checksum")


def sealed(entries: Mapping[str, str], checksums: Mapping[str, TensorChecksum]) -> dict[str, str]:
    """A description with the checksums of its tensors, by name, and its own."""
    whole = {**entries, CHECKSUMS: json.dumps({name: asdict(found) for name, found in checksums.items()})}
    return {**whole, CHECKSUM: seal(whole)}


def seal(entries: Mapping[str, Any]) -> str:
    """The checksum of a description: of its JSON with sorted keys, as Python writes it."""
    text = json.dumps({key: value for key, value in entries.items() if key != CHECKSUM}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):0{_DIGITS}x}"


def unsealed(entries: Mapping[str, Any], names: Iterable[str]) -> dict[str, TensorChecksum] | None:
    """The checksums of the named tensors, once a description has been found to be as it was written.

    None if the description has none, as before they were introduced.

    Raises:
        ValueError: it is not what was written, or not of these tensors.
    """
    if CHECKSUM not in entries and CHECKSUMS not in entries:
        return None
    # With one alone, the other's name was damaged.
    if CHECKSUM not in entries or CHECKSUMS not in entries or seal(entries) != entries[CHECKSUM]:
        raise ValueError("its description is not what was written, by its checksum")
    try:
        found = {
            name: TensorChecksum(entry["dtype"], tuple(entry["shape"]), entry["crc32"])
            for name, entry in parse(entries[CHECKSUMS]).items()
        }
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"checksums that are none ({error!r})") from error
    if differing := sorted(found.keys() ^ set(names)):
        raise ValueError(f"tensors and checksums differ in {differing[:4]}")
    return found


def parse(text: str | bytes) -> Any:
    """JSON in which no object has a key twice.

    Raises:
        ValueError: it is something else, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("JSON with a key twice")
    return found


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _pieces(raw: memoryview) -> list[str]:
    starts = range(0, len(raw), PIECE)

    def of(start: int) -> str:
        return f"{zlib.crc32(raw[start : start + PIECE]):0{_DIGITS}x}"

    threads = min(torch.get_num_threads(), len(starts))
    if threads < 2:
        return [of(start) for start in starts]
    with ThreadPoolExecutor(threads) as pool:  # zlib lets go of the interpreter's lock
        return list(pool.map(of, starts))
