"""Leave-one-out by retraining, on a convex model whose optimum is known by other means."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import fisherkit as fk
from examples.influence.evaluation import (
    TrainingRecipe,
    leave_one_out,
    linear_datamodeling_score,
    random_subsets,
    retrain,
)

F64 = torch.float64
N, Q, D, C = 120, 5, 4, 3
DECAY = 0.1
RECIPE = TrainingRecipe(epochs=400, learning_rate=0.5, momentum=0.9, weight_decay=DECAY)
"""Whole-batch training of a strongly convex loss: it ends at the optimum."""
NEAR = replace(RECIPE, epochs=150)
"""It ends near enough for rank correlations."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def softmax(seed: int) -> nn.Module:
    return nn.Linear(D, C, bias=False).double()


X = random(N + Q, D)
Y = (X @ random(D, C, seed=1) + random(N + Q, C, seed=2)).argmax(1)
TRAIN, QUERIES = (X[:N], Y[:N]), (X[N:], Y[N:])


def optimum(kept: Tensor) -> Tensor:
    """The minimum of the mean loss plus ½ · DECAY · ‖w‖², by Newton's method."""
    w = torch.zeros(C * D, dtype=F64)

    def objective(w: Tensor) -> Tensor:
        z = X[:N][kept] @ w.view(C, D).mT
        return F.cross_entropy(z, Y[:N][kept]) + 0.5 * DECAY * w.square().sum()

    for _ in range(10):
        w = w - torch.linalg.solve(torch.func.jacrev(torch.func.grad(objective))(w), torch.func.grad(objective)(w))
    return w


def query_losses(w: Tensor) -> Tensor:
    return F.cross_entropy(X[N:] @ w.view(C, D).mT, Y[N:], reduction="none")


def exact_scores() -> Tensor:
    """(1/N) ∇ℓ_qᵀ (H + decay)⁻¹ ∇ℓ_n at the optimum, from dense matrices."""
    w = optimum(torch.ones(N, dtype=torch.bool))

    def losses(w: Tensor) -> Tensor:
        return F.cross_entropy(X @ w.view(C, D).mT, Y, reduction="none")

    gradients = torch.func.jacrev(losses)(w)
    hessian = torch.func.jacrev(torch.func.grad(lambda w: losses(w)[:N].mean()))(w) + DECAY * torch.eye(
        C * D, dtype=F64
    )
    return gradients[N:] @ torch.linalg.solve(hessian, gradients[:N].mT) / N


@pytest.mark.smoke
def test_leave_one_out__is_the_difference_of_optima() -> None:
    everything = torch.ones(N, dtype=torch.bool)
    got = leave_one_out(softmax, TRAIN, QUERIES, [3, 0, 17], RECIPE, seeds=(0, 1))
    for column, n in enumerate((3, 0, 17)):
        kept = everything.clone()
        kept[n] = False
        # Larger is better: −loss with the example minus −loss without it.
        expected = query_losses(optimum(kept)) - query_losses(optimum(everything))
        torch.testing.assert_close(got.effects[:, column], expected, rtol=1e-6, atol=1e-9)
    assert got.examples.tolist() == [3, 0, 17]
    assert float(got.noise.max()) < 1e-9  # seeds start elsewhere and end at the same optimum


def test_leave_one_out__agrees_with_influence_functions_on_a_convex_model() -> None:
    scores = exact_scores()
    left_out = leave_one_out(softmax, TRAIN, QUERIES, range(0, N, 3), NEAR, seeds=(0,))
    got = left_out.correlation(scores, resamples=50)
    assert float(got.per_query.min()) > 0.95
    assert got.interval[0] > 0.95
    assert left_out.slope(scores) == pytest.approx(1, abs=0.1)
    assert left_out.slope(2 * scores) == pytest.approx(left_out.slope(scores) / 2)
    expected = [
        stats.spearmanr(s.numpy(), e.numpy()).statistic for s, e in zip(scores[:, ::3], left_out.effects, strict=True)
    ]
    torch.testing.assert_close(got.per_query, torch.tensor(expected, dtype=F64))
    assert bool(left_out.noise.isnan().all())


def test_linear_datamodeling_score__is_near_1_for_influence_functions_on_a_convex_model() -> None:
    masks = random_subsets(N, 30, fraction=0.8)
    runs = retrain(softmax, TRAIN, QUERIES, masks, NEAR, seeds=(0,))
    got = linear_datamodeling_score(exact_scores(), runs.masks, runs.outputs["loss"], resamples=50)
    assert got.mean > 0.95


def test_leave_one_out__passes_options_on(tmp_path: Path) -> None:
    path = tmp_path / "runs.safetensors"
    brief = TrainingRecipe(epochs=1, learning_rate=0.1)
    got = leave_one_out(softmax, TRAIN, QUERIES, [1], brief, seeds=(4,), measurement="margin", path=path)
    assert path.exists()
    assert got.runs.seeds == (4,)
    assert list(got.runs.outputs) == ["margin"]


BRIEF = TrainingRecipe(epochs=1, learning_rate=0.1)


@pytest.mark.parametrize("examples", [[], [1, 1], [-1], [N], [0.5], [[1, 2]]])
def test_leave_one_out__refuses_examples(examples: Any) -> None:
    with pytest.raises(fk.errors.InvalidArgumentError, match=f"distinct integers from 0 to {N - 1}"):
        leave_one_out(softmax, TRAIN, QUERIES, examples, BRIEF)


def test_leave_one_out__refuses_scores_that_do_not_fit() -> None:
    left_out = leave_one_out(softmax, TRAIN, QUERIES, [1, 2], BRIEF, seeds=(0,))
    with pytest.raises(fk.errors.InvalidArgumentError, match=re.escape(f"expected [{Q}, {N}]")):
        left_out.correlation(random(Q, 2))
    with pytest.raises(fk.errors.InvalidArgumentError, match="all zero"):
        left_out.slope(torch.zeros(Q, N))
    one = leave_one_out(softmax, TRAIN, QUERIES, [1], BRIEF, seeds=(0,))
    with pytest.raises(fk.errors.InvalidArgumentError, match="two or more"):
        one.correlation(random(Q, N))
