"""γ against its formula and the paper's toy example; ∇L against autograd of the loss that everyone knows."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.evaluation import approximation_quality, loss_gradient, quality_floor
from fisherkit.operators import DenseOperator, DiagonalOperator, FisherOperator
from fisherkit.space import ParameterSpace
from tests.operator_cases import unchecked_annotations  # noqa: F401  a fixture
from tests.reference import fisher as reference
from tests.reference.models import FAMILIES
from tests.reference.outputs import EF
from tests.snapshot import untouched
from tests.tolerances import SAME

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


def test_approximation_quality__takes_any_operator() -> None:
    diagonal, update, gradient = random(8).square(), random(8, seed=1), random(8, seed=2)
    expected = (diagonal * update.square()).sum().sqrt() / abs(update @ gradient)
    for operator in (DiagonalOperator(SPACE, diagonal), DenseOperator(SPACE, diagonal.diag())):
        torch.testing.assert_close(approximation_quality(update, operator, gradient), expected)


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


@pytest.mark.parametrize(
    ("theta", "natural", "empirical"), [((1.0, -0.9), 0.746, 3.77), ((0.5, 1.0), 0.981, 1.63)], ids=str
)
def test_approximation_quality__is_the_papers_on_its_toy_example(
    theta: tuple[float, float], natural: float, empirical: float
) -> None:
    model, data = line(slope=theta[1], intercept=theta[0])
    exact = fk.ExactFisher(model, data, likelihood="gaussian")
    gradient = loss_gradient(model, data, likelihood="gaussian")
    at_gradient = approximation_quality(gradient, exact, gradient)

    def relative(kind: Callable[..., fk.FisherApproximation]) -> float:
        update = kind(model, data, likelihood="gaussian").solve(gradient, damping=1e-9)
        return float(approximation_quality(update, exact, gradient) / at_gradient)

    assert relative(fk.ExactFisher) == pytest.approx(natural, abs=5e-4)
    assert relative(fk.ImprovedEmpiricalFisher) == pytest.approx(natural, abs=5e-4)
    assert relative(fk.EmpiricalFisher) == pytest.approx(empirical, abs=5e-3)


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


def test_quality_floor__is_the_natural_gradients_quality_without_damping() -> None:
    operator, _ = dense()
    gradient = random(8, seed=2)
    natural = operator.solve(gradient, damping=0.0)
    torch.testing.assert_close(
        quality_floor(operator, gradient, 0.0), approximation_quality(natural, operator, gradient)
    )


def test_quality_floor__falls_with_the_damping() -> None:
    operator, _ = dense(rank=4)
    gradient = operator @ random(8, seed=2)
    floors = [quality_floor(operator, gradient, damping) for damping in (1.0, 1e-2, fk.RelativeDamping(1e-8))]
    assert floors == sorted(floors, reverse=True)


# -- ∇L ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_annotations")  # checking draws from Python's global generator
@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_loss_gradient__is_the_mean_of_the_references_rows(family: Any) -> None:
    problem = family.problem()
    rows = reference.rows(problem, EF)
    options = {"likelihood": problem.likelihood, "example": problem.example}
    data = (problem.inputs, problem.targets)
    if not isinstance(problem.inputs, Tensor):
        data = {**problem.inputs, "labels": problem.targets}  # type: ignore[assignment]
    with untouched(problem.model, data):
        mean = loss_gradient(problem.model, data, **options)
    torch.testing.assert_close(mean, rows.matrix.sum(0) / rows.count, rtol=1e-8, atol=1e-12)


class Tokens(nn.Module):
    """(B, T) token ids to (B, T, C) logits that depend on all earlier tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.embedding(ids).cumsum(1)))
        return logits


def tokens() -> tuple[nn.Module, Tensor, Tensor]:
    """Labels with ignored ones: some in the first example, all in the second."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, ids, labels = Tokens().to(F64), torch.randint(7, (4, 5)), torch.randint(7, (4, 5))
    labels[0, :2] = labels[1] = -100
    return model, ids, labels


def autograd(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize(("example", "count"), [("sequence", 3), ("token", 13)])
@pytest.mark.parametrize("normalization", ["mean", "sum"])
def test_loss_gradient__skips_ignored_labels_and_counts_as_the_fisher(
    example: str, count: int, normalization: str
) -> None:
    model, ids, labels = tokens()
    loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum")
    got = loss_gradient(model, (ids, labels), example=example, normalization=normalization)
    fisher = fk.ExactFisher(model, (ids, labels), example=example, normalization=normalization)
    assert fisher.examples == count
    torch.testing.assert_close(got, autograd(loss, model) / (count if normalization == "mean" else 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_loss_gradient__does_not_depend_on_batches(dtype: torch.dtype) -> None:
    model, ids, labels = tokens()
    model = model.to(dtype)
    whole = loss_gradient(model, (ids, labels))
    assert whole.dtype == dtype
    pieces = loss_gradient(model, [(ids[:3], labels[:3]), (ids[3:], labels[3:])])
    assert (whole - pieces).norm() <= SAME[dtype] * whole.norm()


def test_loss_gradient__is_over_the_chosen_parameters() -> None:
    model, ids, labels = tokens()
    whole = loss_gradient(model, (ids, labels))
    model.requires_grad_(False)
    torch.testing.assert_close(loss_gradient(model, (ids, labels), params=["head.weight", "head.bias"]), whole[28:])


def test_loss_gradient__shifts_labels_for_causal_models() -> None:
    model, ids, _ = tokens()
    causal = type("TinyForCausalLM", (Tokens,), {})()
    causal.load_state_dict(model.state_dict())
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / 4
    expected = autograd(loss, model)
    for found in (
        loss_gradient(causal.to(F64), {"ids": ids, "labels": ids}),
        loss_gradient(model, {"ids": ids, "labels": ids}, shift_labels=True),
    ):
        torch.testing.assert_close(found, expected)


def test_loss_gradient__is_that_of_bfloat16_models() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    data = torch.ones(4, 3, dtype=torch.bfloat16), torch.tensor([0, 1, 1, 1])
    got = loss_gradient(model, data)
    assert got.dtype == torch.bfloat16
    loss = F.cross_entropy(model(data[0]).float(), data[1])
    torch.testing.assert_close(got, autograd(loss, model), rtol=2e-2, atol=2e-2)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked_annotations")
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


@pytest.mark.usefixtures("unchecked_annotations")
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


class NoGraph(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


X, Y = torch.ones(2, 3), torch.tensor([0, 1])


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        (nn.Linear(3, 2), (X, Y), {"example": "word"}, fk.InvalidArgumentError, "example='word'"),
        (nn.Linear(3, 2), (X, Y), {"normalization": "max"}, fk.InvalidArgumentError, "normalization='max'"),
        (nn.Linear(3, 2), (X, Y), {"likelihood": "poisson"}, fk.InvalidArgumentError, "'poisson'"),
        (nn.Linear(3, 2), (X, Y), {"params": ["w"]}, fk.UnknownParameterError, "'w'"),
        (torch.relu, (X, Y), {}, fk.InvalidTypeError, "expected a torch.nn.Module"),
        (nn.Linear(3, 2), (X, None), {}, fk.DataError, "got no targets"),
        (nn.Linear(3, 2), [], {}, fk.DataError, "no example with a label that counts"),
        (nn.Linear(3, 2), (X, Y * 0 - 100), {}, fk.DataError, "no example with a label that counts"),
        (nn.Linear(3, 2), (X, Y + 5), {}, fk.DataError, "labels from 5 to 6"),
        (nn.Linear(3, 2), (X / 0, Y), {}, fk.NonFiniteError, "NaN or infinite"),
        (nn.Sequential(nn.Linear(3, 2), nn.Dropout()), (X, Y), {}, fk.ModelError, "Dropout '1' in train mode"),
        (NoGraph(3, 2), (X, Y), {}, fk.ModelError, "outputs that do not depend on the parameters"),
    ],
)
def test_loss_gradient__refuses(model: Any, data: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        loss_gradient(model, data, **options)
