"""What the truncated kind has in common with others, claim by claim of docs/truncated.md."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fisherkit as fk
from tests.reference.fisher import Problem, forward_one
from tests.reference.outputs import gradient, hessian
from tests.theorem_cases import build, error, gradients, metric, problem

TINY = 1e-9


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
    assert error(j @ fisher.solve(j.sum(0), damping=TINY), (1 - p) / p) < 1e-4


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
