"""The format of Fisher files: what the header says, in which version, in one safetensors file or in several.

Owns the header's keys, the format's versions, which tensor goes into which shard, and the order of replacement: shards
under names that nothing points to, then the index, then what it replaced is deleted. So the old file or the new one is
complete at every moment. Knows nothing of what an operator means.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fisherkit.arguments import is_integer
from fisherkit.errors import FileFormatError, InvalidArgumentError, InvalidTypeError
from fisherkit.io.atomic import (
    FORMAT,
    UNREADABLE,
    as_path,
    check_folder,
    owned,
    part_of,
    replace_checked_file,
    replace_text,
    unreadable,
    write_part,
)
from fisherkit.io.checksums import CHECKSUM, CHECKSUMS, TensorChecksum, parse, seal, sealed, unsealed
from fisherkit.io.reader import INDEX_SUFFIX, SHARD_FORMAT, Archive, Node, Place, Reader, State, index_of, stem_of
from fisherkit.model_state import tensors_hash
from fisherkit.space import ParameterSpace

Tensors = dict[str, Tensor]

VERSION = 1
"""Of a single file."""
SHARDED_VERSION = 2
"""Of an index, whose tensors may be cut; the highest that is read."""
MOST_SHARDS = 99_999
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
    node, tensors = _pack(state, max_shard_size if sharded else None)
    header = {
        "format": FORMAT,
        "version": str(SHARDED_VERSION if sharded else VERSION),
        "space": json.dumps({n: list(s) for n, s in zip(space.names, space.shapes, strict=True)}),
        "operator": json.dumps(node.to_json()),
        "metadata": json.dumps({k: v for k, v in metadata.items() if (k, v) not in NO_CHECKSUMS.items()}),
    }
    if max_shard_size is not None and sharded:
        _write_sharded(path, _fill(tensors, max_shard_size), header, call)
    else:
        refuse_weights(path, call)
        _write_single(path, tensors, header)


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


# -- one file or shards -----------------------------------------------------------------------------------------------


def _pack(state: State, largest: int | None, prefix: str = "") -> tuple[Node, Tensors]:
    """A state as a node and the tensors it names, cut along the first axis where they have more than so many bytes."""
    places: dict[str, Place] = {}
    tensors: Tensors = {}
    for role, tensor in state.tensors.items():
        key = f"{prefix}{role}"
        parts = _cut(tensor, largest)
        places[role] = Place((key,))
        if len(parts) > 1:
            keys = tuple(f"{key}.{i}" for i in range(len(parts)))
            places[role] = Place(keys, tuple(len(part) for part in parts))
        tensors.update(zip(places[role].keys, parts, strict=True))
    children = []
    for i, child in enumerate(state.children):
        node, below = _pack(child, largest, f"{prefix}{i}.")
        children.append(node)
        tensors.update(below)
    return Node(state.kind, state.names, places, state.options, tuple(children)), tensors


def _cut(tensor: Tensor, largest: int | None) -> Sequence[Tensor]:
    if largest is None or nbytes(tensor) <= largest or tensor.ndim == 0 or len(tensor) < 2:
        return (tensor,)
    return tensor.split(max(1, largest * len(tensor) // nbytes(tensor)))


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def _fill(tensors: Tensors, largest: int) -> list[Tensors]:
    """The tensors in their order, in shards of at most ``largest`` bytes where no single tensor is larger."""
    shards: list[Tensors] = []
    room = 0
    for key, tensor in tensors.items():
        if not shards or nbytes(tensor) > room:
            shards.append({})
            room = largest
        shards[-1][key] = tensor
        room -= nbytes(tensor)
    return shards


def _write_single(path: Path, tensors: Tensors, header: dict[str, str]) -> None:
    """One file; a sharded one of the same name is deleted afterwards."""
    replace_checked_file(path, tensors, header)
    if _is_ours(index_of(path)):
        _delete([index_of(path)])
    _delete(_shards_of(path))


def _write_sharded(path: Path, shards: list[Tensors], header: dict[str, str], call: str) -> None:
    """Shards and an index, in which the description is; nothing will be under the path itself."""
    index = index_of(path)
    _check(path, len(shards), call)
    # Of what is saved, so that the same is saved as the same bytes.
    hashes = [tensors_hash(shard) for shard in shards]
    save = hashlib.sha256(json.dumps([header, hashes], sort_keys=True).encode()).hexdigest()[:32]
    total = sum(nbytes(tensor) for shard in shards for tensor in shard.values())
    finals = _names(path, len(shards), save)
    weight_map = {key: final.name for shard, final in zip(shards, finals, strict=True) for key in shard}
    checksums: dict[str, TensorChecksum] = {}
    try:
        with ExitStack() as stack:
            parts = [stack.enter_context(part_of(final)) for final in finals]
            for part, shard in zip(parts, shards, strict=True):
                own = owned(shard)
                checksums.update({key: TensorChecksum.of(tensor) for key, tensor in own.items()})
                write_part(part, own, {"format": SHARD_FORMAT, "save": save})
            metadata = {"total_size": total, **sealed({**header, "save": save}, checksums)}
            metadata[CHECKSUM] = seal({**metadata, "weight_map": weight_map})
            text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1)
            for part, final in zip(parts, finals, strict=True):
                os.replace(part, final)
            replace_text(index, text)
    except BaseException:
        # An interruption may come right after the index was put in place: then the new file is the file.
        if _header(index).get("save") != save:
            _delete([final for final in finals if _header(final).get("save") == save])
        raise
    _delete([path] if path.is_file() else [])
    _delete([shard for shard in _shards_of(path) if shard not in finals])


def _names(path: Path, count: int, save: str) -> list[Path]:
    """Names that no file has, so that an index that is there never points to a shard of this save."""
    for tag in ("", f"-{save[:8]}"):
        names = [path.with_name(f"{stem_of(path)}{tag}-{i:05}-of-{count:05}.safetensors") for i in range(1, count + 1)]
        if not any(name.exists() for name in names):
            break
    return names


def _shards_of(path: Path) -> list[Path]:
    """The shards of any save under this name, interrupted ones too; told by their headers, not their names alone."""
    pattern = re.compile(re.escape(stem_of(path)) + r"(-[0-9a-f]{8})?-\d{5}-of-\d{5}\.safetensors")
    named = (found for found in path.parent.iterdir() if pattern.fullmatch(found.name))
    return [found for found in named if _header(found).get("format") == SHARD_FORMAT]


def _check(path: Path, count: int, call: str) -> None:
    if count > MOST_SHARDS:
        raise InvalidArgumentError(
            call=call, got=f"a need of {count:,} shards", expected=f"at most {MOST_SHARDS:,}",
            try_="a larger max_shard_size",
        )  # fmt: skip
    for there in (path, index_of(path)):
        if there.exists() and not _is_ours(there):
            raise InvalidArgumentError(
                call=call, got=f"a path where {there.name} is something else than a Fisher file",
                expected="a free path, or that of an older Fisher file",
                why="a sharded file has to replace it, and a model's index may have this name", try_="another name",
            )  # fmt: skip


def refuse_weights(path: Path, call: str) -> None:
    """Refuse to replace a safetensors file that is no Fisher file: a model's weights have such names.

    Raises:
        InvalidArgumentError: there is one at the path.
    """
    if path.is_file() and not _is_ours(path) and _is_safetensors(path):
        raise InvalidArgumentError(
            call=call, got=f"a path where {path.name} is a safetensors file of another kind",
            expected="a free path, or that of an older Fisher file", why="a model's weights would be lost",
            try_="another name",
        )  # fmt: skip


def _is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _is_ours(path: Path) -> bool:
    return _header(path).get("format") == FORMAT


def _header(path: Path) -> dict[str, str]:
    """What a file or an index says of itself; nothing if it is not there or of another kind."""
    try:
        if path.name.endswith(INDEX_SUFFIX):
            return dict(json.loads(path.read_text("utf-8"))["metadata"])
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, RuntimeError, OSError, LookupError, TypeError, ValueError):
        return {}


def _delete(paths: Sequence[Path]) -> None:
    # What cannot be deleted (a reader has it open on Windows) is in nobody's way; the next save tries again.
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
