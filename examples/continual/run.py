"""The command: measure the benches, print the tables, write figures and pictures and, if asked, the docs page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.continual import experiment, report
from examples.continual.cells import RAW, TRACE, Plan
from examples.continual.methods import DAMPED, METHODS
from examples.continual.pictures import draw
from examples.continual.summary import curves
from examples.shared import results

DOCS = Path(__file__).parents[2] / "docs"
ASSETS = DOCS / "assets" / "continual"
PAGE = DOCS / "results" / "continual.md"
SECTION = "continual"
"""The name of the page's section."""

TINY = Plan(
    seeds=(0, 1),
    strengths={TRACE: (0.01, 0.1, 1.0), RAW: (0.1, 1.0, 10.0)},
    full={("permuted-digits", "fit"): (0.1, 1.0)},
    short={"": (0.1, 1.0), DAMPED: (1.0, 3.0)},
    examples=8,
    epochs={"fit": 1, "early": 1},
    tasks=2,
)
"""Every path, no figure."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(prog="python -m examples.continual", description=__doc__)
    add = parser.add_argument
    add(
        "--part",
        nargs="+",
        choices=list(experiment.ALL),
        default=list(experiment.ALL),
        help="which benches (default: all)",
    )
    add("--methods", nargs="+", choices=list(METHODS), default=None, help="which methods (default: all)")
    results.add_options(parser, "continual")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not there yet, and report.

    Args:
        arguments: of the command line; None: the process's own.
    """
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        if not options.report:
            keys = tuple(options.methods) if options.methods else None
            for name in options.part:
                experiment.run(options.out, experiment.ALL[name], TINY if options.tiny else Plan(), keys)
        found = experiment.read(options.out)
    except ValueError as error:
        sys.exit(str(error))
    pictures = draw(curves(found), options.out)
    body = report.report(found, ".")
    (options.out / "continual.md").write_text(body + "\n", "utf-8")
    print(body)
    if options.docs:
        files = (*(experiment.path_of(options.out, name) for name in found), *pictures)
        results.publish(ASSETS, files, PAGE, SECTION, report.report(found, "../assets/continual"))
