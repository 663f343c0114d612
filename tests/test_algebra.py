"""Sums and multiples of operators: what folds, what is solved, and quadratic forms that are joined."""

from collections.abc import Callable

import pytest
import torch

import fisherkit as fk
from fisherkit.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    FisherOperator,
    KroneckerOperator,
    SumOperator,
    kronecker_sum,
)
from fisherkit.operators.base import convert
from fisherkit.operators.outputs_average import average_over_outputs, mix_with_average
from tests import merging_cases as mc
from tests import operator_cases as oc
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
from tests.test_merging import hard_layers


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


# -- what merging needs of operators -----------------------------------------------------------------------------------


F64, CPU = torch.float64, torch.device("cpu")
LAYERS = {
    "diagonal": (oc.diagonal, False),
    "dense": (oc.dense, False),
    "kronecker": (oc.kronecker, False),
    "eigen_kronecker": (oc.eigen_kronecker, False),
    "kronecker_transposed": (lambda dtype: oc.kronecker(dtype, oc.CONV1D, transposed=True), True),
    "eigen_kronecker_transposed": (lambda dtype: oc.eigen_kronecker(dtype, oc.CONV1D, transposed=True), True),
    "sum": (lambda dtype: oc.total(oc.kronecker(dtype), oc.diagonal(dtype), oc.dense(dtype)), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_average_over_outputs__is_the_partial_trace(name) -> None:
    make, transposed = LAYERS[name]
    operator, matrix = make(F64)
    expected = mc.averaged(matrix, 4, 3, True, transposed)
    oc.assert_close(average_over_outputs(operator).to_dense(), expected, F64)
    assert float(average_over_outputs(operator).trace()) == pytest.approx(float(operator.trace()))
    for ratio in (0.0, 0.3, 5.0):
        oc.assert_close(mix_with_average(operator, ratio).to_dense(), (matrix + ratio * expected) / (1 + ratio), F64)


def test_average_over_outputs__of_parameters_on_their_own() -> None:
    space = fk.ParameterSpace(("norm.weight", "scale"), ((3,), ()))
    operator = DiagonalOperator(space, torch.tensor([1.0, 2.0, 6.0, 7.0]))
    assert average_over_outputs(operator).diagonal().tolist() == [3.0, 3.0, 3.0, 7.0]
    dense = DenseOperator(space, operator.to_dense())
    assert torch.allclose(average_over_outputs(dense).to_dense(), torch.tensor([3.0, 3.0, 3.0, 7.0]).diag())


def test_average_over_outputs__of_deficient_bases_and_blocks() -> None:
    operator, matrix = oc.eigen_kronecker(F64)
    short = fk.operators.EigenKroneckerOperator(
        oc.LAYER, operator.activation_basis[:, :3], operator.gradient_basis[:, :2], operator.eigenvalue_grid[:2, :3]
    )
    expected = mc.averaged(short.to_dense(), 4, 3, True)
    oc.assert_close(average_over_outputs(short).to_dense(), expected, F64)
    oc.assert_close(mix_with_average(short, 1.0).to_dense(), (short.to_dense() + expected) / 2, F64)
    blocks, matrix = oc.block_diagonal(F64)
    assert float(average_over_outputs(blocks).trace()) == pytest.approx(float(matrix.trace()))


@pytest.mark.parametrize("ratio", [-1.0, float("nan"), float("inf")])
def test_mix_with_average__refuses_other_ratios(ratio) -> None:
    with pytest.raises(fk.InvalidArgumentError, match="0 or more"):
        mix_with_average(oc.diagonal(F64)[0], ratio)


@pytest.mark.parametrize("name", oc.CASES)
def test_convert__is_the_same_matrix(name) -> None:
    single, _ = oc.CASES[name](torch.float32)
    double = convert(single, F64, CPU)
    assert double.dtype == F64
    assert type(double) is type(single)
    oc.assert_close(double.to_dense(), single.to_dense().double(), torch.float32, 0.1)
    assert convert(double, F64, CPU) is double


def test_convert__leaves_no_negative_eigenvalue() -> None:
    (operator,) = hard_layers(1, torch.float32)
    double = convert(operator, F64, CPU)
    assert float(torch.linalg.eigvalsh(operator.gradient.double()).min()) < -1e-9
    assert float(torch.linalg.eigvalsh(double.gradient).min()) > -1e-15
    dense = DenseOperator(operator.space, operator.to_dense())
    assert float(torch.linalg.eigvalsh(convert(dense, F64, CPU).to_dense()).min()) > -1e-14


@pytest.mark.parametrize("most", [1 << 28, 24 * 41 * 24, 1], ids=["rows", "columns", "both"])
@pytest.mark.parametrize("count", [1, 2])
def test_preconditioner__of_two_layers_without_damping_is_the_inverse(count, most, monkeypatch) -> None:
    monkeypatch.setattr(kronecker_sum, "MOST_NUMBERS", most)
    space = fk.ParameterSpace(("l.weight", "l.bias"), ((24, 40), (24,)))
    terms = [
        KroneckerOperator(space, oc.positive(41, 3 * t, F64), oc.positive(24, 3 * t + 1, F64)) for t in range(count)
    ]
    total = SumOperator(terms)
    v = oc.normal(space.size, 2, seed=9)
    oc.assert_close(total._approximate_inverse(0.0)(total.matvec(v)), v, F64, 1e3)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1.0), (F64, 1e-2)], ids=str)
def test_solve__of_sums_of_layers_takes_few_steps(dtype, relative) -> None:
    total = SumOperator(hard_layers(2, dtype))
    v = oc.normal(total.size, seed=1, dtype=dtype)
    _, info = total.solve(v, fk.RelativeDamping(relative), return_info=True)
    assert info.converged
    assert info.steps < 60


@pytest.mark.parametrize("damping", [1e-2, 1e-6])
def test_solve__of_sums_with_zero_terms_and_with_blocks(damping) -> None:
    kronecker, matrix = oc.kronecker(F64)
    total = SumOperator([kronecker, 0.0 * oc.kronecker(F64, seed=5)[0]])
    v = oc.normal(oc.LAYER.size, seed=2)
    expected = torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=F64), v)
    oc.assert_close(total.solve(v, damping), expected, F64, 10)
    blocks, matrix = oc.total(oc.block_diagonal(F64), oc.dense(F64, oc.MIXED), oc.diagonal(F64, oc.MIXED))
    w = oc.normal(oc.MIXED.size, seed=2)
    solution, info = blocks.solve(w, damping, return_info=True)
    expected = torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=F64), w)
    oc.assert_close(solution, expected, F64, 1e3)
    assert info.converged


def test_convert__refuses_rows_that_lie_nowhere() -> None:
    torch.manual_seed(0)
    model, data = torch.nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,)))
    fisher = fk.EmpiricalFisher(model, data, structure="full", memory_budget=1)
    with pytest.raises(fk.NoClosedFormError, match=r"LowRankOperator in torch.float64.*streamed"):
        convert(fisher, F64, CPU)
