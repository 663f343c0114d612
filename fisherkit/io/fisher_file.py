"""The format of Fisher files: what the header says, in which version.

Owns the header's keys and the format's versions; `shards` and `reader` own the bytes. Knows nothing of what an operator
means.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from fisherkit.arguments import is_integer
from fisherkit.errors import FileFormatError, InvalidArgumentError, InvalidTypeError
from fisherkit.io.atomic import FORMAT, UNREADABLE, as_path, check_folder, unreadable
from fisherkit.io.checksums import CHECKSUMS, TensorChecksum, parse, unsealed
from fisherkit.io.reader import INDEX_SUFFIX, Archive, Node, Reader, State
from fisherkit.io.shards import fill, nbytes, pack, refuse_weights, write_sharded, write_single
from fisherkit.space import ParameterSpace

VERSION = 1
"""Of a single file."""
SHARDED_VERSION = 2
"""Of an index, whose tensors may be cut; the highest that is read."""
NO_CHECKSUMS = {CHECKSUMS: "none"}
"""Recorded with what comes from a file without checksums, and not written again."""


def write(
    path: str | Path,
    state: State,
    space: ParameterSpace,
    metadata: dict[str, str],
    *,
    max_shard_size: int | None = None,
) -> None:
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
            call=call, got="the name of an index", expected="the name of the file",
            try_=repr(path.name.removesuffix(INDEX_SUFFIX)),
        )  # fmt: skip
    _check_size(max_shard_size, call)
    total = sum(nbytes(tensor) for tensor in state.all_tensors())
    sharded = max_shard_size is not None and total > max_shard_size
    node, tensors = pack(state, max_shard_size if sharded else None)
    header = {
        "format": FORMAT,
        "version": str(SHARDED_VERSION if sharded else VERSION),
        "space": json.dumps({n: list(s) for n, s in zip(space.names, space.shapes, strict=True)}),
        "operator": json.dumps(node.to_json()),
        "metadata": json.dumps({k: v for k, v in metadata.items() if (k, v) not in NO_CHECKSUMS.items()}),
    }
    if max_shard_size is not None and sharded:
        shards = fill({key: nbytes(tensor) for key, tensor in tensors.items()}, max_shard_size)
        write_sharded(path, [{key: tensors[key] for key in keys} for keys in shards], header, call)
    else:
        refuse_weights(path, call)
        write_single(path, tensors, header)


@dataclass(frozen=True)
class FisherHeader:
    """What a Fisher file says of itself.

    Args:
        space: the parameters.
        metadata: what was recorded.
        root: the operator, its tensors still in the file.
        archive: where they are.
        checksums: of the tensors; None if the file has none.
    """

    space: ParameterSpace
    metadata: dict[str, str]
    root: Node
    archive: Archive
    checksums: dict[str, TensorChecksum] | None

    def reader(self, device: torch.device | str) -> Reader:
        """A reader of its tensors, which compares their checksums."""
        return Reader(self.archive, self.checksums, device)


def read_header(path: str | Path, call: str) -> FisherHeader:
    """All of a Fisher file but its tensors; the path is as in `Archive.open`.

    Raises:
        InvalidTypeError: not a path.
        FileFormatError: no such file, damaged, not a Fisher file, or a version from the future.
    """
    archive = Archive.open(as_path(path, call), call)
    try:
        version = int(archive.header["version"])
        if not 1 <= version <= SHARDED_VERSION:
            raise FileFormatError(
                call=call, got=f"format version {version}", expected=f"at most {SHARDED_VERSION}",
                try_="a newer fisherkit",
            )  # fmt: skip
        checksums = unsealed(archive.sealed, archive.files)
        space = _space(parse(archive.header["space"]))
        root = Node.from_json(parse(archive.header["operator"]))
        metadata = dict(parse(archive.header["metadata"])) | (NO_CHECKSUMS if checksums is None else {})
        absent = [key for key in root.all_keys() if key not in archive.files]
    except FileFormatError:
        raise
    except (*UNREADABLE, AttributeError) as error:
        raise FileFormatError(**unreadable(call, error)) from error
    if absent:
        raise FileFormatError(**unreadable(call, f"{archive.path.name} has no tensor {absent[0]!r}"))
    return FisherHeader(space, metadata, root, archive, checksums)


def read(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[State, ParameterSpace, dict[str, str]]:
    """The operator's state, its space and the recorded metadata, as `read_header` finds them."""
    header = read_header(path, f"load({str(path)!r})")
    with header.reader(device) as reader:
        return reader.state(header.root), header.space, header.metadata


def _space(shapes: dict[str, list[int]]) -> ParameterSpace:
    sides = [side for shape in shapes.values() for side in shape]
    if not all(is_integer(side) and side >= 0 for side in sides):
        raise ValueError(f"parameters of shapes {list(shapes.values())[:4]}")
    return ParameterSpace(tuple(shapes), tuple(tuple(shape) for shape in shapes.values()))


def _check_size(size: int | None, call: str) -> None:
    if size is None:
        return
    if not is_integer(size):
        got = f"max_shard_size of type {type(size).__name__}"
        raise InvalidTypeError(call=call, got=got, expected="bytes, an integer", try_="5 * 10**9")
    if size < 1:
        raise InvalidArgumentError(call=call, got=f"max_shard_size={size}", expected="bytes, 1 or more")
