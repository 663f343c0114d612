"""The output-space reference against textbook facts."""

import itertools
import math

import pytest
import torch
from torch import nn

from tests.reference.checks import assert_below, assert_close, outer, output_case
from tests.reference.outputs import (
    EF,
    EXACT,
    IEF,
    IGNORE_INDEX,
    SAMPLED,
    Kind,
    Likelihood,
    example_vectors,
    gradient,
    hessian,
    improved,
    loss,
    square_root,
    truncated,
    truncated_kind,
    vectors,
)

LIKELIHOODS: list[Likelihood] = ["categorical", "gaussian", "bernoulli"]
KINDS = [EF, IEF, Kind("ief", power=0.5), EXACT, *map(truncated_kind, (1, 2, 3)), truncated_kind(tolerance=1e-2)]

every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
every_shape = pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=["C", "TC"])


def test_kinds__have_distinct_names() -> None:
    assert len({str(kind) for kind in KINDS}) == len(KINDS)
    assert math.isclose(KINDS[2].power, 0.5)


def test_gradient_and_hessian__softmax_closed_form() -> None:
    z, y = output_case("categorical", (4,))
    p = z.softmax(-1)
    assert_close(gradient(z, y, "categorical"), p - nn.functional.one_hot(y, 4))
    assert_close(hessian(z, y, "categorical"), p.diag() - p.outer(p))


@every_shape
def test_gradient_and_hessian__gaussian_and_bernoulli_closed_forms(shape: tuple[int, ...]) -> None:
    z, y = output_case("gaussian", shape)
    assert_close(gradient(z, y, "gaussian"), z - y)
    assert_close(hessian(z, y, "gaussian"), torch.eye(z.numel(), dtype=z.dtype))
    z, y = output_case("bernoulli", shape)
    p = z.sigmoid()
    assert_close(gradient(z, y, "bernoulli"), p - y)
    assert_close(hessian(z, y, "bernoulli"), (p * (1 - p)).reshape(-1).diag())


def test_loss__agrees_with_torch() -> None:
    z, y = output_case("categorical", (3, 4))
    assert_close(loss(z, y, "categorical"), nn.functional.cross_entropy(z, y, reduction="sum"))
    z, y = output_case("bernoulli", (3, 4))
    assert_close(loss(z, y, "bernoulli"), nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum"))
    z, y = output_case("gaussian", (3, 4))
    assert_close(loss(z, y, "gaussian"), 0.5 * nn.functional.mse_loss(z, y, reduction="sum"))


def test_hessian__bernoulli_survives_a_saturated_logit() -> None:
    z = torch.tensor([25.0, -25.0], dtype=torch.float64)
    found = hessian(z, torch.tensor([0.0, 1.0]), "bernoulli").diagonal()
    assert_close(found, z.sigmoid() * (-z).sigmoid())


def test_hessian__ignored_position_and_foreign_position_are_zero() -> None:
    z, y = output_case("categorical", (3, 4))
    blocks = hessian(z, y, "categorical").reshape(3, 4, 3, 4)
    assert all(blocks[s, :, t].norm() == 0 for s, t in itertools.product(range(3), repeat=2) if s != t or s == 1)
    assert gradient(z, y, "categorical")[1].norm() == 0


@every_likelihood
@every_shape
def test_exact__squares_to_the_hessian(likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    z, y = output_case(likelihood, shape)
    assert_close(outer(vectors(EXACT, z, y, likelihood)), hessian(z, y, likelihood))
    assert_close(outer(square_root(hessian(z, y, likelihood))), hessian(z, y, likelihood))


def test_exact__is_the_expected_empirical_fisher() -> None:
    z, _ = output_case("categorical", (4,))
    by_label = [p * outer(vectors(EF, z, torch.tensor(c), "categorical")) for c, p in enumerate(z.softmax(-1))]
    assert_close(torch.stack(by_label).sum(0), hessian(z, torch.tensor(0), "categorical"))


def test_sampled__is_the_mean_over_the_draws_and_keeps_the_mask() -> None:
    z, y = output_case("categorical", (3, 4))
    draws = torch.tensor([[0, 1, 2], [3, 3, 3], [1, 0, IGNORE_INDEX]])
    found = vectors(SAMPLED, z, y, "categorical", draws)
    assert found[:, 1].norm() == 0
    masked = draws.masked_fill(y == IGNORE_INDEX, IGNORE_INDEX)
    each = [outer(vectors(EF, z, draw, "categorical")) for draw in masked]
    assert_close(outer(found), torch.stack(each).mean(0))
    with pytest.raises(ValueError, match="drawn targets"):
        vectors(SAMPLED, z, y, "categorical")


@every_likelihood
@every_shape
def test_ief__has_unit_norm_along_the_gradient(likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    z, y = output_case(likelihood, shape)
    u = gradient(z, y, likelihood)
    assert_close(vectors(IEF, z, y, likelihood)[0] * u.norm(), u)
    assert_close(improved(u, 0.5).norm(), u.norm().sqrt())
    assert_close(improved(u, 0.0), u)


def test_ief__zero_gradient_stays_zero() -> None:
    z, _ = output_case("gaussian", (3, 4))
    assert torch.equal(vectors(IEF, z, z.clone(), "gaussian"), torch.zeros(1, 3, 4, dtype=z.dtype))


@every_likelihood
@every_shape
def test_truncated__is_a_loewner_chain_that_ends_at_exact(likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    z, y = output_case(likelihood, shape)
    h, u = hessian(z, y, likelihood), gradient(z, y, likelihood).reshape(-1)
    rank = int(torch.linalg.matrix_rank(h))
    chain = [outer(truncated(u, h, r)) for r in range(1, rank + 1)]
    for lower, upper in itertools.pairwise([*chain, h]):
        assert_below(lower, upper)
    assert_close(chain[-1], h)
    assert_close(truncated(u, h), truncated(u, h, rank + 5))
    assert len(truncated(u, h)) == rank


@every_likelihood
@every_shape
def test_truncated__first_vector_is_the_largest_multiple_of_the_gradient(
    likelihood: Likelihood, shape: tuple[int, ...]
) -> None:
    z, y = output_case(likelihood, shape)
    h, u = hessian(z, y, likelihood), gradient(z, y, likelihood).reshape(-1)
    first = outer(truncated(u, h, 1))
    assert_close(first / first.trace(), u.outer(u) / u.dot(u))
    assert torch.linalg.eigvalsh(h - 1.001 * first)[0] < -1e-6 * h.trace()


def test_truncated__softmax_closed_form_of_the_first_vector() -> None:
    z, y = output_case("categorical", (4,))
    p = z.softmax(-1)
    label = nn.functional.one_hot(y, 4).double()
    others = p * (1 - label) / (1 - p[y])
    expected = (p[y] * (1 - p[y])).sqrt() * (label - others)
    assert_close(outer(vectors(truncated_kind(1), z, y, "categorical")), expected.outer(expected))


def test_truncated__rank_one_is_exact_for_two_classes_and_for_one_logit() -> None:
    z, y = output_case("categorical", (2,))
    assert_close(outer(vectors(truncated_kind(1), z, y, "categorical")), hessian(z, y, "categorical"))
    z, y = output_case("bernoulli", (1,))
    assert_close(outer(vectors(truncated_kind(1), z, y, "bernoulli")), hessian(z, y, "bernoulli"))


@every_shape
def test_truncated__gaussian_rank_one_is_ief(shape: tuple[int, ...]) -> None:
    z, y = output_case("gaussian", shape)
    assert_close(vectors(truncated_kind(1), z, y, "gaussian"), vectors(IEF, z, y, "gaussian"))


@every_likelihood
@every_shape
@pytest.mark.parametrize("tolerance", [0.5, 0.2, 0.05, 1e-3])
def test_truncated__tolerance_takes_the_smallest_rank(
    likelihood: Likelihood, shape: tuple[int, ...], tolerance: float
) -> None:
    z, y = output_case(likelihood, shape)
    h, u = hessian(z, y, likelihood), gradient(z, y, likelihood).reshape(-1)
    found = truncated(u, h, tolerance=tolerance)
    assert (h - outer(found)).trace() <= tolerance * h.trace() + 1e-12
    if len(found) > 1:
        assert (h - outer(found[:-1])).trace() > tolerance * h.trace()
    assert_close(found, truncated(u, h, len(found)))


def test_truncated__zero_gradient_starts_with_a_pivot() -> None:
    z, _ = output_case("gaussian", (4,))
    assert_close(outer(vectors(truncated_kind(4), z, z.clone(), "gaussian")), torch.eye(4, dtype=z.dtype))


@every_kind
def test_example_vectors__all_ignored_is_no_example(kind: Kind) -> None:
    z, y = output_case("categorical", (3, 4))
    y.fill_(IGNORE_INDEX)
    assert example_vectors(kind, z, y, "categorical", "sequence") == []
    assert example_vectors(kind, z, y, "categorical", "token") == []


@every_kind
@every_likelihood
def test_example_vectors__token_is_each_position_by_itself(kind: Kind, likelihood: Likelihood) -> None:
    z, y = output_case(likelihood, (3, 4))
    counted = [0, 2] if likelihood == "categorical" else [0, 1, 2]
    by_token = example_vectors(kind, z, y, likelihood, "token")
    assert len(by_token) == len(counted)
    for t, found in zip(counted, by_token, strict=True):
        assert_close(found[:, t], vectors(kind, z[t], y[t], likelihood))
        assert int(found.count_nonzero()) == int(found[:, t].count_nonzero())


def test_example_vectors__exact_is_the_same_sum_for_tokens_and_sequence() -> None:
    z, y = output_case("categorical", (3, 4))
    tokens = torch.cat(example_vectors(EXACT, z, y, "categorical", "token"))
    assert_close(outer(tokens), outer(example_vectors(EXACT, z, y, "categorical")[0]))
