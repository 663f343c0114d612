"""``python -m examples.demo``: train, measure, print tables, write pictures and figures.json. A minute or two."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from examples.demo.digits import BATCH, Digits, train
from examples.demo.measure import DAMPING, compare_structures, project, quality_over_training
from examples.demo.pictures import draw
from examples.demo.report import projection_report, quality_report, structures_report, training_table, uses_report
from examples.demo.uses import measure_uses
from examples.shared import results


def main(arguments: Sequence[str] | None = None) -> None:
    """Do everything.

    Args:
        arguments: of the command line; None: the process's own.
    """
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(options.seed)
    digits = Digits.load(generator)
    print("Using a Fisher: learning a second task, merging two models, training, looking for examples ...")
    uses = measure_uses(digits, epochs=max(1, options.epochs // 4), seed=options.seed)
    print(uses_report(uses))

    print("\nTraining a 64-64-32-10 network on scikit-learn's digits ...")
    checkpoints = train(digits, epochs=options.epochs, seed=options.seed, generator=generator)
    print(training_table(checkpoints))

    print("\nBuilding every kind in every structure ...")
    batch = digits.batch(options.examples, generator)
    structures = compare_structures(checkpoints[-1].network(), batch, repeats=options.repeats)
    print(structures_report(structures, checkpoints[-1], len(batch[1])))

    print("\nJudging every kind's update along the training run ...")
    quality = quality_over_training(checkpoints, digits, batches=options.batches, generator=generator)
    print(quality_report(quality, options.batches))

    print("\nLooking at what an update asks of each example ...")
    shown = checkpoints[len(checkpoints) // 2]
    projection = project(shown, digits.batch(BATCH, generator))
    print(projection_report(projection, shown))
    written = draw(uses, digits, quality, projection, shown, structures, options.out)
    path, seconds = options.out / "figures.json", time.perf_counter() - start
    figures = {
        "environment": results.environment(),
        "settings": {**vars(options), "out": str(options.out), "relative_damping": DAMPING.scale, "batch": BATCH},
        "seconds": seconds,
        "uses": asdict(uses),
        "training": [{"epoch": c.epoch, "loss": c.loss, "accuracy": c.accuracy} for c in checkpoints],
        "structures": {"epoch": checkpoints[-1].epoch, **asdict(structures)},
        "quality_over_training": [asdict(q) for q in quality],
        "projection": {"epoch": shown.epoch, **asdict(projection)},
    }
    results.write(path, figures)
    print(f"\nWrote {', '.join(str(p) for p in [*written, path])} after {seconds:.0f} s.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("demo"), help="folder of pictures and figures.json; what is there is replaced")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--epochs", type=int, default=40, help="epochs of training")
    add("--examples", type=int, default=256, help="examples behind the table of structures, at most 1437")
    add("--batches", type=int, default=6, help=f"batches of {BATCH} that γ is averaged over")
    add("--repeats", type=int, default=5, help="builds that a time is the median of")
    add("--threads", type=int, default=1, help="threads of PyTorch; the network is too small for two")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
