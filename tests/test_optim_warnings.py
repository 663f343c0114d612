"""What a step would lose without a word is said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from tests.bad_input import X, Y, mlp
from tests.optim_loops import natural

Loss = Callable[[nn.Module], Tensor]
GRAM: dict[str, Any] = {"gram_damping": 0.1}
DAMPED: dict[str, Any] = {"damping": 0.1, "gram_damping": None}
WEIGHT = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


def penalized(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y) + sum((p.square().sum() for p in model.parameters()), torch.zeros(()))


CASES: dict[str, tuple[dict[str, Any], Loss, str]] = {
    "penalty": (GRAM, penalized, "no effect on the update of gram_damping=. Try: damping="),
    "weights": (
        GRAM,
        lambda m: F.cross_entropy(m(X), Y, weight=WEIGHT),
        "weights of examples in the loss have no effect",
    ),
    "a sum": (DAMPED, lambda m: F.cross_entropy(m(X), Y, reduction="sum"), 'the loss is a sum: reduction="sum"'),
    "a mean": ({**DAMPED, "reduction": "sum"}, lambda m: F.cross_entropy(m(X), Y), 'a mean: reduction="mean"'),
}
FINE: dict[str, tuple[dict[str, Any], Loss]] = {
    "gram, sum": (GRAM, lambda m: F.cross_entropy(m(X), Y, reduction="sum")),
    "gram, scaled": (GRAM, lambda m: 1024 * F.cross_entropy(m(X), Y)),
    "damped, mean": (DAMPED, lambda m: F.cross_entropy(m(X), Y)),
    "damped, sum": ({**DAMPED, "reduction": "sum"}, lambda m: F.cross_entropy(m(X), Y, reduction="sum")),
    "damped, scaled": (DAMPED, lambda m: 1024 * F.cross_entropy(m(X), Y)),
    "damped, penalty": (DAMPED, penalized),
}


def steps(options: dict[str, Any], loss: Loss, number: int = 3) -> list[str]:
    model = mlp()
    optimizer = natural(model, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(number):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    return [str(one.message) for one in said if "NaturalGradient" in str(one.message)]


@pytest.mark.parametrize("case", CASES)
def test_surprise__is_said_once(case: str) -> None:
    options, loss, message = CASES[case]
    said = steps(options, loss)
    assert len(said) == 1
    assert message in said[0]


@pytest.mark.parametrize("case", FINE)
def test_surprise__nothing_is_said_of_what_is_as_expected(case: str) -> None:
    assert steps(*FINE[case]) == []


def test_surprise__undivided_accumulation() -> None:
    def loss(model: nn.Module) -> Tensor:
        F.cross_entropy(model(X[:3]), Y[:3]).backward()
        return F.cross_entropy(model(X[3:]), Y[3:])

    (said,) = steps(DAMPED, loss)
    assert "divide the loss of each of the 2 passes by 2" in said


def test_surprise__a_step_without_a_label_that_counts_moves_nothing() -> None:
    model = mlp()
    optimizer = natural(model, **GRAM)
    before = [p.clone() for p in model.parameters()]
    F.cross_entropy(model(X), torch.full_like(Y, -100), reduction="sum").backward()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("options", [{"kind": kind, **DAMPED} for kind in ("ef", "ief", "exact", "truncated")] + [GRAM])
@pytest.mark.parametrize("label", [0, 1])
def test_step__of_an_example_that_is_certain_right_or_wrong_is_finite(options: dict[str, Any], label: int) -> None:
    model = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        model.weight.zero_()[0, 0] = 4000.0
    optimizer = natural(model, **options)
    F.cross_entropy(model(torch.tensor([[1.0, 0.0]])), torch.tensor([label])).backward()
    optimizer.step()
    assert bool(model.weight.isfinite().all())


def test_step__of_an_example_whose_gradient_is_lost_to_rounding_has_the_others_rows() -> None:
    """A logit that is 95 ahead leaves a gradient of 5e-42, whose unit vector cannot be made of it in float32."""
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[95.0, 0.5, 0.2], [0.0, 0.1, 0.3]]))
    before = model.weight.detach().double()
    optimizer = natural(model, 1.0, kind="ief", gram_damping=None, damping=0.1)
    y = torch.tensor([0, 1, 0])
    F.cross_entropy(model(torch.eye(3)), y).backward()
    optimizer.step()
    # The inputs are unit vectors, so that of each example (ûûᵀ / 3 + λI)⁻¹ u / 3 is left, û = u / ‖u‖.
    u = torch.softmax(before.mT, 1) - F.one_hot(y, 2)
    torch.testing.assert_close(before - model.weight.detach(), (u / (1 + 0.3)).mT, atol=1e-6, rtol=1e-6)


def no_ops(act: Callable[[nn.Module, Any], None], kind: str) -> list[str]:
    """What three steps without gradients say."""
    model = mlp()
    optimizer = natural(model) if kind == "natural" else fk.optim.Preconditioner(model, damping=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            act(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    return [str(one.message) for one in said]


@pytest.mark.parametrize("kind", ["natural", "preconditioner"])
def test_backward__that_was_forgotten_is_said_once(kind: str) -> None:
    def forgotten(model: nn.Module, optimizer: Any) -> None:
        F.cross_entropy(model(X), Y)
        optimizer.step()

    said = no_ops(forgotten, kind)
    assert len(said) == 1
    assert "without a gradient" in said[0]
    assert "loss.backward() before step()" in said[0]


@pytest.mark.parametrize("kind", ["natural", "preconditioner"])
def test_backward__that_nobody_forgot_is_not_missed(kind: str) -> None:
    def frozen(model: nn.Module, optimizer: Any) -> None:
        model.requires_grad_(requires_grad=False)
        model(X)
        optimizer.step()

    def evaluated(model: nn.Module, optimizer: Any) -> None:
        with torch.no_grad():
            model(X)
        optimizer.step()

    for act in (frozen, evaluated, lambda _, optimizer: optimizer.step()):
        assert no_ops(act, kind) == []
