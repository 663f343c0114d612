"""Checksums: what tells a damaged file from the one that was written.

Every mebibyte of every tensor has a CRC-32 (that of gzip and zip), so that a part is compared without reading the rest;
one more is of the description, in which those of the tensors are, so that nothing that a reader uses changes unnoticed.
Against accidents, not forgery. Owns how checksums are written in a description; knows neither files nor what they are
for.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

PIECE = 1 << 20
"""Bytes of a tensor that have a checksum of their own; the last piece may be shorter."""

CHECKSUMS = "checksums"
"""The entry with the tensors' checksums."""
CHECKSUM = "checksum"
"""The entry with the description's own."""

_DIGITS = 8


class Written(NamedTuple):
    """What a tensor was when it was written; eight digits of ``crc32`` for each piece of its little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    crc32: str

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Written:
        """The inverse of ``_asdict``, as JSON gives it back."""
        return cls(entry["dtype"], tuple(entry["shape"]), entry["crc32"])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row along the first axis."""
        size: int = getattr(torch, self.dtype).itemsize
        return size * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return self.row_bytes * math.prod(self.shape[:1])


class Checksums:
    """The checksums of a file's tensors by their names, or none, where nothing is known to compare with."""

    def __init__(self, tensors: Mapping[str, Written] | None) -> None:
        self._tensors = tensors

    def __bool__(self) -> bool:
        return self._tensors is not None

    @property
    def known(self) -> Mapping[str, Written] | None:
        """What each tensor was when it was written."""
        return self._tensors

    def rows_around(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """The rows of a tensor along its first axis that must be read to compare those from start to stop."""
        if self._tensors is None or (width := self._tensors[name].row_bytes) == 0:
            return start, stop
        first, end = start * width // PIECE * PIECE, -(-stop * width // PIECE) * PIECE
        return first // width, min(-(-end // width), self._tensors[name].shape[0])

    def check(self, name: str, found: Tensor, first: int = 0, shape: tuple[int, ...] | None = None) -> None:
        """Compare a tensor, or the pieces that lie whole in its rows from ``first`` on; ValueError if it differs."""
        if self._tensors is None:
            return
        written, whole = self._tensors[name], tuple(found.shape) if shape is None else shape
        if (_dtype(found), whole) != (written.dtype, written.shape):
            read = f"{_dtype(found)} {list(whole)}"
            raise ValueError(f"tensor {name!r}: {read} where {written.dtype} {list(written.shape)} was written")
        begin = first * written.row_bytes
        number = -(-begin // PIECE)
        raw = _raw(found)[number * PIECE - begin :]
        if whole and first + len(found) < whole[0]:
            raw = raw[: len(raw) // PIECE * PIECE]
        digits = _crc32(raw)
        if digits != written.crc32[number * _DIGITS : number * _DIGITS + len(digits)]:
            raise ValueError(f"tensor {name!r}: its values are not those that were written, by their checksum")


def written(tensors: Mapping[str, Tensor]) -> dict[str, Written]:
    """What tensors are, with the checksums of their bytes; they may lie anywhere."""
    return {name: Written(_dtype(t), tuple(t.shape), _crc32(_raw(t))) for name, t in tensors.items()}


def sealed(entries: Mapping[str, str], tensors: Mapping[str, Written]) -> dict[str, str]:
    """A description with the checksums of its tensors, and its own."""
    whole = {**entries, CHECKSUMS: json.dumps({name: one._asdict() for name, one in tensors.items()})}
    return {**whole, CHECKSUM: seal(whole)}


def seal(entries: Mapping[str, Any]) -> str:
    """The checksum of a description: of its JSON with sorted keys, as Python writes it."""
    text = json.dumps({key: value for key, value in entries.items() if key != CHECKSUM}, sort_keys=True)
    return f"{zlib.crc32(text.encode()):0{_DIGITS}x}"


def unsealed(entries: Mapping[str, Any], names: Iterable[str]) -> Checksums:
    """The checksums of the named tensors; none where the description has none, as before they were introduced.

    Raises:
        ValueError: the description is not what was written, or not of these tensors.
    """
    if CHECKSUM not in entries and CHECKSUMS not in entries:
        return Checksums(None)
    # With one alone, the other's name was damaged.
    if CHECKSUM not in entries or CHECKSUMS not in entries or seal(entries) != entries[CHECKSUM]:
        raise ValueError("its description is not what was written, by its checksum")
    try:
        found = {name: Written.from_json(entry) for name, entry in parse(entries[CHECKSUMS]).items()}
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"checksums that are none ({error!r})") from error
    if differing := sorted(found.keys() ^ set(names)):
        raise ValueError(f"tensors and checksums differ in {differing[:4]}")
    return Checksums(found)


def parse(text: str | bytes) -> Any:
    """JSON in which no object has a key twice; a ValueError for anything else."""
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
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _crc32(raw: memoryview) -> str:
    """The checksums of all pieces, one behind the other."""
    starts = range(0, len(raw), PIECE)

    def of(start: int) -> str:
        return f"{zlib.crc32(raw[start : start + PIECE]):0{_DIGITS}x}"

    threads = min(torch.get_num_threads(), len(starts))
    if threads < 2:
        return "".join(map(of, starts))
    with ThreadPoolExecutor(threads) as pool:  # zlib lets go of the interpreter's lock
        return "".join(pool.map(of, starts))
