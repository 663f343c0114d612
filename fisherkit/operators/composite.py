"""Operators made of others: block-diagonal matrices, and sums.

Parameters of different blocks do not interact; blocks may be of any structure, and their names need not be neighbours
in the flat order. Sums are folded into one operator where that is exact, kept as a sum where it is not: one of
Kronecker products that share no factor is none, its products are exact, its inverse is by conjugate gradients, whose
approximate inverse is here; `kronecker_sum` owns that of one layer's Kronecker products.
"""

from __future__ import annotations

import copy
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherkit import io
from fisherkit.arithmetic import MatMat
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, SingularMatrixError
from fisherkit.operators.base import FisherOperator, Makers, fold
from fisherkit.operators.diagonal import DiagonalOperator
from fisherkit.operators.factorization import BlockProducts, Factorization, RowProducts, aligned, diagonal_inverse
from fisherkit.operators.kronecker_sum import layer_inverse
from fisherkit.operators.persistence import blocks_of_node, restore
from fisherkit.processes import ALONE, Processes
from fisherkit.rows.collection import Rows
from fisherkit.solvers import SolveInfo
from fisherkit.space import ParameterSpace, finest_partition


class CompositeOperator(FisherOperator):
    """An operator made of others, its blocks or terms: what it knows is theirs."""

    parts: tuple[FisherOperator, ...]

    @abstractmethod
    def _of(self, parts: Sequence[FisherOperator]) -> FisherOperator:
        """The same of other parts."""

    def _trace(self) -> Float[Tensor, ""]:
        return torch.stack([part._trace() for part in self.parts]).sum()

    def _scaled(self, scale: float) -> FisherOperator:
        return self._of([part._scaled(scale) for part in self.parts])

    def _converted(self, dtype: torch.dtype, device: torch.device) -> FisherOperator:
        return self._of([part._converted(dtype, device) for part in self.parts])

    @property
    def is_diagonal(self) -> bool:
        return all(part.is_diagonal for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def together(self) -> Processes:
        return next((part.together for part in self.parts if part.together.size > 1), ALONE)

    def _usual_damping(self) -> float:
        # What has correlations decides, and of that what takes least.
        parts = [part for part in self.parts if not part.is_diagonal] or self.parts
        return min(part._usual_damping() for part in parts)

    def _state(self) -> io.State:
        return io.State(self.tag, self.space.names, children=tuple(part._state() for part in self.parts))


# -- blocks ------------------------------------------------------------------------------------------------------------


class BlockDiagonalOperator(CompositeOperator):
    """F = blockdiag(F₁, F₂, ...) up to the order of the parameters.

    Args:
        space: all parameters.
        blocks: operators over parts of it, each with its names in the order of ``space``; each name in one block.

    Raises:
        InvalidArgumentError: the blocks do not partition the space, or lie on different devices.
        InvalidTypeError: a block is not a FisherOperator, or dtypes differ.
    """

    tag: ClassVar[str] = "block_diagonal"

    def __init__(self, space: ParameterSpace, blocks: Sequence[FisherOperator]) -> None:
        _check_partition(space, blocks)
        super().__init__(space, dtype=blocks[0].dtype, device=blocks[0].device)
        self.parts = self.blocks = tuple(blocks)

    def _of(self, parts: Sequence[FisherOperator]) -> BlockDiagonalOperator:
        return BlockDiagonalOperator(self.space, parts)

    @functools.cached_property
    def _sizes(self) -> list[int] | None:
        """Of the blocks, if they lie one after the other; else None."""
        names = tuple(name for block in self.blocks for name in block.space.names)
        return [block.size for block in self.blocks] if names == self.space.names else None

    def _gather(self, flat: Tensor) -> Sequence[Tensor]:
        """What each block sees of a flat tensor [D] or [D, K]."""
        if self._sizes is not None:
            return flat.split_with_sizes(self._sizes)
        return [self.space.take(flat, block.space.names) for block in self.blocks]

    def _scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """One flat tensor of the blocks' results."""
        if self._sizes is not None:
            return torch.cat(tuple(parts))
        return self.space.join([(block.space.names, part) for block, part in zip(self.blocks, parts, strict=True)])

    def _map(self, operation: Callable[[FisherOperator], Tensor]) -> Tensor:
        return self._scatter([operation(block) for block in self.blocks])

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        parts = self._gather(columns)
        return self._scatter([block._matmat(part) for block, part in zip(self.blocks, parts, strict=True)])

    def _diagonal(self) -> Float[Tensor, "D"]:
        return self._map(lambda block: block._diagonal())

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        return _BlockFactorization(self, damping, tolerance, max_steps)

    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        return self._map(lambda block: block._draw(generator, count))

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        if not isinstance(other, BlockDiagonalOperator):
            return None
        partners = {block.space: block for block in other.blocks}
        pairs = ((block, partners.get(block.space)) for block in self.blocks)
        folded = [None if partner is None else fold(block, partner) for block, partner in pairs]
        whole = [block for block in folded if block is not None]
        return BlockDiagonalOperator(self.space, whole) if len(whole) == len(folded) else None

    def _leading(self, k: int) -> list[Float[Tensor, "_"]]:
        """The blocks' largest eigenvalues, among which the k largest of all lie."""
        return [block._eigenvalues(min(k, block.size)) for block in self.blocks]

    def _eigenvalues(self, k: int) -> Float[Tensor, "k"]:
        return torch.cat(self._leading(k)).topk(k).values

    def _eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        owner = owners_of_leading(self._leading(k), k)
        return self._scatter([own_leading(block, owner == i) for i, block in enumerate(self.blocks)])

    def _effective_dimension(self, damping: float) -> Float[Tensor, ""]:
        return torch.stack([block._effective_dimension(damping) for block in self.blocks]).sum()

    def _to_dense(self) -> Float[Tensor, "D D"]:
        result = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        places = self._gather(torch.arange(self.size, device=self.device))
        for block, place in zip(self.blocks, places, strict=True):
            result[place.unsqueeze(-1), place] = block._to_dense()
        return result

    def _frobenius(self) -> Float[Tensor, ""]:
        return torch.stack([block._frobenius() for block in self.blocks]).norm()

    def _blocks(self) -> tuple[FisherOperator, ...]:
        place = {name: i for i, name in enumerate(self.space.names)}
        found = [own for block in self.blocks for own in block._blocks()]
        return tuple(sorted(found, key=lambda block: place[block.space.names[0]]))

    @classmethod
    def _blocks_of_node(cls, node: io.Node, space: ParameterSpace, reader: io.Reader) -> Makers | None:
        parts = [blocks_of_node(child, space.restrict(child.names), reader) for child in node.children]
        return in_order(space, parts) if parts else None

    @property
    def inversion(self) -> Literal["cheap", "direct", "iterative"]:
        found = {block.inversion for block in self.blocks}
        return "iterative" if "iterative" in found else "direct" if "direct" in found else "cheap"

    @property
    def decomposed_side(self) -> int:
        return max(block.decomposed_side for block in self.blocks)

    def _made_of(self) -> str:
        return f"{len(self.blocks):,} block{'s' * (len(self.blocks) != 1)}"

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> BlockDiagonalOperator:
        return cls(space, [restore(space.restrict(child.names), child) for child in state.children])


def split(operator: FisherOperator) -> tuple[FisherOperator, ...]:
    """The finest independent diagonal blocks that are known, so that F = blockdiag of them.

    Args:
        operator: any.

    Returns:
        Operators over disjoint parts of the space that cover it, in flat order of their first names, without metadata:
        of a diagonal operator a diagonal for each parameter, of a sum the blocks of its terms joined where they
        overlap. Tensors are shared with the operator.
    """
    blocks = tuple(copy.copy(block) if block.metadata else block for block in operator._blocks())
    for block in blocks:
        block.metadata = {}
    return blocks


def owners_of_leading(leading: Sequence[Float[Tensor, "_"]], k: int) -> Int[Tensor, "k"]:
    """Of the k largest eigenvalues of all parts, the largest first, the number of the part that each belongs to."""
    # Stable, so that of equal ones within a part the first are taken, which its own eigenvectors(count) are.
    order = torch.cat(list(leading)).sort(descending=True, stable=True).indices[:k]
    return torch.cat([torch.full_like(own, i, dtype=torch.long) for i, own in enumerate(leading)])[order]


def own_leading(part: FisherOperator, own: Bool[Tensor, "k"]) -> Float[Tensor, "d k"]:
    """Eigenvectors of a part where the leading ones of all parts are its own, in their places, and 0 elsewhere."""
    columns = torch.zeros(part.size, len(own), dtype=part.dtype, device=part.device)
    if count := int(own.sum()):
        columns[:, own] = part._eigenvectors(count)
    return columns


def join(space: ParameterSpace, blocks: Sequence[FisherOperator]) -> FisherOperator:
    """The block-diagonal operator of some blocks over a space; a single one is itself, diagonals are one diagonal."""
    if len(blocks) == 1:
        return blocks[0]
    whole = BlockDiagonalOperator(space, blocks)
    return DiagonalOperator(space, whole._diagonal()) if whole.is_diagonal else whole


def in_order(space: ParameterSpace, parts: Iterable[Makers]) -> Makers:
    """The blocks of all parts in flat order."""
    place = {name: i for i, name in enumerate(space.names)}
    found = [item for part in parts for item in part.items()]
    return dict(sorted(found, key=lambda item: place[item[0][0]]))


class _BlockFactorization(Factorization):
    """Each block's own inverse, with the one damping for all."""

    def __init__(
        self, operator: BlockDiagonalOperator, damping: float, tolerance: float, max_steps: int | None
    ) -> None:
        super().__init__(operator, damping)
        self._whole = operator
        self._spaces = [block.space for block in operator.blocks]
        self._inverses = [_factorize_block(block, damping, tolerance, max_steps) for block in operator.blocks]

    def _solve(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        parts = self._whole._gather(columns)
        return self._whole._scatter([f._solve(part) for f, part in zip(self._inverses, parts, strict=True)])

    def _row_products(self, probe: Rows, queries: int, others: int) -> RowProducts:
        found = self._joined(lambda own, part: own._row_products(part, queries, others), probe)
        return found or super()._row_products(probe, queries, others)

    def _unit_products(self, probe: Rows) -> RowProducts:
        return self._joined(lambda own, part: own._unit_products(part), probe) or super()._unit_products(probe)

    def _joined(self, of: Callable[[Factorization, Rows], RowProducts], probe: Rows) -> BlockProducts | None:
        """The blocks' products; None of rows whose units lie in several."""
        if not aligned(self._spaces, probe):
            return None
        pairs = zip(self._spaces, self._inverses, strict=True)
        return BlockProducts([(space, of(own, probe.restrict(space))) for space, own in pairs])

    def _row_squares(self, rows: Rows) -> Float[Tensor, "R"]:
        if not aligned(self._spaces, rows):
            return super()._row_squares(rows)
        parts = [f._row_squares(rows.restrict(space)) for space, f in zip(self._spaces, self._inverses, strict=True)]
        return torch.stack([part.double() for part in parts]).sum(0)

    def _solve_with_info(
        self, columns: Float[Tensor, "D K"], checkpoint: Path | None = None, *, progress: bool = False
    ) -> tuple[Float[Tensor, "D K"], SolveInfo]:
        parts = self._whole._gather(columns)
        solved = [
            # A block that is solved iteratively has a file of its own: solve.0.safetensors, solve.1.safetensors, ...
            inverse._solve_with_info(
                part, checkpoint and checkpoint.with_suffix(f".{i}{checkpoint.suffix}"), progress=progress
            )
            for i, (inverse, part) in enumerate(zip(self._inverses, parts, strict=True))
        ]
        infos = [info for _, info in solved]
        # Blocks report residuals relative to their own share of the right-hand side; here they count by that share.
        shares = torch.stack([part.norm(dim=0) for part in parts])
        total = shares.norm(dim=0)
        residual = (torch.stack([info.residual for info in infos]) * shares).norm(dim=0)
        info = SolveInfo.of_parts(infos, residual / torch.where(total > 0, total, 1), self.damping)
        return self._whole._scatter([solution for solution, _ in solved]), info

    def _logdet(self) -> Float[Tensor, ""]:
        return torch.stack([inverse._logdet() for inverse in self._inverses]).sum()


def _factorize_block(block: FisherOperator, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
    try:
        return block._factorize(damping, tolerance, max_steps)
    except SingularMatrixError as error:
        raise SingularMatrixError(
            f"BlockDiagonalOperator.factorize(damping={damping})", f"a singular block over {list(block.space.names)}",
            "positive definite blocks", why=str(error),
        ) from error  # fmt: skip


def _check_partition(space: ParameterSpace, blocks: Sequence[Any]) -> None:
    """Raise unless the blocks cover the space, each name once, in one dtype and on one device."""
    call = "BlockDiagonalOperator(blocks)"
    strangers = [type(block).__name__ for block in blocks if not isinstance(block, FisherOperator)]
    if strangers:
        raise InvalidTypeError(call, f"blocks of type {sorted(set(strangers))}", "FisherOperators")
    covered = [name for block in blocks for name in block.space.names]
    missing, unknown = sorted(set(space.names) - set(covered)), sorted(set(covered) - set(space.names))
    twice = sorted({name for name in covered if covered.count(name) > 1})
    if missing or unknown or twice:
        raise InvalidArgumentError(
            call, f"blocks that leave out {missing}, add {unknown} and repeat {twice}",
            f"each of the {len(space.names)} names of the space in one block",
            try_="space.restrict(names) for each of space.blocks.values()",
        )  # fmt: skip
    odd = [block.space.names for block in blocks if block.space != space.restrict(block.space.names)]
    if odd:
        raise InvalidArgumentError(
            call, f"a block over {list(odd[0])} whose shapes or order are not the space's",
            "the same shapes and order as in the space", try_="space.restrict(names)",
        )  # fmt: skip
    if len({block.dtype for block in blocks}) > 1:
        raise InvalidTypeError(call, f"blocks of {[block.dtype for block in blocks]}", "one dtype")
    if len({block.device for block in blocks}) > 1:
        devices = [str(block.device) for block in blocks]
        raise InvalidArgumentError(call, f"blocks on {devices}", "one device")


# -- sums --------------------------------------------------------------------------------------------------------------


LEAST_SHIFT = 1e-12
"""Of the mean eigenvalue: what is added to a cheap part that is singular where there is no damping."""


def add(a: FisherOperator, b: FisherOperator) -> FisherOperator:
    """A + B as one operator where the terms fold into one, else a `SumOperator`.

    Args:
        a: one term, or a sum of them.
        b: another, over the same space, of the same dtype and on the same device.

    Raises:
        InvalidArgumentError: the spaces or devices differ; the message lists the names.
        InvalidTypeError: the dtypes differ.
    """
    folded: list[FisherOperator] = []
    for term in addends(a, b):
        for place, known in enumerate(folded):
            if (total := fold(known, term)) is not None:
                folded[place] = total
                break
        else:
            folded.append(term)
    return folded[0] if len(folded) == 1 else SumOperator(folded)


def addends(a: FisherOperator, b: FisherOperator) -> list[FisherOperator]:
    """The terms of A + B; refused as by `add`."""
    terms = _flatten([a, b])
    _check_terms(terms, f"{a._name} + {b._name}")
    return terms


class SumOperator(CompositeOperator):
    """F = F₁ + F₂ + ... of terms that do not fold into one structure.

    Products, diagonal, trace, draws and `to_dense` are the terms'; solves are by conjugate gradients; eigenvalues,
    eigenvectors, log determinant, effective dimension and Gram have no closed form.

    Args:
        terms: operators over one space, of one dtype and on one device, at least one; sums among them are flattened.
    """

    tag: ClassVar[str] = "sum"

    def __init__(self, terms: Sequence[FisherOperator]) -> None:
        self.parts = self.terms = tuple(_flatten(terms))
        _check_terms(self.terms, "SumOperator(terms)")
        first = self.terms[0]
        super().__init__(first.space, dtype=first.dtype, device=first.device)

    def _of(self, parts: Sequence[FisherOperator]) -> SumOperator:
        return SumOperator(parts)

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return _total(term._matmat(columns) for term in self.terms)

    def _diagonal(self) -> Float[Tensor, "D"]:
        return _total(term._diagonal() for term in self.terms)

    def _approximate_inverse(self, damping: float) -> MatMat | None:
        """Of the terms that are inverted cheaply, block by block; of the diagonal where there is nothing but those.

        Kronecker products of one layer have an inverse of their own. Rows and dense matrices beside block-diagonal
        terms are left to conjugate gradients, which need a step for each of their large eigenvalues.
        """
        found = layer_inverse(self.terms, damping)
        if found is not None:
            return found
        cheap = [term for term in self.terms if term.inversion == "cheap"]
        if not cheap:
            return diagonal_inverse(self, damping)
        part = SumOperator(cheap)
        blocks = part._blocks()
        if len(blocks) == 1 and len(cheap) == len(self.terms):
            return diagonal_inverse(self, damping)
        shift = max(damping, LEAST_SHIFT * float(part._trace()) / part.size)
        inverses = [block._approximate_inverse(shift) for block in blocks]
        whole = BlockDiagonalOperator(self.space, blocks)

        def product(columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
            pairs = zip(inverses, whole._gather(columns), strict=True)
            return whole._scatter([part if inverse is None else inverse(part) for inverse, part in pairs])

        return product

    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        # Independent draws: their covariances add.
        return _total(term._draw(generator, count) for term in self.terms)

    def _to_dense(self) -> Float[Tensor, "D D"]:
        return _total(term._to_dense() for term in self.terms)

    def _terms(self) -> tuple[FisherOperator, ...]:
        return self.terms

    def _blocks(self) -> tuple[FisherOperator, ...]:
        terms: list[Makers] = [
            {block.space.names: lambda block=block: block for block in term._blocks()}  # type: ignore[misc]
            for term in self.terms
        ]
        return tuple(make() for make in _joined(self.space, terms).values())

    @classmethod
    def _blocks_of_node(cls, node: io.Node, space: ParameterSpace, reader: io.Reader) -> Makers | None:
        terms = [blocks_of_node(child, space, reader) for child in node.children]
        return _joined(space, terms) if terms else None

    def _made_of(self) -> str:
        return f"{len(self.terms):,} terms"

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> SumOperator:
        return cls([restore(space, child) for child in state.children])


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _flatten(operators: Iterable[FisherOperator]) -> list[FisherOperator]:
    return [term for operator in operators for term in operator._terms()]


def _joined(space: ParameterSpace, terms: Sequence[Makers]) -> Makers:
    """The blocks of a sum from those of its terms: joined where they overlap, each the sum of the terms' parts."""
    found: Makers = {}
    for group in finest_partition(names for blocks in terms for names in blocks):
        part = space.restrict(group)
        makers = [[make for names, make in blocks.items() if names[0] in group] for blocks in terms]
        found[part.names] = functools.partial(_sum, part, makers)
    return in_order(space, [found])


def _sum(space: ParameterSpace, terms: Sequence[Sequence[Callable[[], FisherOperator]]]) -> FisherOperator:
    return functools.reduce(add, [join(space, [make() for make in makers]) for makers in terms])


def _check_terms(terms: Sequence[FisherOperator], call: str) -> None:
    if not terms:
        raise InvalidArgumentError(call, "no terms", "at least one operator")
    first = terms[0]
    for term in terms[1:]:
        if term.space != first.space:
            raise InvalidArgumentError(
                call, f"operators over different parameters: {_difference(first.space, term.space)}",
                "the same names, shapes and order", try_="build both with the same params=",
            )  # fmt: skip
        if term.dtype != first.dtype:
            raise InvalidTypeError(call, f"{first.dtype} and {term.dtype}", "one dtype")
        if term.device != first.device:
            raise InvalidArgumentError(call, f"{first.device} and {term.device}", "one device")


def _difference(a: ParameterSpace, b: ParameterSpace) -> str:
    left, right = dict(zip(a.names, a.shapes, strict=True)), dict(zip(b.names, b.shapes, strict=True))
    parts = []
    if only := [name for name in left if name not in right]:
        parts.append(f"only the first has {only}")
    if only := [name for name in right if name not in left]:
        parts.append(f"only the second has {only}")
    if changed := [name for name in left if name in right and left[name] != right[name]]:
        shapes = (f"{name!r}: {list(left[name])} and {list(right[name])}" for name in changed)
        parts.append("shapes differ in " + ", ".join(shapes))
    return "; ".join(parts) or "the names are in another order"
