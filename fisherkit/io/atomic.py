"""One file under its name: the old one or the whole new one, never a part.

Owns temporary names, replacement, the checks of a path, and reading whole files, compared with their checksums. Knows
safetensors and text, and no format of its own.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fisherkit.errors import FileFormatError, InvalidArgumentError, InvalidTypeError
from fisherkit.io.checksums import CHECKSUM, TensorChecksum, sealed, unsealed

FORMAT = "fisherkit"
"""How the formats of this package's files begin; that of a Fisher file is this alone."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Safetensors' names of dtypes."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Forms = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name to shape and dtype of tensors that are or will be in a file."""

UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, LookupError, RuntimeError, ArithmeticError)
"""What reading a damaged file may raise: safetensors', and torch's where a header says of a tensor what cannot be."""


def as_path(path: str | Path, call: str) -> Path:
    """A path as a Path.

    Raises:
        InvalidTypeError: it is no path.
    """
    if not isinstance(path, (str, Path)):
        raise InvalidTypeError(call=call, got=f"a {type(path).__name__}", expected="the path of a file")
    return Path(path)


def check_folder(path: str | Path, call: str) -> None:
    """Find out before the work is done whether a file can be written.

    Raises:
        InvalidArgumentError: the folder does not exist, or the path is a folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InvalidArgumentError(
            call=call,
            got=f"a folder that does not exist: {path.parent}",
            expected="an existing folder",
            try_=f"Path({str(path.parent)!r}).mkdir(parents=True)",
        )
    if path.is_dir():
        raise InvalidArgumentError(call=call, got="a folder", expected="a file's name", try_="a file in that folder")


@contextmanager
def part_of(path: Path) -> Iterator[Path]:
    """A temporary file beside a path, gone at the end unless it was moved."""
    # Not by tempfile, whose files only their owner can read: what becomes of this one is a file like any other.
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.touch(exist_ok=False)
        yield part
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside a path, gone at the end with whatever is still in it."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.mkdir()
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def leftovers(path: Path) -> list[Path]:
    """Temporary files and folders of this path that are there: another process is at work, or one was killed."""
    stem = re.escape(path.name.removesuffix(".safetensors"))
    shard = r"(-[0-9a-f]{8}|-\d+)?(-\d{5}-of-\d{5})?"
    pattern = re.compile(rf"\.?{stem}{shard}(\.safetensors)?(\.index\.json)?\.[0-9a-f]{{8}}\.part")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(found for found in beside if pattern.fullmatch(found.name))


def write_part(part: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file and have it on the disk."""
    save_tensors(tensors, part, metadata=header)
    flush(part)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the same tensors and header are the same bytes."""
    with path.open("wb") as file:
        put = lay_out(file, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}, metadata)
        for name, tensor in tensors.items():
            put(name, tensor)


def lay_out(
    file: IO[bytes], forms: Forms, metadata: Mapping[str, str], call: str = "save"
) -> Callable[[str, Tensor], None]:
    """Write a safetensors header and reserve the space, so that tensors can be written as they come.

    Args:
        file: open for writing, and empty.
        forms: name to shape and dtype of every tensor.
        metadata: string keys and values of the header.
        call: the public call, for errors.

    Returns:
        A function that writes one tensor, of the announced form, in its place.

    Raises:
        InvalidTypeError: a dtype that safetensors does not have.
    """
    if odd := [name for name, (_, dtype) in forms.items() if dtype not in _NAMES]:
        expected = f"one of {[*map(str, _NAMES)]} in files"
        raise InvalidTypeError(call=call, got=f"{odd[0]!r} of {forms[odd[0]][1]}", expected=expected)
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    size, offsets = 0, dict[str, int]()
    # Wide dtypes first, as safetensors does: then every tensor is aligned.
    for name in sorted(forms, key=lambda name: (-forms[name][1].itemsize, name)):
        shape, dtype = forms[name]
        offsets[name], size = size, size + form_nbytes(forms[name])
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], size]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + size)

    def put(name: str, tensor: Tensor) -> None:
        file.seek(8 + len(text) + offsets[name])
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    return put


def form_nbytes(form: tuple[tuple[int, ...], torch.dtype]) -> int:
    """Bytes of a tensor of this shape and dtype."""
    return math.prod(form[0]) * form[1].itemsize


def flush(part: Path) -> None:
    """Have a file on the disk, else a power cut right after it is renamed leaves an empty one."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())


def replace_checked_file(path: str | Path, tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """Write a safetensors file; whoever opens the path finds the old file or the whole new one, never a part.

    It has checksums of the tensors and of the header, which `read_tensors` compares.

    Args:
        path: where; an existing file is replaced.
        tensors: named tensors.
        header: string keys and values.

    Returns:
        The header's checksum, which is one of all that the file holds.
    """
    whole = sealed(header, checksums_of(tensors))
    with part_of(Path(path)) as part:
        write_part(part, tensors, whole)
        os.replace(part, path)
    return whole[CHECKSUM]


def checksums_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorChecksum]:
    """The checksum of each tensor, wherever it lies."""
    return {name: TensorChecksum.of(tensor.detach().cpu().contiguous()) for name, tensor in tensors.items()}


def replace_text(path: str | Path, text: str) -> None:
    """The same for a text file, in UTF-8."""
    with part_of(Path(path)) as part:
        part.write_text(text, encoding="utf-8")
        flush(part)
        os.replace(part, path)


def read_tensors(
    path: str | Path, device: torch.device | str, call: str, writer: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the tensors of a safetensors file; compared with the checksums in it, if it is of this package.

    Args:
        path: the file.
        device: where its tensors go.
        call: the public call, for errors.
        writer: what writes such files, for errors.

    Raises:
        FileFormatError: damaged, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # The handle is not a mapping: keys() is its only way to tell what it holds.
            names, header = list(file.keys()), file.metadata() or {}
            checksums = unsealed(header, names) if header.get("format", "").startswith(FORMAT) else None
            tensors = {}
            for name in names:
                found = file.get_tensor(name)
                if checksums is not None:
                    with of_tensor(name):
                        checksums[name].check(found)
                tensors[name] = found.to(device)
            return header, tensors
    except UNREADABLE as error:
        raise FileFormatError(**unreadable(call, error, writer=writer)) from error


@contextmanager
def of_tensor(name: str) -> Iterator[None]:
    """Say of which tensor a ValueError is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"tensor {name!r}: {error}") from error


def unreadable(
    call: str, error: Exception | str, *, name: str = "a file", writer: str = "fisher.save"
) -> dict[str, str]:
    """What a FileFormatError says of a damaged file, under the name that it has in the sentence."""
    return {
        "call": call,
        "got": f"{name} that cannot be read ({error})",
        "expected": f"a complete file written by {writer}",
        "try_": "another copy of it, or save it again; an interrupted save leaves the old file in place",
    }
