"""Operators of every structure beside the matrix that each must be, written out entry by entry.

Shares no formula with the package: places in the flat order are counted, products of factors are double loops.
"""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from fisherkit.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    FisherOperator,
    KroneckerOperator,
    SumOperator,
)
from fisherkit.space import ParameterSpace

Pair = tuple[FisherOperator, Tensor]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]

LAYER = ParameterSpace(("l.weight", "l.bias"), ((3, 4), (3,)))
CONV1D = ParameterSpace(("t.weight", "t.bias"), ((4, 3), (3,)))
CONV = ParameterSpace(("c.weight",), ((3, 2, 1, 2),))
# The blocks of this space are not neighbours: x's weight is first, its bias is last but one.
MIXED = ParameterSpace(
    ("x.weight", "y.weight", "z", "w.weight", "x.bias", "w.bias"), ((3, 2), (2, 2), (), (2, 3), (3,), (3,))
)


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert got.shape == expected.shape
    error = (got.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert float(error) < factor * TOLERANCE[dtype], float(error)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def positive(size: int, seed: int, dtype: torch.dtype, rank: int | None = None) -> Tensor:
    """A positive definite matrix, or a singular one of some rank."""
    rows = normal(2 * size if rank is None else rank, size, seed=seed)
    return (rows.T @ rows / len(rows) + (0.1 * torch.eye(size) if rank is None else 0)).to(dtype)


def kronecker_matrix(activation: Tensor, gradient: Tensor, inputs: int, transposed: bool) -> Tensor:
    """G ⊗ A in the flat order, float64: entry by entry."""
    a, g = activation.double(), gradient.double()
    outputs, width = len(g), len(a)

    def place(o: int, i: int) -> int:
        if i == inputs:
            return outputs * inputs + o
        return i * outputs + o if transposed else o * inputs + i

    matrix = torch.zeros(outputs * width, outputs * width, dtype=torch.float64)
    for o, i, p, j in product(range(outputs), range(width), range(outputs), range(width)):
        matrix[place(o, i), place(p, j)] = g[o, p] * a[i, j]
    return matrix


def diagonal(dtype: torch.dtype, space: ParameterSpace = LAYER, seed: int = 0) -> Pair:
    entries = (normal(space.size, seed=seed).square() + 0.05).to(dtype)
    return DiagonalOperator(space, entries), torch.diag(entries.double())


def dense(dtype: torch.dtype, space: ParameterSpace = LAYER, seed: int = 0) -> Pair:
    matrix = positive(space.size, seed, dtype)
    return DenseOperator(space, matrix), matrix.double()


def kronecker(
    dtype: torch.dtype, space: ParameterSpace = LAYER, seed: int = 0, inputs: int = 4, transposed: bool = False
) -> Pair:
    outputs = space.size // (inputs + len(space.names) - 1)
    activation = positive(inputs + len(space.names) - 1, seed, dtype)
    gradient = positive(outputs, seed + 1, dtype)
    matrix = kronecker_matrix(activation, gradient, inputs, transposed)
    return KroneckerOperator(space, activation, gradient, transposed), matrix


def eigen_kronecker(
    dtype: torch.dtype, space: ParameterSpace = LAYER, seed: int = 0, inputs: int = 4, transposed: bool = False
) -> Pair:
    width = inputs + len(space.names) - 1
    outputs = space.size // width
    on_inputs = torch.linalg.qr(normal(width, width, seed=seed)).Q.to(dtype)
    on_outputs = torch.linalg.qr(normal(outputs, outputs, seed=seed + 1)).Q.to(dtype)
    values = (normal(outputs, width, seed=seed + 2).square() + 0.05).to(dtype)
    matrix = torch.zeros(space.size, space.size, dtype=torch.float64)
    for o, j in product(range(outputs), range(width)):  # e u uᵀ with u = u_G ⊗ u_A, one eigenvector after the other
        u_a, u_g = on_inputs[:, j], on_outputs[:, o]
        matrix += float(values[o, j]) * kronecker_matrix(
            torch.outer(u_a, u_a), torch.outer(u_g, u_g), inputs, transposed
        )
    return EigenKroneckerOperator(space, on_inputs, on_outputs, values, transposed), matrix


def block_diagonal(dtype: torch.dtype, seed: int = 0) -> Pair:
    parts = [
        kronecker(dtype, MIXED.restrict(["x.weight", "x.bias"]), seed, inputs=2),
        dense(dtype, MIXED.restrict(["y.weight"]), seed + 3),
        diagonal(dtype, MIXED.restrict(["z"]), seed + 4),
        eigen_kronecker(dtype, MIXED.restrict(["w.weight", "w.bias"]), seed + 5, inputs=2, transposed=True),
    ]
    order = [*range(6), *range(17, 20), *range(6, 10), 10, *range(11, 17), *range(20, 23)]
    inverse = torch.tensor(order).argsort()
    matrix = torch.block_diag(*(matrix for _, matrix in parts))[inverse][:, inverse]
    return BlockDiagonalOperator(MIXED, [operator for operator, _ in parts]), matrix


def total(*pairs: Pair) -> Pair:
    return SumOperator([operator for operator, _ in pairs]), torch.stack([matrix for _, matrix in pairs]).sum(0)


CASES: dict[str, Callable[[torch.dtype], Pair]] = {
    "diagonal": diagonal,
    "dense": dense,
    "kronecker": kronecker,
    "kronecker_transposed": lambda dtype: kronecker(dtype, CONV1D, transposed=True),
    "kronecker_convolution": lambda dtype: kronecker(dtype, CONV),
    "eigen_kronecker": eigen_kronecker,
    "eigen_kronecker_transposed": lambda dtype: eigen_kronecker(dtype, CONV1D, transposed=True),
    "eigen_kronecker_convolution": lambda dtype: eigen_kronecker(dtype, CONV),
    "block_diagonal": block_diagonal,
    "sum_of_kroneckers": lambda dtype: total(kronecker(dtype), kronecker(dtype, seed=7)),
    "sum_of_structures": lambda dtype: total(diagonal(dtype), eigen_kronecker(dtype), dense(dtype)),
    "sum_of_blocks": lambda dtype: total(block_diagonal(dtype), diagonal(dtype, MIXED), block_diagonal(dtype, seed=9)),
}
