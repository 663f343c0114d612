"""What a Fisher file holds, and its tensors, one file or several, read when they are asked for.

`State` is an operator as a tree of named tensors and plain options, `Node` says where in the files they lie, `Reader`
gets them. Owns the tree's JSON form, the way from a path to the file that holds a tensor, and the checks that all files
are of one save and as they were written. Knows nothing of what an operator means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fisherkit.errors import FileFormatError, MissingFileError
from fisherkit.io.atomic import FORMAT, UNREADABLE, of_tensor, unreadable
from fisherkit.io.checksums import TensorChecksum, parse

SHARD_FORMAT = "fisherkit-shard"
INDEX_SUFFIX = ".index.json"


def stem_of(path: Path) -> str:
    """A Fisher file's name without ``.safetensors``, of which shards and index are named."""
    return path.name.removesuffix(".safetensors")


def index_of(path: Path) -> Path:
    """The index of a Fisher file that is kept in shards."""
    return path.with_name(f"{stem_of(path)}.safetensors{INDEX_SUFFIX}")


def _stamp(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class State:
    """What an operator needs to come back: a tree of named tensors and plain options.

    Args:
        kind: the operator's registered name.
        names: the parameters it acts on, in flat order.
        tensors: its tensors.
        options: JSON-compatible settings.
        children: the states of the operators it is made of.
    """

    kind: str
    names: tuple[str, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    children: tuple[State, ...] = ()

    def all_tensors(self) -> list[Tensor]:
        """Its tensors and those of its children."""
        return [*self.tensors.values(), *(tensor for child in self.children for tensor in child.all_tensors())]

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.all_tensors())

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The same with every tensor, those of its children too, replaced by what the function makes of it."""
        tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, children=tuple(child.map(function) for child in self.children))


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: under one key, or cut along its first axis under several.

    Args:
        keys: its names in the file, in order.
        rows: length of each part's first axis; empty for a tensor in one piece.
    """

    keys: tuple[str, ...]
    rows: tuple[int, ...] = ()

    def to_json(self) -> Any:
        """A string, or an object with "parts" and "rows"."""
        return {"parts": list(self.keys), "rows": list(self.rows)} if self.rows else self.keys[0]

    @classmethod
    def from_json(cls, found: Any) -> Place:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is something else.
        """
        if isinstance(found, str):
            return cls((found,))
        keys, rows = tuple(found["parts"]), tuple(found["rows"])
        if not keys or len(keys) != len(rows) or not all(isinstance(r, int) and r > 0 for r in rows):
            raise ValueError(f"parts {list(keys)} with rows {list(rows)}")
        return cls(keys, rows)


@dataclass(frozen=True)
class Node:
    """A `State` whose tensors are still in the file.

    Args:
        kind: as in `State`.
        names: as in `State`.
        places: role to where the tensor lies.
        options: as in `State`.
        children: the nodes below.
    """

    kind: str
    names: tuple[str, ...]
    places: dict[str, Place]
    options: dict[str, Any]
    children: tuple[Node, ...]

    def all_keys(self) -> list[str]:
        """The keys of its tensors and of its children's."""
        own = [key for place in self.places.values() for key in place.keys]
        return [*own, *(key for child in self.children for key in child.all_keys())]

    def to_json(self) -> dict[str, Any]:
        """As the header has it."""
        return {
            "kind": self.kind,
            "names": list(self.names),
            "tensors": {role: place.to_json() for role, place in self.places.items()},
            "options": self.options,
            "children": [child.to_json() for child in self.children],
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Node:
        """The inverse of `to_json`; LookupError, TypeError, ValueError or AttributeError for anything else."""
        kind, names = tree["kind"], tree["names"]
        if not (isinstance(kind, str) and isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise TypeError(f"an operator of kind {kind!r} over {names!r}")
        return cls(
            kind,
            tuple(names),
            {role: Place.from_json(place) for role, place in tree["tensors"].items()},
            tree["options"],
            tuple(cls.from_json(child) for child in tree["children"]),
        )


@dataclass(frozen=True)
class Archive:
    """Which file holds which tensor.

    Args:
        path: the file or the index.
        header: the description, string keys and values.
        sealed: what its checksum is of: all that the file or the index says.
        files: key to file.
        save: what tells this save's files from others': an entry of each shard's header, or a single file's place on
            the disk and time.
        call: the public call, for errors.
    """

    path: Path
    header: dict[str, str]
    sealed: dict[str, Any]
    files: dict[str, Path]
    save: str | tuple[int, ...]
    call: str

    @classmethod
    def open(cls, path: Path, call: str) -> Archive:
        """Read the header or the index, and no tensor.

        The path is that of the file, of the index, or the one that was given to ``save`` of a sharded file.

        Raises:
            MissingFileError: no such file.
            FileFormatError: damaged, or not a Fisher file.
        """
        found = path if path.is_file() else index_of(path)
        if not found.is_file():
            raise MissingFileError(
                call=call, got="no such file", expected="one written by fisher.save", try_="check the path"
            )
        indexed = found.name.endswith(INDEX_SUFFIX)
        try:
            archive = cls._of_index(found, call) if indexed else cls._of_file(found, call)
        except (*UNREADABLE, AttributeError) as error:
            # A shard's name with a folder in it raises ValueError too: shards lie beside their index.
            name = f"an index {found.name}" if indexed else "a file"
            raise FileFormatError(**unreadable(call, error, name=name)) from error
        form = archive.header.get("format")
        if form == SHARD_FORMAT and not indexed:
            raise FileFormatError(
                call=call,
                got="one shard of a Fisher file",
                expected="its index, which knows the others",
                try_=f"the file that ends with {INDEX_SUFFIX}, beside it",
            )
        if form != FORMAT:
            got = "an index of something else" if indexed else "a safetensors file of another kind"
            raise FileFormatError(call=call, got=got, expected="one written by fisher.save", try_="check the path")
        return archive

    @classmethod
    def _of_file(cls, path: Path, call: str) -> Archive:
        save = _stamp(path)
        with safe_open(path, framework="pt") as file:
            header, keys = file.metadata() or {}, list(file.keys())
        return cls(path, header, header, dict.fromkeys(keys, path), save, call)

    @classmethod
    def _of_index(cls, path: Path, call: str) -> Archive:
        index = parse(path.read_text("utf-8"))
        header = {key: value for key, value in index["metadata"].items() if isinstance(value, str)}
        files = {key: path.with_name(name) for key, name in index["weight_map"].items()}
        save = header["save"] if header.get("format") == FORMAT else ""
        return cls(path, header, {**index["metadata"], "weight_map": index["weight_map"]}, files, save, call)

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of all files that are there."""
        paths = {self.path, *self.files.values()}
        return sum(path.stat().st_size for path in paths if path.is_file())


class Reader:
    """Files of an archive, opened when one of their tensors is asked for and closed together.

    Args:
        archive: which file holds which tensor.
        checksums: key to that of its tensor, which is compared when the tensor is read; None if the files have none.
        device: where tensors go.
    """

    def __init__(
        self, archive: Archive, checksums: Mapping[str, TensorChecksum] | None, device: torch.device | str
    ) -> None:
        self._archive, self._checksums, self._device = archive, checksums, device
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> Reader:
        """Open nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what was opened."""
        self._open.clear()
        self._stack.close()

    def state(self, node: Node) -> State:
        """A node with all its tensors."""
        tensors = {role: self.tensor(place) for role, place in node.places.items()}
        return State(node.kind, node.names, tensors, node.options, tuple(self.state(child) for child in node.children))

    def tensor(self, place: Place) -> Tensor:
        """A whole tensor.

        Raises:
            MissingFileError: a file is not there; which one is said.
            FileFormatError: a file is damaged, of another save, or lacks the tensor.
        """
        if not place.rows:
            return self._read(place.keys[0], None)
        return torch.cat([self._read(key, (0, rows), rows) for key, rows in zip(place.keys, place.rows, strict=True)])

    def rows(self, place: Place, start: int, stop: int) -> Tensor:
        """A tensor's entries from start to stop along its first axis; nothing is read but what their checksums are of.

        Raises:
            FileFormatError: as `tensor`, or the tensor is not that long.
        """
        if not place.rows:
            return self._read(place.keys[0], (start, stop))
        parts, first = [], 0
        for key, rows in zip(place.keys, place.rows, strict=True):
            low, high = max(start, first) - first, min(stop, first + rows) - first
            if low < high:
                parts.append(self._read(key, (low, high), rows))
            first += rows
        if not parts or stop > first:
            raise self._wrong(self._archive.path, f"{first} numbers under {list(place.keys)}, {stop} are needed")
        return torch.cat(parts)

    def _read(self, key: str, span: tuple[int, int] | None, rows: int | None = None) -> Tensor:
        path = self._archive.files.get(key)
        if path is None:
            raise self._wrong(self._archive.path, f"no tensor {key!r}")
        file = self._file(path)
        checksum = None if self._checksums is None else self._checksums[key]
        try:
            if span is None:
                whole = file.get_tensor(key)
                if checksum is not None:
                    with of_tensor(key):
                        checksum.check(whole)
                return whole.to(self._device)
            found = file.get_slice(key)
            shape = tuple(found.get_shape())
            length = shape[0] if shape else 0
            if length < span[1] or (rows is not None and length != rows):
                raise self._wrong(path, f"{key!r} has {length} rows, {rows or span[1]} are needed")
            if checksum is None:
                return found[span[0] : span[1]].to(self._device)
            first, end = checksum.rows_around(*span)
            part = found[first:end]
            with of_tensor(key):
                checksum.check_rows(part, first, shape)
            return part[span[0] - first : span[1] - first].to(self._device)
        except FileFormatError:
            raise
        except UNREADABLE as error:
            raise self._wrong(path, error) from error

    def _file(self, path: Path) -> Any:
        if path in self._open:
            return self._open[path]
        archive = self._archive
        if not path.is_file():
            raise MissingFileError(
                call=archive.call, got=f"no file {path.name}", expected=f"every file that {archive.path.name} names",
                why="it was not copied along, or the Fisher file was replaced after it was opened",
                try_="copy all of them, or open it again",
            )  # fmt: skip
        try:
            # On the CPU, whatever the device: checksums are of bytes in memory.
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            header = file.metadata() or {}
        except UNREADABLE as error:
            raise self._wrong(path, error) from error
        if archive.save != (_stamp(path) if path == archive.path else header.get("save")):
            raise FileFormatError(
                call=archive.call, got=f"{path.name} of another save", expected=f"the one {archive.path.name} names",
                why="files of two saves are mixed, or the Fisher file was replaced after it was opened",
                try_="copy all files of one save, or open it again",
            )  # fmt: skip
        self._open[path] = file
        return file

    def _wrong(self, path: Path, error: Exception | str) -> FileFormatError:
        name = "a file" if path == self._archive.path else f"a file {path.name}"
        return FileFormatError(**unreadable(self._archive.call, error, name=name))
