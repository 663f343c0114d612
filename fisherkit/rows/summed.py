"""Rows that are sums of rows of other forms: of one parameter under several rules, as a head tied to its embedding.

The parts stay as they are kept, and what products of two parts need is made of both: of an embedding and a head,
⟨Σ_t g_t a_tᵀ, Σ_s e_id(s) h_sᵀ⟩ = Σ_ts g_t[id(s)] (a_t · h_s), so that no row over the table is written out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit.rows.base import TILE, StoredRows, UnitRows, spans, sum_by
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.sparse import SparseRows

FORMS: tuple[type[UnitRows], ...] = (FactoredRows, SparseRows, StoredRows)
"""What parts can be; files have their places."""

S = TypeVar("S")


class SumRows(UnitRows):
    """R rows, each the sum of the parts' rows, of which there are equally many over the same parameters."""

    form = "summed"

    def __init__(self, parts: Sequence[UnitRows]) -> None:
        super().__init__(parts[0].count, parts[0].size)
        self.parts = tuple(parts)

    @staticmethod
    def of(parts: Sequence[UnitRows]) -> UnitRows:
        """The sum in the simplest form: parts that are written out are added up."""
        stored = [part.values for part in parts if isinstance(part, StoredRows)]
        rest = [part for part in parts if not isinstance(part, StoredRows)]
        if stored:
            rest.append(StoredRows(functools.reduce(torch.add, stored)))
        return rest[0] if len(rest) == 1 else SumRows(rest)

    def matmul(self, u: Float[Tensor, "d K"]) -> Float[Tensor, "R K"]:
        return functools.reduce(torch.add, (part.matmul(u) for part in self.parts))

    def rmatmul(self, w: Float[Tensor, "R K"], out: Float[Tensor, "d K"] | None = None) -> Float[Tensor, "d K"]:
        total = self.parts[0].rmatmul(w, out)
        for part in self.parts[1:]:
            total += part.rmatmul(w)
        return total

    def gram(self, other: SumRows, precise: bool = True) -> Float[Tensor, "R S"]:
        """J J'ᵀ: all products of a part with a part."""
        result = self.parts[0].floating.new_zeros(self.count, other.count, dtype=torch.float64)
        for (i, mine), (j, theirs) in itertools.product(enumerate(self.parts), enumerate(other.parts)):
            if other is not self or i == j:
                result += unit_gram(mine, theirs, precise)
            elif i < j:
                cross = unit_gram(mine, theirs, precise)
                result += cross
                result += cross.mT
        return result

    def squared_sum(self) -> Float[Tensor, "d"]:
        if self._written:
            return functools.reduce(torch.add, (tile.square_().sum(0) for tile in self._tiles()))
        total = functools.reduce(torch.add, (part.squared_sum() for part in self.parts))
        for sparse, other in self._pairs():
            cross = sparse.values * _at(other, sparse)
            total += 2 * sum_by(sparse.token, cross, sparse.vocabulary).reshape(-1)
        return total

    def weighted_squares(self, weights: Float[Tensor, "d"]) -> Float[Tensor, "R"]:
        if self._written:
            return torch.cat([tile.square_() @ weights for tile in self._tiles()])
        total = functools.reduce(torch.add, (part.weighted_squares(weights) for part in self.parts))
        for sparse, other in self._pairs():
            table = weights.reshape(sparse.vocabulary, -1)
            cross = sparse.values * _at(other, sparse) * table[sparse.token]
            total = total + 2 * sum_by(sparse.row, cross.sum(1), self.count)
        return total

    def dense(self) -> Float[Tensor, "R d"]:
        # Stored parts give their own matrix, which is not to be written to.
        first, *rest = (part.dense() for part in self.parts)
        return functools.reduce(torch.Tensor.add_, rest, first.clone() if rest else first)

    def scaled(self, scale: float) -> SumRows:
        return SumRows([part.scaled(scale) for part in self.parts])

    def reordered(self, order: Int[Tensor, "R"], regular: bool = False) -> SumRows:
        return SumRows([part.reordered(order, regular) for part in self.parts])

    def compact(self) -> SumRows:
        return SumRows([part.compact() for part in self.parts])

    def double(self) -> SumRows:
        return SumRows([part.double() for part in self.parts])

    @classmethod
    def cat(cls, parts: Sequence[SumRows]) -> SumRows:
        return cls([type(same[0]).cat(same) for same in zip(*(part.parts for part in parts), strict=True)])

    def tensors(self) -> dict[str, Tensor]:
        """The parts' own, numbered."""
        return {f"{i}.{name}": t for i, part in enumerate(self.parts) for name, t in part.tensors().items()}

    def options(self) -> dict[str, int]:
        """The parts' forms, by their place in `FORMS`, and options."""
        own = {f"{i}.form": FORMS.index(type(part)) for i, part in enumerate(self.parts)}
        return own | {f"{i}.{name}": n for i, part in enumerate(self.parts) for name, n in part.options().items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], options: dict[str, int]) -> SumRows:
        count = sum(name.endswith(".form") for name in options)
        own = [(_of(i, tensors), _of(i, options)) for i in range(count)]
        return cls([FORMS[settings.pop("form")].from_tensors(numbers, settings) for numbers, settings in own])

    @property
    def floating(self) -> Tensor:
        return self.parts[0].floating

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.numbers)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def _written(self) -> bool:
        """Whether squares are of rows written out a few at a time: no part of some two is sparse."""
        return sum(not isinstance(part, SparseRows) for part in self.parts) > 1

    def _tiles(self) -> Iterator[Float[Tensor, "r d"]]:
        return (self.some(span).dense() for span in spans(self.count, len(self.parts) * self.size))

    def _pairs(self) -> Iterator[tuple[SparseRows, UnitRows]]:
        """All pairs of two parts, of which one is sparse."""
        for mine, theirs in itertools.combinations(self.parts, 2):
            if isinstance(mine, SparseRows):
                yield mine, theirs
            elif isinstance(theirs, SparseRows):
                yield theirs, mine


def _of(i: int, values: dict[str, S]) -> dict[str, S]:
    """What belongs to a part, by its own names."""
    return {name.removeprefix(f"{i}."): value for name, value in values.items() if name.startswith(f"{i}.")}


def unit_gram(mine: UnitRows, theirs: UnitRows, precise: bool) -> Float[Tensor, "R S"]:
    """J J'ᵀ of rows that may be kept in different ways, some of them written out a few at a time, in float64."""
    if isinstance(mine, FactoredRows) and isinstance(theirs, FactoredRows):
        if mine.transposed == theirs.transposed:
            return mine.gram(theirs, precise)
    elif type(mine) is type(theirs):
        return mine.gram(theirs, precise)
    elif isinstance(mine, SparseRows) and isinstance(theirs, FactoredRows):
        return _looked_up(theirs, mine, precise).mT
    elif isinstance(mine, FactoredRows) and isinstance(theirs, SparseRows):
        return _looked_up(mine, theirs, precise)
    tiles = (theirs.some(span) for span in spans(theirs.count, 2 * theirs.size))
    if isinstance(mine, StoredRows):
        return torch.cat([mine.gram(StoredRows(tile.dense()), precise) for tile in tiles], 1)
    mine = mine.double() if precise else mine
    return torch.cat([mine.matmul((tile.double() if precise else tile).dense().mT).double() for tile in tiles], 1)


def _sides(rows: FactoredRows, which: slice | Int[Tensor, "n"]) -> tuple[Tensor, Tensor]:
    """Of some rows, the factors along the table's first axis ``[n, T, V]`` and along its second ``[n, T, E]``."""
    a, g = rows.activations[:][rows._owner()[which]], rows.gradients[which]
    return (a, g) if rows.transposed else (g, a)


def _looked_up(rows: FactoredRows, sparse: SparseRows, precise: bool) -> Float[Tensor, "R S"]:
    """The Gram of factored with sparse rows, Σ_ts g_t[id(s)] (a_t · h_s)."""
    result = rows.gradients.new_zeros(rows.count, sparse.count, dtype=torch.float64)
    for some in spans(len(sparse.token), min(TILE, rows.positions * 64)):
        token, h, place = sparse.token[some], sparse.values[some], sparse.row[some]
        h = h.double() if precise else h
        for span in spans(rows.count, rows.positions * (len(token) + sparse.values.shape[1])):
            first, second = _sides(rows, span)
            met = (second.double() if precise else second) @ h.mT
            met *= first[:, :, token]
            result[span].index_add_(1, place, met.sum(1, dtype=torch.float64))
    return result


def _at(rows: UnitRows, sparse: SparseRows) -> Float[Tensor, "n E"]:
    """The vectors that rows have where sparse ones have their entries."""
    row, token, width = sparse.row, sparse.token, sparse.values.shape[1]
    if isinstance(rows, StoredRows):
        return rows.values.unflatten(1, (-1, width))[row, token]
    if isinstance(rows, SparseRows):
        key, wanted = (one.row * one.vocabulary + one.token for one in (rows, sparse))
        order = torch.argsort(key)
        if not len(order):
            return torch.zeros_like(sparse.values)
        place = order[torch.searchsorted(key[order], wanted).clamp_max(len(order) - 1)]
        return torch.where((key[place] == wanted).unsqueeze(1), rows.values[place], 0)
    assert isinstance(rows, FactoredRows)  # noqa: S101  (there is no other form)
    a, g, owner, found = rows.activations[:], rows.gradients, rows._owner(), [sparse.values.new_zeros(0, width)]
    for span in spans(len(row), rows.positions * (width + 1)):
        if rows.transposed:
            left, right = a[owner[row[span]], :, token[span]], g[row[span]]
        else:
            left, right = g[row[span], :, token[span]], a[owner[row[span]]]
        found.append((left.unsqueeze(1) @ right).squeeze(1))
    return torch.cat(found)
