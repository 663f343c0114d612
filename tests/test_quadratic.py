"""Quadratic forms joined into one: the same values and gradients as their sum, also where a naive form would cancel."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fisherkit.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError
from fisherkit.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    FisherOperator,
    KroneckerOperator,
    LowRankOperator,
    Quadratic,
    SumOperator,
    normalize,
    state_of,
)
from fisherkit.operators.quadratic import atoms, join
from fisherkit.rows.base import StoredRows
from fisherkit.rows.collection import Rows, UnitSlot
from tests.operator_cases import CASES, DTYPES, LAYER, TOLERANCE, Pair, dense, diagonal, kronecker, normal

F64 = torch.float64
D = LAYER.size


def low_rank(dtype: torch.dtype, seed: int = 0, rows: int = 4) -> Pair:
    values = normal(rows, D, seed=seed, dtype=dtype)
    slot = UnitSlot(LAYER.names, StoredRows(values))
    operator = LowRankOperator(Rows(LAYER, [slot]), 0.5, dtype=dtype, device=torch.device("cpu"))
    return operator, 0.5 * values.double().mT @ values.double()


def value_and_gradient(parts: list[tuple[Tensor, Tensor]], theta: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (θ − c)ᵀF(θ − c) and half its gradient, term by term in float64."""
    differences = [(matrix, theta.double() - centre.double()) for matrix, centre in parts]
    value = torch.stack([d @ matrix @ d for matrix, d in differences]).sum()
    return value, torch.stack([matrix @ d for matrix, d in differences]).sum(0)


def chain(
    pairs: list[Pair], centres: list[Tensor], weight: float = 1.0
) -> tuple[Quadratic, list[tuple[Tensor, Tensor]]]:
    """All joined one by one, older ones times the weight at each step; and the same as matrices and centres."""
    joined: Quadratic | None = None
    parts: list[tuple[Tensor, Tensor]] = []
    for (operator, matrix), centre in zip(pairs, centres, strict=True):
        new = Quadratic.of(operator, centre)
        joined = new if joined is None else join(joined.scaled(weight), new)
        assert joined is not None
        parts = [(weight * old, c) for old, c in parts] + [(matrix, centre)]
    assert joined is not None
    return joined, parts


FOLDING = {"diagonal": diagonal, "dense": dense, "low_rank": low_rank}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FOLDING)
def test_join__has_the_values_and_gradients_of_the_sum(name: str, dtype: torch.dtype) -> None:
    pairs = [FOLDING[name](dtype, seed=seed) for seed in range(5)]
    centres = [normal(D, seed=50 + seed, dtype=dtype) for seed in range(5)]
    joined, parts = chain(pairs, centres, weight=0.7)
    for theta in [*centres, normal(D, seed=99, dtype=dtype), 100 * normal(D, seed=98, dtype=dtype)]:
        value, half = joined.evaluate(theta)
        expected, gradient = value_and_gradient(parts, theta)
        assert value.dtype == F64
        assert float(abs(value - expected) / expected) < TOLERANCE[dtype]
        assert float((half.double() - gradient).norm() / gradient.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", FOLDING)
def test_join__does_not_cancel_in_float32(name: str) -> None:
    """Back at an old task's θ* under a new Fisher a million times smaller, the value is a millionth of the constant."""
    dtype = torch.float32
    pairs = [FOLDING[name](dtype, seed=seed) for seed in range(2)]
    small, matrix = pairs[1]
    pairs[1] = (1e-6 * small, 1e-6 * matrix)
    centres = [normal(D, seed=50 + seed, dtype=dtype) for seed in range(2)]
    joined, parts = chain(pairs, centres)
    value, _ = joined.evaluate(centres[0])
    expected, _ = value_and_gradient(parts, centres[0])
    largest, _ = value_and_gradient(parts, centres[1])
    assert float(expected / largest) < 1e-4
    assert float(abs(value - expected) / expected) < 1e-4


def test_join__without_any_curvature_keeps_the_newer_centre() -> None:
    nothing = DiagonalOperator(LAYER, torch.zeros(D, dtype=F64))
    a, b = (Quadratic.of(nothing, normal(D, seed=seed)) for seed in range(2))
    joined = join(a, b)
    assert joined is not None
    assert torch.equal(joined.centre, b.centre)
    assert float(joined.evaluate(a.centre)[0]) == 0.0
    flat = DenseOperator(LAYER, torch.zeros(D, D, dtype=F64))
    assert join(Quadratic.of(flat, a.centre), Quadratic.of(flat, b.centre)) is not None


def test_join__rows_become_a_matrix_once_that_is_smaller_and_then_take_rows() -> None:
    pairs = [low_rank(F64, seed, rows=6) for seed in range(5)]
    centres = [normal(D, seed=50 + seed) for seed in range(5)]
    kinds = [type(chain(pairs[:n], centres[:n])[0].operator) for n in range(1, 6)]
    assert kinds == [LowRankOperator, LowRankOperator, DenseOperator, DenseOperator, DenseOperator]
    joined, parts = chain(pairs, centres)
    theta = normal(D, seed=99)
    (value, half), (expected, gradient) = joined.evaluate(theta), value_and_gradient(parts, theta)
    assert float(abs(value - expected) / expected) < 1e-10
    assert float((half - gradient).norm() / gradient.norm()) < 1e-10


@pytest.mark.parametrize(("a", "b"), [("kronecker", "kronecker"), ("kronecker", "diagonal"), ("low_rank", "diagonal")])
def test_join__leaves_apart_what_does_not_fold(a: str, b: str) -> None:
    makers = CASES | {"low_rank": low_rank}
    parts = [Quadratic.of(makers[name](F64, seed=9 * n)[0], normal(D, seed=1)) for n, name in enumerate((a, b))]
    assert join(*parts) is None


def test_join__kronecker_products_that_share_a_factor() -> None:
    first, second = kronecker(F64)[0], kronecker(F64, seed=9)[0]
    assert isinstance(first, KroneckerOperator)
    assert isinstance(second, KroneckerOperator)
    shared = KroneckerOperator(first.space, second.activation, 2 * first.gradient, first.layout.transposed)
    centres = [normal(D, seed=seed) for seed in (1, 2)]
    joined = join(Quadratic.of(first, centres[0]), Quadratic.of(shared, centres[1]))
    assert joined is not None
    theta = normal(D, seed=3)
    value, half = joined.evaluate(theta)
    parts = [(operator.to_dense(), c) for operator, c in zip((first, shared), centres, strict=True)]
    expected, gradient = value_and_gradient(parts, theta)
    assert float(abs(value - expected)) < 1e-10 * float(expected)
    assert float((half - gradient).norm()) < 1e-10 * float(gradient.norm())


def test_join__leaves_apart_other_parameters() -> None:
    part = LAYER.restrict(["l.bias"])
    a = Quadratic.of(diagonal(F64)[0], normal(D, seed=1))
    assert join(a, Quadratic.of(diagonal(F64, part)[0], normal(3, seed=1))) is None


@pytest.mark.parametrize("name", CASES)
def test_atoms__add_up_to_the_operator(name: str) -> None:
    operator, matrix = CASES[name](F64)
    theta = normal(operator.size, seed=1)
    total = torch.zeros(operator.size, dtype=F64)
    for atom in atoms(operator):
        assert not isinstance(atom, (SumOperator, BlockDiagonalOperator))
        part = torch.cat([theta[operator.space.slices[name]] for name in atom.space.names])
        for name, product in atom.space.unflatten(atom @ part).items():
            total[operator.space.slices[name]] += product.reshape(-1)
    torch.testing.assert_close(total, matrix @ theta, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["trace", "norm"])
@pytest.mark.parametrize("name", [*CASES, "low_rank"])
def test_normalize__gives_a_standard_size(name: str, how: str) -> None:
    operator, matrix = (CASES | {"low_rank": low_rank})[name](F64)
    values = torch.linalg.eigvalsh(matrix)
    size = values.mean() if how == "trace" else values.square().mean().sqrt()
    torch.testing.assert_close(normalize(operator, how).to_dense(), matrix / size, rtol=1e-9, atol=1e-12)


def test_normalize__none_is_the_operator_itself() -> None:
    operator, _ = diagonal(F64)
    assert normalize(operator, None) is operator


def test_normalize__refuses_what_has_no_size() -> None:
    zero = DiagonalOperator(LAYER, torch.zeros(D))
    huge = DiagonalOperator(LAYER, torch.full((D,), 1e308, dtype=F64))
    for operator, how, error, says in [
        (zero, "trace", InvalidArgumentError, "normalize\\('trace'\\): got a Fisher that is 0.*normalize=None"),
        (zero, "norm", InvalidArgumentError, "a Fisher that is 0"),
        (huge, "trace", NonFiniteError, "inf"),
        (zero, "frobenius", InvalidArgumentError, "'trace', 'norm'"),
        ("F", "trace", InvalidTypeError, "a str"),
    ]:
        with pytest.raises(error, match=says):
            normalize(operator, how)  # type: ignore[arg-type]


def test_map__replaces_every_tensor() -> None:
    """Copies share no memory with the original and say the same."""
    for name, maker in itertools.chain(FOLDING.items(), [("kronecker", CASES["kronecker"])]):
        operator: FisherOperator = maker(F64)[0]
        q = Quadratic.of(operator, normal(D, seed=1))
        if name != "kronecker":
            q = join(q, Quadratic.of(maker(F64, seed=3)[0], normal(D, seed=2)))  # type: ignore[assignment, call-arg]
        seen: list[int] = []
        copy = q.map(lambda tensor, seen=seen: seen.append(tensor.data_ptr()) or tensor.clone())  # type: ignore[misc]
        assert len(seen) == len(state_of(q.operator).all_tensors()) + len(q.tensors())
        theta = normal(D, seed=9)
        assert torch.equal(copy.evaluate(theta)[1], q.evaluate(theta)[1])
