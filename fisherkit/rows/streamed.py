"""Rows that are made anew from the data for every product, because they do not fit in memory, or of a few examples.

Two ways for a product JᵀJ u over a batch: rebuild the batch's rows and use them, which takes a backward pass for each
of an example's M vectors; or push forward, apply the output metric, pull back: Jᵀ (Σ_m v vᵀ) J u costs one forward-mode
and one reverse pass whatever M is, and no layer rule. The latter needs ``torch.func`` to see through the model, which
is tried first.

Or rows are made when they pay, a choice between renting and buying: each product without rows costs a pass over the
data, rows cost several passes once and make products cheap. They are made as soon as what products without them have
cost more is what making them costs, which is never more than twice the cheaper of the two. All costs are counted, in
multiplications, and none is measured, so that the same calls always do the same.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherkit.arithmetic import HALF, all_finite, overflow
from fisherkit.data import Batch, CutSource, Source
from fisherkit.errors import FisherkitError
from fisherkit.randomness import untouched_rng
from fisherkit.rows.base import spans
from fisherkit.rows.batch_checks import BatchChecks
from fisherkit.rows.collection import Rows, RowSource
from fisherkit.rows.differentiable import differentiable, with_values
from fisherkit.rows.plan import TOLERANCE, Plan
from fisherkit.rows.problem import Metric, Problem, Tally
from fisherkit.rows.record import Recorder
from fisherkit.rows.units import RuledUnit
from fisherkit.rows.watched import Watched, graph_of
from fisherkit.space import ParameterSpace, infinite

FEW_VECTORS = 2
"""Up to this many vectors an example, rebuilding rows costs no more than a forward-mode pass."""

FEWEST = 3
"""Products from which on it is worth beginning without rows."""

MOVED = 20
"""Multiplications in the time that it takes to write or read a number of rows, about."""

PASS = 50_000_000
"""Multiplications in the time that a pass over the data takes beside its arithmetic, about."""

_LOOKUPS = "EmbeddingBackward", "EmbeddingBagBackward"


class StreamedRows(RowSource):
    """Rows over the data of a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.plan.space)
        self.problem = problem
        self.matrix_free = matrix_free(problem)
        self.counted: Tally | None = None

    @property
    def tally(self) -> Tally:
        """N, R and what the kind left out; counted by forward passes, unless a product has."""
        if self.counted is None:
            self.counted = Tally.of(self.problem.counts("count", matrix_free=self.matrix_free))
        return self.counted

    def some(self) -> Tally:
        """The same, refused where there is no example."""
        return self.tally.some()

    @property
    def count(self) -> int:
        return self.tally.rows

    def product(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """JᵀJ U in one pass, which also counts if that has not been done."""
        if not self.matrix_free:
            return self._finite(self._sum(lambda rows: rows.product(u), "product", torch.zeros_like(u)))
        if u.shape[1] > 1:
            _ = self.tally  # what is vectorised cannot be watched
        counts: list[Tally] | None = None if self.counted else []
        plan, total = self.problem.plan, None
        for batch, metric, count in self.problem.metrics("product"):
            try:
                part, seen = matrix_free_product(plan, self.space, batch, u, metric, watch=counts is not None)
            except FisherkitError:
                raise
            except RuntimeError:  # of a function that only this batch uses, or a kernel for so many
                self.matrix_free = False
                return StreamedRows.product(self, u)
            total = part if total is None else total.add_(part)
            if counts is not None and seen is not None:
                counts.append(count(seen))
        total = torch.zeros_like(u) if total is None else total
        self.counted = self.counted or Tally.of(counts or [])
        return self._finite(total)

    def _finite(self, product: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """A product, refused if it is not finite because rows or their squares are not, which they say themselves."""
        if not all_finite(product):
            self.squared_sum()
        return product

    def matmul(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "R K"]:
        """J U in one pass."""
        return torch.cat([u[:0], *(chunk.rows.matmul(u) for chunk in self.problem.batches("J u"))])

    def rmatmul(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "D K"]:
        """Jᵀ W in one pass."""
        total, start = w.new_zeros(self.space.size, w.shape[1]), 0
        for chunk in self.problem.batches("Jᵀ w"):
            stop = start + chunk.rows.count
            total += chunk.rows.rmatmul(w[start:stop])
            start = stop
        return total

    def gram(self, precise: bool = True) -> Float[Tensor, "R R"]:
        """J Jᵀ by pairs of batches: the rows of each batch are rebuilt once for every batch before it."""
        device = self.problem.plan.example_parameter.device
        result = torch.zeros(self.count, self.count, dtype=torch.float64, device=device)
        start = 0
        for outer in self.problem.batches("Gram"):
            mine, other = slice(start, start + outer.rows.count), 0
            for inner in self.problem.batches("Gram, inner"):
                result[mine, other : other + inner.rows.count] = outer.rows.cross_gram(inner.rows, precise)
                other += inner.rows.count
                if other > start:
                    break
            start = mine.stop
        lower = result.tril()
        return lower + result.tril(-1).mT

    def squared_sum(self) -> Float[Tensor, "D"]:
        """Diag JᵀJ in one pass."""
        total = self._sum(lambda rows: rows.squared_sum(), "diagonal", self._zeros(self.space.size))
        if not all_finite(total):
            raise overflow("diagonal", infinite(self.space, total), total.dtype)
        return total

    def normal_matrix(self) -> Float[Tensor, "D D"]:
        """JᵀJ in one pass."""
        zero = self._zeros(self.space.size, self.space.size).double()
        return self._sum(lambda rows: rows.normal_matrix(), "dense", zero)

    def _sum(self, function: Callable[[Rows], Tensor], description: str, zero: Tensor) -> Tensor:
        return functools.reduce(torch.add, (function(chunk.rows) for chunk in self.problem.chunks(description)), zero)

    def _zeros(self, *shape: int) -> Tensor:
        plan = self.problem.plan
        return torch.zeros(shape, dtype=plan.dtype, device=plan.example_parameter.device)


class LaterRows(StreamedRows):
    """Rows that do not exist yet, which ``make`` makes of these, once and for all.

    Products are made without them as long as no more columns than ``products`` are multiplied.
    """

    def __init__(self, problem: Problem, make: Callable[[LaterRows], RowSource], products: float) -> None:
        super().__init__(problem)
        self.make, self.left = make, products

    def settled(self, columns: int | None = None) -> RowSource:
        """Itself as long as products are fewer than pay, else the rows."""
        return self.make(self) if columns is None or columns > self.left else self

    def product(self, u: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        found = super().product(u)
        self.left -= u.shape[1]
        return found


def products_before_rows(plan: Plan, vectors: int, examples: int) -> float:
    """After how many products rows of so many vectors an example, kept as chosen, have paid; infinite if never.

    For one example, with F the multiplications of a forward pass: a product without rows takes 5F (forward with a
    tangent, and back to weights), rows take F, and F for each vector, which is only led back to layers' outputs, and
    another F for each that is written out. A product with them takes 2F of factors, or 2 of each number written out,
    and reads all numbers twice.
    """
    making, saved = 0, 0
    for unit in plan.units:
        shape = unit.shape if isinstance(unit, RuledUnit) else None
        factored = isinstance(unit, RuledUnit) and shape is not None and not unit.stored
        forward, numbers = math.prod(shape or [unit.written]), unit.numbers_per_example(vectors)
        making += (1 + (1 if factored else 2) * vectors // unit.fold) * forward + MOVED * numbers
        saved += 5 * forward - 2 * (forward if factored else numbers) - 2 * MOVED * numbers
    making, saved = examples * making + PASS, examples * saved + PASS
    return float(math.ceil(making / saved)) if saved > 0 else math.inf


def every_kth_example(source: Source, stride: int, before: int = 0) -> CutSource:
    """Every k-th example (``stride``) of the data and of so many examples ``before`` them."""

    def cut(batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        seen = before
        for number, batch in batches:
            first = -seen % stride
            if first < batch.size:
                yield number, batch.take(slice(first, None, stride))
            seen += batch.size

    return CutSource(source, cut)


def every_kth(rows: Rows | StreamedRows, stride: int, first: int = 0) -> Rows:
    """Rows of every k-th example; for stored ones every k-th row from the first.

    Cost: streamed, reading the data once, and the rows of the examples that are taken.
    """
    if isinstance(rows, StreamedRows):
        source = every_kth_example(rows.problem.source, stride)
        problem = replace(rows.problem, source=source, progress=False, checks=BatchChecks())
        return Rows.cat([chunk.rows for chunk in problem.batches("sample")])
    return rows.reordered(torch.arange(first, rows.count, stride, device=rows.device)).compact()


# -- products without rows -------------------------------------------------------------------------------------------


def matrix_free(problem: Problem) -> bool:
    """Whether products can do without rows, and take less for it; tried on two examples, once a plan."""
    plan = problem.plan
    # In half precision tangents would have no more digits than the weights; rows are made in float32. And forward-mode
    # derivatives do not know of hooks.
    if problem.vectors_per_example <= FEW_VECTORS or plan.example_parameter.dtype in HALF or plan.probe.hooked:
        return False

    def find() -> bool:
        probe, rows = problem.probe_rows()
        return not _is_uneven(plan, probe.watched) and _agrees(plan, plan.space, lambda v, u: rows(v).product(u))

    return bool(plan.tried.answer("matrix-free", find))


def matrix_free_product(
    plan: Plan, space: ParameterSpace, batch: Batch, u: Float[Tensor, "D K"], metric: Metric, *, watch: bool = False
) -> tuple[Float[Tensor, "D K"], Watched | None]:
    """Jᵀ M J U over a batch, for parameters that may be some of the plan's, and M = Σ_m v vᵀ of each example.

    Of one column also the forward pass, if it is to be watched.
    """
    # The fused attention kernels have no forward-mode derivative.
    with untouched_rng([u.device]), differentiable(plan.model, ()), sdpa_kernel(SDPBackend.MATH):
        if u.shape[1] == 1:
            return _one_column(plan, space, batch, u, metric, watch)
        return _columns(plan, space, batch, u, metric), None


def _one_column(
    plan: Plan, space: ParameterSpace, batch: Batch, u: Float[Tensor, "D 1"], metric: Metric, watch: bool
) -> tuple[Float[Tensor, "D 1"], Watched | None]:
    """One forward pass carries the tangents and leaves the graph to go back through."""
    parameters = _detached(plan, space)
    with forward_ad.dual_level():
        tangents = space.unflatten(u[:, 0])
        # Leaves themselves, so that what watches sees parameters and not something made of them.
        leaves = {n: forward_ad.make_dual(p, tangents[n]).requires_grad_() for n, p in parameters.items()}
        model = with_values(plan.model, leaves)
        own = batch.fresh()
        seen = Watched.of(model, Recorder({}, batch.size, own.batched), own) if watch else None
        z = own.handed(model) if seen is None else seen.z
        tangent = forward_ad.unpack_dual(z).tangent
        pushed = torch.zeros_like(z) if tangent is None else tangent.detach().clone()
    # Outside of the dual level, where going back would carry tangents too.
    weighed = metric(z.detach(), pushed.unsqueeze(0)).squeeze(0).to(z.dtype)
    found = torch.autograd.grad(z, list(leaves.values()), weighed, allow_unused=True, materialize_grads=True)
    return space.flatten(dict(zip(leaves, found, strict=True))).unsqueeze(1), seen


def _columns(
    plan: Plan, space: ParameterSpace, batch: Batch, u: Float[Tensor, "D K"], metric: Metric
) -> Float[Tensor, "D K"]:
    """Tangents and cotangents vectorised over the columns."""
    parameters = _detached(plan, space)

    def forward(values: Mapping[str, Tensor]) -> Tensor:
        return batch.call(with_values(plan.model, values))

    z, pull = vjp(forward, parameters)[:2]
    parts = []
    for span in spans(u.shape[1], z.numel()):
        tangents = {name: t.movedim(-1, 0) for name, t in space.unflatten(u[:, span]).items()}
        pushed = vmap(lambda t: jvp(forward, (parameters,), (t,))[1])(tangents)
        (pulled,) = vmap(pull)(metric(z.detach(), pushed).to(z.dtype))
        parts.append(space.flatten({name: g.movedim(0, -1) for name, g in pulled.items()}))
    return torch.cat(parts, 1)


def _is_uneven(plan: Plan, watched: Watched) -> bool:
    """Whether a table's vectors have other gradients than derivatives: a padding token's, and those by frequency."""
    modules = [(getattr(m, "padding_idx", None), getattr(m, "scale_grad_by_freq", False)) for m in plan.model.modules()]
    nodes: Any = (node for node in graph_of(watched.z.grad_fn) if node.name().startswith(_LOOKUPS))
    # Of no padding, a node says the largest integer.
    seen = [(None if n._saved_padding_idx >= 1 << 63 else 0, n._saved_scale_grad_by_freq) for n in nodes]
    return any(padding is not None or scaled for padding, scaled in (*modules, *seen))


def _agrees(plan: Plan, space: ParameterSpace, row_products: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether products are those of the verified rows, for one column and for three, more than examples.

    Both sides are asked for Jᵀ r (rᵀ J u) with random output vectors r, which takes one row of each example, however
    many vectors the kind has.
    """
    like, generator, batch, z = plan.example_parameter, torch.Generator().manual_seed(0), plan.probe.batch, plan.probe.z
    u = torch.randn(space.size, 3, generator=generator, dtype=torch.float64).to(like)
    r = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)

    def metric(_: Tensor, w: Float[Tensor, "K B ..."]) -> Float[Tensor, "K B ..."]:
        inner = (r * w).flatten(2).sum(2)
        return r * inner.reshape(*inner.shape, *[1] * (w.ndim - 2))

    expected = row_products(r.unsqueeze(0), u)
    # Some operations have no forward-mode derivative or batching rule; rows do without both.
    with contextlib.suppress(Exception):
        one, three = (matrix_free_product(plan, space, batch, columns, metric)[0] for columns in (u[:, :1], u))
        tolerance = TOLERANCE.get(like.dtype, 5e-2) * expected.norm()
        return bool((three - expected).norm() <= tolerance) and bool((one - expected[:, :1]).norm() <= tolerance)
    return False


def _detached(plan: Plan, space: ParameterSpace) -> dict[str, Tensor]:
    return {name: plan.parameters[name].detach() for name in space.names}
