"""Average ranks, their correlation, and bootstrap intervals of both.

A resample of the columns is a vector of multiplicities. The rank of a value in it follows from running sums of the
multiplicities in the order of the original values, so that a thousand resamples need one sort (Efron and Tibshirani,
"An Introduction to the Bootstrap", 1993). Arithmetic on plain tensors, a pure function of the seed.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit.arguments import check_count
from fisherkit.errors import InvalidArgumentError

Interval = tuple[float, float]
"""Lower and upper end."""


def check_bootstrap(resamples: int, confidence: float, call: str) -> None:
    """Refuse a bootstrap that has no interval."""
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


class Ranking:
    """The order of each row of values, from which the ranks in any resample of the columns follow."""

    def __init__(self, values: Float[Tensor, "Q S"]) -> None:
        values = values.double().contiguous()
        ordered, self.order = values.sort(1)
        self.left: Int[Tensor, "Q S"] = torch.searchsorted(ordered, values)
        self.right: Int[Tensor, "Q S"] = torch.searchsorted(ordered, values, right=True)

    def ranks(self, weights: Float[Tensor, "b S"]) -> Float[Tensor, "b Q S"]:
        """Ranks of the values in b resamples with these multiplicities, counted from 1, ties at their average."""
        running = torch.nn.functional.pad(weights[:, self.order].cumsum(2), (1, 0))
        shape = (len(weights), *self.left.shape)
        return (running.gather(2, self.left.expand(shape)) + running.gather(2, self.right.expand(shape)) + 1) / 2


def average_ranks(values: Float[Tensor, "Q S"]) -> Float[Tensor, "Q S"]:
    """Ranks within each row, counted from 1, ties at their average; float64."""
    ranking = Ranking(values)
    return (ranking.left + ranking.right + 1).double() / 2


def correlation(
    x: Float[Tensor, "... S"], y: Float[Tensor, "... S"], weights: Float[Tensor, "... S"] | None = None
) -> Float[Tensor, "..."]:
    """Pearson's correlation along the last axis, weighted by multiplicities; 0 where one of the two is constant."""
    weights = torch.ones_like(x) if weights is None else weights
    total = weights.sum(-1, keepdim=True)
    x, y = (t - (weights * t).sum(-1, keepdim=True) / total for t in (x, y))
    weighted = weights * x
    squares = (weighted * x).sum(-1) * (weights * y * y).sum(-1)
    products = (weighted * y).sum(-1)
    return torch.where(squares > 0, products / torch.where(squares > 0, squares, 1.0).sqrt(), 0.0).clamp(-1, 1)


def spearman(x: Float[Tensor, "Q S"], y: Float[Tensor, "Q S"]) -> Float[Tensor, " Q"]:
    """Spearman's rank correlation of each row; 0 where one of the two is constant."""
    return correlation(average_ranks(x), average_ranks(y))


def resampled_spearman(
    x: Ranking, y: Ranking, weights: Float[Tensor, "B S"], entries: int = 1 << 20
) -> Float[Tensor, "B Q"]:
    """Spearman's correlation of each row in each resample, with intermediates of a few times so many entries."""
    parts = weights.split(max(1, entries // x.order.numel()))
    return torch.cat([correlation(x.ranks(w), y.ranks(w), w.unsqueeze(1).expand(-1, len(x.order), -1)) for w in parts])
