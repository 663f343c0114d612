"""Theorems about kinds and structures: what must hold whatever the implementation.

The numbers of the empirical and improved kinds are those of Wu, Yu, Zhang, Woodland, arXiv 2406.06420 ("the paper").
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from tests import by_hand
from tests.reference.fisher import Problem, block_indices, forward_one, rows
from tests.reference.outputs import Kind, gradient
from tests.theorem_cases import KINDS, build, error, gradients, problem

FAMILIES = [
    "mlp", "residual", "linear_3d", "conv2d", "conv_pooled", "deep_linear", "token_mlp", "mapping_batch_by_token",
]  # fmt: skip
# A damping half way between the smallest non-zero eigenvalues here (about 0.1) and rounding in float64: it leaves an
# error of about 1e-7 on the first account, and of ε / damping on the second, since what rounding puts outside the
# rows' span is divided by the damping.
TINY = 1e-8


def blocks(of: Problem) -> dict[str, Tensor]:
    """Flat indices of every module's block."""
    return block_indices(rows(of, Kind("ef")))


def pick(dense: Tensor, index: Tensor) -> Tensor:
    return dense[index[:, None], index]


def first_example(of: Problem) -> Problem:
    assert isinstance(of.inputs, Tensor)
    return Problem(of.model, of.inputs[:1], of.targets[:1], of.likelihood, of.example)


# -- Kronecker factors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ef", "exact"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ekfac__is_no_farther_from_f_than_kfac_in_any_block(family: str, kind: str) -> None:
    of = problem(family)
    cls, options = KINDS[kind]
    exact, kfac, ekfac = (build(cls, of, structure=s, **options).to_dense() for s in ("block", "kfac", "ekfac"))
    for index in blocks(of).values():
        near, far = ((pick(m, index) - pick(exact, index)).norm() for m in (ekfac, kfac))
        assert near <= far * (1 + 1e-9) + 1e-12 * pick(exact, index).norm()


def test_ekfac__is_strictly_nearer_where_kfac_is_wrong() -> None:
    """Otherwise the theorem above would also hold of an EKFAC that is KFAC."""
    of = problem("mlp")
    exact, kfac, ekfac = (build(fk.ExactFisher, of, structure=s).to_dense() for s in ("block", "kfac", "ekfac"))
    assert (ekfac - exact).norm() < 0.95 * (kfac - exact).norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["mlp", "mlp_no_bias", "deep_linear", "residual", "inplace_relu_linear"])
def test_kfac__is_exact_for_one_example_without_shared_positions(family: str, kind: str) -> None:
    """A second moment over one example is the product of its factors: there is nothing to be correlated over."""
    of = first_example(problem(family))
    cls, options = KINDS[kind]
    block, kfac, ekfac = (build(cls, of, structure=s, **options).to_dense() for s in ("block", "kfac", "ekfac"))
    assert error(kfac, block) < 1e-12
    assert error(ekfac, block) < 1e-12


def test_kfac__is_exact_for_a_deep_linear_network_with_gaussian_likelihood() -> None:
    """Output gradients of the exact kind are then the same for all examples, so that they are independent of inputs."""
    of = problem("deep_linear")
    block, kfac = (build(fk.ExactFisher, of, structure=s).to_dense() for s in ("block", "kfac"))
    assert error(kfac, block) < 1e-12
    # ...which is a property of the exact kind: residuals do depend on inputs.
    block, kfac = (build(fk.EmpiricalFisher, of, structure=s).to_dense() for s in ("block", "kfac"))
    assert error(kfac, block) > 0.05


# -- the sampled kind --------------------------------------------------------------------------------------------------


def sampled_error(of: Problem, draws: int, seeds: int) -> float:
    exact = build(fk.ExactFisher, of).to_dense()
    squares = [
        (build(fk.SampledFisher, of, draws=draws, seed=s).to_dense() - exact).square().sum() for s in range(seeds)
    ]
    return float(torch.stack(squares).mean().sqrt() / exact.norm())


@pytest.mark.parametrize(
    "family", ["mlp", "bernoulli_multilabel", "gaussian_vector", "token_mlp", "token_mlp_by_token"]
)
def test_sampled__approaches_exact_at_the_rate_of_one_over_root_draws(family: str) -> None:
    of = problem(family)
    few, many = sampled_error(of, 4, 32), sampled_error(of, 256, 8)
    assert many < 0.25
    assert 8 / 1.5 < few / many < 8 * 1.5  # √(256 / 4), to the scatter of so few seeds


@pytest.mark.parametrize("family", ["bernoulli_scalar", "gaussian_scalar", "token_mlp"])
def test_sampled__is_unbiased(family: str) -> None:
    of = problem(family)
    exact = build(fk.ExactFisher, of)
    v = torch.randn(exact.size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    forms = torch.stack([build(fk.SampledFisher, of, seed=s).quadratic_form(v) for s in range(40)])
    z = (forms.mean(0) - exact.quadratic_form(v)) / (forms.std(0) / len(forms) ** 0.5)
    assert bool((z.abs() < 4).all()), z


# -- the improved empirical kind ---------------------------------------------------------------------------------------


def output_gradients(of: Problem) -> Tensor:
    """u_n joined over positions and outputs, ``[N, P]``."""
    return torch.stack(
        [gradient(forward_one(of, n).detach(), y, of.likelihood).reshape(-1) for n, y in enumerate(of.targets)]
    )


@pytest.mark.parametrize(
    "family", ["mlp", "conv2d", "gaussian_vector", "bernoulli_multilabel", "gaussian_tokens", "bernoulli_tokens"]
)
def test_ief__is_the_gram_of_gradients_weighted_by_the_inverse_squared_logit_gradient(family: str) -> None:
    """The paper's equations 14 and 41: Jᵀ diag(s)⁻¹ J with J of the losses, in its sum convention."""
    of = problem(family)
    j, s = gradients(of), output_gradients(of).square().sum(1)
    ief = build(fk.ImprovedEmpiricalFisher, of, normalization="sum")
    assert error(ief.to_dense(), j.T @ (j / s[:, None])) < 1e-12
    half = build(fk.ImprovedEmpiricalFisher, of, normalization="sum", power=0.5)
    assert error(half.to_dense(), j.T @ (j / s.sqrt()[:, None])) < 1e-12


@pytest.mark.parametrize("family", ["mlp", "bernoulli_multilabel", "token_mlp_by_token"])
@pytest.mark.parametrize("structure", ["full", "diagonal", "ekfac"])
def test_ief__of_power_zero_is_the_empirical_fisher(family: str, structure: str) -> None:
    of = problem(family)
    ief = build(fk.ImprovedEmpiricalFisher, of, power=0.0, structure=structure)
    assert error(ief.to_dense(), build(fk.EmpiricalFisher, of, structure=structure).to_dense()) < 1e-12


@pytest.mark.parametrize("family", ["gaussian_scalar", "bernoulli_scalar"])
def test_ief__of_a_scalar_output_is_gauss_newton(family: str) -> None:
    """The paper's appendix A. For ½(z − y)² that is the natural gradient too; for a logit it is not."""
    of = problem(family)
    total = gradients(of).sum(0)
    ief = build(fk.ImprovedEmpiricalFisher, of, normalization="sum")
    gauss_newton = build(fk.ExactFisher, of, normalization="sum", likelihood="gaussian")
    natural = build(fk.ExactFisher, of, normalization="sum")
    assert error(ief.to_dense(), gauss_newton.to_dense()) < 1e-12
    # The undamped update on its own, by the paper's equation 8, which never forms the matrix.
    j, s = gradients(of), output_gradients(of).square().sum(1)
    update = j.T @ torch.linalg.solve(j @ j.T, s)
    assert error(ief.solve(total, damping=TINY), update) < 1e-5
    assert error(gauss_newton.solve(total, damping=TINY), update) < 1e-5
    distance = error(natural.solve(total, damping=TINY), update)
    assert distance < 1e-5 if family == "gaussian_scalar" else distance > 0.05


@pytest.mark.parametrize("family", ["mlp", "conv2d", "bernoulli_multilabel"])
def test_undamped_update__ef_changes_every_loss_alike_and_ief_by_its_squared_logit_gradient(family: str) -> None:
    """The paper's section 4.1: EF asks the same of a fitted example as of a wrong one, −η; iEF asks −η‖∂ℓ/∂z‖²."""
    of = problem(family)
    j, s = gradients(of), output_gradients(of).square().sum(1)
    assert torch.linalg.matrix_rank(j) == len(j)
    ef, ief = (build(kind, of, normalization="sum") for kind in (fk.EmpiricalFisher, fk.ImprovedEmpiricalFisher))
    assert error(j @ ef.solve(j.sum(0), damping=TINY), torch.ones_like(s)) < 1e-5
    assert error(j @ ief.solve(j.sum(0), damping=TINY), s) < 1e-5


def test_perfect_fit__the_fisher_vanishes_and_the_improved_empirical_does_not() -> None:
    of = problem("mlp")
    with torch.no_grad():
        of.model[2].weight.mul_(3)
    of = Problem(of.model, of.inputs, of.model(of.inputs).argmax(1), of.likelihood)
    traces: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(4):
        for name, (kind, options) in KINDS.items():
            # Of the last layer alone: its inputs stay as they are; the hidden layer's gradients grow with its weight.
            fisher = build(kind, of, params=("2.weight", "2.bias"), **options)
            traces[name].append(float(fisher.trace()))
        with torch.no_grad():
            of.model[2].weight.mul_(3)
            of.model[2].bias.mul_(3)
    for name in ("ef", "exact", "truncated"):
        assert traces[name][-1] < 1e-3 * traces[name][0], name
    assert traces["ief"][-1] > 0.5 * traces["ief"][0]


# -- Gauss-Newton ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("positions", [(), (3,)], ids=["example", "positions"])
def test_exact__is_the_hessian_of_the_loss_of_a_linear_model(likelihood: str, positions: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 4).double()
    x = torch.randn(5, *positions, 3, dtype=torch.float64, generator=generator)
    y = torch.rand(5, *positions, 4, dtype=torch.float64, generator=generator)
    target = y.argmax(-1) if likelihood == "categorical" else y

    def mean_loss(weight: Tensor, bias: Tensor) -> Tensor:
        z = nn.functional.linear(x, weight, bias)
        if likelihood == "gaussian":
            return 0.5 * (z - y).square().sum() / 5
        if likelihood == "bernoulli":
            return nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / 5
        return nn.functional.cross_entropy(z.flatten(0, -2), target.flatten(), reduction="sum") / 5

    (ww, wb), (bw, bb) = torch.autograd.functional.hessian(mean_loss, (model.weight.detach(), model.bias.detach()))
    expected = torch.cat(
        [
            torch.cat([ww.reshape(12, 12), wb.reshape(12, 4)], 1),
            torch.cat([bw.reshape(4, 12), bb], 1),
        ]
    )
    fisher = fk.ExactFisher(model, (x, target), likelihood=likelihood)
    assert error(fisher.to_dense(), expected) < 1e-12


@pytest.mark.parametrize("family", ["mlp", "bernoulli_multilabel", "gaussian_vector", "conv_gaussian_positions"])
@pytest.mark.parametrize("targets", ["observed", "none", "other"])
def test_exact__with_gaussian_likelihood_is_the_jacobians_gram_whatever_the_targets(family: str, targets: str) -> None:
    """The identity-output Gauss-Newton of a classifier takes the classifier's own data, class labels and all."""
    of = problem(family)
    jacobian = torch.cat([_jacobian(of, n) for n in range(len(of.targets))])
    z = of.model(of.inputs).detach()
    given = {"observed": of.targets, "none": None, "other": torch.full_like(z, 7.0)}[targets]
    fisher = fk.ExactFisher(of.model, (of.inputs, given), likelihood="gaussian", normalization="sum")
    assert error(fisher.to_dense(), jacobian.T @ jacobian) < 1e-12


def _jacobian(of: Problem, n: int) -> Tensor:
    z = forward_one(of, n).reshape(-1)
    return torch.stack([by_hand.gradient(entry, of.chosen().values()) for entry in z])


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "kfac"])
@pytest.mark.parametrize("family", ["mlp", "bare_parameters", "tied_linears", "weight_norm", "lstm", "token_attention"])
def test_operator__holds_no_autograd_graph(family: str, structure: str) -> None:
    """A graph would keep every activation alive for as long as the operator lives."""
    fisher = build(fk.EmpiricalFisher, problem(family), structure=structure)
    v = torch.ones(fisher.size, dtype=torch.float64)
    for found in (fisher.to_dense(), fisher.diagonal(), fisher.trace(), fisher @ v, fisher.solve(v, damping=1.0)):
        assert not found.requires_grad
