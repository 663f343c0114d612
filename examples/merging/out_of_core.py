"""How much memory a merge of files takes, while the models grow.

    python examples/merging/out_of_core.py folder/    # models of 0.25, 0.5 and 1 GB; 4 GB of files
    python examples/merging/out_of_core.py folder/ --gigabytes 0.1

Writes two synthetic float32 models in shards and their diagonal Fishers into the folder, merges them into files, each
way in a process of its own, and deletes everything again. Prints what the process had at most above what it had before
the merge: anonymous memory (tensors; ``RssAnon``), sampled every 5 ms, and resident memory with the pages of mapped
files that the system keeps while nobody needs them (``VmHWM``). Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import fisherkit as fk
from fisherkit.operators import DiagonalOperator

GIGABYTE = 1_000_000_000
SIDE = 2048
SHARD = 200_000_000
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WAYS = ("merge", "average", "merge, kept in memory")
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives freed blocks back to the system at once: what is counted is what is in use."""


def write_model(folder: Path, size: int, seed: int) -> None:
    """A sharded model of square float32 layers and its diagonal Fisher.

    Args:
        folder: where; made.
        size: bytes of the model.
        seed: of its numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    names = [f"layers.{i}.weight" for i in range(max(2, round(size / (4 * SIDE * SIDE))))]
    per_shard = max(1, SHARD // (4 * SIDE * SIDE))
    groups = [names[i : i + per_shard] for i in range(0, len(names), per_shard)]
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file({name: torch.randn(SIDE, SIDE, generator=generator) for name in group}, folder / file)
        weight_map.update(dict.fromkeys(group, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    space = fk.ParameterSpace(tuple(names), ((SIDE, SIDE),) * len(names))
    entries = torch.rand(space.size, generator=generator)
    DiagonalOperator(space, entries).save(folder / "fisher.safetensors", max_shard_size=SHARD)


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


class Peak:
    """The largest anonymous memory while a block runs, sampled by a thread."""

    def __init__(self) -> None:
        self.most, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._done.is_set():
            self.most = max(self.most, memory("RssAnon"))
            time.sleep(0.005)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def child(folder: Path, way: str) -> None:
    """Merge, and print memory and seconds as JSON."""
    torch.set_num_threads(1)
    models = [folder / "a", folder / "b"]
    fishers = [model / "fisher.safetensors" for model in models]
    warm = {"w": torch.ones(2, 2)}
    identity = DiagonalOperator(fk.ParameterSpace(("w",), ((2, 2),)), torch.ones(4))
    fk.merging.merge([warm, warm], [identity, identity])
    CLEAR.write_text("5")  # VmHWM starts anew
    before, resident, start = memory("RssAnon"), memory("VmRSS"), time.perf_counter()
    policy = fk.merging.MergePolicy(max_shard_size=SHARD)
    with Peak() as peak:
        if way == "average":
            fk.merging.average(models, out=folder / "out", policy=policy)
        elif way == "merge":
            fk.merging.merge(models, fishers, out=folder / "out", policy=policy)
        else:
            fk.merging.merge(models, fishers)
    found = {"anonymous": peak.most - before, "resident": memory("VmHWM") - resident}
    print(json.dumps(found | {"seconds": time.perf_counter() - start}))


def measured(folder: Path, way: str) -> dict[str, float]:
    """One way of merging in a fresh process."""
    command = [sys.executable, __file__, str(folder), "--child", way]
    done = subprocess.run(command, env=os.environ | STEADY, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    shutil.rmtree(folder / "out", ignore_errors=True)
    return result


def main() -> None:
    """Write models of growing size, merge them, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for everything that is written; made if need be")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the largest model")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.folder, arguments.child)
        return
    block, shard = 4 * SIDE * SIDE / 1e6, SHARD / 1e6
    print(f"two models and two diagonal Fishers, one block is {block:.1f} MB, shards of {shard:.0f} MB\n")
    print("| a model | all files | way | anonymous memory | resident, with mapped pages | seconds |")
    print("|---|---|---|---|---|---|")
    for share in (0.25, 0.5, 1.0):
        size, work = int(share * arguments.gigabytes * GIGABYTE), arguments.folder / f"work-{share}"
        try:
            for seed, name in enumerate("ab"):
                write_model(work / name, size, seed)
            total = sum(path.stat().st_size for path in work.rglob("*.safetensors"))
            for way in WAYS:
                row = measured(work, way)
                print(
                    f"| {size / 1e9:.3g} GB | {total / 1e9:.3g} GB | {way} | {row['anonymous'] / 1e6:,.0f} MB "
                    f"| {row['resident'] / 1e6:,.0f} MB | {row['seconds']:.1f} |",
                    flush=True,
                )
        finally:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
