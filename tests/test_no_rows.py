"""A Fisher without any row is the zero matrix: its damped inverse is 1 / λ, in every structure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk

LAMBDA = 1e-2
STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")


def sure() -> tuple[nn.Module, Tensor, Tensor]:
    """A model so sure and right that no vector of the truncated kind is a number above zero."""
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-900.0], [900.0]]))
        model.bias.zero_()
    return model, torch.ones(4, 1).double(), torch.ones(4).long()


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.1}], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_rows__is_the_zero_matrix(structure: str, options: dict[str, float], tmp_path: Path) -> None:
    model, x, y = sure()
    fisher = fk.TruncatedFisher(model, (x, y), structure=structure, **options)
    v = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert fisher.rows == 0
    assert float(fisher.trace()) == 0
    fisher.save(tmp_path / "f")
    for operator in (fisher, fk.load(tmp_path / "f"), fisher + fisher):
        torch.testing.assert_close(operator.solve(v, damping=LAMBDA), v / LAMBDA)
        assert not bool((operator @ v).any())
    inverse = fisher.factorize(damping=LAMBDA)
    torch.testing.assert_close(inverse.logdet(), 4 * torch.tensor(LAMBDA, dtype=torch.float64).log())
    assert inverse.sample(torch.Generator().manual_seed(0)).shape == (4,)
    with pytest.raises(fk.SingularMatrixError):
        fisher.factorize(damping=0.0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_rows__influence_is_the_gradients_product_over_lambda(structure: str) -> None:
    model, x, y = sure()
    fisher = fk.TruncatedFisher(model, (x, y), structure=structure)
    found = fk.influence.InfluenceScores(fisher, model, damping=LAMBDA).scores((x[:2], 0 * y[:2]), (x, 0 * y))
    # The gradient at the wrong label is (-1, 1) for the weights, as x = 1, and for the bias.
    torch.testing.assert_close(found, torch.full_like(found, 4.0 / LAMBDA / 4))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_rows__a_step_is_the_gradient_over_lambda(structure: str) -> None:
    model, x, y = sure()
    optimizer = fk.optim.NaturalGradient(model, lr=1.0, kind="truncated", damping=LAMBDA, structure=structure)
    nn.functional.cross_entropy(model(x), y).backward()
    before = model.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before)
