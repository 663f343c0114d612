"""Resamples and percentile intervals, a pure function of their seed.

Owns the bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993): draws with replacement as
multiplicities, and quantiles. Knows not what is resampled.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arguments import check_count
from fisherkit.errors import InvalidArgumentError

Interval = tuple[float, float]
"""Lower and upper end."""


def check_bootstrap(resamples: int, confidence: float, call: str) -> None:
    """Refuse a bootstrap that has no interval.

    Raises:
        InvalidArgumentError: fewer than one resample, or a confidence outside (0, 1).
    """
    check_count(call, "resamples", resamples)
    if not 0 < confidence < 1:
        raise InvalidArgumentError(
            call=call, got=f"confidence={confidence!r}", expected="a number between 0 and 1", try_="confidence=0.95"
        )


def multiplicities(count: int, resamples: int, generator: torch.Generator) -> Float[Tensor, "B n"]:
    """How often each of n items is in each of B resamples of n with replacement; float64 on the CPU."""
    drawn = torch.randint(count, (resamples, count), generator=generator)
    return torch.zeros(resamples, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1, dtype=torch.float64).expand(resamples, count)
    )


def percentile_interval(samples: Float[Tensor, " B"], confidence: float) -> Interval:
    """The central interval that holds this share of the samples."""
    tail = (1 - confidence) / 2
    low, high = torch.quantile(samples.double(), samples.new_tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
