"""The cost model's choice of representation against both forced ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import fisherkit as fk
from examples.benchmarks.contestants import DAMPING, Case
from examples.benchmarks.measure import Record
from examples.benchmarks.ours import build
from examples.benchmarks.timing import Clock, race
from fisherkit.memory import available_memory
from fisherkit.rows.units import RuledUnit

FORCED = {"chosen": None, "factored": False, "written out": True}
GRAM_ROWS = 8192
"""Above this many rows a Gram matrix is not part of the work."""
TARGET = 1.2


@contextmanager
def forced(stored: bool | None) -> Iterator[None]:
    """Every unit that could be kept either way is kept one way; None leaves the choice to the cost model."""
    original = RuledUnit.choose

    def choose(self: RuledUnit, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if stored is not None and self.shape is not None:
            self.stored = stored

    try:
        RuledUnit.choose = choose  # type: ignore[method-assign]
        yield
    finally:
        RuledUnit.choose = original  # type: ignore[method-assign]


def work(case: Case, kind: type[fk.FisherApproximation], stored: bool | None) -> Callable[[], None]:
    """Build, product, Gram and solve with a representation."""

    def run() -> None:
        with forced(stored):
            fisher = build(case, kind, storage="rows")
        fisher @ case.vector
        if fisher.rows <= GRAM_ROWS:
            fisher.gram()
            fisher.solve(case.gradient, damping=DAMPING)

    return run


def representation(case: Case, kind: type[fk.FisherApproximation], stored: bool | None) -> tuple[str, ...]:
    """How each unit's rows are kept."""
    with forced(stored):
        return tuple(entry.structure for entry in build(case, kind, storage="rows").coverage().entries)


def written_out_bytes(case: Case, kind: type[fk.FisherApproximation]) -> int:
    """What rows that are all written out take."""
    rows = build(case, kind, storage="stream").rows  # counted, not kept
    return 4 * rows * case.vector.numel()


def compare(case: Case, kind: type[fk.FisherApproximation], device: torch.device, *, rounds: int) -> Record:
    """Seconds of the chosen and the forced representations, and chosen over best."""
    clock, runs, first, skipped, same = Clock(device), {}, {}, [], []
    chosen = representation(case, kind, None)
    fits = 3 * written_out_bytes(case, kind) < available_memory(device)
    for name, stored in FORCED.items():
        if stored and not fits:
            skipped.append(name)
            continue
        if stored is not None and representation(case, kind, stored) == chosen:
            same.append(name)
            continue
        runs[name] = work(case, kind, stored)
        first[name] = clock.once(runs[name])[0]
    found = race(runs, first, clock, rounds=rounds, slow=5.0)
    seconds = {name: timing.seconds for name, timing in found.items()}
    seconds |= dict.fromkeys(same, seconds["chosen"])  # one and the same thing
    ratio = seconds["chosen"] / min(seconds.values())
    return {
        "workload": case.workload.name, "kind": next(name for name, own in fk.KINDS.items() if own is kind),
        "seconds": seconds, "ratio": ratio,
        "does not fit": skipped, "target": f"≤ {TARGET:g}", "met": ratio <= TARGET,
    }  # fmt: skip
