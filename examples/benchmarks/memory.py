"""Peak memory of rows and solve against one training step, each in a process of its own.

On the CPU it is resident memory above what was resident after imports and a tiny warm-up, so that neither the
interpreter nor torch's lazily imported parts dilute the ratio. Run as a module, this file is the child process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import fisherkit as fk
from examples.benchmarks.contestants import DAMPING
from examples.benchmarks.measure import Record
from examples.benchmarks.operations import MEMORY_TARGETS
from examples.benchmarks.workloads import FULL, TINY, Workload

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ROOT = Path(__file__).parents[2]

STEADY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""glibc gives freed blocks back to the system at once: what is counted is what is in use."""


def train(workload: Workload) -> None:
    """One plain training step."""
    optimizer = torch.optim.SGD(workload.model.parameters(), lr=1e-3)
    optimizer.zero_grad(set_to_none=True)
    workload.loss(workload.model).backward()
    optimizer.step()


def solve(workload: Workload) -> None:
    """Rows and one damped solve of the gradient."""
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(workload.loss(workload.model), list(workload.model.parameters()))]
    )
    fk.ImprovedEmpiricalFisher(workload.model, workload.data).solve(gradient, damping=DAMPING)


ACTIONS: dict[str, Callable[[Workload], None]] = {"train": train, "solve": solve}


def measure_memory(name: str, *, device: str, tiny: bool, repeats: int = 3) -> Record:
    """Both peaks in bytes, and their ratio; medians of fresh processes."""
    peaks = {
        action: statistics.median(_child(name, action, device, tiny) for _ in range(repeats)) for action in ACTIONS
    }
    ratio = peaks["solve"] / peaks["train"]
    record: Record = {"workload": name, "train_bytes": peaks["train"], "solve_bytes": peaks["solve"], "ratio": ratio}
    if name in MEMORY_TARGETS:
        record |= {"target": f"≤ {MEMORY_TARGETS[name]:g}×", "met": ratio <= MEMORY_TARGETS[name]}
    return record


def _child(name: str, action: str, device: str, tiny: bool) -> int:
    arguments = [name, action, "--device", device, *(["--tiny"] if tiny else [])]
    return int(run_module("examples.benchmarks.memory", arguments, STEADY)["peak"])


def run_module(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], *, patience: float | None = None
) -> Record:
    """Run a module as a process of its own with as many threads as here; what it printed last, as JSON.

    Args:
        module: its name; takes ``--threads``.
        arguments: of its command line.
        environment: variables beside the present ones.
        patience: seconds until it is ended; None for no limit.

    Raises:
        RuntimeError: it failed.
        TimeoutExpired: it was not done in time.
    """
    command = [sys.executable, "-m", module, *arguments, "--threads", str(torch.get_num_threads())]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False, timeout=patience,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    record: Record = json.loads(done.stdout.strip().splitlines()[-1])
    return record


class Peak:
    """The most memory since now, above what is in use now.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        self.before = _resident("VmRSS")
        if CLEAR.exists() and os.access(CLEAR, os.W_OK):
            CLEAR.write_text("5")  # the high-water mark starts anew

    def bytes(self) -> int:
        """So far."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return int(torch.cuda.max_memory_allocated() - self.before)
        return _resident("VmHWM") - self.before


def _resident(field: str) -> int:
    if STATUS.exists():
        found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    import resource  # not on Windows

    # Where the system has no such file, the process's whole maximum stands for both.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """The child process: print the peak as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=list(FULL))
    parser.add_argument("action", choices=list(ACTIONS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ACTIONS[options.action](TINY[options.workload]().to(options.device))
    workload = (TINY if options.tiny else FULL)[options.workload]
    peak = Peak(options.device)
    ACTIONS[options.action](workload().to(options.device))
    print(json.dumps({"peak": peak.bytes()}))


if __name__ == "__main__":
    main()
