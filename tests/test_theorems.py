"""Theorems about kinds and structures: what must hold whatever the implementation.

The numbers of the empirical and improved kinds are those of Wu, Yu, Zhang, Woodland, arXiv 2406.06420 ("the paper").
"""

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from tests import by_hand
from tests.reference.fisher import Problem, block_indices, forward_one, rows
from tests.reference.outputs import Kind, gradient, hessian
from tests.theorem_cases import KINDS, build, error, gradients, metric, problem

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
    expected = torch.cat([torch.cat([ww.reshape(12, 12), wb.reshape(12, 4)], 1), torch.cat([bw.reshape(4, 12), bb], 1)])
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


# -- what the truncated kind has in common with others -----------------------------------------------------------------


NO_NUMBER = 1e-9


def outputs(seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits and labels of fifty examples with six classes, from fit to hopeless."""
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(50, 6, dtype=torch.float64, generator=generator), torch.randint(
        6, (50,), generator=generator
    )


def of_label(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The label's probability ``[N, 1]``, and e_y − q with q the distribution of the other classes."""
    p = torch.softmax(z, -1)
    label = torch.nn.functional.one_hot(y, z.shape[-1]).to(z.dtype)
    p_y = (p * label).sum(-1, keepdim=True)
    others = p * (1 - label)
    return p_y, label - others / others.sum(-1, keepdim=True)


def margin_gradients(of: Problem) -> tuple[Tensor, Tensor]:
    """∇f ``[N, D]`` of the margin f = log(p_y/(1 − p_y)), and ℓ''(f) ``[N]`` of ℓ = log(1 + e^(−f)), by autograd."""
    found, curvature = [], []
    parameters = list(of.chosen().values())
    for n, y in enumerate(of.targets):
        z = forward_one(of, n)
        f = z[y] - z[torch.arange(len(z)) != y].logsumexp(0)
        found.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, parameters)]))
        free = f.detach().requires_grad_()
        (slope,) = torch.autograd.grad((1 + (-free).exp()).log(), free, create_graph=True)
        curvature.append(torch.autograd.grad(slope, free)[0])
    return torch.stack(found), torch.stack(curvature)


def label_probabilities(of: Problem) -> Tensor:
    rows = range(len(of.targets))
    return torch.stack([torch.softmax(forward_one(of, n).detach(), -1)[of.targets[n]] for n in rows])


# -- the lemma ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_first_vector__is_the_largest_multiple_of_the_gradient_and_takes_one_from_the_rank(likelihood: str) -> None:
    z, labels = outputs(spread=1.0)
    y = labels if likelihood == "categorical" else (z > 0.3).double()
    first = metric(fk.TruncatedFisher, z, y, likelihood, rank=1)
    for n in range(10):
        h, u = hessian(z[n], y[n], likelihood), gradient(z[n], y[n], likelihood).reshape(-1)
        assert error(first[n], torch.outer(u, u) / (u @ torch.linalg.pinv(h, hermitian=True) @ u)) < 1e-10
        left = torch.linalg.eigvalsh(h - first[n])
        assert float(left.min()) > -1e-14
        assert int((left > 1e-12).sum()) == int((torch.linalg.eigvalsh(h) > 1e-12).sum()) - 1
        assert float(torch.linalg.eigvalsh(h - 1.001 * first[n]).min()) < -1e-8


def test_ef__is_below_exact_where_the_label_has_half_the_mass_and_ief_is_nowhere() -> None:
    z, y = outputs()
    p_y = of_label(z, y)[0].squeeze(1)
    exact = metric(fk.ExactFisher, z, y, "categorical")
    below = {
        kind: torch.linalg.eigvalsh(exact - metric(kind, z, y, "categorical"))[:, 0] > -1e-13
        for kind in (fk.EmpiricalFisher, fk.ImprovedEmpiricalFisher)
    }
    assert 0 < int((p_y >= 0.5).sum()) < len(z)
    assert torch.equal(below[fk.EmpiricalFisher], p_y >= 0.5)
    assert not bool(below[fk.ImprovedEmpiricalFisher].any())


# -- softmax -----------------------------------------------------------------------------------------------------------


def test_softmax__is_the_answer_to_is_it_the_label_and_what_is_left_is_a_softmax_of_the_others() -> None:
    z, y = outputs()
    p_y, direction = of_label(z, y)
    v = (p_y * (1 - p_y)).sqrt() * direction
    first = metric(fk.TruncatedFisher, z, y, "categorical", rank=1)
    assert error(first, v.unsqueeze(2) * v.unsqueeze(1)) < 1e-12
    q = torch.nn.functional.one_hot(y, 6) - direction
    rest = (1 - p_y).unsqueeze(2) * (torch.diag_embed(q) - q.unsqueeze(2) * q.unsqueeze(1))
    assert error(metric(fk.ExactFisher, z, y, "categorical") - first, rest) < 1e-12


def test_softmax__of_a_good_fit_lacks_a_share_that_depends_on_the_competitors_alone() -> None:
    for others, share in (([0.0, 0, 0, 0], 0.375), ([0.0, -40, -40, -40], 0.0), ([0.0, 0, -40, -40], 0.25)):
        z, y = torch.tensor([[16.0, *others]], dtype=torch.float64), torch.tensor([0])
        first = metric(fk.TruncatedFisher, z, y, "categorical", rank=1)[0]
        exact = metric(fk.ExactFisher, z, y, "categorical")[0]
        assert float(1 - first.trace() / exact.trace()) == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("options", [{"rank": 1}, {"rank": 2}, {"tolerance": 0.0}], ids=str)
def test_undamped_update__asks_the_newton_decrement_of_each_example_at_any_rank(options: dict[str, float]) -> None:
    of = problem("mlp")
    j, p = gradients(of), label_probabilities(of)
    fisher = build(fk.TruncatedFisher, of, normalization="sum", **options)
    assert fisher.rows < fisher.size
    assert int(torch.linalg.matrix_rank(fisher.to_dense())) == fisher.rows
    assert error(j @ fisher.solve(j.sum(0), damping=NO_NUMBER), (1 - p) / p) < 1e-4


# -- relatives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mlp", "mlp_no_bias", "conv2d"])
def test_rank_one__is_the_fast_gauss_newton_of_the_margin(family: str) -> None:
    """Korbit and Zanon, arXiv 2605.06081: ℓ = log(1 + e^(−f)) is a function of one number, with ℓ''(f) ∇f ∇fᵀ."""
    of = problem(family)
    slopes, curvature = margin_gradients(of)
    fast = slopes.T @ (curvature.unsqueeze(1) * slopes)
    assert error(build(fk.TruncatedFisher, of, rank=1, normalization="sum").to_dense(), fast) < 1e-12


@pytest.mark.parametrize("family", ["mlp", "conv2d"])
def test_rank_one__weighs_the_rows_of_ef_and_the_features_of_trak(family: str) -> None:
    of = problem(family)
    features, p = margin_gradients(of)[0], label_probabilities(of).unsqueeze(1)
    j = gradients(of)
    assert error(-(1 - p) * features, j) < 1e-12  # TRAK's weight 1 − p, on the features, is EF's row
    rank_one = build(fk.TruncatedFisher, of, rank=1, normalization="sum").to_dense()
    assert error(features.T @ (p * (1 - p) * features), rank_one) < 1e-12
    assert error(j.T @ (p / (1 - p) * j), rank_one) < 1e-12


def krylov(h: Tensor, u: Tensor, rank: int) -> Tensor:
    """Q QᵀHQ Qᵀ with Q an orthonormal basis of u, Hu, H²u, ..."""
    basis: list[Tensor] = []
    w = u
    for _ in range(rank):
        for _ in range(2):  # Gram and Schmidt, twice: once leaves rounding
            for b in basis:
                w = w - b * (b @ w)
        if float(w.norm()) < 1e-10 * float(u.norm()):
            break
        basis.append(w / w.norm())
        w = h @ basis[-1]
    q = torch.stack(basis, 1)
    return q @ (q.T @ h @ q) @ q.T


def test_krylov__is_neither_below_nor_nested_nor_exact_where_probabilities_repeat() -> None:
    z, y = torch.tensor([1.0, 0.5, -0.2, 0.1], dtype=torch.float64), torch.tensor(1)
    h, u = hessian(z, y, "categorical"), gradient(z, y, "categorical").reshape(-1)
    one, two, three = (krylov(h, u, rank) for rank in (1, 2, 3))
    assert float(torch.linalg.eigvalsh(h - one).min()) < -1e-4
    assert float(torch.linalg.eigvalsh(two - one).min()) < -1e-4
    assert error(three, h) < 1e-10
    z = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    h, u = hessian(z, y, "categorical"), gradient(z, y, "categorical").reshape(-1)
    assert error(krylov(h, u, 4), h) > 0.1
    assert error(metric(fk.TruncatedFisher, z[None], y[None], "categorical", rank=3)[0], h) < 1e-12
