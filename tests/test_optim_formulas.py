"""One step of the optimizers equals its formula, written out in float64 with dense matrices and loops over examples."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit import RelativeDamping
from fisherkit.vectors import TruncatedVectors
from tests.optim_cases import backward, close, damped, fisher, flat, jacobian, one_step, places, problem, restore
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


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "ief") for family in FAMILIES),
        *((family, "ef") for family in ("mlp", "token_mlp", "gaussian_vector")),
    ],
)
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


@pytest.mark.parametrize(
    "family", ["mlp", "gaussian_vector", "bernoulli_scalar", "embedding", "tied_head_parameter", "token_mlp", "lstm"]
)
def test_damping__is_the_mean_gradient_through_the_damped_fisher(family: str) -> None:
    of = problem(family)
    J, _ = jacobian(of)
    close(one_step(of, kind="ief", damping=LAMBDA), damped(fisher(of, "ief", "full"), J.mean(0), LAMBDA))


# The reference has Kronecker factors neither of labels that the package draws nor of positions that do not count.
STRUCTURED = [
    (family, kind, structure)
    for family in ("mlp", "token_mlp", "gaussian_tokens", "gaussian_vector", "bernoulli_multilabel")
    for kind in (
        ("ef", "ief", "sf", "exact", "truncated") if family in {"mlp", "gaussian_tokens"} else ("ief", "exact")
    )
    for structure in ("full", "block", "diagonal", "kfac", "ekfac")
    if structure not in {"kfac", "ekfac"} or (kind != "sf" and family != "token_mlp")
    if family in {"mlp", "gaussian_tokens"} or kind in {"ief", "exact"}
]


@pytest.mark.parametrize(("family", "kind", "structure"), STRUCTURED)
def test_damping__of_every_kind_and_structure(family: str, kind: str, structure: str) -> None:
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


@pytest.mark.parametrize(
    ("family", "setting"),
    [*(("mlp", setting) for setting in SETTINGS), *(("gaussian_vector", setting) for setting in SETTINGS),
     *((family, SETTINGS[i]) for family in ("token_mlp", "bernoulli_multilabel", "masked_weight") for i in (0, 3, 6))],
    ids=lambda value: value if isinstance(value, str) else name(value),
)  # fmt: skip
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


@pytest.mark.parametrize("structure", ["full", "block", "kfac", "diagonal"])
@pytest.mark.parametrize("family", ["mlp", "token_mlp", "linear_3d"])
def test_step__of_a_kind_whose_rank_depends_on_the_examples_depends_on_no_cuts(family: str, structure: str) -> None:
    of = problem(family)
    rule = TruncatedVectors(tolerance=0.1)
    whole = one_step(of, kind=rule, damping=LAMBDA, structure=structure)
    close(one_step(of, cuts=(1, 2, len(of.targets) - 3), kind=rule, damping=LAMBDA, structure=structure), whole)


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_step__of_gaussian_micro_batches_of_one_size_is_that_of_the_batch(setting: dict[str, Any]) -> None:
    """The loss of each is divided by the number of micro-batches, which no gradient shows."""
    of = problem("deep_linear")
    close(one_step(of, cuts=(2, 2, 2), **setting), one_step(of, **setting))


def test_gaussian__an_example_that_is_fit_perfectly_counts() -> None:
    of = problem("gaussian_vector")
    with torch.no_grad():  # outputs of 0, to the last bit in a batch of any size
        of.inputs[1], of.targets[1] = 0, 0
        for name, parameter in of.model.named_parameters():
            parameter.mul_(not name.endswith("bias"))
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


def test_trust_region__of_a_step_without_examples_leaves_the_parameters() -> None:
    """All labels are ignored: a direction of length 0 is not divided by it."""
    model = nn.Linear(3, 4).double()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    optimizer = fk.optim.NaturalGradient(
        model, lr=1.0, gram_damping=1.0, reduction="sum", normalize_update=True, trust_region=1.0
    )
    y = torch.full((5,), -100)
    nn.functional.cross_entropy(model(torch.ones(5, 3).double()), y, reduction="sum").backward()
    optimizer.step()
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


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
