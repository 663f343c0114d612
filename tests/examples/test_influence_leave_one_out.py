"""Influence scores against leaving one out, mislabelled examples, and texts."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn

import fisherkit as fk
from examples.influence import text
from examples.influence.evaluation import (
    TrainingRecipe,
    flip_labels,
    leave_one_out,
    linear_datamodeling_score,
    mislabel_detection,
    plain_rankings,
    random_subsets,
    retrain,
)
from examples.influence.evaluation.statistics import multiplicities
from examples.influence.settings import Pair
from examples.shared.tasks import docstring_text, minilm
from tests.small_data import normal as random

F64 = torch.float64
N, Q, D, C = 120, 5, 4, 3
DECAY = 0.1
RECIPE = TrainingRecipe(epochs=400, learning_rate=0.5, momentum=0.9, weight_decay=DECAY)
"""Whole-batch training of a strongly convex loss: it ends at the optimum."""
NEAR = replace(RECIPE, epochs=150)
"""It ends near enough for rank correlations."""


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


# -- mislabel detection ------------------------------------------------------------------------------------------------


QUICK = settings(max_examples=20, deadline=None)


@pytest.mark.smoke
@QUICK
@given(seed=st.integers(0, 1000), ties=st.booleans(), wrong=st.integers(1, 19))
def test_mislabel_detection__is_scikit_learns(seed: int, ties: bool, wrong: int) -> None:
    ranking = random(20, seed=seed)
    ranking = ranking.round() if ties else ranking
    mislabelled = torch.arange(20) < wrong
    got = mislabel_detection({"own": ranking}, mislabelled, resamples=2)["own"]
    assert got.auroc == pytest.approx(roc_auc_score(mislabelled, ranking), abs=1e-12)
    assert got.average_precision == pytest.approx(average_precision_score(mislabelled, ranking), abs=1e-12)


def test_mislabel_detection__intervals_are_percentiles_of_resampled_values() -> None:
    mislabelled = torch.arange(60) < 15
    ranking = (random(60) + 1.0 * mislabelled).mul(2).round()
    got = mislabel_detection({"own": ranking}, mislabelled, resamples=50, confidence=0.9, seed=3)["own"]
    generator = torch.Generator().manual_seed(3)
    counts = torch.cat([multiplicities(n, 50, generator) for n in (15, 45)], 1).long()
    areas, precisions = [], []
    for count in counts:
        index = torch.arange(60).repeat_interleave(count)
        areas.append(roc_auc_score(mislabelled[index], ranking[index]))
        precisions.append(average_precision_score(mislabelled[index], ranking[index]))
    assert got.auroc_interval == pytest.approx(tuple(np.quantile(areas, [0.05, 0.95])))
    assert got.precision_interval == pytest.approx(tuple(np.quantile(precisions, [0.05, 0.95])))
    assert str(got).startswith(f"AUROC {got.auroc:.3f} [")


@QUICK
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_mislabel_detection__ignores_order_and_scale_and_is_1_for_the_truth(seed: int, scale: float) -> None:
    ranking, mislabelled = random(30, seed=seed), torch.arange(30) < 7
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    rankings = {"own": ranking, "scaled": ranking * scale, "truth": mislabelled.double(), "opposite": -ranking}
    got = mislabel_detection(rankings, mislabelled, resamples=3)
    other = mislabel_detection({"own": ranking[order]}, mislabelled[order], resamples=3)
    for detection in (other["own"], got["scaled"]):
        assert detection.auroc == pytest.approx(got["own"].auroc)
        assert detection.average_precision == pytest.approx(got["own"].average_precision)
    assert got["truth"].auroc_interval == got["truth"].precision_interval == (1, 1)
    assert got["opposite"].auroc == pytest.approx(1 - got["own"].auroc)


def test_flip_labels__changes_what_it_says() -> None:
    labels = torch.arange(100) % 5
    flipped, wrong = flip_labels(labels, 0.2, classes=5, seed=3)
    assert int(wrong.sum()) == 20
    assert torch.equal(flipped != labels, wrong)
    assert int(flipped.min()) >= 0
    assert int(flipped.max()) < 5
    assert torch.equal(flipped, flip_labels(labels, 0.2, classes=5, seed=3)[0])


class Keywords(nn.Module):
    """Takes keywords, has a parameter that is not trained and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.first.bias.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) * self.scale)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_plain_rankings__are_one_backward_pass_an_example(likelihood: str) -> None:
    torch.manual_seed(0)
    model, x = Keywords().double(), random(11, 4)
    targets = {"categorical": torch.arange(11) % 3, "gaussian": random(11, 3, seed=1)}.get(
        likelihood, (random(11, 3, seed=1) > 0).double()
    )
    losses = {
        "categorical": lambda z, y: F.cross_entropy(z, y),
        "gaussian": lambda z, y: 0.5 * (z - y).square().sum(),
        "bernoulli": lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="sum"),
    }
    batches = [({"x": x[:6]}, targets[:6]), ({"x": x[6:]}, targets[6:])]
    got = plain_rankings(model, batches, likelihood=likelihood)
    for n in range(11):
        model.zero_grad()
        loss = losses[likelihood](model(x[n : n + 1]), targets[n : n + 1])
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        torch.testing.assert_close(got["loss"][n], loss.detach())
        torch.testing.assert_close(got["gradient norm"][n], norm)
    model.zero_grad()


RANKING, WRONG = random(10), torch.arange(10) < 3


@pytest.mark.parametrize(
    ("rankings", "mislabelled", "error", "message"),
    [
        ({}, WRONG, fk.errors.InvalidArgumentError, "0 rankings"),
        ({"a": RANKING}, WRONG & False, fk.errors.InvalidArgumentError, "0 of 10 examples mislabelled"),
        ({"a": RANKING}, WRONG | True, fk.errors.InvalidArgumentError, "10 of 10"),
        ({"a": RANKING}, WRONG.long(), fk.errors.InvalidTypeError, "boolean"),
        ({"a": RANKING[:9]}, WRONG, fk.errors.InvalidArgumentError, "rankings['a'] of shape [9]"),
        ({"a": RANKING.log()}, WRONG, fk.errors.NonFiniteError, "rankings['a'] with NaN"),
        ({"a": [1.0] * 10}, WRONG, fk.errors.InvalidTypeError, "list"),
    ],
)
def test_mislabel_detection__refuses(rankings: Any, mislabelled: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        mislabel_detection(rankings, mislabelled)


@pytest.mark.parametrize("options", [{"fraction": 0.0, "classes": 5}, {"fraction": 0.5, "classes": 4}])
def test_flip_labels__refuses(options: dict[str, Any]) -> None:
    with pytest.raises(fk.errors.InvalidArgumentError, match="flip_labels"):
        flip_labels(torch.arange(100) % 5, **options)


def test_plain_rankings__refuses_data_without_targets() -> None:
    with pytest.raises(fk.errors.DataError, match="no targets"):
        plain_rankings(nn.Linear(4, 3), (torch.ones(2, 4), None))


# -- the text model of the influence experiments is the end of the whole encoder ---------------------------------------


@pytest.fixture(scope="module")
def data() -> tuple[Pair, Pair, int]:
    return text.data()


def test_data__is_what_the_task_has(data: tuple[Pair, Pair, int]) -> None:
    train, queries, classes = data
    for (inputs, labels), count in ((train, text.TRAIN), (queries, text.QUERIES)):
        assert inputs.shape == (count, text.TOKENS, 385)
        assert len(labels) == count
        assert set(inputs[..., -1].unique().tolist()) == {0.0, 1.0}
    assert classes == 10


def test_build__is_the_rest_of_the_encoder(data: tuple[Pair, Pair, int]) -> None:
    inputs, labels = (tensor[:6] for tensor in data[0])
    task = docstring_text(tokens=text.TOKENS)
    tokens = task.train.inputs
    assert isinstance(tokens, dict)
    assert torch.equal(labels, task.train.labels[:6])
    model, encoder = text.build(0, data[2]), minilm().eval()
    assert isinstance(model, text.Tail)
    with torch.no_grad():
        hidden = encoder(**{name: tensor[:6] for name, tensor in tokens.items()}).last_hidden_state
        real = tokens["attention_mask"][:6, :, None]
        expected = model.head((hidden * real).sum(1) / real.sum(1))  # LoRA begins as nothing
        torch.testing.assert_close(model(inputs), expected, rtol=1e-4, atol=1e-5)


def test_build__trains_lora_and_the_head(data: tuple[Pair, Pair, int]) -> None:
    model = text.build(3, data[2])
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert sum(shape.numel() for shape in trained.values()) == 2 * 2 * text.RANK * (384 + 384) + 385 * 10
    assert all("lora" in name or name.startswith("head.") for name in trained)
    again = text.build(3, data[2])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
