"""One cell: agreement first, then the race. Owns what a cell's record says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from examples.benchmarks.contestants import Contestant, DisagreementError, Values, check_agreement
from examples.benchmarks.operations import OPERATIONS, Cell
from examples.benchmarks.timing import Clock, TookTooLongError, limit, race

Record = dict[str, Any]
"""What JSON can hold."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        device: where.
        rounds: how often each contestant is timed.
        slow: seconds; who takes longer is timed once.
        patience: seconds; who takes longer is not waited for.
    """

    device: torch.device
    rounds: int = 5
    slow: float = 5.0
    patience: float = 90.0


@dataclass
class _Ready:
    """A contestant that has run once."""

    contestant: Contestant
    run: Callable[[], Any]
    first: float
    values: Values


def agree(cell: Cell, settings: Settings) -> tuple[Record, list[_Ready]]:
    """Run everybody once and compare.

    Returns:
        The record so far, and who can be timed, ours first if it can be.

    Raises:
        DisagreementError: a peer's result is not ours.
    """
    where = f"{cell.case.workload.name}, {cell.operation.title} ({cell.case.scope})"
    record: Record = {
        "workload": cell.case.workload.name,
        "operation": cell.name,
        "title": cell.operation.title,
        "scope": cell.case.scope,
        "peers": [],
    }
    clock = Clock(settings.device)
    theirs: list[tuple[Contestant, Record, _Ready]] = []
    for peer in cell.peers:
        entry: Record = {"name": peer.name, "how": peer.how}
        record["peers"].append(entry)
        one = _try(peer, clock, settings, entry)
        if one is not None:
            theirs.append((peer, entry, one))
    if cell.case.scope != "all" and not theirs:
        return record, []  # no peer can do part of it either: there is nothing to compare with
    mine = _try(cell.ours, clock, settings, record)
    expected = None if mine is None else _with_forms(cell, mine.values)
    for peer, entry, one in theirs:
        if expected is None:
            expected = one.values  # ours could not be run: peers must still agree among themselves
            continue
        found = one.values if mine is not None else {n: t for n, t in one.values.items() if n in expected}
        entry["errors"] = check_agreement(f"{where}, {peer.name}", expected, found, cell.bounds(peer))
        entry["why"] = peer.why or (cell.operation.why if entry["errors"].keys() & cell.operation.bounds else "")
    ready = [*([] if mine is None else [mine]), *(one for _, _, one in theirs)]
    for one in ready:
        one.values = {}
    return record, ready


def measure(cell: Cell, settings: Settings) -> Record:
    """Check that everybody agrees, then time everybody."""
    record, ready = agree(cell, settings)
    if cell.case.scope == "all" or ready:
        _time(cell, ready, settings, record)
    return record


def _time(cell: Cell, ready: list[_Ready], settings: Settings, record: Record) -> None:
    clock, unit = Clock(settings.device), cell.case.workload.unit()
    runs, first = {"unit": unit}, {"unit": clock.once(unit)[0]}
    for one in ready:
        runs[one.contestant.name], first[one.contestant.name] = one.run, one.first
    timings = race(runs, first, clock, rounds=settings.rounds, slow=settings.slow)
    u = timings["unit"].seconds
    record["unit_seconds"] = u
    for name, target in [(cell.ours.name, record), *((p["name"], p) for p in record["peers"])]:
        if name in timings:
            timing = timings[name]
            target |= {"seconds": timing.seconds, "units": timing.seconds / u, "rounds": timing.rounds}
            target |= {"spread": timing.spread}
    judge(record)


def judge(record: Record) -> None:
    """Ratios to the best peer and to the target, from a cell's medians."""
    times = {p["name"]: p["seconds"] for p in record["peers"] if "seconds" in p}
    if "seconds" in record and times:
        best = min(times, key=times.__getitem__)
        record |= {"best_peer": best, "ratio": times[best] / record["seconds"]}
    target = OPERATIONS[record["operation"]].targets.get(record["workload"])
    if target is None:
        return
    counting = [t for name, t in times.items() if not target.against or name in target.against]
    by_ratio, by_units = target.ratio is not None and bool(counting), target.units is not None
    if not by_ratio and (record["scope"] != "all" or not by_units):
        return  # a target is judged where those that it names take part
    record["target"], record["met"] = str(target), False
    if "seconds" in record:
        ratio = min(counting) / record["seconds"] if counting else 0.0
        if target.ratio is not None:
            record["target_ratio"] = ratio
        record["met"] = ratio >= (target.ratio or 0.0) and record["units"] <= (target.units or float("inf"))


def _with_forms(cell: Cell, values: Values) -> Values:
    """Products also as a quadratic form, for who can only be compared by that."""
    if "product" in values and "quadratic form" not in values:
        return {**values, "quadratic form": cell.case.vector @ values["product"]}
    return values


def _try(contestant: Contestant, clock: Clock, settings: Settings, record: Record) -> _Ready | None:
    """Run once; what goes wrong is put down as the result. Ours fails like anybody else."""
    try:
        with warnings.catch_warnings(), limit(settings.patience):
            warnings.simplefilter("ignore")  # not ours to fix
            run = contestant.prepare()
            first, result = clock.once(run)
        values = contestant.values(result)
    except (DisagreementError, KeyboardInterrupt):
        raise
    except TookTooLongError as error:
        record["error"] = str(error)
    except Exception as error:  # noqa: BLE001  whatever a library raises is its answer
        record["error"] = f"{type(error).__name__}: {_first_line(error)}"
    else:
        return _Ready(contestant, run, first, {name: t.detach().clone() for name, t in values.items()})
    return None


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:159] + "…"
