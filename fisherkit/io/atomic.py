"""One file under its name: the old one or the whole new one, never a part.

Owns temporary names, replacement, the checks of a path, and reading whole files, compared with their checksums. Knows
safetensors and text, and no format of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fisherkit.errors import FileFormatError, InvalidArgumentError, InvalidTypeError
from fisherkit.io.checksums import CHECKSUM, TensorChecksum, sealed, unsealed

FORMAT = "fisherkit"
"""How the formats of this package's files begin; that of a Fisher file is this alone."""

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
    """Write a safetensors file and have it on the disk; contiguous tensors that share no memory."""
    mode = part.stat().st_mode
    save_file(tensors, part, metadata=header)
    part.chmod(mode)  # some versions of safetensors leave a file that only its owner can read
    _sort_metadata(part)
    flush(part)


def _sort_metadata(part: Path) -> None:
    """The same tensors and header as the same bytes: safetensors writes a header's entries in a random order."""
    with part.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:  # else another writer spells some sign shorter, and its order stays
            file.seek(8)
            file.write(text.ljust(length))


def flush(part: Path) -> None:
    """Have a file on the disk, else a power cut right after it is renamed leaves an empty one."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())


def replace_checked_file(path: str | Path, tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """Write a safetensors file; whoever opens the path finds the old file or the whole new one, never a part.

    It has checksums of the tensors and of the header, which `read_tensors` compares.

    Args:
        path: where; an existing file is replaced.
        tensors: named tensors, copied.
        header: string keys and values.

    Returns:
        The header's checksum, which is one of all that the file holds.
    """
    own = owned(tensors)
    whole = sealed(header, {name: TensorChecksum.of(tensor) for name, tensor in own.items()})
    with part_of(Path(path)) as part:
        write_part(part, own, whole)
        os.replace(part, path)
    return whole[CHECKSUM]


def owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: safetensors refuses tensors that share memory, and views that are not contiguous."""
    form = torch.contiguous_format
    return {name: tensor.detach().to("cpu", copy=True, memory_format=form) for name, tensor in tensors.items()}


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
