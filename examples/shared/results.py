"""Figures as they are written, and tables made of them. Knows no part."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

import torch

Figures = dict[str, Any]
"""What a part measured: text, numbers, lists and dicts, as JSON has them."""


def environment() -> Figures:
    """Versions and threads; never a host's or a user's name."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fisherkit": importlib.metadata.version("fisherkit"),
        "threads": torch.get_num_threads(),
    }


def write(path: Path, figures: Figures) -> None:
    """Figures as JSON, one entry a line."""
    path.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read(path: Path) -> Figures:
    """What `write` wrote."""
    return json.loads(path.read_text("utf-8"))


def write_json(path: Path, content: Any) -> None:
    """A JSON file, put in place at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, ensure_ascii=False) + "\n", "utf-8")
    os.replace(part, path)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    align = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, align, *rows))


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean, by Student's t; 0 of one value."""
    from scipy.stats import t  # takes long to import

    count = len(values)
    return float(t.ppf(0.975, count - 1)) * stdev(values) / count**0.5 if count > 1 else 0.0


def markers(name: str) -> tuple[str, str]:
    """What a part's section of the page stands between."""
    return f"<!-- {name}: written by run.py -->", f"<!-- end of {name} -->"


def fill(page: Path, name: str, body: str) -> None:
    """Write a section into a page, between its markers.

    Args:
        page: a Markdown file.
        name: of the section.
        body: its new content.

    Raises:
        ValueError: the page lacks a marker.
    """
    content = page.read_text("utf-8")
    first, last = markers(name)
    if first not in content or last not in content:
        raise ValueError(f"{page.name} should have the lines {first!r} and {last!r}")
    before, _, rest = content.partition(first)
    page.write_text(f"{before}{first}\n\n{body}\n\n{last}{rest.partition(last)[2]}", "utf-8")


def publish(assets: Path, files: Iterable[Path], page: Path, name: str, body: str) -> None:
    """Results and pictures among the docs' assets, and their section into the page.

    Args:
        assets: the folder; made if missing.
        files: what goes there.
        page: a Markdown file.
        name: of the section.
        body: its new content.
    """
    assets.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy(file, assets)
    fill(page, name, body)


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """What every experiment's command has.

    Args:
        parser: gets them.
        out: the default folder.
    """
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), help=f"folder for figures and pictures (default: {out})")
    add("--threads", type=int, default=1, help="of torch (default: 1; everything here is small)")
    add("--tiny", action="store_true", help="tiny sizes: does everything work? The figures mean nothing.")
    add("--docs", action="store_true", help="also update the docs' page")
    add("--report", action="store_true", help="measure nothing: print, draw and, with --docs, write what is there")
