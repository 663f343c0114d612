"""A batch linearised example by example: the loop, for models that nothing vectorises or that it would slow down.

One forward pass an example, whose graph has the layers' outputs and the parameters without a rule alike, so that rows
take what a loop written by hand takes. Owns the order of the rows.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.data import Batch
from fisherkit.rows.collection import Rows
from fisherkit.rows.linearized import Linearized
from fisherkit.rows.plan import Plan
from fisherkit.rows.selection import RowSelection

MOST = 32
"""Examples whose graphs are held at once: what each group costs beside its passes no longer counts."""


class OneByOne:
    """The model at one batch, as `Linearized`.

    Args:
        plan: how rows are made.
        batch: the examples.
    """

    def __init__(self, plan: Plan, batch: Batch) -> None:
        self.parts = [Linearized.at(plan, batch.take(slice(n, n + 1))) for n in range(batch.size)]
        self.z = torch.cat([part.z.detach() for part in self.parts])

    @property
    def numbers_per_vector(self) -> int:
        """As of `Linearized`."""
        return sum(part.numbers_per_vector for part in self.parts)

    @property
    def noticed(self) -> set[str]:
        """As of `Linearized`."""
        return set().union(*(part.noticed for part in self.parts))

    @property
    def lost(self) -> set[str]:
        """As of `Linearized`."""
        return set().union(*(part.lost for part in self.parts))

    def revised(self) -> Plan:
        """As of `Linearized`, by the first example that shows something."""
        return next(part for part in self.parts if part.noticed or part.lost).revised()

    def rows(self, v: Float[Tensor, "k B ..."], selection: RowSelection, *, alone: bool = False) -> Rows:
        """The rows Jᵀ v, by example and then by vector.

        Args:
            v: k vectors for each example, ``[k, *outputs]``.
            selection: which of them are rows.
            alone: as of `Linearized`; whose each position is, is no question here.
        """
        keeps = [None] * len(self.parts) if selection.keep is None else list(selection.keep.split(1))
        found = [
            part.rows(v[:, n : n + 1], RowSelection(selection.vectors, 1, selection.device, keep))
            for n, (part, keep) in enumerate(zip(self.parts, keeps, strict=True))
        ]
        return Rows.cat(found)
