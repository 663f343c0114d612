"""Where merged tensors go: a state dict, or safetensors files that grow tensor by tensor.

Owns the layout of the files (Hugging Face's: one file, or shards beside an index) and their atomic appearance. The
format fixes every tensor's place in advance by its shape and dtype, so that tensors are written as they come and none
is kept. Knows nothing of merging.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from fisherkit.arguments import is_integer
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.io.atomic import part_of, replace_text
from fisherkit.merging.checkpoints import DTYPES

Forms = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name to shape and dtype, in the order of the model."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Sink(ABC):
    """Takes tensors by name."""

    @abstractmethod
    def put(self, name: str, tensor: Tensor) -> None:
        """One tensor of the announced shape and dtype."""

    @abstractmethod
    def tie(self, name: str, owner: str) -> None:
        """One more name for a tensor that was put."""


class MemorySink(Sink):
    """A state dict.

    Args:
        names: all names, in the order of the result.
    """

    def __init__(self, names: list[str]) -> None:
        self._names, self._found = names, dict[str, Tensor]()

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep it."""
        self._found[name] = tensor

    def tie(self, name: str, owner: str) -> None:
        """The same tensor under another name."""
        self._found[name] = self._found[owner]

    def state_dict(self) -> dict[str, Tensor]:
        """All of them, in order."""
        return {name: self._found[name] for name in self._names}


class FileSink(Sink):
    """Open safetensors files.

    Args:
        places: name to file and offset.
    """

    def __init__(self, places: dict[str, tuple[IO[bytes], int]]) -> None:
        self._places = places

    def put(self, name: str, tensor: Tensor) -> None:
        """Write it in its place."""
        file, offset = self._places[name]
        file.seek(offset)
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def tie(self, name: str, owner: str) -> None:
        """Nothing: files hold one name of each tensor, and name the others in their header."""


@contextmanager
def written(
    out: Path, forms: Forms, ties: Mapping[str, str], max_shard_size: int | None, *, overwrite: bool, call: str
) -> Iterator[FileSink]:
    """Safetensors files that appear under their names, whole, when the block ends without an exception.

    Args:
        out: a folder, made if need be, or a file's name that ends in ``.safetensors``.
        forms: what will be put.
        ties: further names of some of these.
        max_shard_size: bytes of tensors in one file; None for one file of any size.
        overwrite: replace what is there.
        call: the public call, for errors.

    Raises:
        InvalidArgumentError: there is something already, or no folder to write into.
        InvalidTypeError: a size that is no integer, or a dtype that safetensors does not have.
    """
    single, index = targets(out)
    _check(out, single, index, max_shard_size, overwrite, call)
    if odd := [name for name, (_, dtype) in forms.items() if dtype not in _NAMES]:
        raise InvalidTypeError(
            call=call, got=f"{odd[0]!r} of {forms[odd[0]][1]}", expected=f"one of {[str(d) for d in _NAMES]} in files"
        )
    shards = _shards(forms, max_shard_size)
    header = {"format": "pt", **ties}
    with ExitStack() as stack:
        if not single.parent.exists():
            single.parent.mkdir()
            stack.callback(_remove_if_empty, single.parent)
        finals = [single] if len(shards) == 1 else _free_names(single, len(shards))
        parts = [stack.enter_context(part_of(final)) for final in finals]
        places: dict[str, tuple[IO[bytes], int]] = {}
        files: list[IO[bytes]] = []
        for part, names in zip(parts, shards, strict=True):
            files.append(stack.enter_context(open(part, "rb+")))
            places.update(_begin(files[-1], {name: forms[name] for name in names}, header))
        yield FileSink(places)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        old = _old_files(single, index)
        if len(shards) == 1:
            os.replace(parts[0], single)
        else:
            weight_map = {name: final.name for final, names in zip(finals, shards, strict=True) for name in names}
            total = sum(_nbytes(form) for form in forms.values())
            text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            _publish(parts, finals, index, text)
        # Now the new model is complete; what it replaces goes last.
        _delete([path for path in old if path not in (*finals, *([index] if len(shards) > 1 else []))])


def _publish(parts: list[Path], finals: list[Path], index: Path, text: str) -> None:
    """Shards under names that nothing points to, then the index; if that fails, nothing of them stays."""
    done = False
    try:
        for part, final in zip(parts, finals, strict=True):
            os.replace(part, final)
        replace_text(index, text)
        done = True
    finally:
        # An interruption may come right after the index was put in place: then it is the model.
        if not done and not (index.is_file() and index.read_text("utf-8") == text):
            _delete(finals)


def _delete(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def targets(out: Path) -> tuple[Path, Path]:
    """The names of a single file and of an index."""
    single = out if out.suffix == ".safetensors" else out / "model.safetensors"
    return single, single.with_name(f"{single.name}.index.json")


def _check(out: Path, single: Path, index: Path, size: int | None, overwrite: bool, call: str) -> None:
    if size is not None and not is_integer(size):
        raise InvalidTypeError(call=call, got=f"max_shard_size={size!r}", expected="bytes as an integer, or None")
    if size is not None and size < 1:
        raise InvalidArgumentError(call=call, got=f"max_shard_size={size}", expected="1 or more")
    folder = single.parent
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(call=call, got=f"out={str(out)!r}, where {folder} is a file", expected="a folder")
    if not folder.exists() and (single == out or not folder.parent.is_dir()):
        missing = folder if single == out else folder.parent
        raise InvalidArgumentError(
            call=call, got=f"a folder that does not exist: {missing}", expected="an existing folder",
            try_=f"Path({str(missing)!r}).mkdir(parents=True)",
        )  # fmt: skip
    there = [path.name for path in (single, index) if path.exists()]
    if there and not overwrite:
        raise InvalidArgumentError(
            call=call, got=f"out={str(out)!r}, where there is a {' and a '.join(there)}",
            expected="a place without a model", why="a model would be lost", try_="another out=, or overwrite=True",
        )  # fmt: skip


def _shards(forms: Forms, size: int | None) -> list[list[str]]:
    """Names of each file, in order; a tensor larger than the size has a file of its own."""
    shards: list[list[str]] = [[]]
    room = math.inf if size is None else size
    for name, form in forms.items():
        if _nbytes(form) > room and shards[-1]:
            shards.append([])
            room = math.inf if size is None else size
        shards[-1].append(name)
        room -= _nbytes(form)
    return shards


def _free_names(single: Path, count: int) -> list[Path]:
    """Names that no file has, so that an index that is there keeps its own shards until it is replaced."""
    attempt = 0
    while True:
        tag = f"-{attempt}" if attempt else ""
        names = [single.with_name(f"{single.stem}{tag}-{i:05}-of-{count:05}.safetensors") for i in range(1, count + 1)]
        if not any(name.exists() for name in names):
            return names
        attempt += 1


def _begin(file: IO[bytes], forms: Forms, metadata: dict[str, str]) -> dict[str, tuple[IO[bytes], int]]:
    """Write the header and reserve the space; where each tensor goes."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset, offsets = 0, {}
    # Wide dtypes first, as safetensors does: then every tensor is aligned.
    for name in sorted(forms, key=lambda name: -forms[name][1].itemsize):
        shape, dtype = forms[name]
        end = offset + _nbytes(forms[name])
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offsets[name], offset = offset, end
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + offset)
    return {name: (file, 8 + len(text) + start) for name, start in offsets.items()}


def _old_files(single: Path, index: Path) -> list[Path]:
    """What a new model replaces: the file, the index and the shards that it names."""
    found = [path for path in (single, index) if path.is_file()]
    if index.is_file():
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            found += [path for name in shards if Path(name).name == name and (path := single.parent / name).is_file()]
    return found


def _nbytes(form: tuple[tuple[int, ...], torch.dtype]) -> int:
    return math.prod(form[0]) * form[1].itemsize
