"""Merging problems with their answer written out: one dense float64 system over all parameters.

Shares no formula with the package: Fishers come as dense matrices of `tests.operator_cases`, normalizations and
averages over outputs are loops over entries.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from fisherkit.operators import FisherOperator
from fisherkit.space import ParameterSpace
from tests import operator_cases as oc

Pairs = list[oc.Pair]
F64 = torch.float64

STRUCTURES: dict[str, Callable[[], Pairs]] = {
    "diagonal": lambda: [oc.diagonal(F64, seed=seed) for seed in (0, 5)],
    "dense": lambda: [oc.dense(F64, seed=seed) for seed in (0, 5)],
    "kronecker": lambda: [oc.kronecker(F64, seed=seed) for seed in (0, 5)],
    "three_kroneckers": lambda: [oc.kronecker(F64, seed=seed) for seed in (0, 5, 10)],
    "kronecker_transposed": lambda: [oc.kronecker(F64, oc.CONV1D, seed=s, transposed=True) for s in (0, 5)],
    "kronecker_convolution": lambda: [oc.kronecker(F64, oc.CONV, seed=seed) for seed in (0, 5)],
    "eigen_kronecker": lambda: [oc.eigen_kronecker(F64, seed=seed) for seed in (0, 5)],
    "block_diagonal": lambda: [oc.block_diagonal(F64, seed=seed) for seed in (0, 5)],
    "sum": lambda: [oc.total(oc.kronecker(F64, seed=s), oc.diagonal(F64, seed=s + 1)) for s in (0, 5)],
    "diagonal_and_kronecker": lambda: [oc.diagonal(F64), oc.kronecker(F64, seed=5)],
    "diagonal_and_dense": lambda: [oc.diagonal(F64), oc.dense(F64, seed=5)],
    "diagonal_and_blocks": lambda: [oc.diagonal(F64, oc.MIXED), oc.block_diagonal(F64, seed=5)],
}


def states(space: ParameterSpace, count: int, dtype: torch.dtype = F64, seed: int = 100) -> list[dict[str, Tensor]]:
    """Models of random parameters."""
    return [
        {
            name: oc.normal(1, *shape, seed=seed + 10 * t + i, dtype=dtype)[0]
            for i, (name, shape) in enumerate(zip(space.names, space.shapes, strict=True))
        }
        for t in range(count)
    ]


def flat(state: Mapping[str, Tensor], space: ParameterSpace) -> Tensor:
    return torch.cat([state[name].double().reshape(-1) for name in space.names])


def brute_force(
    models: Sequence[Mapping[str, Tensor]],
    matrices: Sequence[Tensor],
    space: ParameterSpace,
    weights: Sequence[float],
    damping: float,
    center: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The minimiser from its normal equations in θ itself, center and all."""
    thetas = [flat(model, space) for model in models]
    pull = (
        sum(w * theta for w, theta in zip(weights, thetas, strict=True)) / sum(weights)
        if center is None
        else flat(center, space)
    )
    left = sum(w * m for w, m in zip(weights, matrices, strict=True)) + damping * torch.eye(space.size, dtype=F64)
    right = sum(w * (m @ theta) for w, m, theta in zip(weights, matrices, thetas, strict=True)) + damping * pull
    return torch.linalg.solve(left, right)


def normalized(matrix: Tensor, how: str | None) -> Tensor:
    size = len(matrix)
    if how is None:
        return matrix
    if how == "trace":
        return matrix * size / sum(float(matrix[i, i]) for i in range(size))
    return matrix * math.sqrt(size) / math.sqrt(sum(float(x) ** 2 for x in matrix.flatten()))


def averaged(matrix: Tensor, inputs: int, outputs: int, bias: bool, transposed: bool = False) -> Tensor:
    """The average over outputs of one layer's matrix, entry by entry."""

    def place(o: int, i: int) -> int:
        if i == inputs:
            return outputs * inputs + o
        return i * outputs + o if transposed else o * inputs + i

    result = torch.zeros_like(matrix)
    width = inputs + bias
    for i, j in product(range(width), range(width)):
        mean = sum(float(matrix[place(o, i), place(o, j)]) for o in range(outputs)) / outputs
        for o in range(outputs):
            result[place(o, i), place(o, j)] = mean
    return result


def operators(pairs: Pairs) -> list[FisherOperator]:
    return [operator for operator, _ in pairs]


def matrices(pairs: Pairs) -> list[Tensor]:
    return [matrix for _, matrix in pairs]
