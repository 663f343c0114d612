"""The full structure: F = scale · JᵀJ, never written out.

Solved by Woodbury's form through the R × R Gram where rows are fewer than parameters, by the D × D normal matrix where
parameters are fewer, by conjugate gradients where neither fits in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit import io
from fisherkit.arithmetic import MatMat
from fisherkit.errors import MemoryBudgetError
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.damped_gram import PRECISE, DampedGram, damped_cholesky, damped_grams, rounding_of
from fisherkit.operators.dense import DenseOperator
from fisherkit.operators.factorization import (
    Factorization,
    IterativeFactorization,
    RowProducts,
    RowSolution,
    UnitSummand,
    diagonal_inverse,
)
from fisherkit.operators.linalg import orthonormal, singular, spectrum
from fisherkit.processes import ALONE, Processes
from fisherkit.rows import restore_rows
from fisherkit.rows.base import spans
from fisherkit.rows.collection import Rows, RowSource
from fisherkit.rows.shared import SharedRows
from fisherkit.rows.streamed import StreamedRows, every_kth
from fisherkit.space import ParameterSpace
from fisherkit.words import readable

UNBOUNDED = 1 << 62
"""A memory budget that nothing exceeds."""

CORRECTED = 1e-4
"""Rounding in a solution from which on it is corrected."""

MANY, PILOT = 512, 16
"""Rows from which on it is worth asking a few, how many at least, which Gram is needed."""

DEFINITE = 1e-9
"""Damping over trace from which on F + λI in float64 has a Cholesky factor, whatever rounding does."""

SHARE = 20
"""A product with the sample's rows may take this fraction of one with all rows ..."""

MOST = 2000
"""... and it has at most so many of them: their Gram matrix is decomposed in seconds."""

FEWEST = 50
"""With fewer, the sample says too little to be worth its products."""


class LowRankOperator(FisherOperator):
    """F = scale · JᵀJ.

    Args:
        rows: J, R rows over D parameters.
        scale: 1/N, or whatever the normalization is; a function where it is not known before the first product.
        dtype: of the rows.
        device: of the rows.
        memory_budget: bytes that a Gram or normal matrix may take; beyond it solves are by conjugate gradients.
    """

    tag: ClassVar[str] = "low_rank"

    def __init__(
        self, rows: RowSource, scale: float | Callable[[], float], *, dtype: torch.dtype, device: torch.device,
        memory_budget: int = UNBOUNDED,
    ) -> None:  # fmt: skip
        super().__init__(rows.space, dtype=dtype, device=device)
        self._rows, self._scale, self.memory_budget = rows, scale, memory_budget

    def __getstate__(self) -> dict[str, object]:
        """For copies and pickles, which hold rows and no model that rows are made of later."""
        _ = self.row_source, self.scale
        return self.__dict__

    @property
    def scale(self) -> float:
        """What JᵀJ is multiplied with."""
        if callable(self._scale):
            self._scale = self._scale()
        return self._scale

    @property
    def row_source(self) -> RowSource:
        """The rows; made now, if they were to be made later."""
        self._rows = self._rows.settled()
        return self._rows

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        self._rows = rows = self._rows.settled(columns.shape[1])
        if isinstance(rows, Rows):  # R numbers are fewer to scale than D
            return rows.rmatmul(rows.matmul(columns).mul_(self.scale))
        return rows.product(columns).mul_(self.scale)

    def _diagonal(self) -> Float[Tensor, "D"]:
        return self.scale * self.row_source.squared_sum()

    def _gram(self) -> Float[Tensor, "R R"]:
        self._check_square(self._rows.count, "gram", "R")
        if isinstance(self.row_source, SharedRows) and not self.row_source.in_memory:
            why = "every process makes its rows anew, and none has those of the others to meet"
            raise self._no_closed_form("gram", why, 'storage="rows", or group=False on all data')
        return self.row_source.gram(precise=False).mul_(self.scale)

    def _to_dense(self) -> Float[Tensor, "D D"]:
        self._check_square(self.size, "to_dense", "D")
        return (self.scale * self.row_source.normal_matrix()).to(self.dtype)

    def _small_side(self) -> str:
        """The side whose square matrix is smaller and fits, or "none"."""
        # Streamed rows pay for a Gram with a pass over the data for every batch; conjugate gradients are cheaper.
        gram = self.row_source.count if self.row_source.in_memory else UNBOUNDED
        side = "gram" if gram <= self.size else "dense"
        return side if _square_bytes(min(gram, self.size)) <= self.memory_budget else "none"

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        if damping == 0.0 and self._rows.count < self.size:
            why = f"R = {self._rows.count:,} rows < D = {self.size:,} parameters"
            raise singular("LowRankOperator.factorize", damping, why)
        side = self._small_side()
        if side == "gram" and damping > 0 and isinstance(self.row_source, (Rows, SharedRows)):
            return _GramFactorization(self, self.row_source, damping)
        if side != "none":
            dense = (self.scale * self.row_source.normal_matrix()).to(self.dtype)
            return DenseOperator(self.space, dense)._factorize(damping, tolerance, max_steps)
        return IterativeFactorization(self, damping, tolerance, max_steps)

    def _eigenvalues(self, k: int) -> Float[Tensor, "k"]:
        small, _ = self._small_matrix("eigenvalues", "fk.estimators.lanczos_eigenvalues(fisher, k)")
        values = torch.linalg.eigvalsh(small).clamp_min(0).flip(0)[:k]
        return torch.nn.functional.pad(values, (0, k - values.shape[0]))

    def _eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        try_ = "scipy.sparse.linalg.eigsh(fisher.to_scipy(), k), which needs products alone"
        small, side = self._small_matrix("eigenvectors", try_)
        if not bool(small.any()):
            return torch.eye(self.size, k, dtype=self.dtype, device=self.device)
        values, vectors, _ = spectrum(small, "LowRankOperator.eigenvectors")
        vectors = vectors[:, values > 0].flip(1)[:, :k]
        if side == "gram":
            # Jᵀ takes the Gram's eigenvectors to F's; the null space, of which it knows nothing, is filled up.
            vectors = self.row_source.rmatmul(vectors.to(self.dtype)).double()
        return orthonormal(vectors, k).to(self.dtype)

    @property
    def _rank_bound(self) -> int:
        return min(self._rows.count, self.size)

    def _small_matrix(self, operation: str, try_: str) -> tuple[Float[Tensor, "n n"], str]:
        """The Gram or F itself, whichever is smaller, in float64, and which it is; refused where neither fits."""
        side = self._small_side()
        if side == "none":
            why = "neither the Gram nor the dense matrix fits the memory budget"
            raise self._no_closed_form(operation, why, try_)
        small = self.row_source.gram() if side == "gram" else self.row_source.normal_matrix()
        return self.scale * small, side

    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        noise = torch.randn(self.row_source.count, count, dtype=self.dtype, device=self.device, generator=generator)
        return self.scale**0.5 * self.row_source.rmatmul(noise)

    def _scaled(self, scale: float) -> LowRankOperator:
        return LowRankOperator(
            self.row_source, scale * self.scale, dtype=self.dtype, device=self.device, memory_budget=self.memory_budget
        )

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        if not isinstance(other, LowRankOperator) or self.stored_rows is None or other.stored_rows is None:
            return None
        (rows, scale), (others, by) = self.stored_rows, other.stored_rows
        if not rows.stacks_with(others):
            return None
        stacked, budget = Rows.cat([rows.scaled(scale**0.5), others.scaled(by**0.5)]), self.memory_budget
        return LowRankOperator(
            stacked, 1.0, dtype=self.dtype, device=self.device, memory_budget=min(budget, other.memory_budget)
        )

    def _frobenius(self) -> Float[Tensor, ""]:
        return self._small_matrix("norm", 'normalize="trace"')[0].norm()

    inversion = "direct"

    @property
    def decomposed_side(self) -> int:
        return self._rank_bound

    @property
    def stored_rows(self) -> tuple[Rows, float] | None:
        return (self.row_source, self.scale) if isinstance(self.row_source, Rows) else None

    @property
    def together(self) -> Processes:
        return self._rows.processes if isinstance(self._rows, SharedRows) else ALONE

    @property
    def nbytes(self) -> int:
        """Bytes of the rows; 0 of those that are streamed, or not made yet."""
        return self._rows.nbytes if isinstance(self._rows, Rows) else 0

    def _approximate_inverse(self, damping: float) -> MatMat | None:
        """Of a sample of the rows, where enough of them fit; else of the diagonal, with no fewer rows than parameters.

        Below that F has a null space, which its diagonal would tear apart.
        """
        rows = self.row_source
        if isinstance(rows, (Rows, StreamedRows)):
            if isinstance(rows, Rows):
                row_bytes = rows.nbytes / rows.count
            else:
                row_bytes = rows.problem.row_bytes(rows.space.names) / rows.problem.vectors_per_example
            stride = sample_stride(rows.count, self.size, row_bytes, self.memory_budget)
            if stride is not None:
                sample = every_kth(rows, stride)
                return SampledInverse(sample, self.scale * rows.count / sample.count, damping)
        return None if rows.count < self.size else diagonal_inverse(self, damping)

    def _usual_damping(self) -> float:
        return 1.0

    def _moment(self, places: Int[Tensor, "O J"]) -> Float[Tensor, "J J"]:
        if self.stored_rows is None:
            return DenseOperator(self.space, self._to_dense())._moment(places)
        rows, scale = self.stored_rows
        # Only of the units that the places lie in, rows are written out.
        wanted = torch.zeros(self.size, dtype=torch.bool, device=places.device)
        wanted[places] = True
        found = [slot for slot in rows.slots if bool(self.space.take(wanted, slot.names).any())]
        order = torch.arange(self.size, device=places.device)
        column = torch.empty_like(order)
        own = torch.cat([self.space.take(order, slot.names) for slot in found])
        column[own] = torch.arange(len(own), device=places.device)
        flat = torch.cat([slot.rows.dense() for slot in found], 1)[:, column[places]].flatten(0, 1)
        return scale / len(places) * (flat.mT @ flat)

    def _made_of(self) -> str:
        return "" if "rows" in self.metadata else f"R = {self._rows.count:,}"

    def _state(self) -> io.State:
        if not isinstance(self.row_source, Rows):
            why, try_ = "its rows are streamed from the data and lie nowhere", ", or a larger memory_budget="
            if self.row_source.in_memory:
                why, try_ = "every process has rows of its own", ", or group=False and all data"
            raise self._no_closed_form("save", why, 'structure="kfac" or "diagonal"' + try_)
        units = tuple(
            io.State(slot.rows.form, slot.names, slot.rows.tensors(), slot.rows.options())
            for slot in self.row_source.slots
        )
        return io.State(self.tag, self.space.names, options={"scale": self.scale}, children=units)

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> LowRankOperator:
        rows = restore_rows(space, state.children)
        rows.finite("load")
        values = state.children[0].tensors
        floating = next(tensor for tensor in values.values() if tensor.is_floating_point())
        return cls(rows, state.options["scale"], dtype=floating.dtype, device=floating.device)

    def _check_square(self, side: int, operation: str, letter: str) -> None:
        needed = _square_bytes(side)
        if needed > self.memory_budget:
            raise MemoryBudgetError(
                f"{self._name}.{operation}",
                f"a {letter} × {letter} matrix of {readable(needed)} with {letter} = {side:,}",
                f"at most {readable(self.memory_budget)}, the memory budget",
                try_="fisher.matvec and fk.estimators, which need no square matrix, or a larger memory_budget=",
            )  # fmt: skip


class _GramFactorization(Factorization):
    """(F + λI)⁻¹ v = (v − scale · Jᵀ w) / λ with w = (scale · JJᵀ + λI)⁻¹ J v, Woodbury's identity.

    The difference cancels down to λ / (λ + trace) of v, so rounding in the rows' dtype may show in the range of Jᵀ.
    Since J x = w for the exact x, the residual v − (F + λI) x is scale · Jᵀ (w − J x): where it matters, one step of
    iterative refinement takes it away, together with the error of a Gram matrix that was multiplied in float32.

    Inner products of rows have no such step, and take a Gram multiplied in float64 where solves do with float32. Which
    of the two is asked for is not known before: where the factor is bound to exist, each is made at its first use.
    """

    method = "woodbury"

    def __init__(self, operator: LowRankOperator, rows: Rows | SharedRows, damping: float) -> None:
        super().__init__(operator, damping)
        # Half precision leaves too little for the correction to converge.
        self._rows = rows if operator.dtype in (torch.float32, torch.float64) else rows.double()
        self._dtype = torch.float32 if operator.dtype == torch.float32 else torch.float64
        self._scale = operator.scale
        asked = self._dtype == torch.float32 and rows.count >= MANY
        self._least = self._least_rounding(rows) if asked and isinstance(rows, Rows) else 0.0
        self._later = self._least >= CORRECTED
        if not self._later:
            _ = self._gram

    def _least_rounding(self, rows: Rows) -> float:
        """What rounding leaves at least, as a few rows and the trace tell; 0 if F + λI may have no Cholesky factor."""
        some = every_kth(rows, rows.count // PILOT)
        sums = rows.cross_gram(some, precise=False).abs().sum(0)
        ones = torch.ones(rows.space.size, dtype=rows.dtype, device=rows.device)
        largest, trace = torch.stack([sums.max(), rows.weighted_squares(ones).double().sum()]).tolist()
        # No row sum of the whole exceeds the largest; 0.99 because these few are rounded in another order.
        definite = self.damping >= DEFINITE * self._scale * trace
        return rounding_of(self._dtype, 0.99 * self._scale * largest, self.damping) if definite else 0.0

    @cached_property
    def _gram(self) -> DampedGram:
        return self._precise_gram if self._least >= PRECISE else self._damped(precise=False)

    @cached_property
    def _precise_gram(self) -> DampedGram:
        return self._gram if "_gram" in vars(self) and self._gram.precise else self._damped(precise=True)

    def _damped(self, *, precise: bool) -> DampedGram:
        call, try_ = "LowRankOperator.factorize", "a larger damping"
        return damped_grams([self._rows], self.damping, scale=self._scale, precise=precise, call=call, try_=try_)[0]

    def _solve(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        v, gram = columns.to(self._dtype), self._gram
        w = gram.solve(self._rows.matmul(v))
        x = self._pull_back(w).neg_().add_(v).div_(self.damping)
        if gram.rounding >= CORRECTED:
            x -= self._pull_back(gram.solve(self._rows.matmul(x) - w))
        return x.to(columns.dtype)

    def _pull_back(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "D K"]:
        return self._rows.rmatmul((self._scale * w).to(self._dtype))

    @cached_property
    def _gram_products(self) -> GramProducts | None:
        """Inner products of rows have no later correction: where rounding would show, they are made in float64."""
        if not isinstance(self._rows, Rows):
            return None
        precise = self._later or self._gram.rounding >= CORRECTED
        gram = self._precise_gram if precise else self._gram
        return GramProducts(self._rows, self._scale, self.damping, gram.solve, precise=precise)

    def _row_products(self, probe: Rows, queries: int, others: int) -> RowProducts:
        mine = self._gram_products if self._rows.same_units(probe) else None
        if mine is not None and mine.operations(queries, others) <= mine.solved_operations(queries, others):
            return mine
        return super()._row_products(probe, queries, others)

    def _row_squares(self, rows: Rows) -> Float[Tensor, "R"]:
        mine = self._gram_products if self._rows.same_units(rows) else None
        return super()._row_squares(rows) if mine is None else mine.squares(rows)

    def _logdet(self) -> Float[Tensor, ""]:
        return self._gram.logdet() + (self.operator.size - self._rows.count) * math.log(self.damping)


def _square_bytes(side: int) -> int:
    return 3 * 8 * side * side  # the matrix, its factor and one temporary, in float64


# -- inner products of rows through the inverse, by their Gram matrices ------------------------------------------------


class GramProducts(RowProducts):
    """rᵀ(F + λI)⁻¹q = (k_rq − scale · k_rJ (scale · JJᵀ + λI)⁻¹ k_Jq) / λ, k the inner products of rows.

    ``solve`` is (scale · JJᵀ + λI)⁻¹ on ``[R, K]``, in float64. ``precise`` asks for inner products in float64; else
    they are as in `fisherkit.rows.base.inner_products`.
    """

    def __init__(
        self, rows: Rows, scale: float, damping: float, solve: Callable[[Tensor], Tensor], *, precise: bool
    ) -> None:
        # Columns of the solution and of the Gram are float64.
        super().__init__(2 * rows.count + sum(slot.rows.written_numbers for slot in rows.slots), 2 * rows.count)
        self.rows, self.scale, self.damping, self.precise = rows, scale, damping, precise
        self._solve = solve

    def solve(self, queries: Rows) -> RowSolution:
        """(scale · JJᵀ + λI)⁻¹ JQ."""
        return _GramSolution(self, self._in_own_dtype(queries))

    def squares(self, rows: Rows) -> Float[Tensor, "R"]:
        """rᵀ(F + λI)⁻¹r of each row, float64."""
        rows = self._in_own_dtype(rows)
        ones = torch.ones(rows.space.size, dtype=rows.dtype, device=rows.device)
        norms = rows.weighted_squares(ones).double()
        parts = []
        for span in spans(rows.count, 4 * self.rows.count):
            k = self.rows.cross_gram(rows.some(span), self.precise)
            parts.append((k * self._solve(k)).sum(0))
        return (norms - self.scale * torch.cat(parts)) / self.damping

    def operations(self, queries: int, others: int) -> int:
        """Multiplications for so many queries and other rows; J's own Gram is there already."""
        r = self.rows.count
        entry = sum(slot.rows.inner_cost for slot in self.rows.slots)
        return (queries * others + r * (queries + others)) * entry + queries * r * (others + r)

    def solved_operations(self, queries: int, others: int) -> int:
        """Those of solving for the queries as columns and meeting the others with them."""
        product = sum(slot.rows.product_cost(queries) for slot in self.rows.slots)
        return product * (2 * self.rows.count + others) + queries * self.rows.count**2

    def _in_own_dtype(self, rows: Rows) -> Rows:
        """In J's dtype, which is a wider one than the model's for half precision."""
        return rows.double() if self.rows.dtype == torch.float64 and rows.dtype != torch.float64 else rows


class _GramSolution(RowSolution):
    def __init__(self, by: GramProducts, queries: Rows) -> None:
        # They meet every block of the others.
        self._by, self._queries = by, queries.written_out()
        self._w = by.scale * by._solve(by.rows.cross_gram(queries, by.precise))

    def parts(self, rows: Rows) -> Iterator[UnitSummand]:
        by, rows = self._by, self._by._in_own_dtype(rows).written_out()
        with_queries = rows.cross_gram_by_unit(self._queries, by.precise)
        with_rows = rows.cross_gram_by_unit(by.rows, by.precise)
        for (names, direct), (_, through) in zip(with_queries, with_rows, strict=True):
            yield names, direct.sub_(through @ self._w).div_(by.damping)

    def products(self, rows: Rows) -> Float[Tensor, "R Q"]:
        by, rows = self._by, self._by._in_own_dtype(rows).written_out()
        through = rows.cross_gram(by.rows, by.precise) @ self._w
        return rows.cross_gram(self._queries, by.precise).sub_(through).div_(by.damping)


# -- an approximate inverse for conjugate gradients: the exact one of a sample of the rows ----------------------------


class SampledInverse:
    """(F_s + λ'I)⁻¹ by Woodbury's identity, where F_s = scale · JᵀJ is of a sample of F's rows and λ' ≥ λ.

    A sample of s rows knows F's large eigenvalues. Its own small ones are noise: rows that hardly overlap make
    eigenvalues of about (what they have in common with no others) / s, where F has much less. λ' is the smallest of
    them, so that this noise and the directions that the sample does not know count alike, as in Erdogdu and Montanari,
    "Convergence rates of sub-sampled Newton methods", 2015 (arXiv 1508.02810).
    """

    def __init__(self, rows: Rows, scale: float, damping: float) -> None:
        self._rows, self._scale = rows, scale
        gram = rows.gram().mul_(scale)
        values = torch.linalg.eigvalsh(gram)
        noise = values[values > values[-1] * torch.finfo(torch.float32).eps]
        self.damping = max(damping, float(noise[0]) if len(noise) else 0.0)
        self._gram = DampedGram(damped_cholesky(gram, self.damping)[0], 0.0, True) if self.damping else None

    def __call__(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """λ' (F_s + λ'I)⁻¹ V; a preconditioner's scale does not matter."""
        if self._gram is None:  # rows of zeros
            return columns
        known = self._gram.solve(self._rows.matmul(columns))
        return columns - self._rows.rmatmul((self._scale * known).to(columns.dtype))


def sample_stride(count: int, size: int, row_bytes: float, budget: int) -> int | None:
    """Take every k-th row: k, or None if no sample is worth it."""
    # s rows and four s × s matrices in float64: 32 s² + row_bytes s <= budget.
    fits = int(((row_bytes**2 + 128 * budget) ** 0.5 - row_bytes) / 64)
    wanted = min(MOST, count // SHARE, size // 2, fits)
    return None if wanted < FEWEST else -(-count // wanted)
