"""What float32 leaves of a solve, and what it costs: digits come from refinement, never from rows in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.rows.base import inner_products, second_moment


def case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 64), nn.Tanh(), nn.Linear(64, 10))
    return model, torch.randn(100, 50), torch.randint(10, (100,))


@pytest.mark.parametrize("relative", [1e-1, 1e-3, 1e-5, 1e-7])
def test_float32_solve__meets_its_equation_at_any_damping(relative: float) -> None:
    """The gradient lies in the span of the rows, where Woodbury's difference cancels most."""
    model, x, y = case()
    fisher = fk.ImprovedEmpiricalFisher(model, (x, y))
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    v = torch.cat([g.flatten() for g in gradient])
    damping = relative * float(fisher.trace())
    factorization = fisher.factorize(damping)
    solution, info = factorization.matvec(v, return_info=True)
    assert info.method == "woodbury"
    assert float(info.residual.max()) <= 3e-5
    assert all(slot.rows.tensors()["gradients"].dtype == torch.float32 for slot in factorization._rows.slots)
    # What is left is the conditioning: rounding of v alone moves the solution by eps · λ_max / λ.
    wide = fk.ImprovedEmpiricalFisher(copy.deepcopy(model).double(), (x.double(), y))
    expected = wide.solve(v.double(), damping=damping)
    condition = 1 + float(wide.eigenvalues(1)[0]) / damping
    assert (solution - expected).norm() <= 10 * condition * torch.finfo(torch.float32).eps * expected.norm()


@pytest.mark.parametrize("shape", [(3, 0), (5, 300), (40, 1024), (300, 700)])
@pytest.mark.parametrize("precise", [True, False])
def test_inner_products__have_the_digits_that_are_asked_for(shape: tuple[int, int], precise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator) for _ in range(2))
    for other in (x, y):
        expected = x.double() @ other.double().mT
        error = (inner_products(x, other, precise) - expected).abs().max() if shape[1] else torch.zeros(())
        scale = x.norm(dim=1).max() * other.norm(dim=1).max()
        assert error <= (1e-13 if precise else 1e-6) * scale


@pytest.mark.parametrize("width", [3, 1030])
@pytest.mark.parametrize("transposed", [True, False])
def test_second_moment__is_the_sum_over_all_vectors(width: int, transposed: bool) -> None:
    x = torch.randn(4, 700, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = x.mT.contiguous().mT if transposed else x
    torch.testing.assert_close(second_moment(given), torch.einsum("nti,ntj->ij", x, x))
