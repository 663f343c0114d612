"""Kill two processes of ``fisherkit scores --rows`` at random moments, again and again, until they come to their end.

    python -m tests.kills --kills 50

Each run is killed (one process or both, SIGKILL) after a random number of new blocks of rows, and started again with
the same command. Every start must go on from the blocks that are there, a process whose partner has died must end with
an error and not hang, and at the end the rows must be the bytes, and the scores the numbers, of a run that nobody
killed. No part of the test suite, as 50 kills take some minutes; prints what happened, and ends with 1 if anything is
otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.commands import Running
from tests.ranks import free_port

MODULE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(200, 300), nn.Tanh(), nn.Linear(300, 3)).double()
    x, y = torch.rand(600, 200).double(), torch.randint(3, (600,))
    return model, list(zip(x.split(10), y.split(10))), [(x[:4], y[:4])]
"""

TIMEOUT = 300
"""Seconds in which a process must end."""


def start(folder: Path, rows: Path, out: Path) -> list[Running]:
    """Two processes of the command, with what torchrun tells them."""
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    words = ["scores", "subject:make", "--fisher", "fisher.safetensors", "--rows", str(rows), "--out", str(out)]
    return [Running(folder, *words, "--top", "8", "--overwrite", **known, RANK=str(rank)) for rank in range(2)]


def blocks(rows: Path) -> list[Path]:
    """The finished blocks."""
    return sorted(rows.glob("rows-*.safetensors"))


def numbers(value: Any) -> Any:
    """A report without the times that it took."""
    if isinstance(value, dict):
        return {key: numbers(one) for key, one in value.items() if "seconds" not in key}
    return [numbers(one) for one in value] if isinstance(value, list) else value


def ended(command: Running) -> int | None:
    """Its status; None of one that had to be killed as it did not end."""
    command.process.join(TIMEOUT)
    status = command.status
    command.process.kill()
    return status


def main() -> int:
    """Run, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: %(default)s)")
    args = parser.parse_args()
    draw, count = random.Random(args.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "subject")
        folder.mkdir()
        (folder / "subject.py").write_text(f"{MODULE}\ndef make_pair():\n    return make()[:2]\n")
        words = ["--structure", "diagonal", "--out", "fisher.safetensors"]
        assert ended(Running(folder, "estimate", "subject:make_pair", *words)) == 0
        assert [ended(one) for one in start(folder, folder / "whole", folder / "expected")] == [0, 0]
        expected = {file.relative_to(folder / "whole"): file.read_bytes() for file in blocks(folder / "whole")}
        report = numbers(json.loads((folder / "expected" / "scores.json").read_text()))
        cycle = 0
        while count["kills"] < args.kills:
            cycle += 1
            rows, out = folder / f"rows-{cycle}", folder / f"out-{cycle}"
            while True:
                before = {file: file.stat().st_mtime_ns for file in blocks(rows)}
                running = start(folder, rows, out)
                left = len(expected) - len(before)
                wanted = len(before) + draw.randint(0, max(left // 3, 1))
                if count["kills"] >= args.kills or left == 0:
                    status = [ended(one) for one in running]
                    count["runs that came to their end"] += status == [0, 0]
                    break
                while len(blocks(rows)) < wanted and all(one.status is None for one in running):
                    time.sleep(0.002)
                time.sleep(draw.random() * (4.0 if draw.random() < 0.2 else 0.05))
                both = len(blocks(rows)) == len(
                    before
                )  # before they know each other it is torchrun that ends the other one
                victims = running if both else draw.choice([running[:1], running[1:], running])
                alive = [one for one in victims if one.status is None]
                for one in alive:
                    one.process.kill()
                count["kills"] += bool(alive)
                count["kills of one process"] += len(alive) == 1 == len(victims)
                status = [ended(one) for one in running]
                count["processes that hung"] += status.count(None)
                count["survivors that ended with an error"] += sum(1 for one in status if one is not None and one > 0)
                print(dict(count), file=sys.stderr)
                there = {file: file.stat().st_mtime_ns for file in blocks(rows)}
                count["finished blocks that were lost or made again"] += sum(
                    there.get(f) != t for f, t in before.items()
                )
            found = {file.relative_to(rows): file.read_bytes() for file in blocks(rows)}
            count["other bytes of rows"] += found != expected
            count["other scores"] += numbers(json.loads((out / "scores.json").read_text())) != report
    count["cycles"] = cycle
    print(json.dumps(dict(count), indent=1))
    bad = ("processes that hung", "finished blocks that were lost or made again", "other bytes of rows", "other scores")
    return int(any(count[name] for name in bad) or count["runs that came to their end"] != cycle)


if __name__ == "__main__":
    sys.exit(main())
