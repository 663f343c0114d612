"""What a method is, and what methods of several libraries need. Knows none of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable

from torch import Tensor, nn

from examples.influence.settings import Pair

Scorer = Callable[[Pair, float | None], Tensor]
"""Queries and a damping to scores."""
Method = Callable[[nn.Module, Pair], Scorer]
"""A model and its training data to a scorer."""


def needed(damping: float | None) -> float:
    """A damping that is there.

    Raises:
        ValueError: it is not.
    """
    if damping is None:
        raise ValueError("a Fisher needs a damping")
    return damping


def seed_of(model: nn.Module) -> int:
    """A seed that depends on the parameters: models of one run are projected differently."""
    found = 0
    for parameter in model.parameters():
        found = zlib.crc32(parameter.detach().numpy().tobytes(), found)
    return found % 2**24
