"""The sampled kind: reproducible wherever an example is read, drawn from the model's own distribution, merged exactly.

Statistical tests have fixed seeds, so that they cannot fail by chance once they have passed.
"""

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

import fisherkit as fk
from fisherkit.randomness import keyed_uniform
from tests.reference.models import FAMILIES
from tests.reference.outputs import IGNORE_INDEX, gradient
from tests.theorem_cases import build, error, metric, problem, table

LOGITS = torch.tensor([0.3, 0.0, -0.4, 0.2], dtype=torch.float64)  # every probability below ½
RARE = 1e-3  # a p-value that says the numbers are not what they should be


def outers(z: Tensor) -> Tensor:
    """(p − e_k)(p − e_k)ᵀ of every label k of one example, ``[C, C, C]``."""
    u = torch.stack([gradient(z, torch.tensor(k), "categorical") for k in range(len(z))])
    return u[:, :, None] * u[:, None, :]


def labels(z: Tensor, **options: Any) -> Tensor:
    """The label that each example ``[N, C]`` drew, read off the diagonal: |p − e_k| is largest at k if p < ½."""
    model, inputs = table(z)
    fisher = fk.SampledFisher(model, (inputs, None), structure="diagonal", **options)
    return fisher.diagonal().reshape(z.shape[1], len(z)).argmax(0)


def counts(a: Tensor, b: Tensor) -> Any:
    """How often each pair of values occurs, as a table."""
    width = int(torch.cat([a, b]).max()) + 1
    return (a * width + b).bincount(minlength=width**2).reshape(width, width).numpy()


# -- merging -----------------------------------------------------------------------------------------------------------


def test_merge__many_draws_make_at_most_one_row_a_label() -> None:
    of = problem("mlp")
    fisher = build(fk.SampledFisher, of, draws=50)
    assert fisher.examples == 6
    assert fisher.examples < fisher.rows <= 3 * fisher.examples
    assert build(fk.SampledFisher, of, draws=1).rows == 6
    assert fisher.gram().shape == (fisher.rows, fisher.rows)


def test_merge__of_fifty_draws_is_the_sum_of_fifty_outer_products() -> None:
    """The first m of M draws are those of ``draws=m``, so that each further one must add one label's outer product."""
    z = torch.stack([LOGITS[:3], LOGITS[:3].flip(0), 3 * LOGITS[1:]])
    choices = torch.stack([outers(row) for row in z])
    total = torch.zeros(3, 3, 3, dtype=torch.float64)
    for draws in range(1, 51):
        found = draws * metric(fk.SampledFisher, z, torch.zeros(3).long(), "categorical", draws=draws, seed=4)
        distance = (found - total)[:, None].sub(choices).flatten(2).norm(dim=2).min(1)
        assert float(distance.values.max()) < 1e-12
        total = total + choices[torch.arange(3), distance.indices]
    assert error(found, total) < 1e-12


def test_merge__of_sequences_joins_only_draws_that_agree_at_every_counted_position() -> None:
    z = torch.stack([3 * LOGITS[:2]] * 3)[None]  # two labels at three positions: at most eight rows
    y = torch.zeros(1, 3).long()
    model, inputs = table(z)
    assert 4 < fk.SampledFisher(model, (inputs, y), draws=60).rows <= 8
    y[0, 1] = IGNORE_INDEX  # what is drawn there is nobody's business
    assert 2 < fk.SampledFisher(model, (inputs, y), draws=60).rows <= 4


def test_merge__leaves_continuous_draws_alone() -> None:
    of = problem("gaussian_vector")
    assert build(fk.SampledFisher, of, draws=7).rows == 7 * 5


# -- reproducible ------------------------------------------------------------------------------------------------------


def test_targets__are_not_needed() -> None:
    of = problem("mlp")
    unlabelled = fk.SampledFisher(of.model, (of.inputs, None), seed=5)
    assert torch.equal(unlabelled.to_dense(), build(fk.SampledFisher, of, seed=5).to_dense())


# -- sequences and tokens ----------------------------------------------------------------------------------------------


def test_example__tokens_and_sequences_draw_the_same_labels() -> None:
    """So that a sequence's metric has the tokens' metrics as its diagonal blocks, and cross terms beside them."""
    z = torch.stack([LOGITS, LOGITS.flip(0), 2 * LOGITS])[None]
    y = torch.tensor([[1, IGNORE_INDEX, 0]])
    sequence, token = (
        metric(fk.SampledFisher, z, y, "categorical", example=example, seed=2)[0].reshape(3, 4, 3, 4)
        for example in ("sequence", "token")
    )
    for t in range(3):
        assert torch.allclose(sequence[t, :, t], token[t, :, t], rtol=1e-12, atol=0)
    assert bool(token[0, :, 0].any())
    assert bool(sequence[0, :, 2].any())
    assert not bool(token[0, :, 2].any())
    assert not bool(sequence[1].any())
    assert not bool(token[1].any())


@pytest.mark.parametrize("example", ["sequence", "token"])
def test_example__counts_rows_as_the_other_kinds_do(example: str) -> None:
    of = FAMILIES["token_mlp"].problem()
    fisher = build(fk.SampledFisher, of, example=example)
    expected = build(fk.EmpiricalFisher, of, example=example)
    assert (fisher.examples, fisher.rows) == (expected.examples, expected.rows)


# -- drawn from the model's distribution -------------------------------------------------------------------------------


def test_categorical__frequencies_are_the_models_over_examples() -> None:
    drawn = labels(LOGITS.expand(2000, 4).clone())
    expected = 2000 * torch.softmax(LOGITS, 0)
    assert stats.chisquare(drawn.bincount(minlength=4), expected.numpy()).pvalue > RARE


def test_categorical__frequencies_are_the_models_over_draws() -> None:
    draws = 4000
    found = metric(fk.SampledFisher, LOGITS[None], torch.zeros(1).long(), "categorical", draws=draws)[0]
    shares = torch.linalg.lstsq(outers(LOGITS).flatten(1).T, found.reshape(-1, 1)).solution.squeeze(1)
    drawn = (draws * shares).round()
    assert float((draws * shares - drawn).abs().max()) < 1e-6
    assert int(drawn.sum()) == draws
    assert stats.chisquare(drawn.numpy(), (draws * torch.softmax(LOGITS, 0)).numpy()).pvalue > RARE


def test_categorical__never_draws_a_label_of_probability_zero() -> None:
    z = torch.tensor([0.0, -2000, 0, -2000], dtype=torch.float64)
    found = metric(fk.SampledFisher, z[None], torch.zeros(1).long(), "categorical", draws=500)[0]
    assert not bool(found[1].any())
    assert not bool(found[3].any())


def test_bernoulli__outputs_are_drawn_each_by_its_own_probability() -> None:
    z = torch.tensor([[-1.0, 0.5, 2.0]], dtype=torch.float64)
    model, inputs = table(z.expand(2000, 3).clone())
    fisher = fk.SampledFisher(model, (inputs, None), likelihood="bernoulli", structure="diagonal", normalization="sum")
    p = torch.sigmoid(z[0])
    squares = fisher.diagonal().reshape(3, 2000)
    drawn = (squares - (1 - p[:, None]).square()).abs() < 1e-12
    assert bool((drawn | ((squares - p[:, None].square()).abs() < 1e-12)).all())
    for c in range(3):
        assert stats.binomtest(int(drawn[c].sum()), 2000, float(p[c])).pvalue > RARE
    assert stats.chi2_contingency(counts(drawn[0].long(), drawn[1].long())).pvalue > RARE


def test_gaussian__residuals_are_standard_normal() -> None:
    z = torch.linspace(-1e3, 1e3, 2000, dtype=torch.float64)[:, None]
    model, inputs = table(z)
    fisher = fk.SampledFisher(model, (inputs, None), likelihood="gaussian", structure="diagonal", normalization="sum")
    assert stats.kstest(fisher.diagonal().numpy(), stats.chi2(1).cdf).pvalue > RARE


def test_gaussian__residuals_of_one_example_have_unit_variance_and_no_correlation() -> None:
    z = torch.tensor([[-5.0, 0.0, 300.0]], dtype=torch.float64)
    found = metric(fk.SampledFisher, z, torch.zeros(1, 3), "gaussian", draws=20_000)[0]
    assert float((found - torch.eye(3)).abs().max()) < 4 * (2 / 20_000) ** 0.5


def test_examples__draw_independently_of_their_neighbours_even_if_they_are_the_same() -> None:
    drawn = labels(LOGITS.expand(2000, 4).clone())
    for distance in (1, 2, 64):
        assert stats.chi2_contingency(counts(drawn[:-distance], drawn[distance:])).pvalue > RARE
    alike = torch.stack([labels(LOGITS.expand(2, 4).clone(), seed=seed) for seed in range(40)])
    p = torch.softmax(LOGITS, 0)
    agreeing = int((alike[:, 0] == alike[:, 1]).sum())
    assert stats.binomtest(agreeing, 40, float(p.square().sum())).pvalue > RARE


# -- the numbers behind it ---------------------------------------------------------------------------------------------

KEYS = torch.arange(50)[:, None] * (1 << 24) + torch.arange(4)


@pytest.mark.parametrize("seed", [0, 1, -1, 12345, 1 << 61])
def test_keyed_uniform__is_uniform_within_the_open_interval(seed: int) -> None:
    u = keyed_uniform(seed, KEYS, draws=5, channels=6)
    assert u.shape == (50, 5, 4, 6)
    assert u.dtype == torch.float64
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > RARE
    assert len(u.unique()) == u.numel()


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["example", "draw", "position", "channel"])
def test_keyed_uniform__neighbours_are_uncorrelated_along_every_axis(axis: int) -> None:
    keys = torch.arange(20)[:, None] * (1 << 24) + torch.arange(12)
    u = keyed_uniform(3, keys, draws=12, channels=12).movedim(axis, 0)
    left, right = u[:-1].flatten().numpy(), u[1:].flatten().numpy()
    assert stats.pearsonr(left, right).pvalue > RARE
    assert stats.kstest((left + right) % 1, "uniform").pvalue > RARE


def test_keyed_uniform__seeds_are_uncorrelated() -> None:
    a, b = (keyed_uniform(seed, KEYS, draws=5, channels=6).flatten().numpy() for seed in (0, 1))
    assert stats.pearsonr(a, b).pvalue > RARE


def test_keyed_uniform__is_a_function_of_seed_key_draw_and_channel_alone() -> None:
    whole = keyed_uniform(7, KEYS, draws=5, channels=6)
    part = keyed_uniform(7, KEYS[13:20, 1:3], draws=2, channels=3)
    assert torch.equal(part, whole[13:20, :2, 1:3, :3])
