"""What must hold of influence scores whatever the numbers are, and what retraining says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.evaluation import loss_gradient
from tests.small_data import F64, X, Y, mlp, normal, same

STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")


def test_self_influence__of_undamped_full_ef_is_one() -> None:
    model = mlp()
    fisher = fk.EmpiricalFisher(model, (X, Y))
    assert fisher.rows < fisher.size
    own = fk.influence.InfluenceScores(fisher, model, damping=1e-9).self_influence((X, Y))
    torch.testing.assert_close(own, torch.ones_like(own), rtol=1e-5, atol=0)


def test_self_influence__of_undamped_full_ief_is_the_squared_output_gradient() -> None:
    model = mlp()
    fisher = fk.ImprovedEmpiricalFisher(model, (X, Y))
    own = fk.influence.InfluenceScores(fisher, model, damping=1e-9).self_influence((X, Y))
    u = torch.softmax(model(X), 1).detach() - nn.functional.one_hot(Y, 3)
    torch.testing.assert_close(own, u.square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_scores__of_a_subset_add_up_to_that_of_its_gradient(structure: str) -> None:
    model, groups = mlp(), torch.tensor([0, 1, 0, 1, 1, 0, 2])
    fisher = fk.TruncatedFisher(model, (X, Y), structure=structure)
    influence = fk.influence.InfluenceScores(fisher, model)
    scores = influence.scores((X[:2], Y[:2]), (X, Y))
    grouped = influence.scores((X[:2], Y[:2]), (X, Y), groups=groups)
    same(grouped, torch.stack([scores[:, groups == g].sum(1) for g in range(3)], 1))
    subset = loss_gradient(model, (X[groups == 1], Y[groups == 1]), normalization="sum")
    for q in range(2):
        query = loss_gradient(model, (X[q : q + 1], Y[q : q + 1]))
        same(grouped[q, 1], query @ fisher.solve(subset, influence.damping) / 7)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_scores__do_not_depend_on_normalization(structure: str) -> None:
    found = []
    for normalization in ("mean", "sum"):
        fisher = fk.EmpiricalFisher(mlp(), (X, Y), structure=structure, normalization=normalization)
        influence = fk.influence.InfluenceScores(fisher, mlp())
        found.append((influence.scores((X[:2], Y[:2]), (X, Y)), influence.self_influence((X, Y))))
    for mean, total in zip(*found, strict=True):
        same(mean, total)


def test_scores__are_symmetric_and_have_self_influence_on_the_diagonal() -> None:
    model = mlp()
    for structure in STRUCTURES:
        fisher = fk.ExactFisher(model, (X, Y), structure=structure)
        influence = fk.influence.InfluenceScores(fisher, model)
        scores = influence.scores((X, Y), (X, Y))
        same(scores, scores.mT)
        same(scores.diagonal(), influence.self_influence((X, Y)))


def test_leverages__of_the_exact_fisher_s_data_add_up_to_its_effective_dimension() -> None:
    model = mlp()
    for structure in ("full", "block", "ekfac", "diagonal"):
        fisher = fk.ExactFisher(model, (X, Y), structure=structure)
        influence = fk.influence.InfluenceScores(fisher, model, damping=fk.RelativeDamping(0.1))
        leverages = influence.leverages((X, None))
        assert bool((leverages >= 0).all())
        if structure != "diagonal":
            dense = fisher.to_dense()
            inverse = torch.linalg.inv(dense + influence.damping * torch.eye(fisher.size, dtype=F64))
            same(leverages.sum(), (dense @ inverse).trace())
        if structure == "full":
            assert bool((leverages <= 2).all())


# -- retraining ------------------------------------------------------------------------------------------------------

DECAY = 0.02


def objective(model: nn.Module, x: Tensor, y: Tensor, total: int) -> Tensor:
    """(1/N) Σ ℓ + (μ/2)‖θ‖², N that of the whole data: removal leaves the others' weights."""
    loss = nn.functional.cross_entropy(model(x), y, reduction="sum") / total
    return loss + 0.5 * DECAY * sum(p.square().sum() for p in model.parameters())


def trained(x: Tensor, y: Tensor, total: int) -> nn.Module:
    """The minimum of a strictly convex objective, to convergence."""
    model = nn.Linear(x.shape[1], 3).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(model, x, y, total)
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float(gradient.norm()) < 1e-8
    for p in model.parameters():
        p.grad = None
    return model


@pytest.fixture(scope="module")
def convex() -> dict[str, Any]:
    x = normal(48, 5, seed=1)
    y = (x @ normal(5, 3, seed=2) + normal(48, 3, seed=3)).argmax(1)
    queries = normal(6, 5, seed=4)
    labels = (queries @ normal(5, 3, seed=2)).argmax(1)
    model = trained(x, y, 48)
    influence = fk.influence.InfluenceScores(fk.ExactFisher(model, (x, y)), model, damping=DECAY)
    return {"x": x, "y": y, "queries": (queries, labels), "model": model, "influence": influence}


def query_losses(model: nn.Module, queries: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(queries[0]), queries[1], reduction="none")


def test_scores__agree_with_retraining_without_each_example(convex: dict[str, Any]) -> None:
    x, y, queries = convex["x"], convex["y"], convex["queries"]
    before, changes = query_losses(convex["model"], queries), []
    for n in range(len(x)):
        kept = torch.arange(len(x)) != n
        changes.append(query_losses(trained(x[kept], y[kept], len(x)), queries) - before)
    truth = torch.stack(changes, 1)
    scores = convex["influence"].scores(queries, (x, y))
    assert min(spearmanr(a, b).statistic for a, b in zip(scores, truth, strict=True)) > 0.95
    slope = float((scores * truth).sum() / scores.square().sum())
    assert 0.8 < slope < 1.6  # the scores' unit is that of the change


def test_scores__agree_with_retraining_without_groups(convex: dict[str, Any]) -> None:
    x, y, queries = convex["x"], convex["y"], convex["queries"]
    groups = torch.arange(len(x)) % 16
    before, changes = query_losses(convex["model"], queries), []
    for g in range(16):
        kept = groups != g
        changes.append(query_losses(trained(x[kept], y[kept], len(x)), queries) - before)
    truth = torch.stack(changes, 1)
    scores = convex["influence"].scores(queries, (x, y), groups=groups)
    assert spearmanr(scores.flatten(), truth.flatten()).statistic > 0.95


def test_margin_scores__agree_with_retraining(convex: dict[str, Any]) -> None:
    x, y, queries = convex["x"], convex["y"], convex["queries"]

    def margins(model: nn.Module) -> Tensor:
        log_p = -query_losses(model, queries)
        return log_p - torch.log1p(-log_p.exp())

    before = margins(convex["model"])
    removed = range(0, len(x), 4)
    changes = []
    for n in removed:
        kept = torch.arange(len(x)) != n
        changes.append(before - margins(trained(x[kept], y[kept], len(x))))
    scores = convex["influence"].scores(queries, (x, y), measurement="margin")[:, list(removed)]
    assert spearmanr(scores.flatten(), torch.stack(changes, 1).flatten()).statistic > 0.95
