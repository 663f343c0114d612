"""Clocks and the race: contestants in turn, round after round. Knows no library and no operation."""

from __future__ import annotations

import gc
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

SHORT = 0.05
"""Seconds: what takes less is repeated within a round, up to `REPEATS` times."""
REPEATS = 10
ENDLESS = 60.0
"""Seconds: what took longer the first time is not timed again."""


class Clock:
    """Wall-clock time; on CUDA, time between two events of the device's stream.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, run: Callable[[], Any], repeats: int = 1) -> float:
        """Of one of so many runs in a row."""
        gc.collect()
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            return (time.perf_counter() - start) / repeats
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) / 1000 / repeats

    def once(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of one run, and what it returned."""
        kept: list[Any] = []
        return self.seconds(lambda: kept.append(run())), kept[0]


@dataclass(frozen=True)
class Timing:
    """What a contestant took.

    Args:
        seconds: the median.
        rounds: how many it is the median of.
        spread: (largest − smallest) / median.
    """

    seconds: float
    rounds: int
    spread: float

    @staticmethod
    def of(found: list[float]) -> Timing:
        """From all rounds."""
        median = statistics.median(found)
        return Timing(median, len(found), (max(found) - min(found)) / median)


def race(
    runs: Mapping[str, Callable[[], Any]], first: Mapping[str, float], clock: Clock, *, rounds: int, slow: float
) -> dict[str, Timing]:
    """Time contestants in turn, so that whatever else the machine does meets all of them alike.

    Args:
        runs: what is timed, by name.
        first: seconds that each took the first time, which also warmed it up.
        clock: of the device.
        rounds: how many.
        slow: seconds; who took longer the first time takes part in one round alone, or in none beyond `ENDLESS`: then
            the first time counts.

    Returns:
        Timings by name.
    """
    found: dict[str, list[float]] = {name: [first[name]] if first[name] > ENDLESS else [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            if first[name] <= slow or (number == 0 and first[name] <= ENDLESS):
                repeats = max(1, min(REPEATS, int(SHORT / max(first[name], 1e-9))))
                found[name].append(clock.seconds(run, repeats))
    return {name: Timing.of(times) for name, times in found.items()}


class TookTooLongError(Exception):
    """A run did not end within its limit."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Interrupt what takes longer, between two of its operations.

    Args:
        seconds: the limit; without effect where the system has no alarm, or outside the main thread.

    Raises:
        TookTooLongError: the limit was reached.
    """
    alarm = getattr(signal, "SIGALRM", None)  # Windows has none
    if alarm is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TookTooLongError(f"not done after {seconds:g} s")

    before = signal.signal(alarm, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(alarm, before)
