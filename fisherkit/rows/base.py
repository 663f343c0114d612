"""Rows of one unit (a weight with its bias, or one parameter): the contract of every representation.

A row is J_nᵀ v for one example n and one output vector v, restricted to the unit's parameters. A representation answers
products, Gram and squares without saying how it stores them; it knows no layer, no kind and no normalization.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

TILE = 1 << 25
"""Entries of the largest temporary of a tiled loop: 128 MiB in float32, well above where matmuls are efficient."""

BLOCK = 1024
"""Most products that are summed in the rows' own dtype on the way to a float64 Gram."""

HALVED = 256
"""Symmetric products of at least so many vectors are computed by halves."""

NARROW = 16
"""Products with fewer columns are computed transposed."""

ALIGNED = 8
"""Products are fastest with a multiple of so many columns."""

R = TypeVar("R", bound="UnitRows")


@dataclass(frozen=True)
class RowSelection:
    """Which slots of k vectors and B examples are rows, by example and then by vector; ``keep`` is None for all."""

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


class UnitRows(ABC):
    """R rows over d parameters.

    Args:
        count: R.
        size: d.
    """

    form: ClassVar[str]

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    @abstractmethod
    def matmul(self, u: Float[Tensor, "d K"]) -> Float[Tensor, "R K"]:
        """J U."""

    @abstractmethod
    def rmatmul(self, w: Float[Tensor, "R K"], out: Float[Tensor, "d K"] | None = None) -> Float[Tensor, "d K"]:
        """Jᵀ W, written to ``out`` if it is given."""

    @abstractmethod
    def gram(self: R, other: R, precise: bool = True) -> Float[Tensor, "R S"]:
        """J J'ᵀ against rows of the same representation, in float64.

        Args:
            other: J'.
            precise: multiply in float64 too; else as `inner_products` says.
        """

    @abstractmethod
    def squared_sum(self) -> Float[Tensor, "d"]:
        """Σ_r row_r², the diagonal of JᵀJ."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "R d"]:
        """The rows themselves."""

    @abstractmethod
    def scaled(self: R, scale: float) -> R:
        """Every row times a number."""

    @abstractmethod
    def reordered(self: R, order: Int[Tensor, "R"], regular: bool = False) -> R:
        """Some or all of the rows in another order.

        Args:
            order: the new rows' old places, each at most once.
            regular: whether the new rows are ordered by example and every example has equally many.
        """

    def some(self: R, span: slice) -> R:
        """Neighbouring rows in their order."""
        if len(range(*span.indices(self.count))) == self.count:
            return self
        device = next(iter(self.tensors().values())).device
        return self.reordered(torch.arange(*span.indices(self.count), device=device))

    def compact(self: R) -> R:
        """The same rows without what `reordered` left over of others."""
        return self

    def weighted_squares(self, weights: Float[Tensor, "d"]) -> Float[Tensor, "R"]:
        """Σ_i w_i row_i² of every row; written out a few at a time unless a representation has something better."""
        parts = [self.some(span).dense().square() @ weights for span in spans(self.count, 2 * self.size)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @abstractmethod
    def double(self: R) -> R:
        """The rows in float64."""

    @classmethod
    @abstractmethod
    def cat(cls: type[R], parts: Sequence[R]) -> R:
        """All rows of the parts, in their order."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a file must hold; `from_tensors` takes it back."""

    def options(self) -> dict[str, int]:
        """Settings beside the tensors."""
        return {}

    @classmethod
    def from_tensors(cls: type[R], tensors: dict[str, Tensor], options: dict[str, int]) -> R:
        """The inverse of `tensors` and `options`, which are the constructor's arguments by default."""
        make: Callable[..., R] = cls
        return make(**tensors, **options)

    @property
    def floating(self) -> Tensor:
        """One of the tensors that has the rows' dtype and device."""
        return next(t for t in self.tensors().values() if t.is_floating_point())

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """All floating-point tensors that the rows are made of, as they are kept."""
        return tuple(t for t in self.tensors().values() if t.is_floating_point())

    @property
    def row_numbers(self) -> int:
        """Numbers that one row takes."""
        return sum(t.numel() for t in self.tensors().values()) // max(1, self.count)

    @property
    def written_numbers(self) -> int:
        """The same where rows that share positions are written out."""
        return self.row_numbers

    @property
    def inner_cost(self) -> int:
        """Multiplications of one inner product of two rows."""
        return min(self.size, self.row_numbers)

    def product_cost(self, columns: int) -> int:
        """Multiplications of one row with so many columns."""
        return columns * min(self.size, self.row_numbers)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def spans(total: int, cost: int) -> Iterator[slice]:
    """Cut ``range(total)`` so that a span times ``cost`` entries stays within `TILE`."""
    step = max(1, TILE // max(1, cost))
    for start in range(0, max(total, 1), step):
        yield slice(start, min(start + step, total))


def product(x: Float[Tensor, "R d"], u: Float[Tensor, "d K"]) -> Float[Tensor, "R K"]:
    """X U; of few columns transposed, which on a processor is faster and sums long rows in more parts."""
    if u.shape[1] == 1 or u.shape[1] >= NARROW or u.device.type != "cpu":
        return x @ u
    return (u.mT.contiguous() @ x.mT).mT


def aligned_product(x: Float[Tensor, "... d"], u: Float[Tensor, "d K"]) -> Float[Tensor, "... K"]:
    """X U; on a processor with columns up to a whole vector register, since a bias makes them an odd number."""
    missing = -u.shape[1] % ALIGNED
    if not missing or min(u.shape[1], x.shape[:-1].numel()) < 8 * ALIGNED or u.device.type != "cpu":
        return x @ u
    return (x @ torch.nn.functional.pad(u, (0, missing)))[..., : u.shape[1]]


def inner_products(x: Float[Tensor, "R d"], y: Float[Tensor, "S d"], precise: bool) -> Float[Tensor, "R S"]:
    """X Yᵀ in float64; of a Gram, where y is x, one half is computed.

    Multiplied in float64 too if ``precise``. Else float32 products are summed over `BLOCK` columns in float32 and over
    blocks in float64, so that the error stays that of a few roundings of the rows themselves.
    """
    if x is y and x.shape[0] >= HALVED:
        half = x.shape[0] // 2
        upper, lower = x[:half], x[half:]
        result = x.new_empty(x.shape[0], x.shape[0], dtype=torch.float64)
        result[:half, :half], result[half:, half:] = _products(upper, upper, precise), _products(lower, lower, precise)
        result[half:, :half] = _products(lower, upper, precise)
        result[:half, half:] = result[half:, :half].mT
        return result
    return _products(x, y, precise)


def _products(x: Float[Tensor, "R d"], y: Float[Tensor, "S d"], precise: bool) -> Float[Tensor, "R S"]:
    if x.shape[1] <= BLOCK:
        return x.double() @ y.double().mT if precise else (x @ y.mT).double()
    result = x.new_zeros(x.shape[0], y.shape[0], dtype=torch.float64)
    if precise or x.dtype == torch.float64:
        for span in spans(x.shape[1], x.shape[0] + y.shape[0]):
            result.addmm_(x[:, span].double(), y[:, span].double().mT)
        return result
    whole = x.shape[1] - x.shape[1] % BLOCK
    left, right = (t[:, :whole].unflatten(1, (-1, BLOCK)).transpose(0, 1) for t in (x, y))
    for span in spans(whole // BLOCK, 8 * x.shape[0] * y.shape[0]):
        result += (left[span] @ right[span].mT).sum(0, dtype=torch.float64)
    return result.add_(x[:, whole:] @ y[:, whole:].mT)


class StoredRows(UnitRows):
    """Rows written out as one matrix: right for small parameters and for layers with many shared positions.

    Args:
        values: ``[R, d]``.
    """

    form = "stored"

    def __init__(self, values: Float[Tensor, "R d"]) -> None:
        super().__init__(*values.shape)
        self.values = values

    def matmul(self, u: Float[Tensor, "d K"]) -> Float[Tensor, "R K"]:
        return product(self.values, u)

    def rmatmul(self, w: Float[Tensor, "R K"], out: Float[Tensor, "d K"] | None = None) -> Float[Tensor, "d K"]:
        return torch.mm(self.values.mT, w, out=out)

    def gram(self, other: StoredRows, precise: bool = True) -> Float[Tensor, "R S"]:
        return inner_products(self.values, self.values if other is self else other.values, precise)

    def squared_sum(self) -> Float[Tensor, "d"]:
        return self.values.square().sum(0)

    def dense(self) -> Float[Tensor, "R d"]:
        return self.values

    def scaled(self, scale: float) -> StoredRows:
        return StoredRows(self.values * scale)

    def reordered(self, order: Int[Tensor, "R"], regular: bool = False) -> StoredRows:
        return StoredRows(self.values[order])

    def double(self) -> StoredRows:
        return StoredRows(self.values.double())

    @classmethod
    def cat(cls, parts: Sequence[StoredRows]) -> StoredRows:
        return parts[0] if len(parts) == 1 else cls(torch.cat([part.values for part in parts]))

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}


def second_moment(x: Float[Tensor, "... w"]) -> Float[Tensor, "w w"]:
    """Σ x xᵀ over all vectors, in their dtype; of wide ones, little more than one half is computed."""
    return mirrored(lower_second_moment(x))


def lower_second_moment(x: Float[Tensor, "... w"], total: Float[Tensor, "w w"] | None = None) -> Float[Tensor, "w w"]:
    """Σ x xᵀ, added to ``total`` in place if it is given; above the diagonal anything that `mirrored` overwrites."""
    if x.ndim == 3 and not x.is_contiguous() and x.shape[1] >= x.shape[2]:
        found = torch.bmm(x.mT, x).sum(0)
        return found if total is None else total.add_(found)
    x = x.reshape(-1, x.shape[-1])
    if x.device.type != "cpu" or x.shape[1] < 2 * HALVED:
        return x.mT @ x if total is None else total.addmm_(x.mT, x)
    total = x.new_zeros(x.shape[1], x.shape[1]) if total is None else total
    half = x.shape[1] // 2
    left, right = x[:, :half], x[:, half:]
    lower_second_moment(left, total[:half, :half])
    lower_second_moment(right, total[half:, half:])
    total[half:, :half].addmm_(right.mT, left)
    return total


def mirrored(total: Float[Tensor, "w w"]) -> Float[Tensor, "w w"]:
    """The same, made symmetric in place by what `lower_second_moment` computes."""
    if total.device.type == "cpu" and len(total) >= 2 * HALVED:
        half = len(total) // 2
        mirrored(total[:half, :half])
        mirrored(total[half:, half:])
        total[:half, half:] = total[half:, :half].mT
    return total


def sum_by(index: Int[Tensor, "R"], values: Float[Tensor, "R ..."], groups: int) -> Float[Tensor, "N ..."]:
    """Sum the values that share an index."""
    return torch.zeros(groups, *values.shape[1:], dtype=values.dtype, device=values.device).index_add_(0, index, values)
