"""Axes of tests: every value of those that do not depend on each other, without the product; some of many seeds."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def paired(first: Iterable[str], second: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs in which every value of the longer axis meets two of the other, and every value of the other is met."""
    a, b = list(first), list(second)
    longer = range(max(len(a), len(b)))
    return list(dict.fromkeys((a[i % len(a)], b[(i + shift) % len(b)]) for shift in (0, 1) for i in longer))


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Some of the product of three axes or more, in which every two values of two axes meet."""
    values = [list(axis) for axis in axes]
    met = {
        cell: set(itertools.combinations(enumerate(cell), 2))
        for cell in itertools.product(*map(range, map(len, values)))
    }
    open_, chosen = set().union(*met.values()), []
    while open_:
        best = max(met, key=lambda cell: len(met[cell] & open_))
        open_ -= met[best]
        chosen.append(tuple(axis[i] for axis, i in zip(values, best, strict=True)))
    return chosen


def seeds(few: int, most: int) -> list[Any]:
    """The numbers from 0 on, of which those from `few` on are left to ``make test-thorough``."""
    return [*range(few), *(pytest.param(seed, marks=pytest.mark.thorough) for seed in range(few, most))]
