"""Run a function in several processes of a gloo group on this machine, and collect what each returns or raises."""

import datetime
import multiprocessing
import socket
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


def _start(rank: int, size: int, folder: str, meets: str, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=meets, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=TIMEOUT)
    )
    try:
        found = function(rank, size, *arguments)
    except Exception as error:  # noqa: BLE001  the test looks at it
        found = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def free_port() -> int:
    """One that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run(
    size: int, function: Callable[..., Any], *arguments: Any, lost: int | None = None, by_tcp: bool = False
) -> list[Any]:
    """What ``function(rank, size, *arguments)`` returns in each process, or its error as a string.

    Args:
        size: how many processes.
        function: of a module's top level.
        arguments: for it.
        lost: a rank that does not come to its end, for which None stands.
        by_tcp: whether they meet at a port of the first process, and not in a file.
    """
    with tempfile.TemporaryDirectory() as folder:
        meets = f"tcp://127.0.0.1:{free_port()}" if by_tcp else f"file://{folder}/store"
        context = mp.start_processes(
            _start, (size, folder, meets, function, arguments), nprocs=size, join=False, start_method="forkserver"
        )
        assert context is not None
        for rank, process in enumerate(context.processes):
            if rank != lost:
                process.join(4 * TIMEOUT)
                assert process.exitcode is not None, "a process does not end"
        if lost is not None:
            context.processes[lost].kill()
        found = {int(file.name): torch.load(file, weights_only=False) for file in Path(folder).glob("[0-9]*")}
        assert {*found} == {*range(size)} - {lost}, [p.exitcode for p in context.processes]
        return [found.get(rank) for rank in range(size)]
