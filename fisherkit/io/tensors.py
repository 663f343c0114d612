"""Safetensors files, one or several beside an index: written tensor by tensor, whole or not at all, and read whole.

Owns the bytes, which tensor goes into which of several files, their names and the order of replacement: files under
names that nothing points to, then the index. So the old file or the new one is complete at every moment. Knows no
format of its own beyond checksums.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fisherkit.errors import FileFormatError, InvalidTypeError
from fisherkit.io.atomic import delete, flush, part_of, replace_text
from fisherkit.io.checksums import CHECKSUM, Checksums, parse, sealed, unsealed, written

FORMAT = "fisherkit"
"""How the formats of this package's files begin; that of a Fisher file is this alone."""

WRITER = "fisher.save or fisherkit estimate"
"""What Fisher files are written by, as errors say it."""

SUFFIX, INDEX_SUFFIX = ".safetensors", ".index.json"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Safetensors' names of dtypes."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Form = tuple[tuple[int, ...], torch.dtype]
"""A tensor's shape and dtype."""

UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, LookupError, RuntimeError, ArithmeticError)
"""What reading a damaged file may raise: safetensors', and torch's where a header says of a tensor what cannot be."""


# -- writing -----------------------------------------------------------------------------------------------------------


@contextmanager
def new_files(
    files: Mapping[Path, Mapping[str, Form]], header: Mapping[str, str], call: str = "save", *,
    index: tuple[Path, str] | None = None,
) -> Iterator[Callable[[str, Tensor], None]]:  # fmt: skip
    """Files that appear under their names, whole, when the block ends without an exception.

    Args:
        files: path of each file to the shapes and dtypes of its tensors. Of several, no path has a file yet.
        header: string keys and values, of every file.
        call: the public call, for errors.
        index: path and text of the index of several files. If it cannot be written, none of them stays.

    Gives a function that writes one named tensor, of the announced form.
    """
    with ExitStack() as stack:
        parts = {path: stack.enter_context(part_of(path)) for path in files}
        places: dict[str, tuple[Path, int]] = {}
        for path, forms in files.items():
            offsets = _lay_out(parts[path], forms, header, call)
            places |= {name: (parts[path], offset) for name, offset in offsets.items()}

        def put(name: str, tensor: Tensor) -> None:
            part, offset = places[name]
            with part.open("rb+") as file:
                file.seek(offset)
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

        yield put
        for part in parts.values():
            flush(part)
        try:
            for path, part in parts.items():
                os.replace(part, path)
            if index is not None:
                replace_text(*index)
        except BaseException:
            # An interruption may come right after the index was put in place: then the new files are the files.
            if index is not None and not (index[0].is_file() and index[0].read_text("utf-8") == index[1]):
                delete(files)
            raise


def _lay_out(path: Path, forms: Mapping[str, Form], metadata: Mapping[str, str], call: str) -> dict[str, int]:
    """Write a header and reserve the space; gives where each tensor goes. The same header is the same bytes."""
    if odd := [name for name, (_, dtype) in forms.items() if dtype not in _NAMES]:
        expected = f"one of {[*map(str, _NAMES)]} in files"
        raise InvalidTypeError(call, f"{odd[0]!r} of {forms[odd[0]][1]}", expected)
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    size, offsets = 0, dict[str, int]()
    # Wide dtypes first, as safetensors does: then every tensor is aligned.
    for name in sorted(forms, key=lambda name: (-forms[name][1].itemsize, name)):
        shape, dtype = forms[name]
        offsets[name], size = size, size + form_nbytes(forms[name])
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offsets[name], size]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    return {name: 8 + len(text) + offset for name, offset in offsets.items()}


def forms_of(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    """Shape and dtype of each tensor."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def form_nbytes(form: Form) -> int:
    """Bytes of a tensor of this shape and dtype."""
    return math.prod(form[0]) * form[1].itemsize


def in_shards(path: Path, forms: Mapping[str, Form], largest: int | None) -> dict[Path, dict[str, Form]]:
    """Which tensor goes into which file: in their order, at most so many bytes a file where no tensor is larger.

    Several files have names that no file has yet, so that an index that is there keeps its own.
    """
    shards = cut(forms, largest)
    if len(shards) == 1:
        return {path: shards[0]}
    for tag in itertools.chain([""], (f"-{number}" for number in itertools.count(1))):
        stem = f"{path.name.removesuffix(SUFFIX)}{tag}"
        names = [f"{stem}-{number:05}-of-{len(shards):05}{SUFFIX}" for number in range(1, len(shards) + 1)]
        paths = [path.with_name(name) for name in names]
        if not any(found.exists() for found in paths):
            break
    return dict(zip(paths, shards, strict=True))


def cut(forms: Mapping[str, Form], largest: int | None) -> list[dict[str, Form]]:
    """Tensors in their order, at most so many bytes together where none has more; ``largest`` None for all together."""
    shards: list[dict[str, Form]] = [{}]
    room = math.inf if largest is None else largest
    for name, form in forms.items():
        if shards[-1] and form_nbytes(form) > room:
            shards.append({})
            room = largest or 0
        shards[-1][name] = form
        room -= form_nbytes(form)
    return shards


def weight_map(files: Mapping[Path, Mapping[str, Form]]) -> dict[str, str]:
    """The name of the file of each tensor, as an index has it."""
    return {name: path.name for path, forms in files.items() for name in forms}


def replace_checked_file(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Write a safetensors file with checksums, whole or not at all; gives that of the header, of all it holds."""
    whole = sealed(header, written(tensors))
    with new_files({Path(path): forms_of(tensors)}, whole) as put:
        for name, tensor in tensors.items():
            put(name, tensor)
    return whole[CHECKSUM]


# -- reading -----------------------------------------------------------------------------------------------------------


def read_tensors(
    path: str | Path, device: torch.device | str, call: str, writer: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the tensors of a safetensors file, compared with the checksums in one of this package."""
    try:
        with safe_open(path, framework="pt") as file:
            # The handle is not a mapping: keys() is its only way to tell what it holds.
            names, header = list(file.keys()), file.metadata() or {}
            ours = header.get("format", "").startswith(FORMAT)
            checksums = unsealed(header, names) if ours else Checksums(None)
            tensors = {}
            for name in names:
                found = file.get_tensor(name)
                checksums.check(name, found)
                tensors[name] = found.to(device)
            return header, tensors
    except UNREADABLE as error:
        raise damaged(call, error, name=str(path), writer=writer) from error


def files_of_index(index: Path) -> dict[str, Path]:
    """The file of each tensor that an index names; what cannot be one raises something of `UNREADABLE`."""
    return {name: index.with_name(file) for name, file in dict(parse(index.read_text("utf-8"))["weight_map"]).items()}


def pickled(file: Path) -> bool:
    """Whether a file begins as those of torch.save do, now zip archives, once pickles."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def damaged(call: str, error: Exception | str, *, name: str = "a file", writer: str = WRITER) -> FileFormatError:
    """The error of a file that cannot be read, under the name that it has in the sentence."""
    return FileFormatError(
        call, f"{name} that cannot be read ({error})", f"a complete file written by {writer}",
        try_="another copy of it, or save it again; an interrupted save leaves the old file in place",
    )  # fmt: skip
