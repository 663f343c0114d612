"""Tables, claims and pictures of `examples.paper.quality`, from the results files alone."""

from __future__ import annotations

from pathlib import Path


def write_all(out: Path, page: Path | None) -> str:
    """Write everything that the results allow, and return the tables as text."""
    return f"{out} {page}"
