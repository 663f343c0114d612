"""The reference's zoo, rows and dense matrices against themselves and against textbook facts."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from tests.reference.capture import capture, kronecker_layers, patches
from tests.reference.checks import assert_below, assert_close, outer, output_case
from tests.reference.fisher import Problem, block, block_indices, diagonal, elements, forward_one, full, layout, rows
from tests.reference.kronecker import Method, Sharing, determined_layers, kronecker, layer_blocks
from tests.reference.models import EVERY_FORM, FAMILIES, Family
from tests.reference.outputs import (
    EF,
    EXACT,
    IGNORE_INDEX,
    SAMPLED,
    Example,
    Likelihood,
    gradient,
    hessian,
    loss,
    truncated_kind,
)
from tests.reference.zoo import Compose

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
every_form = pytest.mark.parametrize("family", [FAMILIES[name] for name in EVERY_FORM], ids=str)
SOME = ("mlp", "conv2d_groups", "hf_conv1d", "embedding", "token_mlp", "token_attention_by_token", "gaussian_tokens")
some_families = pytest.mark.parametrize("family", [FAMILIES[name] for name in SOME], ids=str)
"""The reference is compared with the package on every family; with textbook facts on these."""

METHODS: tuple[Method, Method] = ("kfac", "ekfac")
SHARINGS: tuple[Sharing, Sharing] = ("expand", "reduce")

every_sharing = pytest.mark.parametrize("sharing", SHARINGS)


def test_zoo__is_large_enough() -> None:
    assert len(FAMILIES) >= 22


@every_family
def test_zoo__is_tiny_and_deterministic_and_every_parameter_matters(family: Family) -> None:
    state = torch.get_rng_state()
    problem, again, other = family.problem(), family.problem(), family.problem(seed=1)
    assert torch.equal(state, torch.get_rng_state())
    z = [forward_one(problem, n) for n in range(len(problem.targets))]
    assert torch.equal(z[0], forward_one(again, 0))
    assert not torch.equal(z[0], forward_one(other, 0))
    assert z[0].dtype == torch.float64
    assert not any(module.training for module in problem.model.modules())
    assert sum(p.numel() for p in problem.chosen().values()) <= 400
    assert len(problem.targets) <= 6
    weights = torch.randn(len(z), *z[0].shape, dtype=z[0].dtype, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((weights * torch.stack(z)).sum(), list(problem.chosen().values()))
    assert all(g.isfinite().all() and g.norm() > 1e-3 for g in gradients)


@every_family
def test_zoo__float32_and_whole_batches_are_the_same_problem(family: Family) -> None:
    double, single = family.problem(torch.float64), family.problem(torch.float32)
    z = torch.stack([forward_one(double, n) for n in range(len(double.targets))])
    narrow = torch.stack([forward_one(single, n) for n in range(len(double.targets))])
    assert narrow.dtype == torch.float32
    assert_close(narrow.double(), z, 1e-4)
    inputs = double.inputs
    output = double.model(inputs) if isinstance(inputs, Tensor) else double.model(**inputs)
    assert_close(getattr(output, "logits", output), z)


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


@every_form
def test_zoo__pivots_of_the_truncated_kind_are_not_close_to_a_tie(family: Family) -> None:
    """Tied pivots would let rounding choose between different, equally valid matrices."""
    problem = family.problem()
    by_kind = [[v for _, _, found in elements(problem, kind) for v in found] for kind in (EXACT, truncated_kind(1))]
    for exact, first in zip(*by_kind, strict=True):
        assert smallest_pivot_gap(outer(exact), outer(first)) > 2e-5


# --- rows and dense matrices -----------------------------------------------------------------------------------------


@some_families
def test_rows__empirical_is_the_gradient_of_each_loss(family: Family) -> None:
    problem = family.problem()
    found = rows(problem, EF)
    assert len(found.matrix) == found.count
    assert torch.equal(found.example, torch.arange(found.count))
    summed = torch.zeros_like(found.matrix[0])
    for n in range(len(problem.targets)):
        total = loss(forward_one(problem, n), problem.targets[n], problem.likelihood)
        grads = torch.autograd.grad(total, list(problem.chosen().values()))
        expected = torch.cat([g.reshape(-1) for g in grads])
        assert_close(found.matrix[found.element == n].sum(0), expected)
        summed += expected
    assert_close(found.matrix.sum(0), summed)
    assert_close(full(found).trace(), found.matrix.square().sum() / found.count)


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


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian", "bernoulli"])
def test_full__exact_is_the_loss_hessian_of_a_linear_model(likelihood: Likelihood) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cases = [output_case(likelihood, (4,), seed) for seed in range(5)]
    targets = torch.stack([y for _, y in cases])
    model = nn.Linear(3, 4, dtype=torch.float64)

    def mean_loss(flat: Tensor) -> Tensor:
        z = x @ flat[:12].reshape(4, 3).T + flat[12:]
        return torch.stack([loss(z[n], targets[n], likelihood) for n in range(5)]).mean()

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    expected = torch.autograd.functional.hessian(mean_loss, flat)  # type: ignore[no-untyped-call]
    assert_close(full(rows(Problem(model, x, targets, likelihood), EXACT)), expected)


@some_families
def test_rows__kinds_are_ordered(family: Family) -> None:
    problem = family.problem()
    chain = [full(rows(problem, kind)) for kind in (*map(truncated_kind, (1, 2, 3)), EXACT)]
    for lower, upper in itertools.pairwise(chain):
        assert_below(lower, upper)
    everything = truncated_kind(rank=forward_one(problem, 0).numel())
    assert_close(full(rows(problem, everything)), chain[-1], 1e-9)


def test_rows__sampled_is_the_mean_of_empirical_fishers() -> None:
    problem = FAMILIES["token_mlp"].problem()
    draws = torch.randint(3, (2, *problem.targets.shape), generator=torch.Generator().manual_seed(0))
    masked = draws.masked_fill(problem.targets == IGNORE_INDEX, IGNORE_INDEX)
    each = [full(rows(Problem(problem.model, problem.inputs, draw), EF)) for draw in masked]
    assert_close(full(rows(problem, SAMPLED, draws)), torch.stack(each).mean(0))


def test_rows__tokens_and_sequences_are_counted() -> None:
    sequence, token = (rows(FAMILIES[name].problem(), EF) for name in ("token_mlp", "token_mlp_by_token"))
    targets = FAMILIES["token_mlp"].problem().targets
    assert sequence.count == len(targets) - 1
    assert token.count == int((targets != IGNORE_INDEX).sum())
    assert 2 not in sequence.element
    for example, element in enumerate(sequence.element):
        assert_close(token.matrix[token.element == element].sum(0), sequence.matrix[example])


@some_families
def test_block_and_diagonal__are_parts_of_full(family: Family) -> None:
    found = rows(family.problem(), EF)
    blocks = block_indices(found)
    assert torch.equal(torch.cat(list(blocks.values())).sort().values, torch.arange(found.matrix.shape[1]))
    assert_close(diagonal(found), block(found).diagonal())
    assert_close(block(found, "sum"), found.count * block(found))
    for index in blocks.values():
        assert_close(block(found)[index[:, None], index], full(found)[index[:, None], index])
    inside = sum(len(index) ** 2 for index in blocks.values())
    assert int(block(found).count_nonzero()) <= inside


def test_layout__tied_and_frozen_parameters() -> None:
    assert list(layout(FAMILIES["tied_head_parameter"].problem())) == [
        "position",
        "emb.weight",
        "body.weight",
        "body.bias",
        "head.bias",
    ]
    assert list(layout(FAMILIES["shared_module"].problem())) == ["0.weight", "0.bias", "4.weight", "4.bias"]
    assert list(layout(FAMILIES["frozen_weight"].problem())) == ["0.bias", "2.bias", "4.weight", "4.bias"]
    assert set(block_indices(rows(FAMILIES["tied_linears"].problem(), EF))) == {"0", "2", "4"}


def test_rows__padding_row_of_an_embedding_is_zero() -> None:
    exact = rows(FAMILIES["embedding"].problem(), EXACT)
    weight = exact.matrix[:, exact.layout["emb.weight"]].reshape(-1, 6, 4)
    assert weight[:, 1].norm() == 0
    assert weight[:, 3].norm() > 0


def test_rows__chosen_names_pick_columns() -> None:
    family = FAMILIES["mlp"]
    everything = rows(family.problem(), EXACT)
    some = rows(Problem(*family.build(), params=("2.bias", "0.weight")), EXACT)
    assert list(some.layout) == ["0.weight", "2.bias"]
    picked = [everything.matrix[:, everything.layout[name]] for name in some.layout]
    assert_close(some.matrix, torch.cat(picked, dim=1))


# --- Kronecker factors -----------------------------------------------------------------------------------------------


@some_families
def test_capture__inputs_and_gradients_make_the_weight_rows(family: Family) -> None:
    problem = family.problem()
    for kind in (EF, EXACT):
        found = rows(problem, kind)
        for layer in capture(problem, kind).values():
            for r, g in enumerate(layer.gradients):
                expected = g.T @ layer.inputs[int(found.example[r])]
                assert_close(found.matrix[r, layer.index], expected)


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


@some_families
@every_sharing
def test_kronecker__ekfac_keeps_the_trace_and_is_no_farther_than_kfac(family: Family, sharing: Sharing) -> None:
    problem = family.problem()
    dense = full(rows(problem, EXACT))
    by_method = [layer_blocks(problem, EXACT, method, sharing) for method in METHODS]
    for name, (index, ekfac) in by_method[1].items():
        truth = dense[index[:, None], index]
        assert_close(ekfac.trace(), truth.trace())
        assert (ekfac - truth).norm() <= (by_method[0][name][1] - truth).norm() + 1e-12 * truth.norm()


@pytest.mark.parametrize("method", METHODS)
@every_sharing
def test_kronecker__is_exact_for_a_deep_linear_net_with_squared_error(method: Method, sharing: Sharing) -> None:
    problem = FAMILIES["deep_linear"].problem()
    found = kronecker(problem, EXACT, method, sharing)
    assert_close(found, block(rows(problem, EXACT)))


@pytest.mark.parametrize("example", ["sequence", "token"])
def test_kronecker__expand_is_exact_for_a_deep_linear_net_at_every_position(example: Example) -> None:
    model, inputs, _ = FAMILIES["deep_linear"].build()
    assert isinstance(inputs, Tensor)
    sequences = inputs.reshape(3, 2, 4)
    problem = Problem(model, sequences, torch.zeros(3, 2, 3, dtype=torch.float64), "gaussian", example)
    assert_close(kronecker(problem, EXACT), block(rows(problem, EXACT)))


def test_kronecker__reduce_is_exact_for_a_deep_linear_net_with_mean_pooling() -> None:
    model, inputs, _ = FAMILIES["deep_linear"].build()
    assert isinstance(inputs, Tensor)
    pooled = Compose(lambda m, x: m.body(x).mean(1), body=model)
    problem = Problem(pooled, inputs.reshape(3, 2, 4), torch.zeros(3, 3, dtype=torch.float64), "gaussian")
    assert_close(kronecker(problem, EXACT, sharing="reduce"), block(rows(problem, EXACT)))


@pytest.mark.parametrize("name", ["mlp", "residual", "frozen_bias", "inplace_relu_linear", "batchnorm1d"])
def test_kronecker__is_exact_for_one_example_without_shared_positions(name: str) -> None:
    model, inputs, targets = FAMILIES[name].build()
    assert isinstance(inputs, Tensor)
    problem = Problem(model, inputs[:1], targets[:1])
    for kind, sharing in itertools.product((EF, EXACT), SHARINGS):
        assert_close(kronecker(problem, kind, "kfac", sharing), block(rows(problem, kind)))


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


def test_kronecker__fallback_and_normalization() -> None:
    problem = FAMILIES["layernorm"].problem()
    found = rows(problem, EF)
    norm = block_indices(found)["1"]
    by_block, by_diagonal = kronecker(problem, EF), kronecker(problem, EF, fallback="diagonal")
    assert_close(by_block[norm[:, None], norm], full(found)[norm[:, None], norm])
    assert_close(by_diagonal[norm[:, None], norm], diagonal(found)[norm].diag())
    assert_close(kronecker(problem, EF, normalization="sum"), found.count * by_block)
    assert_close(kronecker(problem, EF, layers=[]), block(found))


@some_families
def test_determined_layers__expand_leaves_no_choice_in_the_zoo(family: Family) -> None:
    problem = family.problem()
    assert determined_layers(problem, EXACT) == kronecker_layers(problem)


def test_determined_layers__reduce_leaves_one_where_the_inputs_means_do_not_span() -> None:
    """Four mean inputs of five features and a bias: A has a null space that the rows still reach."""
    problem = FAMILIES["token_mlp"].problem()
    assert determined_layers(problem, EXACT, "reduce") == ["0"]
