"""Theorems of the truncated kind: nested below the exact Fisher, with a certificate for every example.

Extreme logits are compared with the definition evaluated in a hundred decimal digits.
"""

from itertools import pairwise
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

import fisherkit as fk
from fisherkit.likelihoods import Categorical
from tests.precise import precise_metric
from tests.reference.fisher import Problem, elements, forward_one
from tests.reference.outputs import IGNORE_INDEX, Kind, counted_positions, gradient, hessian, truncated
from tests.theorem_cases import assert_below, build, error, gradients, metric, problem, table
from tests.watching import Largest

FAMILIES = [
    "mlp", "mlp_no_bias", "gaussian_vector", "bernoulli_multilabel", "token_mlp", "token_mlp_by_token", "mapping_batch",
    "gaussian_by_token", "gaussian_tokens", "bernoulli_tokens",
]  # fmt: skip


# -- nested below exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_rank__gives_a_chain_in_the_loewner_order_that_ends_at_exact(family: str) -> None:
    of = problem(family)
    full = max(len(v) for *_, found in elements(of, Kind("exact")) for v in found)
    exact = build(fk.ExactFisher, of).to_dense()
    chain = [build(fk.TruncatedFisher, of, rank=rank).to_dense() for rank in range(1, full + 2)]
    for lower, upper in pairwise([*chain, exact]):
        assert_below(lower, upper)
    assert error(chain[full - 1], exact) < 1e-11
    assert error(chain[full], exact) < 1e-11
    assert all(error(lower, exact) > 1e-6 for lower in chain[: full - 1])


@pytest.mark.parametrize("family", ["mlp_no_bias", "bernoulli_multilabel", "token_mlp"])
def test_rank__is_nested_in_float32_too(family: str) -> None:
    of = problem(family)
    narrow = Problem(of.model.float(), of.inputs.float(), of.targets, of.likelihood, of.example)
    if narrow.targets.is_floating_point():
        narrow = Problem(narrow.model, narrow.inputs, of.targets.float(), of.likelihood, of.example)
    chain = [build(fk.TruncatedFisher, narrow, rank=rank).to_dense() for rank in (1, 2, 3, 4)]
    for lower, upper in pairwise([*chain, build(fk.ExactFisher, narrow).to_dense()]):
        assert_below(lower, upper, tolerance=2e-6)


@pytest.mark.parametrize("family", ["binary_softmax", "bernoulli_scalar", "gaussian_scalar"])
def test_rank_one__is_exact_for_one_degree_of_freedom(family: str) -> None:
    of = problem(family)
    fisher = build(fk.TruncatedFisher, of, rank=1)
    assert error(fisher.to_dense(), build(fk.ExactFisher, of).to_dense()) < 1e-12
    assert fisher.rows == fisher.examples
    assert float(fisher.dropped_trace.abs().max()) < 1e-15


@pytest.mark.parametrize("family", ["gaussian_vector", "gaussian_tokens", "gaussian_by_token", "deep_linear"])
def test_rank_one__is_the_improved_empirical_fisher_if_the_metric_is_the_identity(family: str) -> None:
    of = problem(family)
    ief = build(fk.ImprovedEmpiricalFisher, of)
    assert error(build(fk.TruncatedFisher, of, rank=1).to_dense(), ief.to_dense()) < 1e-12


# -- the certificate ---------------------------------------------------------------------------------------------------


def reference_dropped(of: Problem, kind: Kind) -> tuple[Tensor, Tensor, list[int]]:
    """Dropped trace, whole trace and rank of every counted example, by the reference."""
    exact = [v.square().sum() for *_, found in elements(of, Kind("exact")) for v in found]
    kept = [v for *_, found in elements(of, kind) for v in found]
    whole = torch.stack(exact)
    return whole - torch.stack([v.square().sum() for v in kept]), whole, [len(v) for v in kept]


def jacobian_norms(of: Problem) -> Tensor:
    """‖J_n‖₂² of every counted example."""
    found, parameters = [], list(of.chosen().values())
    for n in range(len(of.targets)):
        z = forward_one(of, n)
        by_position = z.reshape(-1, z.shape[-1])
        counted = counted_positions(of.targets[n], len(by_position), of.likelihood)
        groups = [[t] for t in counted] if of.example == "token" else [counted] if counted else []
        for group in groups:
            rows = [torch.autograd.grad(e, parameters, retain_graph=True) for t in group for e in by_position[t]]
            jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
            found.append(torch.linalg.matrix_norm(jacobian, 2).square())
    return torch.stack(found)


OPTIONS: list[dict[str, Any]] = [
    {"rank": 1}, {"rank": 2}, {"rank": 3}, {"tolerance": 0.45}, {"tolerance": 0.1}, {"tolerance": 1e-3},
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_certificate__is_what_is_missing_and_bounds_the_error(family: str) -> None:
    of = problem(family)
    exact, norms = build(fk.ExactFisher, of).to_dense(), jacobian_norms(of)
    for options in OPTIONS:
        fisher = build(fk.TruncatedFisher, of, **options)
        dropped, whole, ranks = reference_dropped(of, Kind("truncated", **options))
        assert fisher.dropped_trace.shape == dropped.shape == (fisher.examples,)
        assert float((fisher.dropped_trace - dropped).abs().max()) < 1e-11
        assert fisher.rows == sum(ranks)  # per example the same dropped trace, so that each has the reference's rank
        if "tolerance" in options:
            assert bool((fisher.dropped_trace <= options["tolerance"] * whole * (1 + 1e-12)).all())
        missing = torch.linalg.matrix_norm(exact - fisher.to_dense(), 2)
        assert float(missing) <= float((fisher.dropped_trace * norms).mean()) + 1e-12


@pytest.mark.parametrize(
    ("family", "structure"),
    [*((family, "full") for family in FAMILIES), ("mlp", "ekfac"), ("token_mlp", "diagonal"), ("token_mlp", "ekfac")],
)
def test_tolerance__zero_is_exact(family: str, structure: str) -> None:
    of = problem(family)
    fisher = build(fk.TruncatedFisher, of, tolerance=0.0, structure=structure)
    exact = build(fk.ExactFisher, of, structure=structure)
    assert error(fisher.to_dense(), exact.to_dense()) < 1e-10
    assert float(fisher.dropped_trace.abs().max()) < 1e-15


def test_tolerance__gives_each_example_its_own_rank_whatever_its_batch() -> None:
    """One competitor, two, and everything open: they need 1, 2 and 5 vectors, alone or side by side."""
    z = torch.tensor([[9.0, 4, -4, -4, -4, -4], [9.0, 9, 9, 0, 0, 0], [0.0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    y = torch.tensor([0, 0, 1])
    together = _table_fisher(z, y, tolerance=0.05)
    alone = [_table_fisher(z[n : n + 1], y[n : n + 1], tolerance=0.05) for n in range(3)]
    needed = [len(truncated(*_loss(z[n], y[n]), tolerance=0.05)) for n in range(3)]
    assert [fisher.rows for fisher in alone] == needed
    assert needed == [1, 2, 5]
    assert together.rows == sum(needed)
    assert torch.cat([fisher.dropped_trace for fisher in alone]) == pytest.approx(together.dropped_trace)


def _table_fisher(z: Tensor, y: Tensor, **options: Any) -> fk.TruncatedFisher:
    model, inputs = table(z)
    return fk.TruncatedFisher(model, (inputs, y), **options)


def _loss(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return gradient(z, y, "categorical"), hessian(z, y, "categorical")


# -- the gradient lies in the rows' span -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_range__holds_the_gradient_so_that_tiny_damping_is_harmless(family: str, rank: int) -> None:
    """With ∇L = mean √(uᵀH⁺u) Jᵀv₁, the update x of any damping has xᵀFx ≤ mean uᵀH⁺u and ‖x‖² ≤ that / 4λ."""
    of = problem(family)
    forms = [_form(z.detach(), of, n) for n, z, found in elements(of, Kind("ef")) if found]
    fisher = build(fk.TruncatedFisher, of, rank=rank)
    slope = gradients(of).sum(0) / fisher.examples
    bound = float(torch.cat(forms).mean())
    for damping in (1e-2, 1e-5, 1e-8):
        update = fisher.solve(slope, damping=damping)
        assert float(fisher.quadratic_form(update)) <= bound * (1 + 1e-6)
        assert float(update.square().sum()) <= bound / (4 * damping) * (1 + 1e-6)


def _form(z: Tensor, of: Problem, n: int) -> Tensor:
    """uᵀH⁺u of each example in a batch element."""
    y, whole = of.targets[n], z.reshape(-1, z.shape[-1])
    counted = counted_positions(y, len(whole), of.likelihood)
    parts = [(z, y)] if of.example == "sequence" else [(whole[t], y[t]) for t in counted]
    pairs = [(gradient(a, b, of.likelihood).reshape(-1), hessian(a, b, of.likelihood)) for a, b in parts]
    return torch.stack([u @ torch.linalg.pinv(h, rtol=1e-12, hermitian=True) @ u for u, h in pairs])


def test_range__of_the_sampled_kind_does_not_hold_it() -> None:
    """The contrast that makes the test above worth having: there the gradient comes back divided by the damping."""
    of = problem("mlp_no_bias")
    slope = gradients(of).mean(0)
    fisher = build(fk.SampledFisher, of)
    assert float(fisher.solve(slope, damping=1e-8).norm()) > 1e7 * float(slope.norm())


# -- softmax in closed form --------------------------------------------------------------------------------------------


def reference_metric(z: Tensor, y: Tensor, rank: int) -> Tensor:
    """Σ v vᵀ of each example in 60 digits: of sure predictions, H in float64 has lost nine."""
    with mpmath.workdps(60):
        return torch.stack([_precise(z[n].tolist(), int(y[n]), rank) for n in range(len(z))])


def _precise(z: list[float], y: int, rank: int) -> Tensor:
    weights = [mpmath.exp(mpmath.mpf(entry)) for entry in z]
    p = mpmath.matrix([weight / sum(weights) for weight in weights])
    h, u = mpmath.diag(list(p)) - p * p.T, p.copy()
    u[y] -= 1
    # H is regular without one output, and H x = u is solved by an x that is 0 there.
    rest = [c for c in range(len(z)) if c != y]
    x = mpmath.lu_solve(mpmath.matrix([[h[a, b] for b in rest] for a in rest]), mpmath.matrix([u[c] for c in rest]))
    v = u / mpmath.sqrt(sum(u[c] * x[i] for i, c in enumerate(rest)))
    found, left = v * v.T, h - v * v.T
    for _ in range(min(rank, len(z) - 1) - 1):
        pivot = max(range(len(z)), key=lambda c: left[c, c])
        v = left[:, pivot] / mpmath.sqrt(left[pivot, pivot])
        found, left = found + v * v.T, left - v * v.T
    return torch.tensor([[float(entry) for entry in row] for row in found.tolist()], dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_softmax__closed_form_is_pivoted_cholesky_after_the_gradient(spread: float, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    z = spread * torch.randn(40, 6, dtype=torch.float64, generator=generator)
    y = torch.randint(6, (40,), generator=generator)
    found = metric(fk.TruncatedFisher, z, y, "categorical", rank=rank)
    assert error(found, reference_metric(z, y, rank)) < 1e-9


class Relabelled(Categorical):
    """A categorical likelihood that the closed form does not recognise."""


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_softmax__closed_form_agrees_with_the_general_construction(spread: float, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    z = spread * torch.randn(20, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(5, (20,), generator=generator)
    closed, general = (metric(fk.TruncatedFisher, z, y, kind, rank=rank) for kind in ("categorical", Relabelled()))
    assert error(general, closed) < 1e-9


@pytest.mark.parametrize(
    ("z", "y"),
    [([0.0] * 6, 2), ([1.0, 1, 0, 0, 0, 1], 3), ([2.0, 2, 2, -1, -1, -1], 0), ([3.0, 3, 3, 3, 3, -9], 5)],
    ids=["uniform", "label least likely", "two levels", "one unlikely label"],
)
def test_softmax__repeated_probabilities_leave_the_order_of_ties_open_but_nothing_else(z: list[float], y: int) -> None:
    outputs, label = torch.tensor([z], dtype=torch.float64), torch.tensor([y])
    exact = metric(fk.ExactFisher, outputs, label, "categorical")
    chain = [metric(fk.TruncatedFisher, outputs, label, "categorical", rank=rank) for rank in range(1, 6)]
    for lower, upper in pairwise([*chain, exact]):
        assert_below(lower, upper)
    assert error(chain[-1], exact) < 1e-12
    for rank, found in enumerate(chain, 1):
        expected = reference_metric(outputs, label, rank)
        assert float(found[0].trace()) == pytest.approx(float(expected[0].trace()), rel=1e-10)


def test_softmax__of_a_thousand_classes_costs_a_few_vectors_never_a_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(4, 1000, dtype=torch.float64, generator=generator)
    y = torch.randint(1000, (4,), generator=generator)
    with Largest() as largest:
        fisher = _table_fisher(z, y, rank=3, normalization="sum")
    assert largest.entries <= 3 * 4 * 4 * 1000  # rank × examples × the table's parameters
    assert fisher.rows == 12
    p = torch.softmax(z[0], -1)
    h = p.diag() - torch.outer(p, p)
    u = p - torch.nn.functional.one_hot(y[0], 1000)
    v = truncated(u, h, rank=3)
    probe = torch.randn(1000, dtype=torch.float64, generator=generator)
    columns = torch.zeros(1000, 4, dtype=torch.float64)
    columns[:, 0] = probe  # the table's parameters of its first example
    found = fisher.matvec(columns.reshape(-1)).reshape(1000, 4)
    assert error(found[:, 0], v.T @ (v @ probe)) < 1e-8
    assert not bool(found[:, 1:].any())
    assert float(fisher.dropped_trace[0]) == pytest.approx(float(h.trace() - v.square().sum()), rel=1e-9)


# -- extremes ----------------------------------------------------------------------------------------------------------


EXTREME = {
    "sure and right": ([0.0, -28, -29, -30], 0),
    "sure and right, ties": ([28.0, 0, 0, 0], 0),
    "sure and wrong": ([0.0, -28, -29, -30], 1),
    "sure and wrong, ties": ([28.0, 0, 0, 0], 2),
    "sure between two": ([30.0, 0, 30, 1], 0),
    "label impossible": ([40.0, 39, 0, -20], 3),
    "rounded to certainty in float32": ([60.0, 0, -5, 3], 0),
    "far from zero": ([1000.0, 971, 970, 972], 0),
    "two classes": ([28.0, 0], 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("case", EXTREME)
def test_extreme__probabilities_within_1e_12_of_zero_or_one_keep_relative_accuracy(
    case: str, rank: int, dtype: torch.dtype
) -> None:
    """Of a metric that is itself as small as 1e-12: an absolute error of one rounding would be all that is left."""
    logits, label = EXTREME[case]
    z, y = torch.tensor([logits], dtype=dtype), torch.tensor([label])
    found = metric(fk.TruncatedFisher, z, y, "categorical", rank=rank)[0]
    expected = precise_metric(z, y, rank)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert bool(torch.isfinite(found).all())
    assert error(found, expected) < tolerance
    if rank == 1:  # one outer product: entry by entry, the smallest included
        underflow = torch.finfo(dtype).tiny
        assert bool(((found - expected).abs() <= 4 * tolerance * expected.abs() + underflow).all())


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("labels", [[0, 0], [0, 1], [1, 3], [0, IGNORE_INDEX]], ids=str)
def test_extreme__positions_joined_in_one_example_keep_it_too(labels: list[int], rank: int) -> None:
    z = torch.tensor([[0.0, -28, -29, -30], [27.0, 1, 0, 0]], dtype=torch.float32)
    y = torch.tensor(labels)
    found = metric(fk.TruncatedFisher, z[None], y[None], "categorical", rank=rank)[0]
    assert bool(torch.isfinite(found).all())
    assert error(found, precise_metric(z, y, rank)) < 1e-6


@pytest.mark.parametrize("logit", [28.0, -28.0, 90.0, -90.0, 800.0, -800.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_extreme__bernoulli_outputs_stay_below_exact(logit: float, target: float) -> None:
    """Beyond ±745 the variance of an output is zero even in float64: a wrong one has nothing to be a multiple of."""
    z, y = torch.tensor([[logit, 0.5, 1.0]], dtype=torch.float64), torch.tensor([[target, 0.0, 1.0]]).double()
    exact = metric(fk.ExactFisher, z, y, "bernoulli")
    chain = [metric(fk.TruncatedFisher, z, y, "bernoulli", rank=rank) for rank in (1, 2, 3, 4)]
    for lower, upper in pairwise([*chain, exact]):
        assert bool(torch.isfinite(lower).all())
        assert_below(lower, upper)


ZERO = {
    "gaussian": ([[1.0, 2, 3]], [[1.0, 2, 3]]),
    "bernoulli": ([[0.0, 0, 0]], [[0.5, 0.5, 0.5]]),
    "gaussian beside others": ([[1.0, 2, 3], [0, 0, 0]], [[1.0, 2, 3], [1, 2, 3]]),
}


@pytest.mark.parametrize("case", ZERO)
def test_zero_gradient__starts_with_a_pivot_and_still_ends_at_exact(case: str) -> None:
    """No direction to begin with is no reason to miss one at the end."""
    z, y = (torch.tensor(values, dtype=torch.float64) for values in ZERO[case])
    likelihood = case.partition(" ")[0]
    exact = metric(fk.ExactFisher, z, y, likelihood)
    chain = [metric(fk.TruncatedFisher, z, y, likelihood, rank=rank) for rank in (1, 2, 3)]
    for lower, upper in pairwise([*chain, exact]):
        assert_below(lower, upper)
    assert error(chain[-1], exact) < 1e-12
    assert error(metric(fk.TruncatedFisher, z, y, likelihood, tolerance=0.0), exact) < 1e-12


def test_zero_gradient__that_underflowed_gives_a_finite_fisher() -> None:
    """Softmax so sure that no other class is left in float32: its metric is below the smallest number too."""
    z, y = torch.tensor([[400.0, 0, 0], [0.0, 1, 2]]), torch.tensor([0, 1])
    found = metric(fk.TruncatedFisher, z, y, "categorical", rank=2)
    assert bool(torch.isfinite(found).all())
    assert not bool(found[0].any())
    assert error(found[1], metric(fk.ExactFisher, z, y, "categorical")[1]) < 1e-6
