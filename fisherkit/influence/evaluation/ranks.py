"""Average ranks, their correlation, and both again for resampled data without sorting anew.

A resample of the columns is a vector of multiplicities. The rank of a value in it follows from running sums of the
multiplicities in the order of the original values, so that a thousand resamples need one sort. Owns arithmetic on plain
tensors; knows nothing of scores, models or queries.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Ranking:
    """The order of each row of values, from which the ranks in any resample of the columns follow.

    Args:
        values: one ranking a row.
    """

    def __init__(self, values: Float[Tensor, "Q S"]) -> None:
        values = values.double().contiguous()
        ordered, self.order = values.sort(1)
        self.left: Int[Tensor, "Q S"] = torch.searchsorted(ordered, values)
        self.right: Int[Tensor, "Q S"] = torch.searchsorted(ordered, values, right=True)

    def ranks(self, weights: Float[Tensor, "b S"]) -> Float[Tensor, "b Q S"]:
        """Ranks of the values among the resampled ones, counted from 1, ties at their average.

        Args:
            weights: how often each column is in each of b resamples.
        """
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
    """Pearson's correlation along the last axis; 0 where one of the two is constant.

    Args:
        x: float64.
        y: float64.
        weights: multiplicities; None counts every entry once.
    """
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
    """Spearman's correlation of each row in each resample of the columns.

    Args:
        x: one variable.
        y: the other.
        weights: multiplicities.
        entries: of the largest intermediate.

    Cost: O(B Q S) time, a few times ``entries`` numbers of memory.
    """
    parts = weights.split(max(1, entries // x.order.numel()))
    return torch.cat([correlation(x.ranks(w), y.ranks(w), w.unsqueeze(1).expand(-1, len(x.order), -1)) for w in parts])
