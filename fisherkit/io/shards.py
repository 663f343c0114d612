"""Writing a Fisher file: one safetensors file, or shards of a given size beside an index.

Owns which tensor goes where, the files' names and the order of replacement: shards under names that nothing points to,
then the index, then what it replaced is deleted. So the old file or the new one is complete at every moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fisherkit.errors import InvalidArgumentError
from fisherkit.io.atomic import FORMAT, checksums_of, part_of, replace_checked_file, replace_text, write_part
from fisherkit.io.checksums import CHECKSUM, TensorChecksum, seal, sealed
from fisherkit.io.reader import INDEX_SUFFIX, SHARD_FORMAT, Node, Place, State, index_of, stem_of
from fisherkit.model_state import tensors_hash

MOST_SHARDS = 99_999

Tensors = dict[str, Tensor]


def pack(state: State, largest: int | None, prefix: str = "") -> tuple[Node, Tensors]:
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
        node, below = pack(child, largest, f"{prefix}{i}.")
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


def fill(sizes: Mapping[str, int], largest: int | None) -> list[list[str]]:
    """Names in their order, in shards of at most ``largest`` bytes where no single tensor is larger; None for one."""
    shards: list[list[str]] = []
    room = 0.0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = math.inf if largest is None else largest
        shards[-1].append(name)
        room -= size
    return shards


def write_single(path: Path, tensors: Tensors, header: dict[str, str]) -> None:
    """One file; a sharded one of the same name is deleted afterwards."""
    replace_checked_file(path, tensors, header)
    if _is_ours(index_of(path)):
        delete([index_of(path)])
    delete(_shards_of(path))


def write_sharded(path: Path, shards: list[Tensors], header: dict[str, str], call: str) -> None:
    """Shards and an index, in which the description is; nothing will be under the path itself.

    Raises:
        InvalidArgumentError: too many shards, or something that is not a Fisher file is in the way.
    """
    index = index_of(path)
    _check(path, len(shards), call)
    # Of what is saved, so that the same is saved as the same bytes.
    hashes = [tensors_hash(shard) for shard in shards]
    save = hashlib.sha256(json.dumps([header, hashes], sort_keys=True).encode()).hexdigest()[:32]
    total = sum(nbytes(tensor) for shard in shards for tensor in shard.values())
    finals = free_names(path, len(shards), ("", f"-{save[:8]}"))
    weight_map = {key: final.name for shard, final in zip(shards, finals, strict=True) for key in shard}
    checksums: dict[str, TensorChecksum] = {}
    with ExitStack() as stack:
        parts = [stack.enter_context(part_of(final)) for final in finals]
        for part, shard in zip(parts, shards, strict=True):
            checksums.update(checksums_of(shard))
            write_part(part, shard, {"format": SHARD_FORMAT, "save": save})
        metadata = {"total_size": total, **sealed({**header, "save": save}, checksums)}
        metadata[CHECKSUM] = seal({**metadata, "weight_map": weight_map})
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1)
        publish(parts, finals, index, text, lambda final: _header(final).get("save") == save)
    delete([path] if path.is_file() else [])
    delete([shard for shard in _shards_of(path) if shard not in finals])


def publish(
    parts: Sequence[Path], finals: Sequence[Path], index: Path, text: str, ours: Callable[[Path], bool]
) -> None:
    """Shards under names that nothing points to, then the index; if that fails, none of the new shards stays.

    Args:
        parts: the written files.
        finals: their names.
        index: where the index goes.
        text: the index.
        ours: whether a file under one of the names is of this save.
    """
    try:
        for part, final in zip(parts, finals, strict=True):
            os.replace(part, final)
        replace_text(index, text)
    except BaseException:
        # An interruption may come right after the index was put in place: then the new file is the file.
        if not (index.is_file() and index.read_text("utf-8") == text):
            delete([final for final in finals if ours(final)])
        raise


def free_names(path: Path, count: int, tags: Iterable[str]) -> list[Path]:
    """Names of shards that no file has, so that an index that is there keeps its own; the last tag's if none is free.

    Args:
        path: of which the names are made.
        count: how many shards.
        tags: what comes after the name, tried one after the other.
    """
    names: list[Path] = []
    for tag in tags:
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


def delete(paths: Sequence[Path]) -> None:
    """Remove files, as far as they can be removed."""
    # What cannot be deleted (a reader has it open on Windows) is in nobody's way; the next save tries again.
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
