"""Conjugate gradients against dense solves."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fisherkit import solvers
from fisherkit.errors import InvalidArgumentError, NonFiniteError, NotConvergedWarning

D = 40


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (basis * eigenvalues.double()) @ basis.T


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda columns: matrix @ columns


def dense_solve(matrix: Tensor, rhs: Tensor, damping: float) -> Tensor:
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), rhs)


SPECTRA = {
    "well-conditioned": torch.linspace(1, 3, D),
    "singular": torch.cat([torch.linspace(1, 3, 7), torch.zeros(D - 7)]),
    "repeated": torch.cat([torch.full((20,), 2.0), torch.full((D - 20,), 5.0)]),
    "decaying": torch.logspace(0, -4, D),
    "zero": torch.zeros(D),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_solve__equals_dense_solve(spectrum: str, damping: float) -> None:
    matrix, rhs = symmetric(SPECTRA[spectrum]), normal(D, 3)
    x, info = solvers.conjugate_gradient(product(matrix), rhs, damping=damping, tolerance=1e-11)
    torch.testing.assert_close(x, dense_solve(matrix, rhs, damping), rtol=1e-8, atol=1e-8)
    assert info.converged
    assert info.method == "conjugate_gradient"
    assert info.damping == damping
    assert 0 < info.steps <= D + 40


def test_solve__steps_equal_number_of_distinct_eigenvalues() -> None:
    matrix = symmetric(SPECTRA["repeated"])
    _, info = solvers.conjugate_gradient(product(matrix), normal(D, 3))
    assert info.steps == 2


def test_solve__singular_without_damping_gives_pseudo_inverse_for_rhs_in_range() -> None:
    matrix = symmetric(SPECTRA["singular"])
    rhs = matrix @ normal(D, 2)
    x, info = solvers.conjugate_gradient(product(matrix), rhs, tolerance=1e-10)
    assert info.converged
    torch.testing.assert_close(x, torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ rhs, rtol=1e-7, atol=1e-9)


def test_solve__residual_is_the_true_one() -> None:
    matrix, rhs = symmetric(SPECTRA["decaying"]), normal(D, 4)
    x, info = solvers.conjugate_gradient(product(matrix), rhs, damping=1e-3, tolerance=1e-5)
    true = (matrix @ x + 1e-3 * x - rhs).norm(dim=0) / rhs.norm(dim=0)
    torch.testing.assert_close(info.residual, true, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(solvers.relative_residual(product(matrix), x, rhs, damping=1e-3), true)
    assert (info.residual <= 1e-5).all()


def test_solve__zero_column_gives_zero_column_and_leaves_the_others_alone() -> None:
    matrix, rhs = symmetric(SPECTRA["decaying"]), normal(D, 3)
    rhs[:, 1] = 0
    x, info = solvers.conjugate_gradient(product(matrix), rhs, damping=1e-2)
    assert info.converged
    assert torch.equal(x[:, 1], torch.zeros(D, dtype=x.dtype))
    assert info.residual[1] == 0
    torch.testing.assert_close(x, dense_solve(matrix, rhs, 1e-2), rtol=1e-4, atol=1e-4)


def test_solve__all_zero_rhs_takes_no_steps() -> None:
    x, info = solvers.conjugate_gradient(product(symmetric(SPECTRA["zero"])), torch.zeros(D, 2, dtype=torch.float64))
    assert not x.any()
    assert info.steps == 0
    assert info.converged


def test_solve__a_column_does_not_depend_on_its_neighbours() -> None:
    matrix, rhs = symmetric(SPECTRA["decaying"]), normal(D, 2)
    easy = torch.linalg.eigh(matrix).eigenvectors[:, -1:]  # done after one step, then frozen
    alone, _ = solvers.conjugate_gradient(product(matrix), rhs, damping=1e-3)
    together, _ = solvers.conjugate_gradient(product(matrix), torch.cat([easy, rhs], dim=1), damping=1e-3)
    torch.testing.assert_close(together[:, 1:], alone, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(together[:, :1], easy / (1 + 1e-3), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_solve__columns_of_any_magnitude(scale: float) -> None:
    matrix, rhs = symmetric(SPECTRA["well-conditioned"]), normal(D, 2)
    rhs[:, 0] *= scale
    x, info = solvers.conjugate_gradient(product(matrix), rhs, tolerance=1e-10)
    assert info.converged
    unit = torch.tensor([scale, 1], dtype=torch.float64)
    torch.testing.assert_close(x / unit, torch.linalg.solve(matrix, rhs / unit))


def test_solve__preconditioner_rescues_an_ill_conditioned_matrix() -> None:
    scale = torch.logspace(0, 5, D, dtype=torch.float64)
    matrix, rhs = symmetric(SPECTRA["well-conditioned"]) * scale * scale[:, None], normal(D, 3)
    jacobi = product(torch.diag(1 / matrix.diagonal()))
    with pytest.warns(NotConvergedWarning, match="a preconditioner"):
        _, plain = solvers.conjugate_gradient(product(matrix), rhs, tolerance=1e-8, max_steps=100)
    x, info = solvers.conjugate_gradient(product(matrix), rhs, preconditioner=jacobi, tolerance=1e-8, max_steps=100)
    assert info.converged
    assert not plain.converged
    torch.testing.assert_close(x, torch.linalg.solve(matrix, rhs), rtol=1e-3, atol=1e-6)


def test_solve__perfect_preconditioner_takes_one_step() -> None:
    matrix, rhs = symmetric(SPECTRA["decaying"]), normal(D, 3)
    inverse = product(torch.linalg.inv(matrix))
    _, info = solvers.conjugate_gradient(product(matrix), rhs, preconditioner=inverse)
    assert info.steps == 1


def test_solve__restarts_until_the_true_residual_meets_the_tolerance() -> None:
    matrix, rhs = symmetric(torch.logspace(0, -6, D)), normal(D, 1)
    _, first = solvers.conjugate_gradient(product(matrix * (1 + 1e-5)), rhs, damping=1e-2, tolerance=1e-8)
    calls = 0

    def imprecise_at_first(columns: Tensor) -> Tensor:
        # The recursion believes in these products, and in its residual; only one afterwards can tell.
        nonlocal calls
        calls += 1
        return matrix * (1 + 1e-5) @ columns if calls <= first.steps else matrix @ columns

    x, info = solvers.conjugate_gradient(imprecise_at_first, rhs, damping=1e-2, tolerance=1e-8)
    assert info.converged
    assert info.steps > first.steps
    torch.testing.assert_close(x, dense_solve(matrix, rhs, 1e-2), rtol=1e-5, atol=1e-5)


def test_solve__checking_less_often_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # What an accelerator does: products go on after every column is done, and must not move anything.
    matrix, rhs = symmetric(SPECTRA["repeated"]), normal(D, 3)
    expected, info = solvers.conjugate_gradient(product(matrix), rhs)
    monkeypatch.setitem(solvers._CHECK_EVERY, "cpu", 5)
    x, lazy = solvers.conjugate_gradient(product(matrix), rhs)
    assert torch.equal(x, expected)
    assert lazy.steps == info.steps


def test_solve__one_dimension() -> None:
    x, info = solvers.conjugate_gradient(lambda v: 3 * v, torch.tensor([[6.0]]), damping=1.0)
    assert x.item() == pytest.approx(1.5)
    assert info.steps == 1


def test_solve__keeps_dtype_and_input() -> None:
    rhs = normal(D, 2).float()
    before = rhs.clone()
    matrix = symmetric(SPECTRA["well-conditioned"]).float()
    x, info = solvers.conjugate_gradient(product(matrix), rhs, tolerance=1e-5)
    assert x.dtype == info.residual.dtype == torch.float32
    assert torch.equal(rhs, before)


def test_solve__needs_no_graph_and_leaves_none() -> None:
    matrix = symmetric(SPECTRA["well-conditioned"]).requires_grad_()
    x, info = solvers.conjugate_gradient(product(matrix), normal(D, 1).requires_grad_())
    assert not x.requires_grad
    assert not info.residual.requires_grad


# -- what cannot be solved is said -----------------------------------------------------------------------------------


def test_solve__too_few_steps_warns_and_says_what_would_help() -> None:
    matrix, rhs = symmetric(SPECTRA["decaying"]), normal(D, 3)
    with pytest.warns(NotConvergedWarning, match=r"3 of 3 columns missed tolerance=1e-06 after 4 steps.*max_steps=4"):
        x, info = solvers.conjugate_gradient(product(matrix), rhs, max_steps=4)
    assert not info.converged
    assert info.steps == 4
    # Each step lowers the error in the norm of A, also where it raises the residual.
    solution = torch.linalg.solve(matrix, rhs)
    energy = ((x - solution) * (matrix @ (x - solution))).sum(dim=0)
    assert (energy < (solution * (matrix @ solution)).sum(dim=0)).all()


def test_solve__rhs_outside_the_range_warns_and_stays_finite() -> None:
    with pytest.warns(NotConvergedWarning, match="not in the range of a singular matrix"):
        x, info = solvers.conjugate_gradient(product(symmetric(SPECTRA["zero"])), normal(D, 2))
    assert not info.converged
    assert torch.isfinite(x).all()
    torch.testing.assert_close(info.residual, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_solve__product_that_is_not_finite_warns_and_stays_finite(bad: float) -> None:
    with pytest.warns(NotConvergedWarning):
        x, info = solvers.conjugate_gradient(lambda v: v * bad, normal(D, 2))
    assert not info.converged
    assert torch.isfinite(x).all()


def test_solve__negative_definite_matrix_warns() -> None:
    with pytest.warns(NotConvergedWarning):
        _, info = solvers.conjugate_gradient(lambda v: -v, normal(D, 2))
    assert not info.converged


def test_solve__convergence_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solvers.conjugate_gradient(product(symmetric(SPECTRA["well-conditioned"])), normal(D, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -1.0}, r"conjugate_gradient: got damping=-1.0; expected a finite number, 0 or more"),
        ({"damping": float("nan")}, r"got damping=nan; expected a finite number, 0 or more"),
        ({"tolerance": 0.0}, r"got tolerance=0.0; expected a number above 0 and below 1"),
        ({"max_steps": 0}, r"got max_steps=0; expected an integer, 1 or more"),
    ],
)
def test_solve__refuses_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        solvers.conjugate_gradient(lambda v: v, normal(D, 2), **arguments)


def test_solve__refuses_nan() -> None:
    bad = normal(D, 2)
    bad[3, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"\(rhs\): got 1 NaN or infinite of 80 entries; expected finite") as e:
        solvers.conjugate_gradient(lambda v: v, bad)
    assert isinstance(e.value, ArithmeticError)


def test_solve__refuses_a_product_of_another_shape() -> None:
    with pytest.raises(InvalidArgumentError, match=r"got a product of shape \[1, 2\].*expected shape \[40, 2\]"):
        solvers.conjugate_gradient(lambda v: v[:1], normal(D, 2))


def test_solve__refuses_rhs_that_is_not_columns() -> None:
    # Under pytest the shape annotations speak first, with a TypeError of their own.
    with pytest.raises((InvalidArgumentError, TypeError)):
        solvers.conjugate_gradient(lambda v: v, normal(D))
