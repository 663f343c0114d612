"""Run a function in several processes of a gloo group on this machine, and collect what each returns or raises."""

import datetime
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 120
"""Seconds until a process that waits for another one gives up."""

FORKED = multiprocessing.get_context("forkserver")
"""Processes are forked from one that has imported everything, which is most of what a short run takes."""

# The first optimizer of torch's that a process makes imports its compiler, for seconds.
FORKED.set_forkserver_preload(["pytest", "torch._dynamo", "fisherkit.optim", "fisherkit.cli", "tests.commands"])


def _start(rank: int, size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )  # fmt: skip
    try:
        found = function(rank, size, *arguments)
    except Exception as error:  # noqa: BLE001  the test looks at it
        found = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def run(size: int, function: Callable[..., Any], *arguments: Any, alive: bool = True) -> list[Any]:
    """What ``function(rank, size, *arguments)`` returns in each process, or its error as a string.

    Args:
        size: how many processes.
        function: of a module's top level.
        arguments: for it.
        alive: whether all processes come to their end; else None stands for those that do not.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _start, (size, folder, function, arguments), nprocs=size, join=False, start_method="forkserver"
        )
        assert context is not None
        for process in context.processes:
            process.join(4 * TIMEOUT)
            assert process.exitcode is not None, "a process does not end"
        found = [Path(folder, str(rank)) for rank in range(size)]
        assert not alive or all(file.exists() for file in found), [p.exitcode for p in context.processes]
        return [torch.load(file, weights_only=False) if file.exists() else None for file in found]
