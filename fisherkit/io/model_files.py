"""A model's weights as Hugging Face keeps them: one safetensors file, or shards beside an index.

Owns this layout: reading tensor by tensor, and files that grow tensor by tensor and appear as a whole. Knows names,
shapes and bytes, and no format of this package.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fisherkit.errors import FileFormatError, InvalidArgumentError, MissingFileError
from fisherkit.io.atomic import DTYPES, FORMAT, UNREADABLE, Forms, form_nbytes, lay_out, part_of
from fisherkit.io.checksums import parse
from fisherkit.io.shards import delete, fill, free_names, publish

FOLDER_NAMES = ("model.safetensors", "model.safetensors.index.json")


class ModelFiles:
    """Named tensors in safetensors files, of which one is open at a time.

    Args:
        path: a file, an index, or a folder with ``model.safetensors`` or its index.
        call: the public call, for errors.

    Attributes:
        forms: name to shape and dtype of every tensor, in the files' order.

    Raises:
        MissingFileError: there is no such file, or the index names one that is not there.
        FileFormatError: one is damaged, or lacks a tensor.
    """

    def __init__(self, path: Path, call: str) -> None:
        self._path, self._call = path, f"{call} ({str(path)!r})"
        self.forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._places: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        for file, wanted in self._files():
            with self._opened(file) as opened:
                present = set(opened.keys())
                if missing := sorted(set(wanted or present) - present):
                    raise self._refused(f"an index that names {missing[:5]}, which {file.name} does not have")
                for name in wanted if wanted is not None else opened.keys():
                    part = opened.get_slice(name)
                    if (dtype := part.get_dtype()) not in DTYPES:
                        raise self._refused(f"{name!r} of dtype {dtype}")
                    self.forms[name], self._places[name] = (tuple(part.get_shape()), DTYPES[dtype]), file

    @property
    def paths(self) -> list[Path]:
        """All files that belong to it, the index included."""
        named = [self._path / name for name in FOLDER_NAMES] if self._path.is_dir() else [self._path]
        return [*named, *dict.fromkeys(self._places.values())]

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            FileFormatError: the file is damaged.
        """
        place = self._places[name]
        if self._open is None or self._open[0] != place:
            self._open = None  # one open file, or the address space of all of them would stay mapped
            self._open = place, self._opened(place)
        try:
            tensor: Tensor = self._open[1].get_tensor(name)
        except UNREADABLE as error:
            raise self._refused(f"{place.name}, of which {name!r} cannot be read ({error})") from error
        return tensor

    def _files(self) -> Iterator[tuple[Path, list[str] | None]]:
        """The files and the names to take from each; None for all."""
        path = self._path
        if path.is_dir():
            found = [path / name for name in FOLDER_NAMES if (path / name).is_file()]
            if not found:
                raise self._refused(f"a folder without {' or '.join(FOLDER_NAMES)}", error=MissingFileError)
            path = found[0]
        if not path.is_file():
            raise self._refused("no such file or folder", error=MissingFileError)
        if path.suffix != ".json":
            yield path, None
            return
        try:
            shards = _shards_of(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._refused(f"an index that cannot be read ({error!r})") from error
        for file, names in shards.items():
            if not file.is_file():
                raise self._refused(f"an index that names {file.name}, which is not there", error=MissingFileError)
            yield file, names

    def _opened(self, file: Path) -> Any:
        try:
            opened: Any = safe_open(file, framework="pt", device="cpu")
        except UNREADABLE as error:
            if _pickled(file):
                raise self._refused(
                    f"{file.name}, which torch.save wrote",
                    "the loaded state dict in place of the path, or a file of it: safetensors.torch.save_file("
                    f'torch.load("{file.name}", weights_only=True), "model.safetensors")',
                ) from error
            raise self._refused(f"{file.name}, which cannot be read ({error})") from error
        if str((opened.metadata() or {}).get("format")).startswith(FORMAT):
            raise self._refused(f"{file.name}, which is a Fisher file", "the model there, and this file in fishers=")
        return opened

    def _refused(
        self,
        got: str,
        try_: str = "check the path, or write the checkpoint again",
        error: type[FileFormatError] = FileFormatError,
    ) -> FileFormatError:
        return error(
            call=self._call, got=got, try_=try_,
            expected="complete safetensors files: one, an index with its shards, or a folder with model.safetensors",
        )  # fmt: skip


def _shards_of(index: Path) -> dict[Path, list[str]]:
    """The files that an index names, with the names in each."""
    shards: dict[Path, list[str]] = {}
    for name, file in dict(parse(index.read_text("utf-8"))["weight_map"]).items():
        shards.setdefault(index.with_name(file), []).append(name)
    return shards


def _pickled(file: Path) -> bool:
    """Whether a file begins as those of torch.save do, now zip archives, once pickles."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        head = opened.read(4)
    return head == b"PK\x03\x04" or head[:1] == b"\x80"


def targets(out: Path) -> tuple[Path, Path]:
    """The names of a single file and of an index."""
    single = out if out.suffix == ".safetensors" else out / FOLDER_NAMES[0]
    return single, single.with_name(f"{single.name}.index.json")


@contextmanager
def written(
    out: Path, forms: Forms, ties: Mapping[str, str], max_shard_size: int | None, *, overwrite: bool, call: str
) -> Iterator[Callable[[str, Tensor], None]]:
    """Files that appear under their names, whole, when the block ends without an exception.

    Args:
        out: a folder, made if need be, or a file's name that ends in ``.safetensors``.
        forms: every tensor that will be put.
        ties: further names of some of these: the header names them.
        max_shard_size: bytes of tensors in one file; None for one file of any size.
        overwrite: replace what is there.
        call: the public call, for errors.

    Returns:
        A function that writes one named tensor.

    Raises:
        InvalidArgumentError: there is something already, or no folder to write into.
        InvalidTypeError: a dtype that safetensors does not have.
    """
    single, index = targets(out)
    _check(out, overwrite, call)
    sizes = {name: form_nbytes(form) for name, form in forms.items()}
    shards, header = fill(sizes, max_shard_size) or [[]], {"format": "pt", **ties}
    with ExitStack() as stack:
        if not single.parent.exists():
            single.parent.mkdir()
            stack.callback(_remove_if_empty, single.parent)
        finals = [single]
        if len(shards) > 1:
            finals = free_names(single, len(shards), (f"-{i}" if i else "" for i in itertools.count()))
        parts = [stack.enter_context(part_of(final)) for final in finals]
        files, puts = [], dict[str, Callable[[str, Tensor], None]]()
        for part, names in zip(parts, shards, strict=True):
            files.append(stack.enter_context(open(part, "rb+")))
            puts |= dict.fromkeys(names, lay_out(files[-1], {n: forms[n] for n in names}, header, call))
        yield lambda name, tensor: puts[name](name, tensor)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        old = [path for path in (single, index) if path.is_file()] + _replaced_shards(index)
        if len(shards) == 1:
            os.replace(parts[0], single)
        else:
            weight_map = {name: final.name for final, names in zip(finals, shards, strict=True) for name in names}
            text = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            publish(parts, finals, index, json.dumps(text, indent=2), lambda final: True)
            finals.append(index)
        # Now the new model is complete; what it replaces goes last.
        delete([path for path in old if path not in finals])


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _replaced_shards(index: Path) -> list[Path]:
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        return [path for path in _shards_of(index) if path.is_file()]
    return []


def _check(out: Path, overwrite: bool, call: str) -> None:
    single, index = targets(out)
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
