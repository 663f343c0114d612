"""One step of the optimizers equals its formula, written out in float64 with dense matrices and loops over examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit import RelativeDamping
from tests.optim_cases import (
    OPTIONS,
    backward,
    blockwise,
    close,
    damped,
    fisher,
    flat,
    jacobian,
    one_step,
    places,
    problem,
    restore,
)
from tests.reference.fisher import Problem, block_indices
from tests.reference.fisher import rows as reference_rows
from tests.reference.outputs import EF

FAMILIES = [
    "mlp", "gaussian_vector", "gaussian_scalar", "bernoulli_multilabel", "bernoulli_scalar", "conv_pooled",
    "embedding", "layernorm", "batchnorm1d", "tied_head_parameter", "tied_head_functional", "shared_module",
    "token_mlp", "gaussian_tokens", "bernoulli_tokens", "masked_weight", "bare_parameters", "attention_batch_first",
    "lstm", "mapping_batch_logits", "frozen_bias", "inplace_relu_conv", "weight_norm", "residual_conv",
]  # fmt: skip
"""Layers with and without rules, tied and reused ones, the three likelihoods, sequences with ignored labels."""

LAMBDA = 0.05


def gram_update(of: Problem, power: float, block: bool = False) -> Tensor:
    """Jᵀ(JJᵀ + λI)⁻¹ t with t = s^power, as in the paper's equations 5 and 8."""
    J, s = jacobian(of)
    update = torch.zeros_like(J[0])
    blocks = block_indices(reference_rows(of, EF)).values() if block else [torch.arange(J.shape[1])]
    for index in blocks:
        own = J[:, index]
        update[index] = own.T @ torch.linalg.solve(own @ own.T + LAMBDA * torch.eye(len(J), dtype=J.dtype), s**power)
    return update


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ef", "ief"])
def test_gram_damping__is_the_papers_update(family: str, kind: str) -> None:
    of = problem(family)
    close(one_step(of, kind=kind, gram_damping=LAMBDA), gram_update(of, float(kind == "ief")))


@pytest.mark.parametrize("family", ["mlp", "layernorm", "conv_pooled", "token_mlp", "gaussian_vector", "lstm"])
@pytest.mark.parametrize("kind", ["ef", "ief"])
def test_gram_damping__by_block_is_the_papers_update_by_module(family: str, kind: str) -> None:
    of = problem(family)
    close(one_step(of, kind=kind, gram_damping=LAMBDA, structure="block"), gram_update(of, float(kind == "ief"), True))


def test_gram_damping__takes_ief_at_half_power_between_the_two() -> None:
    of = problem("mlp")
    close(one_step(of, kind="ief", power=0.5, gram_damping=LAMBDA), gram_update(of, 0.5))


def test_gram_damping__of_the_sampled_kind_is_the_papers_equation_49() -> None:
    """(1/λ)[I − Ĵᵀ(ĴĴᵀ + λI)⁻¹Ĵ]∇L = (ĴᵀĴ + λI)⁻¹ ∇L, sums over examples."""
    of = problem("mlp")
    J, _ = jacobian(of)
    close(one_step(of, kind="sf", gram_damping=LAMBDA), damped(len(J) * fisher(of, "sf", "full"), J.sum(0), LAMBDA))


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_gram_damping__beside_averaged_structures_is_beside_the_sum(structure: str) -> None:
    of = problem("mlp")
    J, _ = jacobian(of)
    expected = damped(len(J) * fisher(of, "ief", structure), J.sum(0), LAMBDA)
    close(one_step(of, kind="ief", gram_damping=LAMBDA, structure=structure), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_damping__is_the_mean_gradient_through_the_damped_fisher(family: str) -> None:
    of = problem(family)
    J, _ = jacobian(of)
    close(one_step(of, kind="ief", damping=LAMBDA), damped(fisher(of, "ief", "full"), J.mean(0), LAMBDA))


@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["ef", "ief", "sf", "exact", "truncated"])
@pytest.mark.parametrize("family", ["mlp", "token_mlp", "gaussian_tokens", "gaussian_vector", "bernoulli_multilabel"])
def test_damping__of_every_kind_and_structure(family: str, kind: str, structure: str) -> None:
    if kind == "sf" and structure in ("kfac", "ekfac"):
        pytest.skip("the reference's Kronecker factors of drawn labels need the labels")
    if family == "token_mlp" and structure in ("kfac", "ekfac"):
        pytest.skip("the reference's factors keep ignored positions, the package's do not")
    of = problem(family)
    J, _ = jacobian(of)
    change = one_step(of, kind=kind, damping=LAMBDA, structure=structure)
    close(change, damped(fisher(of, kind, structure), J.mean(0), LAMBDA))


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("family", ["conv_pooled", "linear_3d", "layernorm", "embedding"])
def test_damping__by_kronecker_factors_of_other_layers(family: str, structure: str) -> None:
    of = problem(family)
    J, _ = jacobian(of)
    change = one_step(of, kind="ief", damping=LAMBDA, structure=structure)
    close(change, damped(fisher(of, "ief", structure), J.mean(0), LAMBDA))


def test_damping__by_reduced_kronecker_factors() -> None:
    of = problem("linear_3d")
    J, _ = jacobian(of)
    change = one_step(of, kind="ef", damping=LAMBDA, structure="kfac", kfac_positions="reduce")
    close(change, damped(fisher(of, "ef", "kfac", "reduce"), J.mean(0), LAMBDA))


def test_damping__relative_is_a_multiple_of_the_mean_eigenvalue() -> None:
    of = problem("mlp")
    J, _ = jacobian(of)
    F = fisher(of, "exact", "full")
    own = 0.3 * float(F.trace()) / len(F)
    close(one_step(of, kind="exact", damping=RelativeDamping(0.3)), damped(F, J.mean(0), own))


SETTINGS: list[dict[str, Any]] = [
    {"kind": "ief", "gram_damping": LAMBDA},
    {"kind": "ef", "damping": LAMBDA},
    {"kind": "ef", "gram_damping": LAMBDA, "structure": "block"},
    {"kind": "exact", "damping": LAMBDA},
    {"kind": "truncated", "damping": LAMBDA, "structure": "block"},
    {"kind": "sf", "damping": LAMBDA},
    {"kind": "ief", "damping": LAMBDA, "structure": "kfac"},
    {"kind": "ef", "damping": LAMBDA, "structure": "ekfac"},
    {"kind": "ef", "gram_damping": LAMBDA, "structure": "diagonal"},
]


def name(setting: dict[str, Any]) -> str:
    return "-".join(str(value) for key, value in setting.items() if "damping" not in key) + (
        "-gram" if "gram_damping" in setting else ""
    )


@pytest.mark.parametrize("family", ["mlp", "token_mlp", "gaussian_vector", "bernoulli_multilabel", "masked_weight"])
@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_step__depends_on_neither_reduction_nor_cuts(family: str, setting: dict[str, Any]) -> None:
    of = problem(family)
    n = len(of.targets)
    whole = one_step(of, **setting)
    close(one_step(of, reduction="sum", **setting), whole)
    close(one_step(of, reduction="sum", cuts=(1, n - 1), **setting), whole)
    if of.likelihood != "gaussian":
        close(one_step(of, cuts=(1, n - 3, 2), **setting), whole)
    elif n % 2 == 0:
        close(one_step(of, cuts=(n // 2, n // 2), **setting), whole)


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_step__of_gaussian_micro_batches_of_one_size_is_that_of_the_batch(setting: dict[str, Any]) -> None:
    """The loss of each is divided by the number of micro-batches, which no gradient shows."""
    of = problem("deep_linear")
    close(one_step(of, cuts=(2, 2, 2), **setting), one_step(of, **setting))


def test_gaussian__an_example_that_is_fit_perfectly_counts() -> None:
    of = problem("gaussian_vector")
    of.targets[1] = of.model(of.inputs)[1].detach()
    J, s = jacobian(of)
    for kind, power in (("ef", 0), ("ief", 1)):
        F = J.T @ (J * torch.where(s > 0, 1 / s**power, 0.0)[:, None]) / len(J)
        close(one_step(of, kind=kind, damping=LAMBDA), damped(F, J.mean(0), LAMBDA), 1e-6)


def test_step__of_one_example() -> None:
    whole = problem("mlp")
    of = Problem(whole.model, whole.inputs[:1], whole.targets[:1])
    close(one_step(of, kind="ief", gram_damping=LAMBDA), gram_update(of, 1.0))


def test_step__of_one_example_after_a_batch_of_many() -> None:
    """The rules were verified on the first batch."""
    whole = problem("conv_pooled")
    last = Problem(whole.model, whole.inputs[:1], whole.targets[:1])
    before, expected = flat(last), gram_update(last, 1.0)
    optimizer = fk.optim.NaturalGradient(whole.model, lr=0.0, gram_damping=LAMBDA)
    backward(whole)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = 1.0
    backward(last)
    optimizer.step()
    close(before - flat(last), expected)


# -- what is done with the direction -----------------------------------------------------------------------------------


def steps(of: Problem, optimizer: torch.optim.Optimizer, number: int) -> None:
    for _ in range(number):
        backward(of)
        optimizer.step()
        optimizer.zero_grad()


def test_momentum_and_weight_decay__are_decoupled_and_the_paths_agree() -> None:
    of = problem("mlp")
    start, m = flat(of), torch.zeros_like(flat(of))
    path = start.clone()
    for _ in range(3):
        restore(of, path)
        m = 0.9 * m + gram_update(of, 1.0)
        path = (1 - 0.1 * 0.05) * path - 0.1 * m
    restore(of, start)
    optimizer = fk.optim.NaturalGradient(of.model, 0.1, gram_damping=LAMBDA, momentum=0.9, weight_decay=0.05)
    steps(of, optimizer, 3)
    close(flat(of), path)


def test_normalize_update__makes_the_direction_a_unit_vector() -> None:
    of = problem("mlp")
    expected = gram_update(of, 1.0)
    close(one_step(of, gram_damping=LAMBDA, normalize_update=True), expected / expected.norm())


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize(
    "setting",
    [
        {"kind": "ief", "gram_damping": LAMBDA},
        {"kind": "ef", "gram_damping": LAMBDA},
        {"kind": "ef", "damping": LAMBDA},
        {"kind": "exact", "damping": LAMBDA},
        {"kind": "ief", "damping": LAMBDA, "structure": "kfac"},
        {"kind": "ief", "gram_damping": LAMBDA, "structure": "ekfac"},
        {"kind": "ief", "gram_damping": LAMBDA, "structure": "block"},
    ],
    ids=name,
)
def test_trust_region__bounds_the_step_in_the_kinds_own_fisher(setting: dict[str, Any], normalize: bool) -> None:
    of = problem("mlp")
    structure = setting.get("structure", "full")
    F = fisher(of, setting["kind"], structure)
    plain = one_step(of, normalize_update=normalize, **setting)
    length = float(plain @ F @ plain)
    far = one_step(of, normalize_update=normalize, trust_region=2 * length, **setting)
    close(far, plain)
    near = one_step(of, normalize_update=normalize, trust_region=length / 9, **setting)
    close(near, plain / 3)


def test_groups__have_their_own_rate_decay_and_momentum() -> None:
    of = problem("mlp")
    model = of.model
    assert isinstance(model, nn.Sequential)
    direction, start = gram_update(of, 1.0), flat(of)
    first = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "weight_decay": 0.5}]
    optimizer = fk.optim.NaturalGradient(model, 1.0, gram_damping=LAMBDA, params=first)
    steps(of, optimizer, 1)
    cut = places(of)["2.weight"].start
    close(flat(of)[:cut], (start - 0.1 * direction)[:cut])
    close(flat(of)[cut:], (0.5 * start - direction)[cut:])


def test_params__names_choose_and_the_rest_is_left_alone() -> None:
    whole = problem("mlp")
    of = Problem(whole.model, whole.inputs, whole.targets, params=("0.bias", "2.weight"))
    rest = whole.model.get_parameter("0.weight").detach().clone()
    close(one_step(of, gram_damping=LAMBDA), gram_update(of, 1.0))
    assert torch.equal(whole.model.get_parameter("0.weight"), rest)


# -- running averages --------------------------------------------------------------------------------------------------


def halves(of: Problem) -> list[Problem]:
    n = len(of.targets) // 2
    assert isinstance(of.inputs, Tensor)
    return [Problem(of.model, of.inputs[take], of.targets[take]) for take in (slice(n), slice(n, 2 * n))]


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def after_both(preconditioner: Any, first: Problem, second: Problem, reduction: str = "mean") -> Tensor:
    """The gradients after a step for each."""
    for of in (first, second):
        first.model.zero_grad()
        backward(of, reduction)
        preconditioner.step()
    return gradients(first.model)


def kfac_factors(of: Problem) -> list[tuple[Tensor, Tensor]]:
    """A and G of each linear layer of an MLP for iEF, by a loop over examples: the paper's equation 43."""
    model = of.model
    assert isinstance(model, nn.Sequential)
    found = []
    for layer in (model[0], model[2]):
        A, G = 0.0, 0.0
        for n in range(len(of.targets)):
            seen: list[Any] = []
            handle = layer.register_forward_hook(lambda _m, args, out, seen=seen: seen.extend([args[0], out]))
            z = model(of.inputs[n : n + 1])
            handle.remove()
            p = torch.softmax(z.detach(), -1)
            u = p - nn.functional.one_hot(of.targets[n], p.shape[-1])
            (g,) = torch.autograd.grad(z, seen[1], u)
            a = torch.cat([seen[0], torch.ones(1, 1, dtype=torch.float64)], 1).detach()
            A, G = A + a.T @ a, G + g.T @ g / u.square().sum()
        found.append((A / len(of.targets), G / len(of.targets)))
    return found


def by_layer(of: Problem, matrices: list[Tensor], vector: Tensor, damping: float) -> Tensor:
    """(⊕ Gᵢ ⊗ Aᵢ + λI)⁻¹ v, each layer's matrix over [weight | bias]."""
    result = []
    for matrix, prefix in zip(matrices, ("0", "2"), strict=True):
        w, b = (vector[places(of)[f"{prefix}.{part}"]] for part in ("weight", "bias"))
        both = torch.cat([w.reshape(len(b), -1), b[:, None]], 1)
        solved = damped(matrix, both.flatten(), damping).reshape(both.shape)
        result += [solved[:, :-1].flatten(), solved[:, -1]]
    return torch.cat(result)


def test_ema__averages_the_kronecker_factors() -> None:
    first, second = halves(problem("mlp"))
    factors, gradient = [kfac_factors(first), kfac_factors(second)], jacobian(second)[0].mean(0)
    found = after_both(fk.optim.Preconditioner(first.model, kind="ief", damping=LAMBDA, ema=0.7), first, second)
    mixed = [
        torch.kron(0.7 * g + 0.3 * g2, 0.7 * a + 0.3 * a2)
        for (a, g), (a2, g2) in zip(factors[0], factors[1], strict=True)
    ]
    close(found, by_layer(first, mixed, gradient, LAMBDA))


def test_refresh_every__keeps_the_eigenbasis_and_renews_the_moments() -> None:
    # Enough examples for a basis that no null space leaves open.
    first, other = problem("mlp"), problem("mlp", seed=1)
    second = Problem(first.model, other.inputs, other.targets)
    mixed, gradient = [], jacobian(second)[0].mean(0)
    for layer, (A, G) in zip(("0", "2"), kfac_factors(first), strict=True):
        basis = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
        moments = []
        for of in (first, second):
            J, s = jacobian(of)
            w = J[:, places(of)[f"{layer}.weight"]].reshape(len(J), len(G), -1)
            b = J[:, places(of)[f"{layer}.bias"]].unsqueeze(2)
            rows = torch.cat([w, b], 2).flatten(1) / s.sqrt()[:, None]
            moments.append((rows @ basis).square().mean(0))
        mixed.append(basis @ torch.diag(0.6 * moments[0] + 0.4 * moments[1]) @ basis.T)
    preconditioner = fk.optim.Preconditioner(
        first.model, kind="ief", structure="ekfac", damping=LAMBDA, ema=0.6, refresh_every=2
    )
    close(after_both(preconditioner, first, second), by_layer(first, mixed, gradient, LAMBDA))


def test_update_every__goes_on_with_what_it_has() -> None:
    first, second = halves(problem("mlp"))
    expected = damped(fisher(first, "ief", "kfac"), jacobian(second)[0].mean(0), LAMBDA)
    preconditioner = fk.optim.Preconditioner(first.model, kind="ief", damping=LAMBDA, update_every=2)
    close(after_both(preconditioner, first, second), expected)


def test_update_every__beside_a_summed_loss_divides_by_each_steps_own_examples() -> None:
    whole = problem("mlp")
    first, second = (Problem(whole.model, whole.inputs[t], whole.targets[t]) for t in (slice(4), slice(4, 6)))
    expected = damped(fisher(first, "ief", "kfac"), jacobian(second)[0].mean(0), LAMBDA)
    preconditioner = fk.optim.Preconditioner(first.model, damping=LAMBDA, update_every=2, reduction="sum")
    close(after_both(preconditioner, first, second, "sum"), expected)


# -- beside another optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("kind", ["ef", "ief", "exact", "truncated"])
def test_preconditioner__puts_the_direction_where_the_gradient_was(kind: str, structure: str) -> None:
    of = problem("mlp")
    expected = damped(fisher(of, kind, structure), jacobian(of)[0].mean(0), LAMBDA)
    preconditioner = fk.optim.Preconditioner(
        of.model, kind=kind, structure=structure, damping=LAMBDA, **OPTIONS.get(kind, {})
    )
    backward(of)
    preconditioner.step()
    close(gradients(of.model), expected)


def test_preconditioner__with_plain_sgd_is_the_natural_gradient() -> None:
    of = problem("mlp")
    start = flat(of)
    expected = one_step(of, kind="ief", gram_damping=LAMBDA)
    preconditioner = fk.optim.Preconditioner(of.model, kind="ief", structure="full", gram_damping=LAMBDA)
    optimizer = torch.optim.SGD(of.model.parameters(), lr=1.0)
    backward(of)
    preconditioner.step()
    optimizer.step()
    close(start - flat(of), expected)


def test_preconditioner__kl_clip_uses_the_optimizers_rate() -> None:
    of = problem("mlp")
    F, g = fisher(of, "ief", "kfac"), jacobian(of)[0].mean(0)
    direction = damped(F, g, LAMBDA)
    bound = float(0.25 * direction @ F @ direction) / 16
    preconditioner = fk.optim.Preconditioner(of.model, damping=LAMBDA, trust_region=bound, lr=lambda: 0.5)
    backward(of)
    preconditioner.step()
    close(gradients(of.model), direction / 4)


def test_blockwise__is_what_the_tests_think() -> None:
    of = problem("mlp")
    F = blockwise(of, torch.ones(len(flat(of)), len(flat(of)), dtype=torch.float64))
    cut = places(of)["2.weight"].start
    assert bool(F[:cut, :cut].all())
    assert not bool(F[:cut, cut:].any())
