"""The command: retrain, score, compare, report. Owns options and the order of things."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.influence import compare, report
from examples.influence.methods import methods
from examples.influence.outcomes import outcomes, scored_models
from examples.influence.peers import missing
from examples.influence.pictures import draw
from examples.influence.scoring import dampings_of, score
from examples.influence.settings import SETTINGS, tiny
from examples.shared import results

DOCS = Path(__file__).parents[2] / "docs"
ASSETS = DOCS / "assets" / "influence"
PAGE = DOCS / "results" / "influence.md"
SECTION = "influence"
"""The name of the page's section."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(prog="python -m examples.influence", description=__doc__)
    add = parser.add_argument
    default = ["digits-0", "digits-0.001", "softmax"]
    add("--setting", nargs="+", choices=list(SETTINGS), default=default, help=f"which (default: {' '.join(default)})")
    add("--subsets", type=int, default=200, help="random halves (default: 200)")
    add("--seeds", type=int, default=10, help="trainings of each half (default: 10)")
    add("--method", nargs="+", choices=list(methods()), help="which scores (default: all)")
    add("--damping", nargs="+", type=float, default=[1.0], help="multiples of the mean eigenvalue (default: 1)")
    results.add_options(parser, "influence")
    add("--only-retrain", action="store_true", help="no scores")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run; what files already have is not computed again.

    Args:
        arguments: of the command line; None: the process's own.
    """
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.report:
        for name in missing():
            print(f"{name} is not installed: its methods are left out", flush=True)
        for name in options.setting:
            _measure(name, options)
    found = compare.read(options.out)
    if not found:
        if options.report or options.docs:
            sys.exit(f"{options.out} has no results yet")
        return
    pictures = draw(found, options.out)
    body = report.report(found, ".")
    (options.out / "influence.md").write_text(body + "\n", "utf-8")
    print(body)
    if options.docs:
        files = (*(compare.path_of(options.out, name) for name in found), *pictures)
        results.publish(ASSETS, files, PAGE, SECTION, report.report(found, "../assets/influence"))


def _measure(name: str, options: argparse.Namespace) -> None:
    setting = tiny(SETTINGS[name]()) if options.tiny else SETTINGS[name]()
    begin = time.perf_counter()
    runs = outcomes(setting, options.out, subsets=options.subsets, seeds=options.seeds, progress=True)
    print(f"{setting.title}: retraining {time.perf_counter() - begin:.0f} s", flush=True)
    if options.only_retrain:
        return
    models = scored_models(setting)
    for method in options.method or methods():
        score(setting, models, method, dampings_of(method, options.damping), options.out)
    compare.compare(setting, models, runs, options.out, tiny=options.tiny)
