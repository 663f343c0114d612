"""Models as named tensors that are read one by one, wherever they lie.

Owns the three sources: a module or a state dict in memory, and safetensors files (one, or several behind an index) of
which only the headers are read until a tensor is asked for. Knows nothing of merging; changes no source.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fisherkit import io
from fisherkit.errors import FileFormatError, InvalidTypeError, MissingFileError, UnknownParameterError
from fisherkit.io.atomic import UNREADABLE
from fisherkit.wrappers import plain, unwrapped

Model: TypeAlias = nn.Module | Mapping[str, Tensor] | str | Path
"""A module, its state dict, or the path of a safetensors file, of a sharded one's index, or of a folder with either."""

STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""Last parts of names that are buffers where nothing tells buffers from parameters: in state dicts and files."""

FOLDER_NAMES = ("model.safetensors", "model.safetensors.index.json")

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Safetensors' names of dtypes."""


class Checkpoint(ABC):
    """Named tensors of one model.

    Args:
        label: what messages call it.
        shapes: name to shape, in the model's order.
        dtypes: name to dtype.
        buffers: names that are no parameters.
        aliases: a later name of a tensor to its first name, where two names share one tensor.
    """

    def __init__(
        self,
        label: str,
        shapes: dict[str, tuple[int, ...]],
        dtypes: dict[str, torch.dtype],
        buffers: frozenset[str],
        aliases: dict[str, str],
    ) -> None:
        self.label, self.shapes, self.dtypes, self.buffers, self.aliases = label, shapes, dtypes, buffers, aliases

    @property
    def files(self) -> list[Path]:
        """All files that belong to it; none of what is in memory."""
        return []

    @property
    def names(self) -> tuple[str, ...]:
        """All names in the model's order."""
        return tuple(self.shapes)

    def read(self, name: str) -> Tensor:
        """One tensor; it may share memory with the source and is not to be changed.

        Raises:
            UnknownParameterError: the model does not have it.
            FileFormatError: the file is damaged.
        """
        if name not in self.shapes:
            raise UnknownParameterError(
                call=f"merge, {self.label}", got=f"no {name!r}", expected=f"one of its {len(self.shapes)} names"
            )
        return self._read(name)

    def device(self, name: str) -> torch.device:
        """Where a tensor is once read."""
        return torch.device("cpu")

    @abstractmethod
    def _read(self, name: str) -> Tensor: ...


class MemoryCheckpoint(Checkpoint):
    """A state dict.

    Args:
        tensors: name to tensor.
        label: what messages call it.
        buffers: names that are no parameters; None to go by `STATISTICS`.

    Raises:
        InvalidTypeError: an entry is no tensor.
    """

    def __init__(self, tensors: Mapping[str, Tensor], label: str, buffers: frozenset[str] | None = None) -> None:
        odd = sorted(str(name) for name, t in tensors.items() if not isinstance(t, Tensor) or not isinstance(name, str))
        if odd:
            raise InvalidTypeError(
                call=f"merge, {label}",
                got=f"entries that are no named tensors: {odd}",
                expected="a state dict of name -> tensor",
                try_="leave them out",
            )
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        first: dict[tuple[Any, ...], str] = {}
        aliases = {}
        for name, tensor in self._tensors.items():
            place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
            owner = first.setdefault(place, name) if tensor.numel() else name
            if owner != name:
                aliases[name] = owner
        super().__init__(
            label,
            {name: tuple(tensor.shape) for name, tensor in self._tensors.items()},
            {name: tensor.dtype for name, tensor in self._tensors.items()},
            _by_name(self._tensors) if buffers is None else buffers,
            aliases,
        )

    def device(self, name: str) -> torch.device:
        """Where the tensor is."""
        return self._tensors[name].device

    def _read(self, name: str) -> Tensor:
        return self._tensors[name]


class FileCheckpoint(Checkpoint):
    """Safetensors files, one of which is open at a time.

    Args:
        path: a file, an index, or a folder with ``model.safetensors`` or its index.
        label: what messages call it.

    Raises:
        MissingFileError: there is no such file, or the index names one that is not there.
        FileFormatError: one is damaged, or lacks a tensor.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self._label = path, label
        self._places: dict[str, Path] = {}
        self._file: tuple[Path, Any] | None = None
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for file, wanted in self._files():
            with self._opened(file) as opened:
                present = set(opened.keys())
                if missing := sorted(set(wanted or present) - present):
                    raise self._refused(f"an index that names {missing[:5]}, which {file.name} does not have")
                for name in wanted if wanted is not None else opened.keys():
                    part = opened.get_slice(name)
                    shapes[name], dtypes[name] = tuple(part.get_shape()), self._dtype(part.get_dtype(), name)
                    self._places[name] = file
        super().__init__(label, shapes, dtypes, _by_name(shapes), {})

    @property
    def files(self) -> list[Path]:
        """All files that belong to it, the index included."""
        named = [self.path / name for name in FOLDER_NAMES] if self.path.is_dir() else [self.path]
        return [*named, *dict.fromkeys(self._places.values())]

    def _files(self) -> Iterator[tuple[Path, list[str] | None]]:
        """The files and the names to take from each; None for all."""
        path = self.path
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
            weight_map = dict(io.parse(path.read_text("utf-8"))["weight_map"])
            shards: dict[str, list[str]] = {}
            for name, file in weight_map.items():
                if not isinstance(file, str):
                    raise TypeError(f"{file!r} is no file's name")
                shards.setdefault(file, []).append(name)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise self._refused(f"an index that cannot be read ({error!r})") from error
        for file, names in shards.items():
            if not (path.parent / file).is_file():
                raise self._refused(f"an index that names {file}, which is not there", error=MissingFileError)
            yield path.parent / file, names

    def _read(self, name: str) -> Tensor:
        place = self._places[name]
        if self._file is None or self._file[0] != place:
            self._file = None  # one open file, or the address space of all of them would stay mapped
            self._file = place, self._opened(place)
        try:
            tensor: Tensor = self._file[1].get_tensor(name)
        except UNREADABLE as error:
            raise self._refused(f"{place.name}, of which {name!r} cannot be read ({error})") from error
        return tensor

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
        if str((opened.metadata() or {}).get("format")).startswith(io.FORMAT):
            raise self._refused(f"{file.name}, which is a Fisher file", "the model there, and this file in fishers=")
        return opened

    def _dtype(self, name: str, tensor: str) -> torch.dtype:
        if name not in DTYPES:
            raise self._refused(f"{tensor!r} of dtype {name}")
        return DTYPES[name]

    def _refused(
        self,
        got: str,
        try_: str = "check the path, or write the checkpoint again",
        error: type[FileFormatError] = FileFormatError,
    ) -> FileFormatError:
        return error(
            call=f"merge, {self._label} ({str(self.path)!r})",
            got=got,
            expected="complete safetensors files: one, an index with its shards, or a folder with model.safetensors",
            try_=try_,
        )


def open_checkpoint(model: Model, label: str) -> Checkpoint:
    """A source of named tensors.

    Args:
        model: in one of the forms of `Model`.
        label: what messages call it.

    Raises:
        InvalidTypeError: none of these.
        FileFormatError: a path without complete safetensors files.
    """
    if isinstance(model, nn.Module):
        model = unwrapped(model)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tensors = model.state_dict()
        return _plain(MemoryCheckpoint(tensors, label, frozenset(set(tensors) - parameters)))
    if isinstance(model, Mapping):
        return _plain(MemoryCheckpoint(model, label))
    if isinstance(model, (str, Path)):
        return _plain(FileCheckpoint(Path(model), label))
    raise InvalidTypeError(
        call=f"merge, {label}",
        got=f"a {type(model).__name__}",
        expected="a module, a state dict, or the path of safetensors files",
    )


class PlainCheckpoint(Checkpoint):
    """Another one by the names that its tensors have where nothing is compiled.

    Args:
        source: with names that torch.compile made.
    """

    def __init__(self, source: Checkpoint) -> None:
        self._source, self._names = source, {plain(name): name for name in source.names}
        super().__init__(
            source.label,
            {new: source.shapes[old] for new, old in self._names.items()},
            {new: source.dtypes[old] for new, old in self._names.items()},
            frozenset(map(plain, source.buffers)),
            {plain(name): plain(owner) for name, owner in source.aliases.items()},
        )

    @property
    def files(self) -> list[Path]:
        """As the source's."""
        return self._source.files

    def device(self, name: str) -> torch.device:
        """Where the tensor is once read."""
        return self._source.device(self._names[name])

    def _read(self, name: str) -> Tensor:
        return self._source._read(self._names[name])


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    short = [plain(name) for name in checkpoint.names]
    return (
        checkpoint if tuple(short) == checkpoint.names or len(set(short)) < len(short) else PlainCheckpoint(checkpoint)
    )


def _pickled(file: Path) -> bool:
    """Whether a file begins as those of torch.save do, now zip archives, once pickles."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        head = opened.read(4)
    return head == b"PK\x03\x04" or head[:1] == b"\x80"


def _by_name(names: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(name for name in names if name.rpartition(".")[2] in STATISTICS)
