"""Axes that do not depend on each other, such as kinds and structures: every value of each, without the product."""

from collections.abc import Iterable


def paired(first: Iterable[str], second: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs in which every value of the longer axis meets two of the other, and every value of the other is met."""
    a, b = list(first), list(second)
    longer = range(max(len(a), len(b)))
    return list(dict.fromkeys((a[i % len(a)], b[(i + shift) % len(b)]) for shift in (0, 1) for i in longer))
