"""A batch linearised example by example: the loop, for models that nothing vectorises or that it would slow down.

One forward pass an example, whose graph has the layers' outputs and the parameters without a rule alike, so that rows
take what a loop written by hand takes. Owns the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
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
    def followed(self) -> bool:
        """As of `Linearized`."""
        return all(part.followed for part in self.parts)

    def by_owner(self) -> None:
        """As of `Linearized`."""
        for part in self.parts:
            part.by_owner()

    @property
    def lost(self) -> set[str]:
        """As of `Linearized`."""
        return set().union(*(part.lost for part in self.parts))

    def revised(self) -> Plan:
        """As of `Linearized`, by the first example that shows something."""
        return next(part for part in self.parts if part.noticed or part.lost).revised()

    def rows(
        self, v: Float[Tensor, "k B ..."], selection: RowSelection, *, alone: bool = False,
        counting: Float[Tensor, "B ..."] | None = None,
    ) -> Rows:  # fmt: skip
        """The rows Jᵀ v, by example and then by vector.

        Args:
            v: k vectors for each example, ``[k, *outputs]``.
            selection: which of them are rows.
            alone: as of `Linearized`; whose each position is, is no question here.
            counting: as of `Linearized`.
        """
        keeps = [None] * len(self.parts) if selection.keep is None else list(selection.keep.split(1))
        found = [
            part.rows(
                v[:, n : n + 1],
                RowSelection(selection.vectors, 1, selection.device, keep),
                counting=None if counting is None else counting[n : n + 1],
            )
            for n, (part, keep) in enumerate(zip(self.parts, keeps, strict=True))
        ]
        whole = Rows.cat(found)
        exist = [[slot.exists for slot in slots] for slots in zip(*(part.slots for part in found), strict=True)]
        slots = [replace(slot, exists=_stacked(own)) for slot, own in zip(whole.slots, exist, strict=True)]
        return Rows(whole.space, slots)


def _stacked(parts: Sequence[Bool[Tensor, "1 T"] | None]) -> Bool[Tensor, "B T"] | None:
    """Of examples with different numbers of positions, which those that have fewer lack."""
    known = [part for part in parts if part is not None]
    most = max((part.shape[1] for part in known), default=0)
    return torch.cat([F.pad(part, (0, most - part.shape[1])) for part in known]) if len(known) == len(parts) else None
