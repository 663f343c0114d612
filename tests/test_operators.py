"""Every structure × operation against the matrix written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import fisherkit as fk
from fisherkit.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    NoClosedFormError,
    NotConvergedWarning,
    SingularMatrixError,
)
from fisherkit.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    FisherOperator,
    KroneckerOperator,
    LowRankOperator,
    SumOperator,
    state_of,
)
from fisherkit.rows.base import StoredRows
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.space import ParameterSpace
from tests.operator_cases import (
    CASES,
    DTYPES,
    LAYER,
    MIXED,
    TOLERANCE,
    Pair,
    assert_close,
    diagonal,
    kronecker,
    normal,
    positive,
    total,
)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, dtype: torch.dtype) -> Pair:
    return CASES[request.param](dtype)


def has_eigenvalues(operator: FisherOperator) -> bool:
    return not isinstance(operator, SumOperator)


def shifted(matrix: Tensor, damping: float) -> Tensor:
    return matrix + damping * torch.eye(len(matrix), dtype=torch.float64)


# -- inverses ----------------------------------------------------------------------------------------------------------


def test_undamped__inverse_and_what_a_sum_has_no_closed_form_for(pair: Pair, dtype: torch.dtype) -> None:
    """All else of these operators is checked in `test_testing`, by `check_fisher`."""
    operator, matrix = pair
    columns = normal(operator.size, 3, seed=23, dtype=dtype)
    expected = torch.linalg.inv(matrix) @ columns.double()
    solution, info = operator.solve(columns, 0.0, return_info=True, tolerance=1e-12 if dtype == torch.float64 else 1e-5)
    assert_close(solution, expected, dtype, factor=10)
    assert (info.converged, info.damping, info.residual.shape) == (True, 0.0, (3,))
    assert float(info.residual.max()) < TOLERANCE[dtype]
    assert (info.steps == 0) == has_eigenvalues(operator)
    if has_eigenvalues(operator):
        assert_close(operator.logdet(0.0), torch.linalg.slogdet(matrix).logabsdet, dtype)
        assert float(operator.effective_dimension(0.0)) == operator.size
        return
    for ask, advice in (
        (lambda: operator.logdet(0.3), r"fk\.estimators\.lanczos_logdet"),
        (lambda: operator.eigenvalues(2), r"fk\.estimators\.lanczos_eigenvalues"),
        (lambda: operator.eigenvectors(2), r"scipy\.sparse\.linalg\.eigsh\(fisher\.to_scipy\(\), k\)"),
        (lambda: operator.effective_dimension(0.3), r"fk\.estimators\.lanczos_effective_dimension"),
    ):
        with pytest.raises(NoClosedFormError, match=advice):
            ask()


class Numbers:
    """Stands in for ``torch.randn``: zeros, with a 1 at one place of the whole sequence of numbers asked for."""

    def __init__(self) -> None:
        self.start(-1)

    def start(self, place: int) -> None:
        self.place, self.used = place, 0

    def __call__(self, *shape: int, dtype: torch.dtype, device: torch.device, generator: object = None) -> Tensor:
        count = math.prod(shape)
        unit = (torch.arange(self.used, self.used + count) == self.place).to(dtype).reshape(shape)
        self.used += count
        return unit


@pytest.mark.parametrize("n", [None, 2])
@pytest.mark.parametrize("name", [*CASES, "rows"])
def test_sample__has_exactly_the_inverse_as_covariance_and_several_are_independent(
    name: str, n: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Samples are linear in the normal numbers behind them: sample = S ε, and its covariance is S Sᵀ. S is read off by
    # feeding one unit vector ε after the other.
    operator, matrix = CASES[name](torch.float64) if name in CASES else rows_that_do_not_fit()
    inverse = operator.factorize(0.3, tolerance=1e-12)
    numbers = Numbers()
    monkeypatch.setattr(torch, "randn", numbers)
    assert inverse.sample(n=n).shape == ((operator.size,) if n is None else (operator.size, n))
    count, parts = numbers.used, []
    for place in range(count):
        numbers.start(place)
        parts.append(inverse.sample(torch.Generator(), n).reshape(operator.size, -1).mT.flatten())
        assert numbers.used == count
    root = torch.stack(parts, dim=1)
    covariance = torch.linalg.inv(shifted(matrix, 0.3))
    assert_close(root @ root.T, torch.block_diag(*[covariance] * (n or 1)), torch.float64, factor=10)


@pytest.mark.parametrize("structure", ["dense", "kronecker"])
def test_sample__is_the_same_for_any_choice_of_eigenvectors(structure: str) -> None:
    """Rounding chooses them where eigenvalues are equal, and their signs everywhere: otherwise in other processes."""

    def draws(rounding: float) -> Tensor:
        a, g = (torch.eye(n, dtype=torch.float64) + rounding * positive(n, n, torch.float64) for n in (5, 3))
        operator = KroneckerOperator(LAYER, a, g)
        dense = DenseOperator(LAYER, operator.to_dense())
        return (dense if structure == "dense" else operator).factorize(0.1).sample(torch.Generator().manual_seed(0), 2)

    torch.testing.assert_close(draws(1e-12), draws(0.0), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("n", "error"),
    [(0, InvalidArgumentError), (-1, InvalidArgumentError), *((n, InvalidTypeError) for n in (1.5, True, "3"))],
)
def test_sample__refuses_what_is_no_number_of_draws(n: object, error: type[Exception]) -> None:
    inverse = diagonal(torch.float64)[0].factorize(0.1)
    with pytest.raises(error, match=r"factorize\(\)\.sample: got n.*expected an integer"):
        inverse.sample(n=n)  # type: ignore[arg-type]


def test_solve__tiny_damping_leaves_the_null_space_divided_by_it(dtype: torch.dtype) -> None:
    # Cholesky of this matrix in float64 sees only rounding in the null space.
    rows = normal(2, LAYER.size, seed=3).to(dtype)
    operator = DenseOperator(LAYER, rows.T @ rows)
    v = normal(LAYER.size, seed=4)
    outside = v - rows.double().T @ torch.linalg.lstsq(rows.double().T, v.unsqueeze(1)).solution.squeeze(1)
    if dtype == torch.float64:
        got = operator.solve(outside, 1e-15)
        assert float((got * 1e-15 - outside).norm() / outside.norm()) < 1e-5
    assert bool(torch.isfinite(operator.solve(v.to(dtype), 1e-15)).all())


# -- spectra -----------------------------------------------------------------------------------------------------------


def singular_operators() -> dict[str, FisherOperator]:
    entries = torch.ones(LAYER.size, dtype=torch.float64)
    entries[3] = 0
    thin = positive(5, 1, torch.float64, rank=2)
    rows = normal(4, MIXED.size, seed=2)
    names = MIXED.restrict(["x.weight", "x.bias"])
    basis = torch.linalg.qr(normal(5, 5, seed=3)).Q[:, :2]
    return {
        "diagonal": DiagonalOperator(LAYER, entries),
        "dense": DenseOperator(LAYER, positive(LAYER.size, 1, torch.float64, rank=3)),
        "kronecker": KroneckerOperator(LAYER, thin, positive(3, 2, torch.float64)),
        "eigen_kronecker": EigenKroneckerOperator(
            LAYER, basis, torch.eye(3, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
        ),
        "block_diagonal": BlockDiagonalOperator(
            MIXED,
            [
                DiagonalOperator(names, torch.zeros(names.size, dtype=torch.float64)),
                DenseOperator(MIXED.restrict(["y.weight", "z", "w.weight", "w.bias"]), positive(14, 1, torch.float64)),
            ],
        ),
        "low_rank": low_rank(rows),
    }


def low_rank(rows: Tensor, **options: int) -> FisherOperator:
    parts = [UnitSlot(("rows",), StoredRows(rows))]
    space = ParameterSpace(("rows",), ((rows.shape[1],),))
    return LowRankOperator(Rows(space, parts), 0.5, dtype=rows.dtype, device=rows.device, **options)


def rows_that_do_not_fit() -> Pair:
    rows = normal(4, 9, seed=5)
    return low_rank(rows, memory_budget=1), 0.5 * rows.T @ rows


@pytest.mark.parametrize("name", singular_operators())
def test_singular__is_an_error_without_damping_and_has_its_dimension_with_it(name: str) -> None:
    operator = singular_operators()[name]
    dense = operator.to_dense().numpy()
    for refused in (operator.logdet, operator.effective_dimension, operator.factorize):
        with pytest.raises(SingularMatrixError, match=r"\(damping=0\)"):
            refused(0.0)
    values = np.linalg.eigvalsh(dense).clip(0)[::-1]
    assert float(operator.effective_dimension(0.2)) == pytest.approx(float((values / (values + 0.2)).sum()), rel=1e-10)
    assert float(operator.logdet(0.2)) == pytest.approx(float(np.log(values + 0.2).sum()), rel=1e-10)
    # The null space has eigenvectors too.
    for k in (1, 4, operator.size):
        vectors = operator.eigenvectors(k).numpy()
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-12)
        np.testing.assert_allclose(dense @ vectors, vectors * values[:k], atol=1e-12 * values[0])


@pytest.mark.parametrize("shape", [(4, 9), (30, 9)], ids=["rows-fewer", "rows-more"])
@pytest.mark.parametrize("spread", [1.0, 1e-3], ids=["alike", "spread"])
def test_eigenvectors__of_rows_are_those_of_the_dense_matrix(shape: tuple[int, int], spread: float) -> None:
    rows = normal(*shape, seed=1) * spread ** torch.linspace(0, 1, shape[1], dtype=torch.float64)
    operator = low_rank(rows)
    values, vectors = np.linalg.eigh(0.5 * (rows.T @ rows).numpy())
    found = operator.eigenvectors(4).numpy()
    overlaps = np.abs((found * vectors[:, ::-1][:, :4]).sum(0))
    np.testing.assert_allclose(overlaps, 1, rtol=1e-9)
    np.testing.assert_allclose(operator.eigenvalues(4).numpy(), values[::-1][:4], rtol=1e-9)


def test_eigenvectors__of_no_rows_at_all() -> None:
    vectors = low_rank(torch.zeros(3, 5, dtype=torch.float64)).eigenvectors(2)
    assert torch.equal(vectors.mT @ vectors, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("operation", ["factorize", "logdet", "solve", "effective_dimension"])
def test_damping__is_asked_for_where_it_is_missing(structure: str, operation: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    fisher = fk.EmpiricalFisher(torch.nn.Linear(4, 3), (x, y), structure=structure)
    arguments = (torch.ones(fisher.size),) if operation == "solve" else ()
    with pytest.raises(fk.InvalidTypeError) as caught:
        getattr(fisher, operation)(*arguments)
    assert isinstance(caught.value, TypeError)
    assert caught.value.call == f"EmpiricalFisher.{operation}"
    assert "got no damping" in str(caught.value)
    assert "fk.RelativeDamping(1e-3)" in caught.value.try_
    getattr(fisher, operation)(*arguments, damping=fk.RelativeDamping(1e-3))


def test_gram__needs_rows(pair: Pair) -> None:
    with pytest.raises(NoClosedFormError, match='structure="full"'):
        pair[0].gram()


def test_eigen__is_the_same_matrix(dtype: torch.dtype) -> None:
    operator, matrix = kronecker(dtype)
    assert isinstance(operator, KroneckerOperator)
    assert operator.eigen() is operator.eigen()
    assert_close(operator.eigen().to_dense(), matrix, dtype)
    assert float(operator.eigen().eigenvalues().min()) >= 0


def test_eigen__rounding_below_zero_counts_as_zero() -> None:
    activation, gradient = positive(5, 1, torch.float32, rank=2), positive(3, 2, torch.float32)
    operator = KroneckerOperator(LAYER, activation, gradient)
    assert float(operator.eigenvalues().min()) >= 0
    assert bool(torch.isfinite(operator.factorize(1e-6).sample(torch.Generator().manual_seed(0))).all())


def test_multiples__of_multiples_decompose_each_factor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, factors = [0, 0], [positive(5, 1, torch.float64), positive(3, 2, torch.float64)]

    def known(i: int) -> tuple[Tensor, Tensor]:
        calls[i] += 1
        values, vectors = torch.linalg.eigh(factors[i])
        return values, vectors

    operator: FisherOperator = KroneckerOperator(
        LAYER, *factors, activation_spectrum=lambda: known(0), gradient_spectrum=lambda: known(1)
    )

    def checked(*_: object) -> None:
        raise AssertionError("the factors were checked when the first operator was made")

    monkeypatch.setattr("fisherkit.operators.kronecker.check_symmetric", checked)
    for _ in range(6):
        operator = 0.5 * operator
    expected = torch.linalg.eigvalsh(0.5**6 * torch.kron(factors[1], factors[0]))
    torch.testing.assert_close(operator.eigenvalues().sort().values, expected)
    assert calls == [1, 1]


def test_solve__blocks_that_iterate_report_themselves() -> None:
    spaces = [MIXED.restrict(["x.weight", "x.bias"]), MIXED.restrict(["y.weight", "z", "w.weight", "w.bias"])]
    pairs = [kronecker(torch.float64, spaces[0], seed, inputs=2) for seed in (0, 4)]
    operator = BlockDiagonalOperator(MIXED, [total(*pairs)[0], diagonal(torch.float64, spaces[1])[0]])
    columns = torch.cat([normal(MIXED.size, 2, seed=1), torch.zeros(MIXED.size, 1, dtype=torch.float64)], dim=1)
    with pytest.warns(NotConvergedWarning):
        solution, info = operator.solve(columns, 0.1, return_info=True, max_steps=2)
    left = (shifted(operator.to_dense(), 0.1) @ solution - columns).norm(dim=0)
    assert torch.allclose(info.residual, left / columns.norm(dim=0).clamp_min(1), rtol=1e-6, atol=1e-14)
    assert float(left[0]) > 1e-6
    assert not info.converged
    assert info.steps == 2
    assert "conjugate_gradient" in info.method
    assert "direct" in info.method


def test_operators__never_change_their_tensors(pair: Pair) -> None:
    operator, _ = pair
    before, v = state_of(operator), normal(operator.size, seed=1, dtype=operator.dtype)
    copies = [tensor.clone() for tensor in tensors_of(before)]
    operator.solve(v, 0.1)
    operator.factorize(0.1).sample()
    operator.diagonal().zero_()  # what an operation returns is the caller's to change
    operator.to_dense().zero_()
    (operator + 2.0 * operator).matvec(v)
    after = tensors_of(state_of(operator))
    assert all(torch.equal(a, b) for a, b in zip(after, copies, strict=True))


def tensors_of(state: object) -> list[Tensor]:
    own = list(state.tensors.values())  # type: ignore[attr-defined]
    return own + [tensor for child in state.children for tensor in tensors_of(child)]  # type: ignore[attr-defined]
