"""The linear datamodeling score, its intervals and its ceiling, against scipy and by properties."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import fisherkit as fk
from examples.influence.evaluation import average_scores, linear_datamodeling_score, noise_ceiling, random_subsets
from examples.influence.evaluation.statistics import (
    Ranking,
    average_ranks,
    multiplicities,
    resampled_spearman,
    spearman,
)
from tests.small_data import normal as random

F64 = torch.float64
QUICK = settings(max_examples=20, deadline=None)


def tied(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of which many are equal."""
    return torch.randint(4, shape, generator=torch.Generator().manual_seed(seed)).double()


def score(scores: Tensor, masks: Tensor, outputs: Tensor, **options: Any) -> Tensor:
    return linear_datamodeling_score(scores, masks, outputs, **{"resamples": 5, **options}).per_query


# -- ranks and correlations ------------------------------------------------------------------------------------------


@QUICK
@given(seed=st.integers(0, 1000), ties=st.booleans())
def test_spearman__is_scipys(seed: int, ties: bool) -> None:
    make = tied if ties else random
    x, y = make(3, 12, seed=seed), make(3, 12, seed=seed + 1)
    torch.testing.assert_close(average_ranks(x), torch.as_tensor(stats.rankdata(x.numpy(), axis=1)))
    for got, a, b in zip(spearman(x, y), x, y, strict=True):
        flat = len(a.unique()) == 1 or len(b.unique()) == 1
        expected = 0.0 if flat else stats.spearmanr(a.numpy(), b.numpy()).statistic
        assert float(got) == pytest.approx(expected, abs=1e-12)


@QUICK
@given(seed=st.integers(0, 1000), entries=st.sampled_from([1, 50, 1 << 20]))
def test_resampled_spearman__is_scipys_on_the_resampled_data(seed: int, entries: int) -> None:
    x, y = tied(2, 9, seed=seed), random(2, 9, seed=seed + 1)
    weights = multiplicities(9, 4, torch.Generator().manual_seed(seed))
    got = resampled_spearman(Ranking(x), Ranking(y), weights, entries)
    for b, q in np.ndindex(4, 2):
        index = torch.arange(9).repeat_interleave(weights[b].long())
        a, c = x[q, index].numpy(), y[q, index].numpy()
        flat = len(set(a)) == 1 or len(set(c)) == 1
        expected = 0.0 if flat else stats.spearmanr(a, c).statistic
        assert float(got[b, q]) == pytest.approx(expected, abs=1e-12)


def test_multiplicities__are_draws_with_replacement() -> None:
    weights = multiplicities(7, 2000, torch.Generator().manual_seed(0))
    assert bool((weights.sum(1) == 7).all())
    # Each item's count is binomial, with mean 1 and variance 6/7.
    torch.testing.assert_close(weights.mean(0), torch.ones(7, dtype=F64), rtol=0, atol=0.1)
    torch.testing.assert_close(weights.var(0), torch.full((7,), 6 / 7, dtype=F64), rtol=0, atol=0.15)


# -- the score -------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_linear_datamodeling_score__is_the_definition() -> None:
    scores, masks, outputs = random(4, 20), random_subsets(20, 15, seed=1), random(15, 3, 4, seed=2)
    got = linear_datamodeling_score(scores, masks, outputs, resamples=10)
    expected = [
        stats.spearmanr(
            [sum(float(scores[q, n]) for n in range(20) if masks[s, n]) for s in range(15)],
            [float(outputs[s, :, q].mean()) for s in range(15)],
        ).statistic
        for q in range(4)
    ]
    torch.testing.assert_close(got.per_query, torch.tensor(expected, dtype=F64))
    assert got.mean == pytest.approx(float(np.mean(expected)))
    assert got.cases == 15


def test_linear_datamodeling_score__is_1_for_what_made_the_outputs_and_minus_1_for_its_opposite() -> None:
    scores, masks = random(5, 30), random_subsets(30, 20)
    outputs = (masks.double() @ scores.mT).exp()  # any increasing function
    torch.testing.assert_close(score(scores, masks, outputs), torch.ones(5, dtype=F64))
    torch.testing.assert_close(score(-scores, masks, outputs), -torch.ones(5, dtype=F64))
    assert linear_datamodeling_score(scores, masks, outputs, resamples=20).interval == pytest.approx((1, 1))


@QUICK
@given(seed=st.integers(0, 1000), scale=st.floats(1e-6, 1e6), shift=st.floats(-10, 10))
def test_linear_datamodeling_score__ignores_order_scale_and_for_equal_sizes_shift(
    seed: int, scale: float, shift: float
) -> None:
    scores, masks, outputs = random(3, 40, seed=seed), random_subsets(40, 10, seed=seed), random(10, 3, seed=seed + 1)
    expected = score(scores, masks, outputs)
    generator = torch.Generator().manual_seed(seed)
    examples, subsets, queries = (torch.randperm(n, generator=generator) for n in (40, 10, 3))
    torch.testing.assert_close(score(scores[:, examples], masks[:, examples], outputs), expected)
    torch.testing.assert_close(score(scores, masks[subsets], outputs[subsets]), expected)
    torch.testing.assert_close(score(scores[queries], masks, outputs[:, queries]), expected[queries])
    torch.testing.assert_close(score(scores * scale, masks, outputs * scale), expected)
    torch.testing.assert_close(score(scores + shift, masks, outputs), expected)


def test_linear_datamodeling_score__is_0_for_scores_that_predict_nothing() -> None:
    """Sums of equal numbers in different order differ by rounding, which is no ranking."""
    masks, outputs = random_subsets(50, 20), random(20, 2)
    assert score(torch.full((2, 50), 0.1, dtype=F64), masks, outputs).tolist() == [0, 0]
    assert score(torch.zeros(2, 50), masks, outputs).tolist() == [0, 0]


def test_linear_datamodeling_score__intervals_are_percentiles_of_resampled_means() -> None:
    scores, masks, outputs = random(6, 40), random_subsets(40, 25), random(25, 6, seed=3)
    outputs += 0.3 * masks.double() @ scores.mT
    got = linear_datamodeling_score(scores, masks, outputs, resamples=50, confidence=0.9, seed=5)
    predicted = (masks.double() @ scores.mT).numpy()
    generator = torch.Generator().manual_seed(5)
    draws = [multiplicities(n, 50, generator).long() for n in (25, 6)]
    both, over_subsets, over_queries = [], [], []
    for counts in zip(*draws, strict=True):
        s, q = (torch.arange(len(count)).repeat_interleave(count).numpy() for count in counts)
        rho = np.array([stats.spearmanr(predicted[s, i], outputs.numpy()[s, i]).statistic for i in range(6)])
        both.append(rho[q].mean())
        over_subsets.append(rho.mean())
        over_queries.append(got.per_query.numpy()[q].mean())
    for interval, samples in zip(
        (got.interval, got.over_cases, got.over_queries), (both, over_subsets, over_queries), strict=True
    ):
        assert interval == pytest.approx(tuple(np.quantile(samples, [0.05, 0.95])))
    assert got.interval[0] < got.mean < got.interval[1]
    assert str(got).startswith(f"{got.mean:.3f} [")


def test_linear_datamodeling_score__is_seeded_and_leaves_the_global_generator_alone() -> None:
    args = random(3, 20), random_subsets(20, 10), random(10, 3, seed=1)
    before = torch.get_rng_state()
    first, second = (linear_datamodeling_score(*args, resamples=50, seed=7) for _ in range(2))
    assert torch.equal(first.samples, second.samples)
    assert not torch.equal(first.samples, linear_datamodeling_score(*args, resamples=50, seed=8).samples)
    assert torch.equal(before, torch.get_rng_state())


def test_difference__is_paired() -> None:
    masks = random_subsets(30, 40)
    scores = random(8, 30)
    outputs = masks.double() @ scores.mT + random(40, 8, seed=1)
    good = linear_datamodeling_score(scores, masks, outputs, resamples=200)
    worse = linear_datamodeling_score(scores + random(8, 30, seed=2), masks, outputs, resamples=200)
    gain, (low, high) = good.difference(worse)
    assert gain == pytest.approx(good.mean - worse.mean)
    assert 0 < low < gain < high
    assert good.difference(good) == (0, (0, 0))
    with pytest.raises(fk.errors.InvalidArgumentError, match="same data"):
        good.difference(linear_datamodeling_score(scores, masks, outputs, resamples=100))


def test_average_scores__is_the_mean() -> None:
    matrices = [random(2, 5, seed=i).float() for i in range(3)]
    torch.testing.assert_close(average_scores(matrices), (matrices[0] + matrices[1] + matrices[2]).double() / 3)


# -- the ceiling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [2, 5, 8])
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_noise_ceiling__is_the_score_of_the_truth(runs: int, noise: float) -> None:
    """Normal truth and noise: Pearson's 1/√(1 + noise²/R), in ranks."""
    scores, masks = random(40, 60), random_subsets(60, 800)
    truth = masks.double() @ scores.mT
    truth = (truth - truth.mean(0)) / truth.std(0)
    outputs = truth.unsqueeze(1) + noise * random(800, runs, 40, seed=1)
    ceiling = noise_ceiling(outputs, splits=20)
    reached = linear_datamodeling_score(scores, masks, outputs, resamples=5).mean
    theory = 6 / math.pi * math.asin(0.5 / math.sqrt(1 + noise**2 / runs))
    assert ceiling.mean == pytest.approx(theory, abs=0.01)
    assert ceiling.mean == pytest.approx(reached, abs=0.01)
    assert ceiling.interval[0] <= ceiling.mean <= ceiling.interval[1]


def test_noise_ceiling__is_1_without_noise_and_small_for_noise_alone() -> None:
    same = random(30, 1, 4).expand(30, 6, 4) + random(6, 1)  # what a seed does to all subsets is no noise
    assert noise_ceiling(same).mean == pytest.approx(1)
    assert noise_ceiling(random(400, 6, 10)).mean < 0.3


# -- bad input -------------------------------------------------------------------------------------------------------

SCORES, MASKS, OUTPUTS = random(3, 8), random_subsets(8, 5), random(5, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": SCORES.numpy()}, fk.errors.InvalidTypeError, "scores of type ndarray"),
        ({"scores": SCORES.long()}, fk.errors.InvalidTypeError, "scores of torch.int64"),
        ({"scores": SCORES[0]}, fk.errors.InvalidArgumentError, "unsqueeze"),
        ({"scores": SCORES / 0}, fk.errors.NonFiniteError, "cannot be ranked"),
        ({"scores": SCORES[:, :7]}, fk.errors.InvalidArgumentError, "scores of 7 training examples; expected 8"),
        ({"masks": MASKS.double()}, fk.errors.InvalidTypeError, "boolean"),
        ({"masks": MASKS[0]}, fk.errors.InvalidArgumentError, "[S, N]"),
        ({"masks": MASKS & False}, fk.errors.InvalidArgumentError, "without examples"),
        ({"masks": MASKS[:1], "outputs": OUTPUTS[:1]}, fk.errors.InvalidArgumentError, "one subset"),
        ({"outputs": OUTPUTS.mT}, fk.errors.InvalidArgumentError, "[5, 3] or [5, seeds, 3]"),
        ({"outputs": OUTPUTS * 0}, fk.errors.InvalidArgumentError, "query 0 that are the same"),
        ({"outputs": OUTPUTS.log()}, fk.errors.NonFiniteError, "outputs with NaN"),
        ({"resamples": 0}, fk.errors.InvalidArgumentError, "resamples=0"),
        ({"confidence": 95}, fk.errors.InvalidArgumentError, "between 0 and 1"),
    ],
)
def test_linear_datamodeling_score__refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"scores": SCORES, "masks": MASKS, "outputs": OUTPUTS, **change}
    with pytest.raises(error, match=re.escape(message)):
        linear_datamodeling_score(**arguments)


def test_others__refuse() -> None:
    for outputs, options in ((OUTPUTS, {}), (random(5, 1, 3), {}), (random(5, 2, 3), {"splits": 0})):
        with pytest.raises(fk.errors.InvalidArgumentError, match="noise_ceiling"):
            noise_ceiling(outputs, **options)
    for matrices in ([], [SCORES, SCORES[:2]]):
        with pytest.raises(fk.errors.InvalidArgumentError, match="average_scores"):
            average_scores(matrices)
    for arguments in ((1, 2), (10, 0)):
        with pytest.raises(fk.errors.InvalidArgumentError, match="random_subsets"):
            random_subsets(*arguments)
    with pytest.raises(fk.errors.InvalidArgumentError, match="fraction"):
        random_subsets(10, 2, fraction=1.0)


def test_random_subsets__have_one_size_and_grow_from_the_front() -> None:
    masks = random_subsets(11, 6, fraction=0.3, seed=4)
    assert masks.sum(1).tolist() == [3] * 6
    assert torch.equal(masks[:2], random_subsets(11, 2, fraction=0.3, seed=4))
    assert not torch.equal(masks, random_subsets(11, 6, fraction=0.3, seed=5))
