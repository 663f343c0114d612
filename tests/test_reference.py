"""The reference's zoo, vectors, rows and Kronecker factors against textbook facts.

What the reference computes is compared with the package everywhere else; here is what both could have wrong together.
"""

import itertools

import pytest
import torch
from torch import Tensor, nn

from tests.reference.capture import capture, kronecker_layers, patches
from tests.reference.checks import assert_below, assert_close, outer, output_case
from tests.reference.fisher import Problem, block, elements, forward_one, full, rows
from tests.reference.kronecker import Method, Sharing, kronecker
from tests.reference.models import EVERY_FORM, FAMILIES, Family
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
    loss,
    truncated,
    truncated_kind,
    vectors,
)
from tests.reference.zoo import Compose

SOME = ("mlp", "conv2d_groups", "hf_conv1d", "embedding", "token_mlp", "token_attention_by_token", "gaussian_tokens")
some_families = pytest.mark.parametrize("family", [FAMILIES[name] for name in SOME], ids=str)
every_likelihood = pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
every_shape = pytest.mark.parametrize("shape", [(4,), (3, 4)], ids=["C", "TC"])

# --- the zoo ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_zoo__is_tiny_and_deterministic_in_any_dtype_and_every_parameter_matters(family: Family) -> None:
    state = torch.get_rng_state()
    problem, again, other = family.problem(), family.problem(), family.problem(seed=1)
    single = family.problem(torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    z, narrow = (torch.stack([forward_one(of, n) for n in range(len(of.targets))]) for of in (problem, single))
    assert torch.equal(z[0], forward_one(again, 0))
    assert not torch.equal(z[0], forward_one(other, 0))
    assert (z.dtype, narrow.dtype) == (torch.float64, torch.float32)
    assert_close(narrow.double(), z, 1e-4)
    inputs = problem.inputs
    output = problem.model(inputs) if isinstance(inputs, Tensor) else problem.model(**inputs)
    assert_close(getattr(output, "logits", output), z)
    assert not any(module.training for module in problem.model.modules())
    assert sum(p.numel() for p in problem.chosen().values()) <= 400
    assert len(problem.targets) <= 6
    weights = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((weights * z).sum(), list(problem.chosen().values()))
    assert all(g.isfinite().all() and g.norm() > 1e-3 for g in gradients)


def smallest_pivot_gap(h: Tensor, first: Tensor) -> float:
    """How close any pivot comes to another that would give a different vector, relative to the trace."""
    residual, gap = h - first, 1.0
    while residual.diagonal().max() > 1e-12 * h.trace():
        pivot = int(residual.diagonal().argmax())
        best = residual[pivot].outer(residual[pivot]) / residual[pivot, pivot]
        for other in (residual.diagonal() > 1e-12 * h.trace()).nonzero().flatten().tolist():
            rival = residual[other].outer(residual[other]) / residual[other, other]
            if (best - rival).norm() > 1e-9 * h.trace():
                gap = min(gap, float((residual[pivot, pivot] - residual[other, other]) / h.trace()))
        residual = residual - best
    return gap


@pytest.mark.parametrize("name", EVERY_FORM)
def test_zoo__pivots_of_the_truncated_kind_are_not_close_to_a_tie(name: str) -> None:
    """Tied pivots would let rounding choose between different, equally valid matrices."""
    problem = FAMILIES[name].problem()
    by_kind = [[v for _, _, found in elements(problem, kind) for v in found] for kind in (EXACT, truncated_kind(1))]
    for exact, first in zip(*by_kind, strict=True):
        assert smallest_pivot_gap(outer(exact), outer(first)) > 2e-5


# --- output vectors --------------------------------------------------------------------------------------------------


@every_shape
def test_loss_gradient_and_hessian__are_torchs_and_the_closed_forms(shape: tuple[int, ...]) -> None:
    z, y = output_case("gaussian", shape)
    assert_close(loss(z, y, "gaussian"), 0.5 * nn.functional.mse_loss(z, y, reduction="sum"))
    assert_close(gradient(z, y, "gaussian"), z - y)
    assert_close(hessian(z, y, "gaussian"), torch.eye(z.numel(), dtype=z.dtype))
    z, y = output_case("bernoulli", shape)
    assert_close(loss(z, y, "bernoulli"), nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum"))
    p = z.sigmoid()
    assert_close(gradient(z, y, "bernoulli"), p - y)
    assert_close(hessian(z, y, "bernoulli"), (p * (1 - p)).reshape(-1).diag())
    z, y = output_case("categorical", shape)
    p, y = z.reshape(-1, 4).softmax(-1), y.reshape(-1)
    counts = (y != IGNORE_INDEX).double().unsqueeze(1)
    assert_close(loss(z, y.reshape(shape[:-1]), "categorical"), nn.functional.cross_entropy(z, y, reduction="sum"))
    expected = counts * (p - nn.functional.one_hot(y.clamp_min(0), 4))
    assert_close(gradient(z, y.reshape(shape[:-1]), "categorical").reshape(-1, 4), expected)
    blocks = torch.block_diag(*(c * (q.diag() - q.outer(q)) for c, q in zip(counts, p, strict=True)))
    assert_close(hessian(z, y.reshape(shape[:-1]), "categorical"), blocks)


def test_hessian__bernoulli_survives_a_saturated_logit() -> None:
    z = torch.tensor([25.0, -25.0], dtype=torch.float64)
    found = hessian(z, torch.tensor([0.0, 1.0]), "bernoulli").diagonal()
    assert_close(found, z.sigmoid() * (-z).sigmoid())


@every_likelihood
@every_shape
def test_vectors__of_every_kind_have_their_definition(likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    z, y = output_case(likelihood, shape)
    h, u = hessian(z, y, likelihood), gradient(z, y, likelihood)
    assert_close(vectors(EF, z, y, likelihood)[0], u)
    assert_close(vectors(IEF, z, y, likelihood)[0] * u.norm(), u)
    assert_close(vectors(Kind("ief", power=0.5), z, y, likelihood)[0] * u.norm().sqrt(), u)
    assert_close(outer(vectors(EXACT, z, y, likelihood)), h)
    u = u.reshape(-1)
    chain = [outer(truncated(u, h, r)) for r in range(1, int(torch.linalg.matrix_rank(h)) + 1)]
    for lower, upper in itertools.pairwise([*chain, h]):
        assert_below(lower, upper)
    assert_close(chain[-1], h)
    assert_close(chain[0] / chain[0].trace(), u.outer(u) / u.dot(u))
    assert torch.linalg.eigvalsh(h - 1.001 * chain[0])[0] < -1e-6 * h.trace()  # no larger multiple is below
    for tolerance in (0.5, 0.2, 0.05, 1e-3):
        found = truncated(u, h, tolerance=tolerance)
        assert (h - outer(found)).trace() <= tolerance * h.trace() + 1e-12
        assert len(found) == 1 or (h - outer(found[:-1])).trace() > tolerance * h.trace()


def test_vectors__sampled_are_the_mean_over_draws_and_keep_the_mask() -> None:
    z, y = output_case("categorical", (3, 4))
    draws = torch.tensor([[0, 1, 2], [3, 3, 3], [1, 0, IGNORE_INDEX]])
    found = vectors(SAMPLED, z, y, "categorical", draws)
    assert found[:, 1].norm() == 0
    masked = draws.masked_fill(y == IGNORE_INDEX, IGNORE_INDEX)
    assert_close(outer(found), torch.stack([outer(vectors(EF, z, draw, "categorical")) for draw in masked]).mean(0))


@pytest.mark.parametrize("kind", [EF, IEF, EXACT, truncated_kind(1), truncated_kind(tolerance=1e-2)], ids=str)
@every_likelihood
def test_example_vectors__token_is_each_position_that_counts_by_itself(kind: Kind, likelihood: Likelihood) -> None:
    z, y = output_case(likelihood, (3, 4))
    counted = [0, 2] if likelihood == "categorical" else [0, 1, 2]
    by_token = example_vectors(kind, z, y, likelihood, "token")
    for t, found in zip(counted, by_token, strict=True):
        assert_close(found[:, t], vectors(kind, z[t], y[t], likelihood))
        assert int(found.count_nonzero()) == int(found[:, t].count_nonzero())
    if likelihood == "categorical":
        for example in ("sequence", "token"):
            assert example_vectors(kind, z, torch.full_like(y, IGNORE_INDEX), likelihood, example) == []


# --- rows ------------------------------------------------------------------------------------------------------------


@some_families
def test_rows__empirical_is_the_gradient_of_each_loss(family: Family) -> None:
    problem = family.problem()
    found = rows(problem, EF)
    assert len(found.matrix) == found.count
    for n in range(len(problem.targets)):
        total = loss(forward_one(problem, n), problem.targets[n], problem.likelihood)
        grads = torch.autograd.grad(total, list(problem.chosen().values()))
        assert_close(found.matrix[found.element == n].sum(0), torch.cat([g.reshape(-1) for g in grads]))


@some_families
def test_full__exact_is_the_gauss_newton_matrix(family: Family) -> None:
    """JᵀHJ with the whole Jacobian from one batched backward, which no output-space vector enters."""
    problem = family.problem()
    parameters, count = list(problem.chosen().values()), rows(problem, EF).count
    total = torch.tensor(0.0)
    for n in range(len(problem.targets)):
        z = forward_one(problem, n)
        units = torch.eye(z.numel(), dtype=z.dtype).reshape(-1, *z.shape)
        columns = torch.autograd.grad(
            z, parameters, units, is_grads_batched=True, allow_unused=True, materialize_grads=True
        )
        jacobian = torch.cat([column.reshape(z.numel(), -1) for column in columns], dim=1)
        total = total + jacobian.T @ hessian(z.detach(), problem.targets[n], problem.likelihood) @ jacobian
    assert_close(full(rows(problem, EXACT)), total / count)
    assert_close(full(rows(problem, EXACT), "sum"), total)


# --- Kronecker factors -----------------------------------------------------------------------------------------------


@some_families
def test_capture__inputs_and_gradients_make_the_weight_rows(family: Family) -> None:
    problem = family.problem()
    for kind in (EF, EXACT):
        found = rows(problem, kind)
        for layer in capture(problem, kind).values():
            for r, g in enumerate(layer.gradients):
                assert_close(found.matrix[r, layer.index], g.T @ layer.inputs[int(found.example[r])])


@some_families
def test_patches__reproduce_the_layer(family: Family) -> None:
    problem = family.problem()
    for name in kronecker_layers(problem):
        module = problem.model.get_submodule(name)
        seen: list[tuple[Tensor, Tensor]] = []
        handle = module.register_forward_hook(
            lambda _, args, out, seen=seen: seen.append((args[0].clone(), out.clone()))
        )
        forward_one(problem, 0)
        handle.remove()
        (x, output), weight = seen[0], module.get_parameter("weight")
        matrix = weight.T if type(module).__name__ == "Conv1D" else weight.flatten(1)
        expected = output[0].flatten(1).T if "Conv" in type(module).__name__ and weight.ndim > 2 else output
        bias = dict(module.named_parameters()).get("bias", torch.zeros(()))
        assert_close(patches(module, x) @ matrix.T + bias, expected.reshape(-1, matrix.shape[0]))


def test_kronecker_layers__only_where_the_rule_holds() -> None:
    expected = {
        "mlp": ["0", "2"],
        "reused_module": ["head"],
        "shared_module": ["4"],
        "tied_linears": ["4"],
        "tied_head_parameter": ["body"],
        "attention_batch_first": ["head"],
        "masked_weight": [],
        "weight_norm": ["2"],
        "frozen_weight": ["4"],
        "frozen_bias": ["0", "2", "4"],
        "conv2d_groups": ["3"],
    }
    assert {name: kronecker_layers(FAMILIES[name].problem()) for name in expected} == expected


@pytest.mark.parametrize(
    ("shape", "pooled", "method", "sharing"),
    [((6, 4), False, "kfac", "expand"), ((6, 4), False, "ekfac", "reduce"), ((3, 2, 4), False, "kfac", "expand"),
     ((3, 2, 4), True, "kfac", "reduce")],
    ids=["plain", "ekfac", "every position", "mean of positions"],
)  # fmt: skip
def test_kronecker__is_exact_for_a_deep_linear_net_with_squared_error(
    shape: tuple[int, ...], pooled: bool, method: Method, sharing: Sharing
) -> None:
    model, inputs, _ = FAMILIES["deep_linear"].build()
    assert isinstance(inputs, Tensor)
    if pooled:
        model = Compose(lambda m, x: m.body(x).mean(1), body=model)
    x = inputs.reshape(shape)
    of = Problem(model, x, torch.zeros_like(model(x)), "gaussian")
    assert_close(kronecker(of, EXACT, method, sharing), block(rows(of, EXACT)))


def test_kronecker__reduce_is_exact_for_one_sequence_of_equal_positions() -> None:
    model, inputs, targets = FAMILIES["linear_3d"].build()
    assert isinstance(inputs, Tensor)
    problem = Problem(model, inputs[:1, :1].expand(1, 4, 3), targets[:1])
    assert_close(kronecker(problem, EF, sharing="reduce"), block(rows(problem, EF)))


def test_kronecker__factor_order_on_one_layer_by_hand() -> None:
    """One example and the gradient u: weight entry (o, i) has the gradient u_o x_i, the bias u_o."""
    model = nn.Linear(2, 3, dtype=torch.float64)
    x, y = torch.tensor([[2.0, -1.0]], dtype=torch.float64), torch.tensor([1])
    u = gradient(model(x)[0], y[0], "categorical")
    by_hand = torch.cat([torch.stack([u[o] * x[0, i] for o in range(3) for i in range(2)]), u])
    assert_close(kronecker(Problem(model, x, y), EF), by_hand.outer(by_hand))
