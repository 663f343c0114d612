"""The command: run the parts, print their tables, write figures and pictures and, if asked, the docs page.

A part is a module with ``run(out, tiny)``, which draws its pictures into a folder and returns its figures, and
``report(figures)``, which says them in Markdown. It is imported when it is asked for: parts need different packages.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import torch

from examples.shared import results
from examples.shared.results import Figures, write_json

DOCS = Path(__file__).parents[2] / "docs"
ASSETS = DOCS / "assets" / "merging"
PARTS = {name: f"examples.merging.{name}" for name in ("protocol", "guard", "small", "text")}
PAGE = "results/merging.md"
"""Where all parts' sections stand."""


class Part(Protocol):
    """What a part's module has."""

    def run(self, out: Path, tiny: bool = False) -> Figures:
        """Measure what is not there yet, draw into the folder, return the figures; tiny: does everything work?"""

    def figures(self, out: Path) -> Figures:
        """Draw and return what is there."""

    def report(self, found: Figures) -> str:
        """The figures in Markdown."""


def part(name: str) -> Part:
    """A part's module, imported now."""
    return cast("Part", importlib.import_module(PARTS[name]))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(prog="python -m examples.merging", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="which (default: all)")
    results.add_options(parser, "merging")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts.

    Args:
        arguments: of the command line; None: the process's own.
    """
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.part:
        begin, module = time.perf_counter(), part(name)
        found = module.figures(options.out) if options.report else module.run(options.out, options.tiny)
        write_json(options.out / f"{name}.json", {**found, "tiny": options.tiny})
        body = module.report(found)
        print(f"{name}: {time.perf_counter() - begin:.0f} s\n\n{body}\n", flush=True)
        if options.docs:
            files = (options.out / f"{name}.json", *options.out.glob("*.png"))
            results.publish(ASSETS, files, DOCS / PAGE, name, body)
