"""One file under its name: the old one or the whole new one, never a part.

Owns temporary names, replacement, and the checks of a path. Knows text, and no format.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fisherkit.errors import InvalidArgumentError, InvalidTypeError


def as_path(path: str | Path, call: str) -> Path:
    """A path as a Path."""
    if not isinstance(path, (str, Path)):
        raise InvalidTypeError(call, f"a {type(path).__name__}", "the path of a file")
    return Path(path)


def check_folder(path: str | Path, call: str) -> None:
    """Find out before the work is done whether a file can be written."""
    path = Path(path)
    require_folder(path.parent, call)
    if path.is_dir():
        raise InvalidArgumentError(call, "a folder", "a file's name", try_="a file in that folder")


def require_folder(folder: Path, call: str) -> None:
    """Refuse a folder that is missing, with what makes it."""
    if not folder.is_dir():
        raise InvalidArgumentError(
            call, f"a folder that does not exist: {folder}", "an existing folder",
            try_=f"mkdir -p {shlex.quote(str(folder))}",
        )  # fmt: skip


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
    shard = r"(-[0-9a-f]{8}|-\d+)?(-\d{5,}-of-\d{5,})?"
    pattern = re.compile(rf"\.?{stem}{shard}(\.safetensors)?(\.(index|parts)\.json)?\.[0-9a-f]{{8}}\.part")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(found for found in beside if pattern.fullmatch(found.name))


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write that then takes the path's place; whoever opens the path finds the old file or the new one."""
    with part_of(Path(path)) as part:
        yield part
        flush(part)
        os.replace(part, path)


def flush(part: Path) -> None:
    """Have a file on the disk, else a power cut right after it is renamed leaves an empty one."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())


def replace_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, as `replacing` does."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def delete(paths: Iterable[Path]) -> None:
    """Remove files, as far as they can be removed."""
    # What cannot be deleted (a reader has it open on Windows) is in nobody's way; the next save tries again.
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
