"""All rows of a Fisher: the units' rows side by side, over the flat parameter space.

Splits flat vectors by unit and adds the units' answers. `RowSource` is what the full structure needs of rows; stored
rows answer from memory, streamed rows (`rows.streamed`) from the data.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherkit.arithmetic import all_finite, finite_by, norms, square_bound
from fisherkit.errors import NonFiniteError, listed
from fisherkit.rows.base import StoredRows, UnitRows
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.summed import unit_gram
from fisherkit.space import ParameterSpace

GROUP = 1 << 30
"""Bytes of rows that are put together first where more are gathered."""


class RowSource(ABC):
    """R rows over D parameters, wherever they are; ``in_memory`` if reading them again costs no pass over data."""

    in_memory = False

    def __init__(self, space: ParameterSpace) -> None:
        self.space = space

    @property
    @abstractmethod
    def count(self) -> int:
        """R, the number of rows."""

    def settled(self, columns: int | None = None) -> RowSource:
        """What answers a product with so many columns, or with None any other question: itself, or rows made of it."""
        return self

    @abstractmethod
    def product(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """JᵀJ U."""

    @abstractmethod
    def matmul(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "R K"]:
        """J U."""

    @abstractmethod
    def rmatmul(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "D K"]:
        """Jᵀ W."""

    @abstractmethod
    def gram(self, precise: bool = True) -> Float[Tensor, "R R"]:
        """J Jᵀ in float64; ``precise`` as in `fisherkit.rows.base.inner_products`."""

    @abstractmethod
    def squared_sum(self) -> Float[Tensor, "D"]:
        """Diag JᵀJ."""

    @abstractmethod
    def normal_matrix(self) -> Float[Tensor, "D D"]:
        """JᵀJ in float64, for small D."""


@dataclass(frozen=True)
class UnitSlot:
    """One unit's rows and the parameters they are over.

    Fresh from a batch, ``exists`` says which positions ``[B, T]`` of each example outputs depend on, where that was
    looked at; None where the forward pass shows whose all are.
    """

    names: tuple[str, ...]
    rows: UnitRows
    exists: Bool[Tensor, "B T"] | None = None


class Rows(RowSource):
    """Rows that lie in memory, of units that partition the space's names."""

    in_memory = True

    def __init__(self, space: ParameterSpace, slots: Sequence[UnitSlot]) -> None:
        super().__init__(space)
        self.slots = tuple(slots)

    @property
    def count(self) -> int:
        return self.slots[0].rows.count

    def _whole(self, parts: Iterable[Tensor]) -> Float[Tensor, "D ..."]:
        """The units' parts in flat order; taken one by one, so that only one exists beside the result."""
        remaining = iter(parts)
        first = next(remaining)
        whole = first.new_empty(self.space.size, *first.shape[1:])
        for slot, part in zip(self.slots, itertools.chain([first], remaining), strict=True):
            self.space.put(whole, slot.names, part)
        return whole

    def matmul(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "R K"]:
        return functools.reduce(torch.add, (part for _, part in self.matmul_by_unit(u)))

    def matmul_by_unit(self, u: Float[Tensor, "D K"]) -> Iterator[tuple[tuple[str, ...], Float[Tensor, "R K"]]]:
        """The units' summands of J U, each with the names of its parameters."""
        for slot in self.slots:
            yield slot.names, slot.rows.matmul(self.space.take(u, slot.names))

    def rmatmul(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "D K"]:
        places = [self.space.span(slot.names) for slot in self.slots]
        if None in places:
            return self._whole(slot.rows.rmatmul(w) for slot in self.slots)
        whole = w.new_empty(self.space.size, w.shape[1])
        for slot, span in zip(self.slots, places, strict=True):
            slot.rows.rmatmul(w, whole[span])
        return whole

    def product(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self.rmatmul(self.matmul(u))

    def cross_gram(self, other: Rows, precise: bool = True) -> Float[Tensor, "R S"]:
        """J J'ᵀ against other rows with the same units, float64."""
        return functools.reduce(torch.Tensor.add_, (part for _, part in self.cross_gram_by_unit(other, precise)))

    def cross_gram_by_unit(
        self, other: Rows, precise: bool = True
    ) -> Iterator[tuple[tuple[str, ...], Float[Tensor, "R S"]]]:
        """The units' summands of J J'ᵀ, each with the names of its parameters; units may be kept in different ways."""
        for mine, theirs in zip(self.slots, other.slots, strict=True):
            yield mine.names, unit_gram(mine.rows, theirs.rows, precise)

    def same_units(self, other: Rows) -> bool:
        """Whether both have the same units in the same order, however they are kept."""
        return [slot.names for slot in self.slots] == [slot.names for slot in other.slots]

    def gram(self, precise: bool = True) -> Float[Tensor, "R R"]:
        """J Jᵀ, symmetric to the last bit."""
        gram = self.cross_gram(self, precise)
        return gram.add_(gram.mT.clone()).mul_(0.5)

    def squared_sum(self) -> Float[Tensor, "D"]:
        return self._whole(slot.rows.squared_sum() for slot in self.slots)

    def weighted_squares(self, weights: Float[Tensor, "D"]) -> Float[Tensor, "R"]:
        """Σ_d w_d J_rd² of every row."""
        parts = (slot.rows.weighted_squares(self.space.take(weights, slot.names)) for slot in self.slots)
        return functools.reduce(torch.add, parts)

    def dense(self) -> Float[Tensor, "R D"]:
        """The rows themselves."""
        return self._whole(slot.rows.dense().mT for slot in self.slots).mT

    def written_out(self) -> Rows:
        """The same with the rows of units that share positions written out, for many products with them."""
        slots = []
        for slot in self.slots:
            shared = isinstance(slot.rows, FactoredRows) and slot.rows.positions > 1
            slots.append(UnitSlot(slot.names, StoredRows(slot.rows.dense()) if shared else slot.rows))
        return Rows(self.space, slots)

    def normal_matrix(self) -> Float[Tensor, "D D"]:
        rows = self.dense().double()
        return rows.mT @ rows

    def stacks_with(self, other: Rows) -> bool:
        """Whether `cat` can put the two on top of each other: same units, kept in the same way."""
        return self.space == other.space and [_form(slot) for slot in self.slots] == [
            _form(slot) for slot in other.slots
        ]

    def scaled(self, scale: float) -> Rows:
        """Every row times a number."""
        return Rows(self.space, [UnitSlot(slot.names, slot.rows.scaled(scale)) for slot in self.slots])

    def reordered(self, order: Int[Tensor, "R"], regular: bool = False) -> Rows:
        """Some or all of the rows in another order; ``regular`` as in `UnitRows.reordered`."""
        return Rows(self.space, [UnitSlot(slot.names, slot.rows.reordered(order, regular)) for slot in self.slots])

    def compact(self) -> Rows:
        """The same without what `reordered` left over of rows that are gone."""
        return Rows(self.space, [UnitSlot(slot.names, slot.rows.compact()) for slot in self.slots])

    @property
    def dtype(self) -> torch.dtype:
        """The rows' dtype."""
        return self.slots[0].rows.floating.dtype

    @property
    def device(self) -> torch.device:
        """The device on which the rows are."""
        return self.slots[0].rows.floating.device

    def some(self, span: slice) -> Rows:
        """Neighbouring rows in their order."""
        return Rows(self.space, [UnitSlot(slot.names, slot.rows.some(span)) for slot in self.slots])

    def double(self) -> Rows:
        """The rows in float64."""
        return Rows(self.space, [UnitSlot(slot.names, slot.rows.double()) for slot in self.slots])

    def restrict(self, space: ParameterSpace) -> Rows:
        """The rows over some whole units."""
        wanted = set(space.names)
        return Rows(space, [slot for slot in self.slots if slot.names[0] in wanted])

    def part(self, names: Sequence[str]) -> Rows:
        """The rows over some whole units, by name."""
        return self.restrict(self.space.restrict(names))

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """All rows of parts that have the same units."""
        return Rows.taken_from(list(parts))

    @staticmethod
    def taken_from(parts: list[Rows]) -> Rows:
        """The same, emptying the list, so that of one unit at a time rows exist twice."""
        space = parts[0].space
        groups = [[slot.rows for slot in group] for group in zip(*(part.slots for part in parts), strict=True)]
        names = [slot.names for slot in parts[0].slots]
        parts.clear()
        slots = []
        for own in names:
            rows = groups.pop(0)
            if len({type(part) for part in rows}) > 1:  # one batch's were made the slow way
                rows = [StoredRows(part.dense()) for part in rows]
            slots.append(UnitSlot(own, type(rows[0]).cat(rows)))
            del rows
        return Rows(space, slots)

    @staticmethod
    def gathered(parts: Iterable[Rows]) -> Rows:
        """The same of parts as they come.

        By way of groups whose tensors are large enough to be given back to the system: what many small ones leave
        behind would stay the process's own, as much again as the rows.
        """
        groups: list[Rows] = []
        pending: list[Rows] = []
        size = 0
        for part in parts:
            pending.append(part)
            size += part.nbytes
            if size >= GROUP:
                groups.append(Rows.taken_from(pending))
                size = 0
        groups += pending
        pending.clear()
        return Rows.taken_from(groups)

    def finite(self, call: str) -> float:
        """About the most that Σ_r ‖row_r‖² can be (`square_bound`), if all of the rows' numbers are finite.

        Outputs may be finite where rows are not: a saturated unit hides an infinite activation. One NaN would make
        every sum, product and score NaN that it enters.

        Raises:
            NonFiniteError: naming the modules and their parameters.

        Cost: one reading.
        """
        numbers = self.numbers
        found = norms(numbers)
        bound = square_bound(found, numbers)
        if finite_by(found, numbers):
            return bound
        # Of a convolution's input, what no window sees does not count.
        bad = [slot.names for slot in self.slots if not all_finite(*slot.rows.tensors().values())]
        if bad:
            modules = {name.rpartition(".")[0]: None for names in bad for name in names}
            raise NonFiniteError(
                call, f"NaN or infinite activations or gradients in {listed(map(repr, modules))} "
                f"({listed(repr(name) for names in bad for name in names)})", "finite ones",
                why="rows are made of them, and outputs that are finite may hide them: a tanh of infinity is 1",
                try_="torch.isfinite of this batch's inputs, and a look for √, log or division at 0 in the model",
            )  # fmt: skip
        return bound

    @property
    def numbers(self) -> list[Tensor]:
        """All floating-point tensors that the rows are made of, as they are kept."""
        return [tensor for slot in self.slots for tensor in slot.rows.numbers]

    @property
    def nbytes(self) -> int:
        """Bytes that the rows take in memory."""
        return sum(slot.rows.nbytes for slot in self.slots)


class LargestRows:
    """The ``most`` rows of largest norm among all that were added, so far ``seen``, in the order in which they came.

    Of rows of equal norm the earlier one is kept, so that it does not matter in which pieces rows come. At most ``2 *
    most`` rows are held, and those of one piece.
    """

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, 0
        self._held: list[Rows] = []
        self._squares: list[Float[Tensor, "R"]] = []
        self._dropped: list[Float[Tensor, ""]] = []

    def add(self, rows: Rows) -> None:
        """More rows, behind those that came before."""
        self.seen += rows.count
        self._held.append(rows)
        self._squares.append(squared_norms(rows))
        if sum(held.count for held in self._held) > 2 * self.most:
            self._trim()

    def result(self) -> tuple[Rows, float]:
        """The rows, and the share of Σ_r ‖row_r‖² (the trace) that the others had; nothing is left to go on from."""
        if sum(held.count for held in self._held) > self.most:
            self._trim()
        kept = torch.cat(self._squares).sum()
        dropped = torch.stack(self._dropped).sum() if self._dropped else torch.zeros_like(kept)
        return Rows.taken_from(self._held), float(dropped / (kept + dropped)) if float(dropped) > 0 else 0.0

    def _trim(self) -> None:
        squares, held = torch.cat(self._squares), self._held
        ranked = squares.argsort(descending=True, stable=True)
        places, start, kept = ranked[: self.most].sort().values, 0, list[Rows]()
        while held:  # one piece at a time exists twice
            piece = held.pop(0)
            own = places[(places >= start) & (places < start + piece.count)] - start
            start += piece.count
            kept.append(piece.reordered(own).compact())
            del piece
        self._held, self._squares = [Rows.taken_from(kept)], [squares[places]]
        self._dropped.append(squares[ranked[self.most :]].sum())


def squared_norms(rows: Rows) -> Float[Tensor, "R"]:
    """In float64 of rows in their own dtype, or of float64 ones where that is a half."""
    wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.double()
    return wide.weighted_squares(torch.ones(rows.space.size, dtype=wide.dtype, device=rows.device)).double()


def _form(slot: UnitSlot) -> tuple[object, ...]:
    options = {key: value for key, value in slot.rows.options().items() if key.split(".")[-1] != "count"}
    return slot.names, slot.rows.form, tuple(options.items())
