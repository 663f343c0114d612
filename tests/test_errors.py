"""What all messages share."""

from __future__ import annotations

import pytest

from fisherkit.errors import listed


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (1, "a"), (3, "a; b; c"), (4, "a; b; c and 1 more"), (26, "a; b; c and 23 more")]
)
def test_listed__shows_the_first_and_counts_the_others(count: int, text: str) -> None:
    assert listed(iter("abcdefghijklmnopqrstuvwxyz"[:count]), 3, "; ") == text
