"""γ and its floor against their formulas and the paper's toy example."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.evaluation import approximation_quality, loss_gradient, quality_floor
from fisherkit.operators import DenseOperator, FisherOperator
from fisherkit.space import ParameterSpace

F64 = torch.float64
SPACE = ParameterSpace(("a", "b"), ((2, 3), (2,)))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def dense(seed: int = 0, rank: int = 8) -> tuple[FisherOperator, Tensor]:
    rows = random(rank, 8, seed=seed)
    return DenseOperator(SPACE, rows.T @ rows), rows.T @ rows


# -- γ -------------------------------------------------------------------------------------------------------


def test_approximation_quality__is_equation_15() -> None:
    operator, matrix = dense()
    update, gradient = random(8, seed=1), random(8, seed=2)
    expected = (update @ matrix @ update).sqrt() / abs(update @ gradient)
    got = approximation_quality(update, operator, gradient)
    assert got.shape == ()
    assert got.dtype == F64
    torch.testing.assert_close(got, expected)


def test_approximation_quality__takes_dicts_and_columns() -> None:
    operator, _ = dense()
    updates, gradient = random(8, 3, seed=1), random(8, seed=2)
    singly = torch.stack([approximation_quality(update, operator, gradient) for update in updates.T])
    named = SPACE.unflatten(gradient)
    torch.testing.assert_close(approximation_quality(updates, operator, gradient), singly)
    torch.testing.assert_close(approximation_quality(SPACE.unflatten(updates), operator, named), singly)
    torch.testing.assert_close(approximation_quality(SPACE.unflatten(updates[:, 0]), operator, gradient), singly[0])


@given(scale=st.floats(1e-6, 1e6), sign=st.sampled_from([-1, 1]), seed=st.integers(0, 1000))
def test_approximation_quality__ignores_length_and_sign_of_the_update(scale: float, sign: int, seed: int) -> None:
    operator, _ = dense()
    update, gradient = random(8, seed=seed), random(8, seed=seed + 1)
    both = approximation_quality(torch.stack([update, sign * scale * update], 1), operator, gradient)
    torch.testing.assert_close(both[0], both[1])


@given(seed=st.integers(0, 1000))
def test_approximation_quality__is_least_for_the_natural_gradient(seed: int) -> None:
    operator, matrix = dense(seed)
    gradient = random(8, seed=seed + 1)
    natural = torch.linalg.solve(matrix, gradient)
    best = approximation_quality(natural, operator, gradient)
    others = approximation_quality(random(8, 20, seed=seed + 2), operator, gradient)
    assert bool((others >= best * (1 - 1e-9)).all())
    torch.testing.assert_close(best, (gradient @ natural).rsqrt())


def line(slope: float, intercept: float) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Figure 1 of the paper: f = θ₀ + θ₁x on (0, 0) and (1, 0)."""
    model = nn.Linear(1, 1).to(F64)
    with torch.no_grad():
        model.weight.fill_(slope)
        model.bias.fill_(intercept)
    return model, (torch.tensor([[0.0], [1.0]], dtype=F64), torch.zeros(2, 1, dtype=F64))


def test_approximation_quality__of_a_mean_is_root_n_times_that_of_a_sum() -> None:
    model, data = line(slope=-0.9, intercept=1.0)
    mean, total = (
        approximation_quality(
            torch.ones(2, dtype=F64),
            fk.ExactFisher(model, data, likelihood="gaussian", normalization=normalization),
            loss_gradient(model, data, likelihood="gaussian", normalization=normalization),
        )
        for normalization in ("mean", "sum")
    )
    torch.testing.assert_close(mean, 2**0.5 * total)


# -- its floor -----------------------------------------------------------------------------------------------


def test_quality_floor__is_its_formula() -> None:
    operator, matrix = dense()
    gradient = random(8, seed=2)
    expected = (gradient @ torch.linalg.solve(matrix + 0.3 * torch.eye(8, dtype=F64), gradient)).rsqrt()
    torch.testing.assert_close(quality_floor(operator, gradient, damping=0.3), expected)
    torch.testing.assert_close(quality_floor(operator, SPACE.unflatten(gradient), damping=0.3), expected)


def test_quality_floor__falls_with_the_damping() -> None:
    operator, _ = dense(rank=4)
    gradient = operator @ random(8, seed=2)
    floors = [quality_floor(operator, gradient, damping) for damping in (1.0, 1e-2, fk.RelativeDamping(1e-8))]
    assert floors == sorted(floors, reverse=True)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "gradient", "error", "message"),
    [
        (torch.zeros(8, dtype=F64), random(8), fk.InvalidArgumentError, "got a zero update"),
        (random(8, 2) * torch.tensor([1.0, 0.0]), random(8), fk.InvalidArgumentError, "got a zero update"),
        (random(8), torch.zeros(8, dtype=F64), fk.InvalidArgumentError, "got a zero gradient"),
        (torch.eye(8, dtype=F64)[0], torch.eye(8, dtype=F64)[1], fk.InvalidArgumentError, "orthogonal to the gradient"),
        (random(7), random(8), fk.InvalidArgumentError, "D = 8"),
        (random(8), random(8, 2), fk.InvalidArgumentError, "2 gradients; expected one"),
        (random(8).float(), random(8), fk.InvalidTypeError, "torch.float32"),
        (random(8), random(8).float(), fk.InvalidTypeError, "approximation_quality, gradient"),
        (random(8).numpy(), random(8), fk.InvalidTypeError, "ndarray"),
        (random(8) / 0, random(8), fk.NonFiniteError, "NaN or infinite"),
        ({"a": random(2, 3)}, random(8), fk.UnknownParameterError, "'b'"),
    ],
)
def test_approximation_quality__refuses(update: Any, gradient: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        approximation_quality(update, dense()[0], gradient)


def test_quality__refuses_what_is_no_operator() -> None:
    matrix: Any = torch.eye(8, dtype=F64)
    for call in (lambda: approximation_quality(random(8), matrix, random(8)), lambda: quality_floor(matrix, random(8))):
        with pytest.raises(fk.InvalidTypeError, match="a Tensor as exact_fisher; expected a FisherOperator"):
            call()


def test_quality_floor__refuses_a_zero_gradient_and_a_singular_matrix() -> None:
    operator, _ = dense(rank=4)
    with pytest.raises(fk.InvalidArgumentError, match="quality_floor: got a zero gradient"):
        quality_floor(operator, torch.zeros(8, dtype=F64))
    with pytest.raises(fk.SingularMatrixError):
        quality_floor(operator, random(8), damping=0.0)
