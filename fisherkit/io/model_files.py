"""A model's weights as Hugging Face keeps them: one safetensors file, or shards beside an index.

Owns this layout: reading tensor by tensor, and files that grow tensor by tensor and appear as a whole. Knows names,
shapes and bytes, and no format of this package.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fisherkit.errors import FileFormatError, InvalidArgumentError, MissingFileError
from fisherkit.io.atomic import delete, require_folder
from fisherkit.io.tensors import (
    DTYPES,
    FORMAT,
    INDEX_SUFFIX,
    SUFFIX,
    UNREADABLE,
    Form,
    files_of_index,
    form_nbytes,
    in_shards,
    new_files,
    pickled,
    weight_map,
)

FOLDER_NAMES = ("model.safetensors", "model.safetensors.index.json")


class ModelFiles:
    """Named tensors in safetensors files, of which one is open at a time.

    Attributes:
        forms: name to shape and dtype of every tensor, in the files' order.
    """

    def __init__(self, path: Path, call: str) -> None:
        self._path, self._call = path, f"{call} ({str(path)!r})"
        self.forms: dict[str, Form] = {}
        self._places: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        for file, wanted in self._files().items():
            opened = self._opened(file)
            present = list(opened.keys())
            if missing := sorted(set(wanted) - set(present)):
                raise self._refused(f"an index that names {missing[:5]}, which {file.name} does not have")
            for name in wanted or present:
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
        """One tensor, on the CPU."""
        place = self._places[name]
        if self._open is None or self._open[0] != place:
            self._open = None  # one open file, or the address space of all of them would stay mapped
            self._open = place, self._opened(place)
        try:
            tensor: Tensor = self._open[1].get_tensor(name)
        except UNREADABLE as error:
            raise self._refused(f"{place.name}, of which {name!r} cannot be read ({error})") from error
        return tensor

    def _files(self) -> dict[Path, list[str]]:
        """The files and, of an index, the names to take from each."""
        path = self._path
        if path.is_dir():
            found = [path / name for name in FOLDER_NAMES if (path / name).is_file()]
            if not found:
                raise self._refused(f"a folder without {' or '.join(FOLDER_NAMES)}", error=MissingFileError)
            path = found[0]
        if not path.is_file():
            raise self._refused("no such file or folder", error=MissingFileError)
        if path.suffix != ".json":
            return {path: []}
        shards: dict[Path, list[str]] = {}
        try:
            for name, file in files_of_index(path).items():
                shards.setdefault(file, []).append(name)
        except (*UNREADABLE, AttributeError) as error:
            raise self._refused(f"an index that cannot be read ({error!r})") from error
        if missing := [file.name for file in shards if not file.is_file()]:
            raise self._refused(f"an index that names {missing[0]}, which is not there", error=MissingFileError)
        return shards

    def _opened(self, file: Path) -> Any:
        try:
            opened: Any = safe_open(file, framework="pt", device="cpu")
        except UNREADABLE as error:
            if pickled(file):
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
        self, got: str, try_: str = "check the path, or write the checkpoint again",
        error: type[FileFormatError] = FileFormatError,
    ) -> FileFormatError:  # fmt: skip
        return error(
            self._call, got,
            "complete safetensors files: one, an index with its shards, or a folder with model.safetensors", try_=try_,
        )  # fmt: skip


def targets(out: Path) -> tuple[Path, Path]:
    """The names of a single file and of an index."""
    single = out if out.suffix == SUFFIX else out / FOLDER_NAMES[0]
    return single, single.with_name(f"{single.name}{INDEX_SUFFIX}")


@contextmanager
def written(
    out: Path, forms: Mapping[str, Form], ties: Mapping[str, str], max_shard_size: int | None, *, overwrite: bool,
    call: str,
) -> Iterator[Callable[[str, Tensor], None]]:  # fmt: skip
    """A model's files that appear under their names, whole, when the block ends without an exception.

    Gives a function that writes one named tensor of those in ``forms``; ``ties``, further names of some, go into the
    header.
    """
    single, index = targets(out)
    _check(out, overwrite, call)
    made = not single.parent.exists()
    single.parent.mkdir(exist_ok=True)
    try:
        files = in_shards(single, forms, max_shard_size)
        text = {"metadata": {"total_size": sum(map(form_nbytes, forms.values()))}, "weight_map": weight_map(files)}
        indexed = (index, json.dumps(text, indent=2)) if len(files) > 1 else None
        replaced = {path for path in (single, index, *_shards_at(index)) if path.is_file()}
        with new_files(files, {"format": "pt", **ties}, call, index=indexed) as put:
            yield put
        # Now the new model is complete; what it replaces goes last.
        delete(replaced - {*files} - ({index} if indexed else set()))
    finally:
        if made:
            with contextlib.suppress(OSError):  # where there is a model
                single.parent.rmdir()


def _shards_at(index: Path) -> list[Path]:
    """The files of an index; none where there is none, or it cannot be read."""
    with contextlib.suppress(*UNREADABLE, AttributeError):
        return list(files_of_index(index).values())
    return []


def _check(out: Path, overwrite: bool, call: str) -> None:
    single, index = targets(out)
    folder = single.parent
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(call, f"out={str(out)!r}, where {folder} is a file", "a folder")
    if not folder.exists():
        require_folder(folder if single == out else folder.parent, call)
    there = [path.name for path in (single, index) if path.exists()]
    if there and not overwrite:
        raise InvalidArgumentError(
            call, f"out={str(out)!r}, where there is a {' and a '.join(there)}", "a place without a model",
            why="a model would be lost", try_="another out=, or overwrite=True",
        )  # fmt: skip
