"""Scores of many training examples against many queries within a fixed memory budget; peak memory and error measured.

    python examples/influence/large_scores.py scratch/                 # 20,000 × 200, a million parameters
    python examples/influence/large_scores.py scratch/ --train 100000 --queries 1000 --width 2200 --budget-mb 1000

Training examples are made batch by batch, so that the data take no memory. Their rows go to the folder, a file a block:
stop it with Ctrl-C and run the same line again, and it goes on where it was. Prints, a line a step, seconds and the
most memory that the process has taken so far beyond what it had before scoring; for approximations also their measured
error, and what the score matrix takes, which no budget bounds.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherkit as fk

CLASSES = 10
BATCH = 500
FEW = 10
"""Queries whose largest scores are found exactly: each takes 2·N·D operations."""


class Batches:
    """Examples of a task with classes, made when they are asked for, the same in every pass.

    Args:
        count: how many.
        width: of an input.
        start: the first batch's number; other numbers are other examples.
    """

    def __init__(self, count: int, width: int, start: int = 0) -> None:
        self.count, self.width, self.start = count, width, start
        self.centres = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return -(-self.count // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(len(self)):
            generator = torch.Generator().manual_seed(1000 + self.start + number)
            size = min(BATCH, self.count - number * BATCH)
            labels = torch.randint(CLASSES, (size,), generator=generator)
            noise = torch.randn(size, self.width, generator=generator)
            yield 0.2 * self.centres[labels] + noise, labels


def make_model(width: int) -> nn.Module:
    """Two hidden layers of the inputs' width."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, CLASSES)
    )


def fit(folder: Path, options: argparse.Namespace) -> None:
    """One pass of training and a Fisher, in files."""
    model, train = make_model(options.width), Batches(options.train, options.width)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for x, y in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "model.pt")
    fk.EmpiricalFisher(model.eval(), train, structure=options.structure).save(folder / "fisher.safetensors")


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found


def step(name: str, work: Callable[[], Any], before: int, **more: Any) -> Any:
    """Do it, and print what it took."""
    began = time.perf_counter()
    result = work()
    line = {"step": name, "seconds": round(time.perf_counter() - began, 1), "peak_mb": round((peak() - before) / 1e6)}
    if isinstance(result, fk.influence.ApproximateScores):
        line |= {"median_error": float(result.error.median()), "scores_mb": round(result.scores.nbytes / 1e6)}
    if isinstance(result, fk.influence.RowBlocks) and result.compression is not None:
        line |= vars(result.compression)
    print(json.dumps(line | more), flush=True)
    return result


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--width", type=int, default=700)
    parser.add_argument("--structure", default="kfac")
    parser.add_argument("--budget-mb", type=int, default=200)
    parser.add_argument("--rank", type=int, default=16, help="of queries, in the low-rank approximation")
    parser.add_argument("--compress", type=float, help="rows too, to this share of their effective dimension")
    parser.add_argument("--exact", action="store_true", help="exact scores too")
    parser.add_argument("--fit", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder / f"{options.train}-{options.width}-{options.structure}"
    folder.mkdir(parents=True, exist_ok=True)
    if options.fit:
        fit(folder, options)
        return
    if not (folder / "fisher.safetensors").exists():
        # In a process of its own: its peak is not that of scoring.
        subprocess.run([sys.executable, *sys.argv, "--fit"], check=True)
    model = make_model(options.width)
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
    train, queries = (Batches(options.train, options.width), Batches(options.queries, options.width, start=1_000_000))
    fisher = fk.load(folder / "fisher.safetensors")
    influence = fk.influence.InfluenceScores(fisher, model.eval(), memory_budget=options.budget_mb * 1_000_000)
    before = peak()
    print(json.dumps({"parameters": fisher.size, **{k: v for k, v in vars(options).items() if k != "folder"}}))
    rows = step("prepare", lambda: influence.prepare(train, folder=folder / "rows"), before)
    if options.compress is not None:
        step("compress", lambda: influence.prepare(train, compress=options.compress, queries=queries), before)
    low_rank = fk.influence.LowRankQueries(options.rank)
    step("low rank", lambda: influence.approximate_scores(queries, rows, low_rank), before)
    x, y = next(iter(queries))
    step("top 10", lambda: influence.top((x[:FEW], y[:FEW]), rows, 10), before, queries=min(FEW, len(y)))
    if options.exact:
        step("exact", lambda: influence.scores(queries, rows), before)


if __name__ == "__main__":
    main()
