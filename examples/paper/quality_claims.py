"""The claims about quality over training and damping, each tried on every task: numbers, and held or failed.

A cell is one checkpoint at one damping, averaged over the batches. Checkpoints are those after the first epoch and
later unless a claim says otherwise. Reads summaries alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.paper.quality_summary import Array, Summary

NEAR = 1.05
"""How close rank 2 is claimed to come to the exact kind."""

EARLY = 2
"""Checkpoints that count as early: the initialization and the one after the first epoch."""

TRUNCATED = ("truncated:1", "truncated:2", "truncated:3", "truncated:4", "truncated:6", "truncated:0.01")


@dataclass(frozen=True)
class Finding:
    """How a claim fared on one task.

    Args:
        numbers: what was measured, in words.
        held: whether it holds.
    """

    numbers: str
    held: bool


def ief_is_best(s: Summary) -> Finding:
    """iEF's γ below EF's and SF's in most cells."""
    ief, ef, sf = (s.mean(kind)[s.trained] for kind in ("ief", "ef", "sf"))
    both = (ief < ef) & (ief < sf)
    numbers = f"{_count(both)} below both ({_count(ief < ef)} below EF, {_count(ief < sf)} below SF)"
    return Finding(numbers, bool(both.mean() > 0.5))


def ief_is_better_than_sgd(s: Summary) -> Finding:
    """iEF's γ below SGD's in every cell, the initialization included."""
    ief = s.mean("ief")
    return Finding(f"{_count(ief < 1)} below; {ief.min():.2f} to {ief.max():.2f}", bool((ief < 1).all()))


def sf_beats_ef(s: Summary) -> Finding:
    """SF's γ below EF's in most cells: the paper's order is iEF, SF, EF."""
    below = s.mean("sf")[s.trained] < s.mean("ef")[s.trained]
    return Finding(f"{_count(below)} below", bool(below.mean() > 0.5))


def ief_is_flat(s: Summary) -> Finding:
    """iEF's largest γ over the dampings at most 1.2 times its least at every checkpoint; EF's 2 times at the last."""
    ief, ef = _spread(s.mean("ief")[s.trained]), _spread(s.mean("ef")[s.trained])
    small = [i for i, damping in enumerate(s.dampings) if damping <= 1e-3]
    near_zero = _spread(s.mean("ief")[s.trained][:, small])
    numbers = f"iEF {_each(ief)} (to λ = 1e-3: {_each(near_zero)}), EF {_each(ef)} at epochs {_epochs(s)}"
    return Finding(numbers, bool((ief <= 1.2).all() and ef[-1] >= 2))


def ef_is_worse_than_sgd(s: Summary) -> Finding:
    """EF's γ above SGD's at the last checkpoint at near-zero damping."""
    last = s.mean("ef")[-1]
    best = int(last.argmin())
    numbers = (
        f"{last[0]:.2f} at λ = {s.dampings[0]:g}, above 1 at {int((last > 1).sum())} of {len(last)} dampings; "
        f"least {last[best]:.2f} at λ = {s.dampings[best]:g}"
    )
    return Finding(numbers, bool(last[0] > 1))


def iekfac_beats_ef_kfac(s: Summary) -> Finding:
    """ieKFAC's γ below that of KFAC with EF in most cells."""
    below = s.mean("ief", "kfac")[s.trained] < s.mean("ef", "kfac")[s.trained]
    return Finding(f"{_count(below)} below", bool(below.mean() > 0.5))


def iekfac_is_near_ief(s: Summary) -> Finding:
    """ieKFAC's γ at most 1.25 times iEF's in most cells."""
    ratio = s.mean("ief", "kfac")[s.trained] / s.mean("ief")[s.trained]
    numbers = (
        f"{_count(ratio <= 1.25)} within; ratio {ratio.min():.2f} to {ratio.max():.2f}, median {np.median(ratio):.2f}"
    )
    return Finding(numbers, bool((ratio <= 1.25).mean() > 0.5))


def rank_two_is_near_exact(s: Summary) -> Finding:
    """Rank 2's γ within 5% of the exact kind's at every damping, at every checkpoint but the first two."""
    ratio = s.curves["full"]["truncated:2"].over_exact[EARLY:]
    if not ratio.size:
        return Finding("no later checkpoint", held=False)
    reached = [epoch for epoch, row in zip(s.epochs[EARLY:], ratio, strict=True) if (row <= NEAR).all()]
    where = f"at epochs {', '.join(map(str, reached))}" if reached else "at no checkpoint"
    numbers = (
        f"{_count(ratio <= NEAR)} within; every damping {where}; largest ratio {_each(ratio.max(1))} "
        f"at epochs {', '.join(map(str, s.epochs[EARLY:]))}"
    )
    return Finding(numbers, bool((ratio <= NEAR).all()))


def rank_two_costs_twice_ef(s: Summary) -> Finding:
    """Rank 2's rows and solve take at most 2.5 times EF's."""
    ratio = {kind: seconds / s.cost["ef"] for kind, seconds in s.cost.items()}
    numbers = (
        f"{ratio['truncated:2']:.1f} times EF's {1e3 * s.cost['ef']:.0f} ms; rank 3 {ratio['truncated:3']:.1f}, "
        f"SF {ratio['sf']:.1f}, exact {ratio['exact']:.1f}, one gradient {ratio['sgd']:.2f}"
    )
    return Finding(numbers, ratio["truncated:2"] <= 2.5)


CLAIMS: dict[str, Callable[[Summary], Finding]] = {
    "iEF below EF and SF in most cells": ief_is_best,
    "iEF below SGD in every cell": ief_is_better_than_sgd,
    "SF below EF in most cells": sf_beats_ef,
    "iEF flat in damping (max/min ≤ 1.2), EF not (≥ 2 at the end)": ief_is_flat,
    "EF worse than SGD at the end, near-zero damping": ef_is_worse_than_sgd,
    "ieKFAC below EF-KFAC in most cells": iekfac_beats_ef_kfac,
    "ieKFAC within 25% of iEF in most cells": iekfac_is_near_ief,
    "Truncated, rank 2: within 5% of exact after the first epochs, every damping": rank_two_is_near_exact,
    "Truncated, rank 2: about twice EF's cost (≤ 2.5)": rank_two_costs_twice_ef,
}
"""What is claimed and how it is tried: the paper's claims first, then ours."""


def needed(s: Summary) -> list[str]:
    """For each checkpoint the first of `TRUNCATED` that is within 5% of the exact kind at every damping, or "none"."""
    found = []
    for i in range(len(s.epochs)):
        near = [kind for kind in TRUNCATED if (s.curves["full"][kind].over_exact[i] <= NEAR).all()]
        found.append(near[0] if near else "none")
    return found


def _count(cells: NDArray[np.bool_]) -> str:
    return f"{int(cells.sum())} of {cells.size} cells"


def _spread(mean: Array) -> Array:
    """Largest over smallest γ of each checkpoint."""
    spread: Array = mean.max(1) / mean.min(1)
    return spread


def _each(values: Array) -> str:
    return ", ".join(f"{value:.2f}" if value < 10 else f"{value:.1f}" for value in values)


def _epochs(s: Summary) -> str:
    return ", ".join(str(s.epochs[i]) for i in s.trained)
