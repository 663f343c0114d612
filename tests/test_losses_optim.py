"""Losses that people train with, in optimizers and influence scores: targets read off the gradient, or a refusal.

A step is compared with the damped matrix by brute force, and with the gradient of the user's own loss.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from examples.influence.evaluation.losses import loss_of
from tests import by_hand
from tests.test_losses import (
    CASES,
    KINDS,
    Case,
    N,
    X,
    Y,
    by_example,
    cross_entropy,
    derivatives,
    error,
    expected,
    flat_jacobian,
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


# -- influence ---------------------------------------------------------------------------------------------------------


SMALL = 0.1


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
    right = g @ torch.linalg.solve(f + SMALL * torch.eye(len(f), dtype=f.dtype), g.T) / fisher.examples
    assert error(fk.influence.InfluenceScores(fisher, model, damping=SMALL).scores(data, data), right) < 1e-8


def test_scores__of_a_file_ask_for_a_likelihood_with_settings(tmp_path: Path) -> None:
    case = CASES["ce weighted"]
    model = case.model()
    fk.ExactFisher(model, (case.x, case.y), likelihood=case.loss("mean")).save(tmp_path / "f")
    loaded = fk.load(tmp_path / "f")
    with pytest.raises(fk.InvalidArgumentError, match=r"weight=\[0.5 2 1 3\]"):
        fk.influence.InfluenceScores(loaded, model, damping=SMALL)
    fk.influence.InfluenceScores(loaded, model, damping=SMALL, likelihood=case.loss("mean"))
    with pytest.warns(UserWarning, match=r"the loss categorical meet a Fisher of categorical\(.*weight"):
        fk.influence.InfluenceScores(loaded, model, damping=SMALL, likelihood="categorical")


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
    influence = fk.influence.InfluenceScores(fisher, model, damping=SMALL)
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

    each = [(x[n : n + 1], y[n : n + 1]) for x, y in data for n in range(len(x))]
    train = by_hand.rows(model, data)
    asked = torch.stack([by_hand.gradient(first_row(model(x), y).sum(), model) for x, y in each])
    fisher = fk.ExactFisher(model, data, likelihood=nn.CrossEntropyLoss())
    matrix = fisher.to_dense() + SMALL * torch.eye(fisher.size, dtype=torch.float64)
    found = fk.influence.InfluenceScores(fisher, model, damping=SMALL).scores(data, data, measurement=first_row)
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
    found = fk.influence.InfluenceScores(fisher, model, damping=SMALL).scores(data, data, measurement="margin")

    def margin(z: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        label = y.clamp_min(0).unsqueeze(1)
        p = z.softmax(1).gather(1, label).squeeze(1)
        return -((p / (1 - p)).log() * (y >= 0)).sum(1)

    own = fk.influence.InfluenceScores(fisher, model, damping=SMALL).scores(data, data, measurement=margin)
    torch.testing.assert_close(found, own)
    soft = CASES["ce probabilities"]
    fisher = fk.ExactFisher(soft.model(), (soft.x, soft.y), likelihood=nn.CrossEntropyLoss())
    scores: Any = fk.influence.InfluenceScores(fisher, soft.model(), damping=SMALL)
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
