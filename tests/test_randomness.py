"""Global generators are put back wherever they were, and whether anything was drawn is told."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fisherkit.randomness import untouched_rng

LEGACY: Any = np.random  # the global functions that users' code draws from

DRAWS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None, "torch": lambda: torch.rand(1), "python": random.random,
    "python's normal": lambda: random.gauss(0, 1), "numpy": lambda: LEGACY.rand(), "numpy's normal": LEGACY.randn,
    "numpy, a whole state": lambda: LEGACY.bytes(4 * 624), "numpy, another seed": lambda: LEGACY.seed(3),
}  # fmt: skip


@pytest.fixture(params=["fresh", "a kept normal", "another kind"])
def numpy(request: pytest.FixtureRequest) -> Iterator[str]:
    """NumPy's global generator in several states; a kept normal number is drawn without moving the generator."""
    before, state = LEGACY.get_bit_generator(), LEGACY.get_state()
    LEGACY.seed(0)
    if request.param == "a kept normal":
        LEGACY.randn()
    if request.param == "another kind":
        LEGACY.set_bit_generator(np.random.PCG64(0))
    yield request.param
    LEGACY.set_bit_generator(before)
    LEGACY.set_state(state)


def places() -> list[str]:
    return [str(random.getstate()), str(LEGACY.get_state(legacy=False)), str(torch.get_rng_state().tolist())]


@pytest.mark.parametrize("name", DRAWS)
def test_untouched_rng__puts_back_what_was_drawn_and_says_so(name: str, numpy: str) -> None:
    if numpy == "another kind" and name == "numpy, another seed":
        pytest.skip("NumPy seeds only a Mersenne twister")
    before = places()
    with np.printoptions(threshold=10_000), untouched_rng([]) as draws:
        DRAWS[name]()
        moved = places() != before
    assert places() == before
    assert draws.happened == (name != "nothing")
    assert moved == (name != "nothing")
