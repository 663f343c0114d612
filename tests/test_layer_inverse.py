"""Leading eigenpairs of Kronecker factors and the damped inverse that is made of them, against dense matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.operators import EigenKroneckerOperator
from fisherkit.operators.layer_layout import LayerLayout
from fisherkit.operators.linalg import Spectrum, leading_spectrum
from fisherkit.space import ParameterSpace
from fisherkit.testing import check_fisher

WIDTH, OUTPUTS, DAMPING = 8, 5, 0.1


def factor(width: int, seed: int) -> Tensor:
    x = torch.randn(20, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / 20


def layer(transposed: bool) -> ParameterSpace:
    shape = (WIDTH - 1, OUTPUTS) if transposed else (OUTPUTS, WIDTH - 1)
    return ParameterSpace(("weight", "bias"), (shape, (OUTPUTS,)))


def dense(spectrum: Spectrum) -> Tensor:
    q = spectrum.basis
    eye = torch.eye(len(q), dtype=torch.float64)
    return q @ torch.diag(spectrum.values) @ q.T + spectrum.others * (eye - q @ q.T)


@pytest.mark.parametrize("rank", [1, 3, None])
def test_leading_spectrum__keeps_the_trace_and_the_largest_eigenvalues(rank: int | None) -> None:
    matrix = factor(40, 0) + torch.diag(torch.logspace(3, -3, 40, dtype=torch.float64))
    found = leading_spectrum(matrix, rank, None, "here")
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:rank]
    torch.testing.assert_close(found.values.sort(descending=True)[0], expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(found.basis.T @ found.basis, torch.eye(found.basis.shape[1], dtype=torch.float64))
    torch.testing.assert_close(dense(found).trace(), matrix.trace())


def test_leading_spectrum__comes_closer_from_where_it_was() -> None:
    matrix = torch.diag(torch.linspace(2, 1, 80, dtype=torch.float64))
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:4]
    errors, start = [], None
    for _ in range(6):
        found = leading_spectrum(matrix, 4, start, "here")
        errors.append(float((found.values.sort(descending=True)[0] - expected).norm()))
        start = found.basis
    assert errors[-1] < 0.5 * errors[0]


def test_leading_spectrum__is_the_same_every_time_and_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    first, second = (leading_spectrum(factor(30, 1), 5, None, "here") for _ in range(2))
    assert torch.equal(first.basis, second.basis)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ranks", [(3, 2), (3, None), (None, 2), (None, None)])
def test_inverse__is_that_of_the_dense_matrix(ranks: tuple[int | None, int | None], transposed: bool) -> None:
    a, g = (
        leading_spectrum(factor(width, seed), rank, None, "here")
        for width, seed, rank in ((WIDTH, 0, ranks[0]), (OUTPUTS, 1, ranks[1]))
    )
    layout, space = LayerLayout(OUTPUTS, WIDTH - 1, True, transposed), layer(transposed)
    flat = torch.randn(OUTPUTS * WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grid = layout.to_grid(flat.unsqueeze(1))[0]
    matrix = torch.kron(dense(g), dense(a)) + DAMPING * torch.eye(OUTPUTS * WIDTH, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, grid.flatten()).reshape(OUTPUTS, WIDTH)
    operator = EigenKroneckerOperator.of_spectra(space, a, g, None, transposed)
    inverse = operator.factorize(DAMPING)
    found = layout.to_grid(inverse.matvec(flat).unsqueeze(1))[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    order = layout.to_flat(torch.arange(OUTPUTS * WIDTH).reshape(1, OUTPUTS, WIDTH)).squeeze(1)
    check_fisher(operator, torch.kron(dense(g), dense(a))[order][:, order])


def test_inverse__with_measured_eigenvalues() -> None:
    a, g = (leading_spectrum(factor(width, seed), None, None, "here") for width, seed in ((WIDTH, 0), (OUTPUTS, 1)))
    values = torch.rand(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layout, space = LayerLayout(OUTPUTS, WIDTH - 1, True, False), layer(False)
    flat = torch.randn(OUTPUTS * WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    basis = torch.kron(g.basis, a.basis)
    matrix = basis @ torch.diag(values.flatten()) @ basis.T + DAMPING * torch.eye(OUTPUTS * WIDTH, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, layout.to_grid(flat.unsqueeze(1)).flatten())
    found = EigenKroneckerOperator.of_spectra(space, a, g, values, False).factorize(DAMPING).matvec(flat)
    torch.testing.assert_close(layout.to_grid(found.unsqueeze(1)).flatten(), expected, rtol=1e-10, atol=1e-12)


def test_inverse__of_a_singular_matrix_is_refused() -> None:
    zero = Spectrum(*(torch.zeros(n, dtype=torch.float64) for n in ((2,), (3, 2), ())))
    with pytest.raises(fk.SingularMatrixError, match="damping > 0"):
        EigenKroneckerOperator.of_spectra(ParameterSpace(("w",), ((3, 3),)), zero, zero, None, False).factorize(0.0)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_max_rank__steps_as_with_all_eigenpairs_once_it_has_them(structure: str) -> None:
    steps = []
    for rank in (None, 64):
        model, x, y = _task()
        optimizer = fk.optim.NaturalGradient(model, 0.1, structure=structure, damping=0.1, ema=0.5, max_rank=rank)
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*steps, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_max_rank__trains_and_goes_on_bit_for_bit(structure: str) -> None:
    ends = []
    for stop in (False, True):
        model, x, y = _task()
        optimizer, losses = _limited(model, structure), []
        for number in range(12):
            if stop and number == 5:
                state = optimizer.state_dict()
                optimizer.close()
                optimizer = _limited(model, structure)
                optimizer.load_state_dict(state)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


def test_max_rank__refuses_what_is_no_number_of_eigenpairs() -> None:
    with pytest.raises(fk.InvalidArgumentError, match="max_rank=0"):
        fk.optim.NaturalGradient(_task()[0], 0.1, structure="kfac", damping=0.1, max_rank=0)


def _limited(model: nn.Module, structure: str) -> fk.optim.NaturalGradient:
    return fk.optim.NaturalGradient(
        model, 0.3, structure=structure, damping=0.1, ema=0.5, update_every=2, refresh_every=2, max_rank=3
    )


def _task() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        return model, torch.randn(30, 6, dtype=torch.float64), torch.randint(4, (30,))
