"""Optimizers on the losses that people train with: targets read off the user's gradient, or a refusal.

A step is compared with the damped matrix by brute force, and with the gradient of the user's own loss.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from tests.test_losses import (
    CASES,
    KINDS,
    Case,
    N,
    X,
    Y,
    by_example,
    cross_entropy,
    error,
    expected,
    labels,
    mlp,
    normal,
)

DAMPING = 0.3

READABLE = [
    "ce weighted", "ce smoothed", "ce weighted smoothed ignoring", "ce (B, C, L)", "ce (B, C, C)", "ce (B, C, H, W)",
    "nll", "nll (B, C, L)", "bce pos_weight", "bce one logit", "mse", "mse images", "mse (B,)", "poisson",
]  # fmt: skip


def step(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The parameters' change, negated, in one step at rate 1, and the gradient of the loss."""
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    optimizer = fk.optim.NaturalGradient(model, lr=1.0, damping=DAMPING, **{"likelihood": loss, **options})
    loss(model(x), y).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    optimizer.step()
    return before - torch.cat([p.detach().flatten() for p in model.parameters()]), gradient


@pytest.mark.parametrize(
    ("kind", "reduction"), [("ef", "mean"), ("ief", "mean"), ("truncated:2", "sum"), ("exact", "mean")]
)
@pytest.mark.parametrize("name", READABLE)
def test_step__is_the_gradient_through_the_damped_matrix_of_the_loss(name: str, kind: str, reduction: str) -> None:
    case: Case = CASES[name]
    f, used = expected(name, KINDS[kind][2]), len(by_example(name))
    change, gradient = step(case.model(), case.loss(reduction), case.x, case.y, kind=kind, reduction=reduction)
    gradient = gradient / used if reduction == "sum" else gradient
    right = torch.linalg.solve(f + DAMPING * torch.eye(len(f), dtype=f.dtype), gradient)
    assert error(change, right) < 1e-8


def test_step__by_kronecker_factors_agrees_with_the_fisher_of_the_same_loss() -> None:
    case = CASES["ce weighted smoothed ignoring"]
    fisher = fk.ImprovedEmpiricalFisher(case.model(), (case.x, case.y), likelihood=case.loss("mean"), structure="kfac")
    change, gradient = step(case.model(), case.loss("mean"), case.x, case.y, kind="ief", structure="kfac")
    assert error(change, fisher.solve(gradient, damping=DAMPING)) < 1e-8


@pytest.mark.parametrize("e", [0.05, 0.3])
def test_smoothing__finds_every_label_at_every_stage_of_a_fit(e: float) -> None:
    """Also where the smoothed gradient at the label's own output is positive, beyond the optimum."""
    likelihood = fk.likelihoods.Categorical(label_smoothing=e, weight=[1.0, 2.0, 0.5, 1.0, 3.0])
    y = labels(400, classes=5)
    for scale in (0.1, 1.0, 5.0, 20.0):
        z = scale * normal(400, 5)
        for factor in (1e-6, 1.0, 1e3):
            found = likelihood.target_from_gradient(z, factor * likelihood.gradient(z, y))
            assert found is not None
            assert torch.equal(found, y)


def refused(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, **options: Any) -> str:
    with pytest.raises(fk.FisherkitError) as caught:
        step(model, loss, x, y, **options)
    return str(caught.value)


def test_step__whose_targets_do_not_show_in_the_gradient_is_refused_with_advice() -> None:
    probabilities = CASES["ce probabilities"]
    text = refused(probabilities.model(), probabilities.loss("mean"), X, probabilities.y)
    assert "no positive multiple" in text
    weights = cross_entropy(weight=torch.tensor([0.0, 1, 1, 1]).double())("mean")
    assert "weights above 0" in refused(mlp()().double(), weights, X, Y)
    two = cross_entropy(label_smoothing=0.1)("mean")
    assert "no smoothing" in refused(mlp(2)().double(), two, X, Y % 2)
    text = refused(mlp()().double(), nn.CrossEntropyLoss(), X, Y, likelihood=nn.GaussianNLLLoss())
    assert "a variance that is the same for all" in text


def test_step__of_a_loss_with_other_weights_than_the_likelihoods_is_refused() -> None:
    case = CASES["ce (B, C, L) weighted"]
    text = refused(case.model(), case.loss("mean"), case.x, case.y, likelihood=nn.CrossEntropyLoss())
    assert "no positive multiple" in text
    smoothed = CASES["ce smoothed"]
    text = refused(smoothed.model(), smoothed.loss("mean"), X, Y, likelihood=cross_entropy(label_smoothing=0.2)("mean"))
    assert "no positive multiple" in text


def test_step__with_classes_on_the_last_axis_and_torchs_loss_says_so() -> None:
    model = nn.Sequential(nn.Linear(3, 4)).double()
    x, y = normal(N, 5, 3), labels(N, 5)
    optimizer = fk.optim.NaturalGradient(model, lr=1.0, damping=1.0, likelihood=nn.CrossEntropyLoss())
    with pytest.raises(fk.ModelError, match="class_axis"):
        nn.CrossEntropyLoss()(model(x).mT, y).backward()
    optimizer.close()


def test_reduction__of_a_module_must_be_the_optimizers_where_it_tells_targets() -> None:
    with pytest.raises(fk.InvalidArgumentError, match="reduction='sum'"):
        fk.optim.NaturalGradient(mlp()(), lr=1.0, damping=1.0, likelihood=nn.MSELoss(reduction="sum"))
    fk.optim.NaturalGradient(mlp()(), lr=1.0, damping=1.0, likelihood=nn.CrossEntropyLoss(reduction="sum")).close()
