"""The record of work in pieces that may be interrupted: of what it is, and which pieces are finished.

A text file of JSON with a checksum of its own, written whole or not at all. Knows nothing of the pieces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisherkit.errors import FileFormatError
from fisherkit.io.atomic import replace_text
from fisherkit.io.checksums import CHECKSUM, parse, seal


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record, which says its "format" and the "settings" of the work."""
    replace_text(file, json.dumps({**record, CHECKSUM: seal(record)}, indent=1))


def read_record(file: Path, form: Mapping[str, Any], call: str, name: str, advice: str) -> dict[str, Any]:
    """What `write_record` has written, with all entries of ``form``; else a FileFormatError names it ``name``."""
    try:
        found = dict(parse(file.read_text("utf-8")))
        if found.pop(CHECKSUM) != seal(found):
            raise ValueError("it is not what was written, by its checksum")
        if odd := [f"{key} {found.get(key)!r} and not {value!r}" for key, value in form.items() if found[key] != value]:
            raise ValueError(", ".join(odd))
        return found | {"settings": dict(found["settings"])}
    except (OSError, LookupError, ValueError, TypeError) as error:
        raise FileFormatError(
            call, f"{name} that cannot be read ({error}): {file}", "what an unfinished or finished run has written",
            try_=advice,
        ) from error  # fmt: skip


def differing(known: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """The names of the settings that are not the same in both."""
    return sorted(name for name in known.keys() | own.keys() if known.get(name) != own.get(name))
