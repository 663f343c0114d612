"""Sums and multiples of structures: exact, and folded only where that is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fisherkit.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    FisherOperator,
    KroneckerOperator,
    SumOperator,
)
from tests.operator_cases import (
    CASES,
    DTYPES,
    MIXED,
    Pair,
    assert_close,
    block_diagonal,
    dense,
    diagonal,
    eigen_kronecker,
    kronecker,
)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, dtype: torch.dtype) -> Pair:
    return CASES[request.param](dtype)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_mul__scales_and_keeps_the_structure(pair: Pair, dtype: torch.dtype, scale: float) -> None:
    operator, matrix = pair
    for got in (scale * operator, operator * scale):
        assert type(got) is type(operator)
        assert_close(got.to_dense(), scale * matrix, dtype)


SUMS: dict[str, tuple[Callable[..., Pair], Callable[..., Pair], type[FisherOperator]]] = {
    "diagonal+diagonal": (diagonal, diagonal, DiagonalOperator),
    "dense+dense": (dense, dense, DenseOperator),
    "dense+diagonal": (dense, diagonal, DenseOperator),
    "diagonal+dense": (diagonal, dense, DenseOperator),
    "kronecker+kronecker": (kronecker, kronecker, SumOperator),
    "eigen+eigen": (eigen_kronecker, eigen_kronecker, SumOperator),
    "kronecker+diagonal": (kronecker, diagonal, SumOperator),
    "block+block": (block_diagonal, block_diagonal, SumOperator),
}


@pytest.mark.parametrize("name", SUMS)
def test_add__is_the_sum_and_folds_only_where_exact(name: str, dtype: torch.dtype) -> None:
    make_a, make_b, structure = SUMS[name]
    (a, matrix_a), (b, matrix_b) = make_a(dtype, seed=0), make_b(dtype, seed=11)
    got = 0.5 * a + b
    assert type(got) is structure
    assert_close(got.to_dense(), 0.5 * matrix_a + matrix_b, dtype)
    assert_close(got.diagonal(), (0.5 * matrix_a + matrix_b).diagonal(), dtype)


def test_add__folds_into_any_term_and_never_nests(dtype: torch.dtype) -> None:
    (a, A), (b, B), (c, C), (d, Dm) = (
        kronecker(dtype),
        diagonal(dtype),
        kronecker(dtype, seed=5),
        diagonal(dtype, seed=6),
    )
    got = (a + b) + (c + d)
    assert isinstance(got, SumOperator)
    assert [type(term).__name__ for term in got.terms] == ["KroneckerOperator", "DiagonalOperator", "KroneckerOperator"]
    assert_close(got.to_dense(), A + B + C + Dm, dtype)
    nested = SumOperator([SumOperator([a, c]), b])
    assert len(nested.terms) == 3


@pytest.mark.parametrize("shared", ["gradient", "activation"])
def test_add__kronecker_products_that_share_a_factor_up_to_a_number_fold(dtype: torch.dtype, shared: str) -> None:
    (a, matrix_a), (b, _) = kronecker(dtype), kronecker(dtype, seed=5)
    assert isinstance(a, KroneckerOperator)
    assert isinstance(b, KroneckerOperator)
    transposed = a.layout.transposed
    factors = (b.activation, 3 * a.gradient) if shared == "gradient" else (3 * a.activation, b.gradient)
    c = KroneckerOperator(a.space, *factors, transposed)
    got = 0.7 * a + c
    assert type(got) is KroneckerOperator
    assert_close(got.to_dense(), 0.7 * matrix_a + c.to_dense().double(), dtype)
    v = torch.ones(a.size, dtype=dtype)
    assert_close((got @ got.solve(v, damping=0.1) + 0.1 * got.solve(v, damping=0.1)), v.double(), dtype)


def test_add__a_kronecker_product_that_is_zero_changes_nothing(dtype: torch.dtype) -> None:
    a, matrix = kronecker(dtype)
    b, _ = kronecker(dtype, seed=5)
    for got in (a + 0.0 * b, 0.0 * b + a):
        assert_close(got.to_dense(), matrix, dtype)


def test_add__equal_partitions_fold_block_by_block(dtype: torch.dtype) -> None:
    names = [["x.weight", "x.bias"], ["y.weight", "z", "w.weight", "w.bias"]]
    spaces = [MIXED.restrict(part) for part in names]
    first, second = [dense(dtype, spaces[0]), diagonal(dtype, spaces[1])], [diagonal(dtype, s, seed=8) for s in spaces]
    a = BlockDiagonalOperator(MIXED, [operator for operator, _ in first])
    b = BlockDiagonalOperator(MIXED, [operator for operator, _ in reversed(second)])
    got = a + b
    assert isinstance(got, BlockDiagonalOperator)
    assert [type(block).__name__ for block in got.blocks] == ["DenseOperator", "DiagonalOperator"]
    assert_close(got.to_dense(), (a.to_dense() + b.to_dense()).double(), dtype)
    other = BlockDiagonalOperator(MIXED, [diagonal(dtype, MIXED)[0]])
    assert isinstance(a + other, SumOperator)
