"""Influence, its measurements and retraining on the losses that people train with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from examples.influence.evaluation.losses import loss_of
from tests.test_losses import CASES, KINDS, N, derivatives, error, expected, flat_jacobian

DAMPING = 0.1


def gradients(name: str) -> Tensor:
    case = CASES[name]
    model = case.model()
    found = [flat_jacobian(case, model, n) for n in range(N)]
    return torch.stack([derivatives(case, z, n)[0] @ jacobian for n, (z, jacobian) in enumerate(found)])


@pytest.mark.parametrize(
    "name",
    [
        "ce weighted smoothed ignoring",
        "ce probabilities",
        "ce (B, C, H, W)",
        "nll",
        "bce images",
        "gaussian nll",
        "poisson",
    ],
)
def test_scores__are_gradients_through_the_damped_matrix_of_the_loss(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), (case.x, case.y)
    fisher = fk.ExactFisher(model, data, likelihood=case.loss("mean"))
    f, g = expected(name, KINDS["exact"][2]), gradients(name)
    right = g @ torch.linalg.solve(f + DAMPING * torch.eye(len(f), dtype=f.dtype), g.T) / fisher.examples
    assert error(fk.influence.InfluenceScores(fisher, model, damping=DAMPING).scores(data, data), right) < 1e-8


def test_scores__of_a_file_ask_for_a_likelihood_with_settings(tmp_path: Path) -> None:
    case = CASES["ce weighted"]
    model = case.model()
    fk.ExactFisher(model, (case.x, case.y), likelihood=case.loss("mean")).save(tmp_path / "f")
    loaded = fk.load(tmp_path / "f")
    with pytest.raises(fk.InvalidArgumentError, match=r"weight=\[0.5 2 1 3\]"):
        fk.influence.InfluenceScores(loaded, model, damping=DAMPING)
    fk.influence.InfluenceScores(loaded, model, damping=DAMPING, likelihood=case.loss("mean"))
    with pytest.warns(UserWarning, match=r"the loss categorical meet a Fisher of categorical\(.*weight"):
        fk.influence.InfluenceScores(loaded, model, damping=DAMPING, likelihood="categorical")


@pytest.mark.parametrize(
    "name", ["ce (B, C, L)", "ce (B, C, H, W)", "ce (B, C, L) probabilities", "bce images", "mse (B,)", "gaussian nll"]
)
def test_measurement__of_a_users_function_gets_outputs_and_targets_as_they_are(name: str) -> None:
    case = CASES[name]
    model, data = case.model(), (case.x, case.y)
    seen: list[tuple[torch.Size, torch.Size]] = []

    def own(z: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        seen.append((z.shape[1:], y.shape[1:]))
        return torch.stack([case.example_loss(z[n : n + 1], int(places[n])) for n in range(len(z))])

    fisher = fk.ExactFisher(model, data, likelihood=case.loss("mean"))
    influence = fk.influence.InfluenceScores(fisher, model, damping=DAMPING)
    places = torch.arange(N)
    found = influence.scores(data, data, measurement=own)
    torch.testing.assert_close(found, influence.scores(data, data))
    assert seen[0] == (model(case.x).shape[1:], case.y.shape[1:])


def test_measurement__of_a_users_function_gets_images_of_each_batch_in_their_own_shape() -> None:
    """As many pixels in other rows and columns: their order tells which is which."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 3, padding=1)).double()
    sizes = ((4, 6), (6, 4), (5, 5))
    data = [(torch.randn(3, 1, h, w).double(), torch.randint(3, (3, h, w))) for h, w in sizes]

    def first_row(z: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        assert y.shape == z[:, 0].shape
        return (z[:, 0, 0] * (1 + y[:, 0])).sum(1)

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])

    each = [(x[n : n + 1], y[n : n + 1]) for x, y in data for n in range(len(x))]
    train = torch.stack([gradient(nn.functional.cross_entropy(model(x), y, reduction="sum")) for x, y in each])
    asked = torch.stack([gradient(first_row(model(x), y).sum()) for x, y in each])
    fisher = fk.ExactFisher(model, data, likelihood=nn.CrossEntropyLoss())
    matrix = fisher.to_dense() + DAMPING * torch.eye(fisher.size, dtype=torch.float64)
    found = fk.influence.InfluenceScores(fisher, model, damping=DAMPING).scores(data, data, measurement=first_row)
    torch.testing.assert_close(found, asked @ torch.linalg.solve(matrix, train.T) / len(each))


@pytest.mark.parametrize("name", CASES)
def test_retraining__has_the_same_loss(name: str) -> None:
    case = CASES[name]
    z = case.model()(case.x).detach()
    right = torch.stack(
        [case.example_loss(case.model()[0](case.x[n : n + 1]) if case.head else z[n : n + 1], n) for n in range(N)]
    )  # type: ignore[index]
    constant = 0.0
    for likelihood in [case.loss("mean"), *([] if case.named is None else [case.named])]:
        found = loss_of(likelihood, "test")(z, case.y)
        if name in ("gaussian nll", "poisson", "mse", "mse images", "mse (B,)"):
            # Up to constants of the targets: their differences are the outputs'.
            other = torch.zeros_like(z)
            found = found - loss_of(likelihood, "test")(other, case.y)
            constant = torch.stack([case.example_loss(other[n : n + 1], n) for n in range(N)])  # type: ignore[assignment]
        torch.testing.assert_close(found, right - constant)


def test_loss__of_class_probabilities_on_the_last_axis() -> None:
    """As many positions as classes: nothing but the axis tells them apart."""
    z, q = (torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    q = q.softmax(-1)
    found = loss_of(fk.likelihoods.Categorical(class_axis=-1), "test")(z, q)
    torch.testing.assert_close(found, -(q * z.log_softmax(-1)).sum((1, 2)))


def test_margin__of_classes_on_axis_1_and_not_of_probabilities() -> None:
    case = CASES["ce (B, C, L)"]
    model, data = case.model(), (case.x, case.y)
    fisher = fk.ExactFisher(model, data, likelihood=case.loss("mean"))
    found = fk.influence.InfluenceScores(fisher, model, damping=DAMPING).scores(data, data, measurement="margin")

    def margin(z: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        label = y.clamp_min(0).unsqueeze(1)
        p = z.softmax(1).gather(1, label).squeeze(1)
        return -((p / (1 - p)).log() * (y >= 0)).sum(1)

    own = fk.influence.InfluenceScores(fisher, model, damping=DAMPING).scores(data, data, measurement=margin)
    torch.testing.assert_close(found, own)
    soft = CASES["ce probabilities"]
    fisher = fk.ExactFisher(soft.model(), (soft.x, soft.y), likelihood=nn.CrossEntropyLoss())
    scores: Any = fk.influence.InfluenceScores(fisher, soft.model(), damping=DAMPING)
    with pytest.raises(fk.DataError, match="with class probabilities"):
        scores.scores((soft.x, soft.y), (soft.x, soft.y), measurement="margin")


@pytest.mark.parametrize("structure", ["full", "kfac"])
def test_batch_without_a_label_that_counts__scores_nothing_also_below_an_embedding(structure: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)).double()
    x, y = torch.randint(7, (6, 4)), torch.randint(3, (6, 4))
    y[5] = -100
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    influence = fk.influence.InfluenceScores(fk.EmpiricalFisher(model, data, structure=structure), model)
    scores = influence.scores(data, data)
    torch.testing.assert_close(scores[:5, :5], influence.scores(data[:1], data[:1]))
    for nothing in (scores[5], scores[:, 5], influence.scores(data[1], data)):
        assert not nothing.any()
    assert float(influence.self_influence(data)[5]) == 0
