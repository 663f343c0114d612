"""The k most helpful and the k most harmful training examples of each query, kept while blocks of scores go by.

Owns the running selection; knows no rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TopScores:
    """The extremes of a score matrix that was never whole.

    Args:
        helpful: the largest scores, in descending order.
        helpful_index: the training examples that have them, by their place in the data.
        harmful: the smallest scores, in ascending order.
        harmful_index: the training examples that have them.
    """

    helpful: Float[Tensor, "Q k"]
    helpful_index: Int[Tensor, "Q k"]
    harmful: Float[Tensor, "Q k"]
    harmful_index: Int[Tensor, "Q k"]


class RunningTop:
    """The largest k scores of each query so far.

    Args:
        k: how many.
        none: no scores, of the dtype and on the device of those to come.
        largest: else the smallest.
    """

    def __init__(self, k: int, none: Float[Tensor, "Q 0"], *, largest: bool) -> None:
        self.k, self.largest = k, largest
        self.seen = 0
        self._values, self._index = none, none.long()

    def add(self, scores: Float[Tensor, "Q B"]) -> None:
        """The next training examples' scores."""
        index = torch.arange(self.seen, self.seen + scores.shape[1], device=scores.device).expand_as(scores)
        self.seen += scores.shape[1]
        # Earlier ones come first, so that a tie goes to the earlier example wherever blocks end.
        scores, index = torch.cat([self._values, scores], 1), torch.cat([self._index, index], 1)
        values, order = torch.sort(scores, dim=1, descending=self.largest, stable=True)
        self._values, self._index = values[:, : self.k], index.gather(1, order[:, : self.k])

    def result(self) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
        """Values and places."""
        return self._values, self._index
