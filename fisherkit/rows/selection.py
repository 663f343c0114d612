"""Which (example, vector) slots are rows, and in which order: by example, then by vector."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class RowSelection:
    """The slots of one chunk of output vectors that are rows.

    Args:
        vectors: k, vectors in the chunk.
        batch: B, examples.
        device: where row indices live.
        keep: which slots ``[B, k]`` are rows; None for all.
    """

    vectors: int
    batch: int
    device: torch.device
    keep: Bool[Tensor, "B k"] | None = None

    @cached_property
    def _kept(self) -> Int[Tensor, "R"] | None:
        return None if self.keep is None else self.keep.flatten().nonzero().squeeze(1)

    @property
    def example(self) -> Int[Tensor, "R"] | None:
        """The example of each row; None if every example has all of its vectors."""
        return None if self._kept is None else self._kept // self.vectors

    @property
    def owner(self) -> Int[Tensor, "R"]:
        """The example of each row, spelled out."""
        if self.example is not None:
            return self.example
        examples = torch.arange(self.batch, device=self.device)
        return examples if self.vectors == 1 else examples.repeat_interleave(self.vectors)

    def take(self, x: Shaped[Tensor, "k B ..."]) -> Shaped[Tensor, "R ..."]:
        """The rows of something that there is for every slot."""
        by_example = x[0] if len(x) == 1 else x.transpose(0, 1).flatten(0, 1)
        return by_example if self._kept is None else by_example[self._kept]
