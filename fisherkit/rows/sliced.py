"""Rows of a parameter of which every position uses one slice, as of experts that are kept in one tensor.

Every slice has the two factors of the rows that use it, and no row over all slices is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit.rows.base import RowSelection, UnitRows
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.ownership import Arrangement, Owned, Regular

SlicePart = tuple[Tensor, FactoredRows]
"""Which rows use a slice, and these over it."""


class SlicedRows(UnitRows):
    """R rows over E slices ``[O, I]`` (or ``[I, O]``), in ``parts`` by slice, of those that are used.

    ``none`` are rows of no slice, ``[0]``, which have its size, orientation, dtype and device.
    """

    form = "sliced"

    def __init__(self, parts: Mapping[int, SlicePart], *, count: int, slices: int, none: FactoredRows) -> None:
        super().__init__(count, slices * none.size)
        self.parts, self.slices, self.none = dict(sorted(parts.items())), slices, none

    @classmethod
    def gathered(
        cls, a: Float[Tensor, "n I"], g: Float[Tensor, "k n O"], index: Int[Tensor, "n"], owner: Int[Tensor, "n"],
        selection: RowSelection, slices: int, *, transposed: bool, cache: dict[int, Tensor],
    ) -> SlicedRows:  # fmt: skip
        """Rows from positions, each with its input, the gradients of its output, its slice (``index``) and its example.

        ``cache`` has inputs by slice, of other vectors of the same positions.
        """
        keep, key, start = selection.keep, index * selection.batch + owner, 0
        counts = torch.bincount(key, minlength=slices * selection.batch).reshape(slices, -1)
        numbers = {one: number for one, number in enumerate(counts.sum(1).tolist()) if number}
        order = key.argsort(stable=True)
        if not bool((order[1:] > order[:-1]).all()):  # else by slice and example already
            a, g, owner = a if numbers.keys() <= cache.keys() else a[order], g[:, order], owner[order]
        parts = {}
        for one, number in numbers.items():
            at, examples = slice(start, start + number), counts[one].nonzero().squeeze(1)
            start += number
            each = number // len(examples)
            place: Arrangement = Regular(len(examples), each)
            if not torch.equal(counts[one, examples], torch.full_like(examples, each)):
                place = Owned(torch.searchsorted(examples, owner[at]), len(examples))
            some = RowSelection(len(g), len(examples), selection.device, None if keep is None else keep[examples])
            if one not in cache:
                cache[one] = place.arranged(a[None, at, None]).squeeze(0)
            gradients = some.take(place.arranged(g[:, at].unsqueeze(2)))
            rows = torch.isin(selection.owner, examples).nonzero().squeeze(1)
            parts[one] = rows, FactoredRows(cache[one], gradients, some.example, bias=False, transposed=transposed)
        none = FactoredRows(
            a.new_empty(0, 1, a.shape[1]), g.new_empty(0, 1, g.shape[2]), bias=False, transposed=transposed
        )
        return cls(parts, count=len(selection.owner), slices=slices, none=none)

    def _of(self, one: int) -> slice:
        return slice(one * self.none.size, (one + 1) * self.none.size)

    def _changed(self, change: Callable[[FactoredRows], FactoredRows]) -> SlicedRows:
        parts = {one: (rows, change(part)) for one, (rows, part) in self.parts.items()}
        return SlicedRows(parts, count=self.count, slices=self.slices, none=change(self.none))

    def zeros(self, count: int, like: Tensor) -> SlicedRows:
        """So many rows of zeros, in ``like``'s dtype and on its device."""
        return SlicedRows({}, count=count, slices=self.slices, none=self.none.zeros(0, 0, None, like))

    def matmul(self, u: Float[Tensor, "d K"]) -> Float[Tensor, "R K"]:
        result = u.new_zeros(self.count, u.shape[1])
        for one, (rows, part) in self.parts.items():
            result.index_add_(0, rows, part.matmul(u[self._of(one)]))
        return result

    def rmatmul(self, w: Float[Tensor, "R K"], out: Float[Tensor, "d K"] | None = None) -> Float[Tensor, "d K"]:
        out = w.new_zeros(self.size, w.shape[1]) if out is None else out.zero_()
        for one, (rows, part) in self.parts.items():
            part.rmatmul(w[rows], out[self._of(one)])
        return out

    def gram(self, other: SlicedRows, precise: bool = True) -> Float[Tensor, "R S"]:
        """J J'ᵀ: rows meet in the slices that both use."""
        result = self.none.gradients.new_zeros(self.count, other.count, dtype=torch.float64)
        for one in self.parts.keys() & other.parts.keys():
            (mine, left), (theirs, right) = self.parts[one], other.parts[one]
            result[mine.unsqueeze(1), theirs] += left.gram(left if other is self else right, precise)
        return result

    def squared_sum(self) -> Float[Tensor, "d"]:
        total = self.floating.new_zeros(self.size)
        for one, (_, part) in self.parts.items():
            total[self._of(one)] = part.squared_sum()
        return total

    def weighted_squares(self, weights: Float[Tensor, "d"]) -> Float[Tensor, "R"]:
        result = weights.new_zeros(self.count)
        for one, (rows, part) in self.parts.items():
            result.index_add_(0, rows, part.weighted_squares(weights[self._of(one)]))
        return result

    def dense(self) -> Float[Tensor, "R d"]:
        whole = self.floating.new_zeros(self.count, self.size)
        for one, (rows, part) in self.parts.items():
            whole[rows, self._of(one)] = part.dense()
        return whole

    def scaled(self, scale: float) -> SlicedRows:
        return self._changed(lambda part: part.scaled(scale))

    def double(self) -> SlicedRows:
        return self._changed(FactoredRows.double)

    def compact(self) -> SlicedRows:
        return self._changed(FactoredRows.compact)

    def reordered(self, order: Int[Tensor, "R"], regular: bool = False) -> SlicedRows:
        """Some or all of the rows in another order; of a slice that none of them uses, nothing is left."""
        order = order.to(self.floating.device)
        place = torch.full((self.count,), -1, device=order.device)
        place[order] = torch.arange(len(order), device=order.device)
        parts = {}
        for one, (rows, part) in self.parts.items():
            new, at = place[rows].sort()
            kept = new >= 0
            if bool(kept.any()):
                parts[one] = new[kept], part.reordered(at[kept], regular)
        return SlicedRows(parts, count=len(order), slices=self.slices, none=self.none)

    @classmethod
    def cat(cls, parts: Sequence[SlicedRows]) -> SlicedRows:
        starts = torch.tensor([0] + [part.count for part in parts]).cumsum(0).tolist()
        found: dict[int, list[SlicePart]] = {}
        for start, own in zip(starts, parts, strict=False):
            for one, (rows, part) in own.parts.items():
                found.setdefault(one, []).append((rows + start, part))
        joined = {
            one: (torch.cat([rows for rows, _ in own]), FactoredRows.cat([part for _, part in own]))
            for one, own in found.items()
        }
        return cls(joined, count=starts[-1], slices=parts[0].slices, none=parts[0].none)

    def tensors(self) -> dict[str, Tensor]:
        """Rows and factors of each slice, numbered."""
        found = {f"none.{name}": tensor for name, tensor in self.none.tensors().items()}
        for one, (rows, part) in self.parts.items():
            found |= {f"{one}.rows": rows, **{f"{one}.{name}": tensor for name, tensor in part.tensors().items()}}
        return found

    def options(self) -> dict[str, int]:
        return {"count": self.count, "slices": self.slices, **self.none.options()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], options: dict[str, int]) -> SlicedRows:
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            one, name = key.split(".")
            found.setdefault(one, {})[name] = tensor
        own = {one: FactoredRows.from_tensors(mine, options) for one, mine in found.items()}
        none = own.pop("none")
        parts = {int(one): (found[one]["rows"], part) for one, part in own.items()}
        return cls(parts, count=options["count"], slices=options["slices"], none=none)

    @property
    def floating(self) -> Tensor:
        return self.none.gradients
