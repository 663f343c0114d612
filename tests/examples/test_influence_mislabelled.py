"""Mislabel detection against scikit-learn, and the plain rankings against one backward pass an example."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn

import fisherkit as fk
from examples.influence.evaluation import flip_labels, mislabel_detection, plain_rankings
from examples.influence.evaluation.statistics import multiplicities

F64 = torch.float64
QUICK = settings(max_examples=20, deadline=None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


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
