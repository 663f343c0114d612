"""A layer's Fisher matrix averaged over its outputs, and mixtures with that average.

A layer's block has an entry for each pair of (output, input) pairs. Its average over outputs is I ⊗ M with
M = (1/O) Σ_o F[(o, ·), (o, ·)], the partial trace divided by O. It knows which inputs matter and not which
outputs do: for G ⊗ A it is tr(G)/O · I ⊗ A, the metric of RegMean (Jin et al., arXiv 2212.09849) up to a scale. Owns
this average for each structure; it has the trace of the original.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import InvalidArgumentError
from fisherkit.operators.algebra import SumOperator, add
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.block_diagonal import BlockDiagonalOperator
from fisherkit.operators.dense import DenseOperator
from fisherkit.operators.diagonal import DiagonalOperator
from fisherkit.operators.kronecker import EigenKroneckerOperator, KroneckerOperator
from fisherkit.operators.layer_layout import LayerLayout
from fisherkit.operators.low_rank import LowRankOperator
from fisherkit.rows.collection import Rows
from fisherkit.space import ParameterSpace


def average_over_outputs(operator: FisherOperator) -> FisherOperator:
    """The average over outputs of each module's own block, I ⊗ M.

    A module's weight [O, ...] and its bias [O] have the outputs along their first axis (along the last for a Kronecker
    product known to be transposed). A parameter on its own with one axis has one input: its average is the mean times
    I. Parameters of different modules do not interact in the average.

    Args:
        operator: any structure.

    Returns:
        An operator over the same space with the same trace.

    Raises:
        NoClosedFormError: rows that are streamed from the data.

    Cost: no more memory than the operator's own for diagonals, dense matrices and Kronecker products; rows are written
        out, one module at a time; any other structure is written out as a matrix, D² numbers.
    """
    return _average(operator._unwrap())


def mix_with_average(operator: FisherOperator, ratio: float) -> FisherOperator:
    """(F + ρR) / (1 + ρ) with R the `average_over_outputs`: F at ρ = 0, R in the limit of large ρ.

    For G ⊗ A with mean(G) = tr(G)/O this is (G + ρ mean(G) I) ⊗ A / (1 + ρ), damping of the gradient factor alone.

    Args:
        operator: F, any structure.
        ratio: ρ, 0 or more.

    Raises:
        InvalidArgumentError: ρ is negative, NaN or infinite.
        NoClosedFormError: as in `average_over_outputs`.
    """
    if not 0 <= ratio < math.inf:
        raise InvalidArgumentError(
            call=f"mix_with_average({ratio})", got=f"ratio {ratio}", expected="a finite number, 0 or more"
        )
    plain = operator._unwrap()
    return plain if ratio == 0 else _mix(plain, ratio)


def _mix(f: FisherOperator, ratio: float) -> FisherOperator:
    if isinstance(f, BlockDiagonalOperator):
        return BlockDiagonalOperator(f.space, [_mix(block, ratio) for block in f.blocks])
    if isinstance(f, SumOperator):
        return SumOperator([_mix(term, ratio) for term in f.terms])
    share = 1 / (1 + ratio)
    if isinstance(f, KroneckerOperator):
        mean = f.gradient.diagonal().mean()
        identity = torch.eye(len(f.gradient), dtype=f.dtype, device=f.device)
        gradient = share * f.gradient + (1 - share) * mean * identity
        return KroneckerOperator(f.space, f.activation, gradient, f.layout.transposed, symmetric=True)
    if isinstance(f, EigenKroneckerOperator) and len(f.eigenvalue_grid) == f.layout.outputs:
        values = f.eigenvalue_grid
        return _with_values(f, share * values + (1 - share) * values.mean(0))
    return add(f._scaled(share), _average(f)._scaled(1 - share))


def _average(f: FisherOperator) -> FisherOperator:
    if isinstance(f, BlockDiagonalOperator):
        return BlockDiagonalOperator(f.space, [_average(block) for block in f.blocks])
    if isinstance(f, SumOperator):
        total = _average(f.terms[0])
        for term in f.terms[1:]:
            total = add(total, _average(term))
        return total
    if isinstance(f, KroneckerOperator):
        identity = torch.eye(len(f.gradient), dtype=f.dtype, device=f.device)
        mean = f.gradient.diagonal().mean()
        return KroneckerOperator(f.space, f.activation, mean * identity, f.layout.transposed, symmetric=True)
    if isinstance(f, EigenKroneckerOperator):
        u = f.activation_basis
        moment = (u * (f.eigenvalue_grid.to(f.dtype).sum(0) / f.layout.outputs)) @ u.mT
        return _of_module(f.space, moment, transposed=f.transposed)
    if isinstance(f, DiagonalOperator):
        return DiagonalOperator(f.space, _diagonal_average(f.space, f._diagonal()))
    if isinstance(f, LowRankOperator) and isinstance(f.row_source, Rows):
        rows, scale = f.row_source, f.scale
        return _by_module(f.space, lambda space: _moment_of_rows(rows, space, scale))
    dense = f if isinstance(f, DenseOperator) else DenseOperator(f.space, f._to_dense())
    return _by_module(f.space, lambda space: _moment_of_matrix(dense, space))


def _with_values(f: EigenKroneckerOperator, values: Float[Tensor, "O r"]) -> EigenKroneckerOperator:
    return EigenKroneckerOperator(f.space, f.activation_basis, f.gradient_basis, values, f.transposed)


def _diagonal_average(space: ParameterSpace, diagonal: Float[Tensor, "D"]) -> Float[Tensor, "D"]:
    parts = []
    for name, shape in zip(space.names, space.shapes, strict=True):
        grid = diagonal[space.slices[name]].reshape(shape[0] if shape else 1, -1)
        parts.append(grid.mean(0, keepdim=True).expand_as(grid).reshape(-1))
    return torch.cat(parts)


def _by_module(space: ParameterSpace, moment: Callable[[ParameterSpace], Tensor]) -> FisherOperator:
    """I ⊗ M of every module; a parameter that does not share its module's outputs stands for itself."""
    parts = []
    for names in space.blocks.values():
        own = space.restrict(names)
        whole = len(names) == 1 or _is_layer(own)
        parts += [_of_module(part, moment(part)) for part in ([own] if whole else map(space.restrict, _each(names)))]
    return parts[0] if len(parts) == 1 else BlockDiagonalOperator(space, parts)


def _each(names: tuple[str, ...]) -> list[list[str]]:
    return [[name] for name in names]


def _is_layer(space: ParameterSpace) -> bool:
    first, *others = space.shapes
    return len(others) == 1 and bool(first) and others[0] == (first[0],)


def _of_module(space: ParameterSpace, moment: Float[Tensor, "J J"], *, transposed: bool = False) -> FisherOperator:
    if not space.shapes[0]:
        return DiagonalOperator(space, moment.reshape(1))
    outputs = LayerLayout.of(space, transposed, "average_over_outputs").outputs
    identity = torch.eye(outputs, dtype=moment.dtype, device=moment.device)
    return KroneckerOperator(space, (moment + moment.mT) / 2, identity, transposed, symmetric=True)


def _grid(space: ParameterSpace, columns: Float[Tensor, "D K"]) -> Float[Tensor, "K O J"]:
    if not space.shapes[0]:
        return columns.mT.unsqueeze(-1)
    return LayerLayout.of(space, False, "average_over_outputs").to_grid(columns)


def _moment_of_rows(rows: Rows, space: ParameterSpace, scale: float) -> Float[Tensor, "J J"]:
    """(1/O) Σ over rows and outputs of what meets one output."""
    found = [slot for slot in rows.slots if set(slot.names) & set(space.names)]
    parts: dict[str, Tensor] = {}
    for slot in found:
        own = rows.space.restrict(slot.names)
        dense, start = slot.rows.dense().mT, 0
        for name in slot.names:
            size = own.sizes[own.names.index(name)]
            parts[name], start = dense[start : start + size], start + size
    grid = _grid(space, torch.cat([parts[name] for name in space.names]))
    flat = grid.reshape(-1, grid.shape[-1])
    return scale / grid.shape[1] * (flat.mT @ flat)


def _moment_of_matrix(dense: DenseOperator, space: ParameterSpace) -> Float[Tensor, "J J"]:
    """(1/O) Σ_o of the matrix's block of output o."""
    matrix, slices = dense._to_dense(), dense.space.slices
    order = torch.arange(dense.size, device=dense.device)
    places = _grid(space, torch.cat([order[slices[name]] for name in space.names]).unsqueeze(-1))[0]
    return torch.stack([matrix[row.unsqueeze(-1), row] for row in places]).mean(0)
