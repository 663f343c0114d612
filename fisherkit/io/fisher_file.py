"""The format of Fisher files: one safetensors file, or several beside an index, and a header that describes them.

An operator is a tree of named tensors and plain options: `State` has the tensors, `Node` says under which keys of the
files they are. Owns the tree's JSON form, the header's keys, the format's versions, the checks that all files are of
one save and as they were written, and what a save may replace. `tensors` owns the bytes. Knows nothing of what an
operator means.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fisherkit.arguments import check_count, is_integer
from fisherkit.errors import FileFormatError, InvalidArgumentError, MissingFileError
from fisherkit.io.atomic import as_path, check_folder, delete
from fisherkit.io.checksums import CHECKSUM, CHECKSUMS, Checksums, Written, parse, seal, sealed, unsealed, written
from fisherkit.io.tensors import (
    FORMAT,
    INDEX_SUFFIX,
    SUFFIX,
    UNREADABLE,
    WRITER,
    damaged,
    files_of_index,
    forms_of,
    in_shards,
    new_files,
    pickled,
    weight_map,
)
from fisherkit.model_state import tensors_hash
from fisherkit.space import ParameterSpace


@dataclass(frozen=True)
class State:
    """What an operator needs to come back: a tree of named tensors and plain options.

    Args:
        tag: the operator's registered name.
        names: the parameters it acts on, in flat order.
        tensors: its tensors.
        options: JSON-compatible settings.
        children: the states of the operators it is made of.
    """

    tag: str
    names: tuple[str, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    children: tuple[State, ...] = ()

    def all_tensors(self) -> list[Tensor]:
        """Its tensors and those of its children."""
        return [*self.tensors.values(), *(tensor for child in self.children for tensor in child.all_tensors())]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.all_tensors())

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The same with every tensor, those of its children too, replaced by what the function makes of it."""
        tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, children=tuple(child.map(function) for child in self.children))


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: under one key, or cut along its first axis under several."""

    keys: tuple[str, ...]
    rows: tuple[int, ...] = ()

    def to_json(self) -> Any:
        """The key, or an object with "parts" and "rows"."""
        return {"parts": list(self.keys), "rows": list(self.rows)} if self.rows else self.keys[0]

    @classmethod
    def from_json(cls, found: Any) -> Place:
        """The inverse of `to_json`."""
        if isinstance(found, str):
            return cls((found,))
        keys, rows = tuple(found["parts"]), tuple(found["rows"])
        if not keys or len(keys) != len(rows) or not all(isinstance(r, int) and r > 0 for r in rows):
            raise ValueError(f"parts {list(keys)} with rows {list(rows)}")
        return cls(keys, rows)


@dataclass(frozen=True)
class Node:
    """A `State` whose tensors are still in the file: ``places`` says where each of them lies."""

    tag: str
    names: tuple[str, ...]
    places: dict[str, Place]
    options: dict[str, Any]
    children: tuple[Node, ...]

    def all_keys(self) -> list[str]:
        """The keys of its tensors and of its children's."""
        own = [key for place in self.places.values() for key in place.keys]
        return [*own, *(key for child in self.children for key in child.all_keys())]

    def state(self, read: Callable[[Place], Tensor]) -> State:
        """The state that it describes, whose tensors a function reads."""
        tensors = {role: read(place) for role, place in self.places.items()}
        return State(self.tag, self.names, tensors, self.options, tuple(child.state(read) for child in self.children))

    def to_json(self) -> dict[str, Any]:
        """The tree as JSON, as a header has it."""
        return {
            "kind": self.tag,
            "names": list(self.names),
            "tensors": {role: place.to_json() for role, place in self.places.items()},
            "options": self.options,
            "children": [child.to_json() for child in self.children],
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Node:
        """The inverse of `to_json`; LookupError, TypeError, ValueError or AttributeError for anything else."""
        tag, names = tree["kind"], tree["names"]
        if not (isinstance(tag, str) and isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise TypeError(f"an operator of the tag {tag!r} over {names!r}")
        return cls(
            tag, tuple(names), {role: Place.from_json(place) for role, place in tree["tensors"].items()},
            tree["options"], tuple(cls.from_json(child) for child in tree["children"]),
        )  # fmt: skip


def pack(state: State, largest: int | None, prefix: str = "") -> tuple[Node, dict[str, Tensor]]:
    """A state as a node and the tensors it names, cut along the first axis where they have more than so many bytes."""
    places: dict[str, Place] = {}
    tensors: dict[str, Tensor] = {}
    for role, tensor in state.tensors.items():
        key = f"{prefix}{role}"
        places[role], parts = Place((key,)), (tensor,)
        if largest is not None and tensor.nbytes > largest and tensor.ndim and len(tensor) > 1:
            parts = tensor.split(max(1, largest * len(tensor) // tensor.nbytes))
            places[role] = Place(tuple(f"{key}.{i}" for i in range(len(parts))), tuple(map(len, parts)))
        tensors.update(zip(places[role].keys, parts, strict=True))
    children = []
    for i, child in enumerate(state.children):
        node, below = pack(child, largest, f"{prefix}{i}.")
        children.append(node)
        tensors.update(below)
    return Node(state.tag, state.names, places, state.options, tuple(children)), tensors


# -- the format --------------------------------------------------------------------------------------------------------


VERSION = 1
"""Of a single file."""
SHARDED_VERSION = 2
"""Of an index, whose tensors may be cut; the highest that is read."""
NO_CHECKSUMS = {CHECKSUMS: "none"}
"""Recorded with what comes from a file without checksums, and not written again."""
SHARD_FORMAT = f"{FORMAT}-shard"


def index_of(path: Path) -> Path:
    """The index of a Fisher file that is kept in shards."""
    return path.with_name(f"{path.name.removesuffix(SUFFIX)}{SUFFIX}{INDEX_SUFFIX}")


# -- writing -----------------------------------------------------------------------------------------------------------


def write(
    path: str | Path, state: State, space: ParameterSpace, metadata: dict[str, str], *,
    max_shard_size: int | None = None,
) -> None:  # fmt: skip
    """Write a Fisher file; the final name appears only when the file is complete.

    Args:
        path: where; an existing Fisher file, of shards or not, is replaced.
        state: the operator's state.
        space: its parameter space.
        metadata: string keys and values to record beside it.
        max_shard_size: bytes; more than that are written as shards beside an index. None for one file.

    Raises:
        InvalidTypeError: not a path, or a size that is not an integer.
        InvalidArgumentError: the folder does not exist, the name is an index's, the size is not positive or too small,
            a model's weights are at the path, or shards would have to replace something that is not a Fisher file.
    """
    call = f"save({str(path)!r})"
    path = as_path(path, "save(path)")
    check_folder(path, call)
    if path.name.endswith(INDEX_SUFFIX):
        raise InvalidArgumentError(
            call, "the name of an index", "the name of the file", try_=repr(path.name.removesuffix(INDEX_SUFFIX))
        )
    check_count(call, "max_shard_size", max_shard_size, optional=True)
    largest = max_shard_size if max_shard_size is not None and state.nbytes > max_shard_size else None
    node, tensors = pack(state, largest)
    files, index = in_shards(path, forms_of(tensors), largest), None
    sharded = len(files) > 1  # a tensor that cannot be cut may be all there is
    header = described(node, space, metadata, SHARDED_VERSION if sharded else VERSION)
    refuse_others(path, call, sharded=sharded)
    if not sharded:
        header = sealed(header, written(tensors))
    else:
        # Of what is saved, so that the same is saved as the same bytes.
        save = hashlib.sha256(json.dumps([header, tensors_hash(tensors)], sort_keys=True).encode()).hexdigest()[:32]
        index = index_of(path), index_text({**header, "save": save}, written(tensors), weight_map(files))
        header = {"format": SHARD_FORMAT, "save": save}
    with new_files(files, header, call, index=index) as put:
        for name, tensor in tensors.items():
            put(name, tensor)
    delete_replaced(path, files, index is not None)


def described(node: Node, space: ParameterSpace, metadata: Mapping[str, str], version: int) -> dict[str, str]:
    """A header, without checksums."""
    return {
        "format": FORMAT,
        "version": str(version),
        "space": json.dumps({n: list(s) for n, s in zip(space.names, space.shapes, strict=True)}),
        "operator": json.dumps(node.to_json()),
        "metadata": json.dumps({k: v for k, v in metadata.items() if (k, v) not in NO_CHECKSUMS.items()}),
    }


def index_text(header: dict[str, str], tensors: Mapping[str, Written], files: Mapping[str, str]) -> str:
    """The text of an index: the header is in it, its checksum is of the files' names too."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    metadata: dict[str, Any] = {"total_size": total, **sealed(header, tensors)}
    metadata[CHECKSUM] = seal({**metadata, "weight_map": files})
    return json.dumps({"metadata": metadata, "weight_map": files}, indent=1)


def delete_replaced(path: Path, files: Collection[Path], sharded: bool) -> None:
    """Remove what another save under this name has left, once the files of this one are in place."""
    kept = {*files, *([index_of(path)] if sharded else [])}
    found = [one for one in (path, index_of(path)) if _is_fisher_file(one)] + _shards_of(path)
    delete(one for one in found if one not in kept)


def refuse_others(path: Path, call: str, *, sharded: bool = False) -> None:
    """Refuse to replace a model's weights, and anything that is in the way of shards but a Fisher file."""
    for there in (path, index_of(path)) if sharded else (path,):
        in_the_way = there.exists() if sharded else header_at(there) is not None
        if in_the_way and not _is_fisher_file(there):
            raise InvalidArgumentError(
                call, f"a path where {there.name} is something else than a Fisher file",
                "a free path, or that of an older Fisher file",
                why="it would be lost, and models' weights and their index have such names", try_="another name",
            )  # fmt: skip


def _shards_of(path: Path) -> list[Path]:
    """The shards of any save under this name, interrupted ones too; told by their headers, not their names alone."""
    stem = re.escape(path.name.removesuffix(SUFFIX))
    pattern = re.compile(rf"{stem}(-[0-9a-f]{{8}}|-\d+)?-\d{{5,}}-of-\d{{5,}}\.safetensors")
    named = (found for found in path.parent.iterdir() if pattern.fullmatch(found.name))
    return [found for found in named if (header_at(found) or {}).get("format") == SHARD_FORMAT]


def _is_fisher_file(path: Path) -> bool:
    return (header_at(path) or {}).get("format") == FORMAT


def header_at(path: Path) -> dict[str, str] | None:
    """What a safetensors file or an index says of itself; None if it is not there or of another kind."""
    try:
        if path.name.endswith(INDEX_SUFFIX):
            return dict(json.loads(path.read_text("utf-8"))["metadata"])
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, RuntimeError, OSError, LookupError, TypeError, ValueError):
        return None


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FisherHeader:
    """All of a Fisher file but its tensors; ``save`` tells the files of this save from others'."""

    path: Path
    space: ParameterSpace
    metadata: dict[str, str]
    root: Node
    files: dict[str, Path]
    checksums: Checksums
    save: str
    call: str

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of all files that are there."""
        return sum(path.stat().st_size for path in {self.path, *self.files.values()} if path.is_file())


def read_header(path: str | Path, call: str) -> FisherHeader:
    """All of a Fisher file but its tensors, by its path, its index, or the path that was given to ``save``."""
    path = as_path(path, call)
    found = path if path.is_file() or not path.name else index_of(path)
    if not found.is_file():
        raise MissingFileError(call, "no such file", f"one written by {WRITER}", try_="check the path")
    indexed = found.name.endswith(INDEX_SUFFIX)
    try:
        save = _stamp(found)
        if indexed:  # whose checksum is of the files' names too
            index = parse(found.read_text("utf-8"))
            header = {key: value for key, value in index["metadata"].items() if isinstance(value, str)}
            described, files = {**index["metadata"], "weight_map": index["weight_map"]}, files_of_index(found)
        else:
            with safe_open(found, framework="pt") as file:
                described = header = file.metadata() or {}
                files = dict.fromkeys(file.keys(), found)
        _check_format(header, indexed, call)
        save = header["save"] if indexed else save
        checksums = unsealed(described, files)
        space, root = _space(header["space"]), Node.from_json(parse(header["operator"]))
        if absent := [key for key in root.all_keys() if key not in files]:
            raise ValueError(f"it has no tensor {absent[0]!r}")
        metadata = dict(parse(header["metadata"])) | ({} if checksums else NO_CHECKSUMS)
    except FileFormatError:
        raise
    except (*UNREADABLE, AttributeError) as error:
        if pickled(found):
            raise FileFormatError(
                call, f"{found.name}, a file of torch.save or pickle", f"one written by {WRITER}",
                try_="torch.load, for what torch.save wrote; fisher.save(path) keeps a Fisher",
            ) from error  # fmt: skip
        # A shard's name with a folder in it raises ValueError too: shards lie beside their index.
        name = f"an index {found.name}" if indexed else "a file"
        raise damaged(call, error, name=name) from error
    return FisherHeader(found, space, metadata, root, files, checksums, save, call)


def _stamp(path: Path) -> str:
    found = path.stat()
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}"


def _check_format(header: Mapping[str, str], indexed: bool, call: str) -> None:
    """Refuse what is no Fisher file, and versions from the future."""
    form = header.get("format")
    if form == SHARD_FORMAT and not indexed:
        raise FileFormatError(
            call, "one shard of a Fisher file", "its index, which knows the others",
            try_=f"the file that ends with {INDEX_SUFFIX}, beside it",
        )  # fmt: skip
    if form != FORMAT:
        got = "an index of something else" if indexed else "a safetensors file of another kind"
        raise FileFormatError(call, got, f"one written by {WRITER}", try_="check the path")
    if not 1 <= (version := int(header["version"])) <= SHARDED_VERSION:
        got, expected = f"format version {version}", f"at most {SHARDED_VERSION}"
        raise FileFormatError(call, got, expected, try_="a newer fisherkit")


def _space(text: str) -> ParameterSpace:
    shapes = parse(text)
    sides = [side for shape in shapes.values() for side in shape]
    if not all(is_integer(side) and side >= 0 for side in sides):
        raise ValueError(f"parameters of shapes {list(shapes.values())[:4]}")
    return ParameterSpace(tuple(shapes), tuple(tuple(shape) for shape in shapes.values()))


def read(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[State, ParameterSpace, dict[str, str]]:
    """The operator's state, its space and the recorded metadata, as `read_header` finds them."""
    header = read_header(path, f"load({str(path)!r})")
    return Reader(header, device).state(header.root), header.space, header.metadata


class Reader:
    """Tensors of a Fisher file, compared with their checksums where it has them; the file read last stays open."""

    def __init__(self, header: FisherHeader, device: torch.device | str) -> None:
        self._header, self._device = header, device
        self._open: tuple[Path, Any] | None = None

    def state(self, node: Node) -> State:
        """The state that a node describes, with all its tensors."""
        return node.state(self.tensor)

    def tensor(self, place: Place) -> Tensor:
        """A whole tensor."""
        if not place.rows:
            return self._read(place.keys[0], None)
        return self.rows(place, 0, sum(place.rows))

    def rows(self, place: Place, start: int, stop: int) -> Tensor:
        """Entries from start to stop along the first axis; nothing is read but what their checksums are of."""
        if not place.rows:
            return self._read(place.keys[0], (start, stop))
        parts, first = [], 0
        for key, rows in zip(place.keys, place.rows, strict=True):
            low, high = max(start, first) - first, min(stop, first + rows) - first
            if low < high:
                parts.append(self._read(key, (low, high), rows))
            first += rows
        if not parts or stop > first:
            raise self._wrong(self._header.path, f"{first} numbers under {list(place.keys)}, {stop} are needed")
        return torch.cat(parts)

    def _read(self, key: str, span: tuple[int, int] | None, rows: int | None = None) -> Tensor:
        path = self._header.files.get(key)
        if path is None:
            raise self._wrong(self._header.path, f"no tensor {key!r}")
        file, checksums = self._file(path), self._header.checksums
        try:
            if span is None:
                whole = file.get_tensor(key)
                checksums.check(key, whole)
                return whole.to(self._device)
            found = file.get_slice(key)
            shape = tuple(found.get_shape())
            length = shape[0] if shape else 0
            if length < span[1] or (rows is not None and length != rows):
                raise ValueError(f"{key!r} has {length} rows, {rows or span[1]} are needed")
            first, end = checksums.rows_around(key, *span)
            part = found[first:end]
            checksums.check(key, part, first, shape)
            return part[span[0] - first : span[1] - first].to(self._device)
        except UNREADABLE as error:
            raise self._wrong(path, error) from error

    def _file(self, path: Path) -> Any:
        if self._open is not None and self._open[0] == path:
            return self._open[1]
        call, origin = self._header.call, self._header.path
        if not path.is_file():
            raise MissingFileError(
                call, f"no file {path.name}", f"every file that {origin.name} names",
                why="it was not copied along, or the Fisher file was replaced after it was opened",
                try_="copy all of them, or open it again",
            )  # fmt: skip
        try:
            # On the CPU, whatever the device: checksums are of bytes in memory.
            file: Any = safe_open(path, framework="pt")
            header = file.metadata() or {}
        except UNREADABLE as error:
            raise self._wrong(path, error) from error
        if self._header.save != (_stamp(path) if path == origin else header.get("save")):
            raise FileFormatError(
                call, f"{path.name} of another save", f"the one {origin.name} names",
                why="files of two saves are mixed, or the Fisher file was replaced after it was opened",
                try_="copy all files of one save, or open it again",
            )  # fmt: skip
        self._open = path, file
        return file

    def _wrong(self, path: Path, error: Exception | str) -> FileFormatError:
        name = "a file" if path == self._header.path else f"a file {path.name}"
        return damaged(self._header.call, error, name=name)
