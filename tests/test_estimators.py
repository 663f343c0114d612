"""Hutchinson and Lanczos against dense eigendecompositions."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fisherkit import estimators
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError, NotConvergedWarning
from tests.axes import pairwise

D = 60


class Dense:
    """The least that the estimators ask of an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.products = 0

    @property
    def size(self) -> int:
        return len(self.matrix)

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def matvec(self, v: Tensor, /) -> Tensor:
        self.products += 1
        return self.matrix @ v


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Dense:
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return Dense((basis * eigenvalues.double()) @ basis.T)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SPECTRA = {
    "decaying": torch.logspace(0, -5, D),
    "full": torch.linspace(0.5, 2, D),
    "low-rank": torch.cat([torch.linspace(1, 3, 7), torch.zeros(D - 7)]),
    "rank-one": torch.cat([torch.ones(1), torch.zeros(D - 1)]),
    "repeated": torch.cat([torch.full((20,), 5.0), torch.full((20,), 1.0), torch.zeros(D - 40)]),
    "identity": torch.ones(D),
    "zero": torch.zeros(D),
    "scalar": torch.tensor([2.5]),
}
SCALED = (1e-12, 1.0, 1e12)


def assert_honest(estimate: estimators.Estimate, truth: Tensor, rounding: float = 1e-10) -> None:
    """Within four standard errors; rounding is what remains where the estimate is exact."""
    assert estimate.value.shape == estimate.standard_error.shape == truth.shape
    assert (estimate.standard_error >= 0).all()
    assert ((estimate.value - truth).abs() <= 4 * estimate.standard_error + rounding * (1 + truth.abs())).all()


# -- Hutchinson ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("seed", range(3))
def test_trace__within_four_standard_errors(spectrum: str, seed: int) -> None:
    operator = symmetric(SPECTRA[spectrum])
    estimate = estimators.hutchinson_trace(operator, samples=50, generator=seeded(seed))
    assert_honest(estimate, operator.matrix.trace())


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_diagonal__within_four_standard_errors(spectrum: str) -> None:
    operator = symmetric(SPECTRA[spectrum])
    assert_honest(estimators.hutchinson_diagonal(operator, samples=200), operator.matrix.diagonal())


def test_trace_and_diagonal__of_a_diagonal_matrix_are_exact_with_one_sample() -> None:
    diagonal = torch.linspace(-1, 3, D, dtype=torch.float64)
    trace = estimators.hutchinson_trace(Dense(diagonal.diag()), samples=1)
    estimate = estimators.hutchinson_diagonal(Dense(diagonal.diag()), samples=1)
    torch.testing.assert_close(trace.value, diagonal.sum())
    torch.testing.assert_close(estimate.value, diagonal)
    assert trace.standard_error.isnan()
    assert estimate.standard_error.isnan().all()


def test_trace_and_diagonal__standard_error_is_that_of_the_theory() -> None:
    operator = symmetric(SPECTRA["full"])
    off_diagonal = operator.matrix - operator.matrix.diagonal().diag()
    by_entry = estimators.hutchinson_diagonal(operator, samples=2000).standard_error
    torch.testing.assert_close(by_entry, off_diagonal.norm(dim=0) / math.sqrt(2000), rtol=0.1, atol=0)
    estimate = estimators.hutchinson_trace(operator, samples=2000)
    assert estimate.standard_error.item() == pytest.approx(off_diagonal.norm().item() * math.sqrt(2 / 2000), rel=0.1)


# -- Lanczos ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "scale", "spectrum"), pairwise([1, 3, 25, D], SCALED, SPECTRA))
def test_eigenvalues__equal_the_largest_of_eigh(spectrum: str, scale: float, k: int) -> None:
    operator = symmetric(SPECTRA[spectrum].double() * scale)
    k = min(k, operator.size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = estimators.lanczos_eigenvalues(operator, k)
    truth = torch.linalg.eigvalsh(operator.matrix).flip(0)[:k]
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-13 * scale)


def test_eigenvalues__float32() -> None:
    operator = Dense(symmetric(SPECTRA["decaying"]).matrix.float())
    found = estimators.lanczos_eigenvalues(operator, 5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, SPECTRA["decaying"][:5].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("spectrum", "products"), [("identity", 1), ("zero", 1), ("low-rank", 3), ("repeated", 3)])
def test_eigenvalues__stop_at_an_invariant_subspace(spectrum: str, products: int) -> None:
    operator = symmetric(SPECTRA[spectrum])
    estimators.lanczos_eigenvalues(operator, 5)
    assert operator.products <= products


def test_eigenvalues__indefinite_matrix_gives_the_algebraically_largest() -> None:
    operator = symmetric(torch.linspace(-5, 1, D))
    torch.testing.assert_close(
        estimators.lanczos_eigenvalues(operator, 3), torch.linspace(-5, 1, D).double().flip(0)[:3], rtol=1e-6, atol=1e-9
    )


def test_eigenvalues__too_few_steps_warn_and_are_lower_bounds() -> None:
    operator = symmetric(SPECTRA["full"])
    with pytest.warns(NotConvergedWarning, match=r"lanczos_eigenvalues\(k=2\): 2 of 2.*steps=3.*Try: more steps"):
        found = estimators.lanczos_eigenvalues(operator, 2, steps=3)
    assert (found < torch.linalg.eigvalsh(operator.matrix).flip(0)[:2]).all()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("damping", [1e-4, 1e-1, 10.0])
def test_logdet_and_effective_dimension__within_four_standard_errors(spectrum: str, damping: float) -> None:
    operator, values = symmetric(SPECTRA[spectrum]), SPECTRA[spectrum].double()
    truth = torch.linalg.slogdet(operator.matrix + damping * torch.eye(operator.size, dtype=torch.float64))[1]
    for steps in (1, 5, 50):
        options = {"damping": damping, "samples": 20, "steps": steps}
        assert_honest(estimators.lanczos_logdet(operator, **options), truth)
        estimate = estimators.lanczos_effective_dimension(operator, **options)
        assert_honest(estimate, (values / (values + damping)).sum())


@pytest.mark.parametrize("spectrum", ["identity", "zero", "scalar"])
@pytest.mark.parametrize("scale", SCALED)
def test_logdet__is_exact_for_a_multiple_of_the_identity(spectrum: str, scale: float) -> None:
    operator = symmetric(SPECTRA[spectrum].double() * scale)
    truth = torch.log(SPECTRA[spectrum].double() * scale + 1e-3 * scale).sum()
    estimate = estimators.lanczos_logdet(operator, damping=1e-3 * scale, samples=2)
    torch.testing.assert_close(estimate.value, truth)
    assert estimate.standard_error < 1e-10


def test_lanczos__diagonal_matrix_with_all_steps_is_exact() -> None:
    # Every sign vector weighs the eigenvalues of a diagonal matrix equally.
    diagonal = torch.linspace(0, 3, 12, dtype=torch.float64)
    for estimate, value in (
        (estimators.lanczos_logdet, (diagonal + 0.1).log()),
        (estimators.lanczos_effective_dimension, diagonal / (diagonal + 0.1)),
    ):
        found = estimate(Dense(diagonal.diag()), damping=0.1, samples=3, steps=12)
        torch.testing.assert_close(found.value, value.sum())
        assert found.standard_error < 1e-8


def test_logdet__error_bar_covers_too_few_steps() -> None:
    # No spread between samples: what is left is the quadrature's own error, which a spread would not show.
    diagonal = torch.logspace(-6, 0, D, dtype=torch.float64)
    truth = (diagonal + 1e-6).log().sum()
    for steps in (2, 4, 8, 16):
        estimate = estimators.lanczos_logdet(Dense(diagonal.diag()), damping=1e-6, samples=5, steps=steps)
        assert (estimate.value - truth).abs() <= estimate.standard_error


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_spectrum__is_a_density_with_the_right_moments(spectrum: str) -> None:
    operator = symmetric(SPECTRA[spectrum])
    density = estimators.lanczos_spectrum(operator, samples=100, steps=20)
    eigenvalues = SPECTRA[spectrum].double()
    assert density.weights.sum().item() == pytest.approx(1)
    assert (density.weights > 0).all()
    assert (density.nodes.diff() >= 0).all()
    assert density.nodes.min() >= eigenvalues.min() - 1e-9
    assert density.nodes.max() <= eigenvalues.max() + 1e-9
    for power in (1, 2):
        moment = (density.weights * density.nodes**power).sum().item()
        assert moment == pytest.approx(eigenvalues.pow(power).mean().item(), rel=0.15, abs=1e-12)


def test_spectrum__of_a_rank_deficient_matrix_finds_its_null_space() -> None:
    operator = symmetric(SPECTRA["repeated"])
    density = estimators.lanczos_spectrum(operator, samples=200, steps=20)
    for eigenvalue in (0.0, 1.0, 5.0):
        near = (density.nodes - eigenvalue).abs() < 1e-6
        assert density.weights[near].sum().item() == pytest.approx(1 / 3, abs=0.03)


# -- for all -----------------------------------------------------------------------------------------------------------

CALLS: dict[str, Callable[..., Tensor]] = {
    "hutchinson_trace": lambda f, **k: estimators.hutchinson_trace(f, samples=4, **k).value,
    "hutchinson_diagonal": lambda f, **k: estimators.hutchinson_diagonal(f, samples=4, **k).value,
    "lanczos_effective_dimension": lambda f, **k: (
        estimators.lanczos_effective_dimension(f, damping=0.1, samples=4, steps=5, **k).value
    ),
    "lanczos_eigenvalues": lambda f, **k: estimators.lanczos_eigenvalues(f, 2, **k),
    "lanczos_logdet": lambda f, **k: estimators.lanczos_logdet(f, damping=0.1, samples=4, steps=5, **k).value,
    "lanczos_spectrum": lambda f, **k: estimators.lanczos_spectrum(f, samples=4, steps=5, **k).nodes,
}


@pytest.mark.parametrize("call", CALLS)
def test_estimators__leave_the_global_generator_alone_and_repeat(call: str) -> None:
    operator = symmetric(SPECTRA["full"])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = CALLS[call](operator)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first, CALLS[call](operator))


@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"lanczos_eigenvalues"}))
def test_estimators__draw_from_the_generator_that_is_passed(call: str) -> None:
    operator, generator = symmetric(SPECTRA["full"]), seeded(3)
    first, second = CALLS[call](operator, generator=generator), CALLS[call](operator, generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, CALLS[call](operator, generator=seeded(3)))


@pytest.mark.parametrize("call", CALLS)
def test_estimators__batches_of_probes_do_not_change_the_numbers(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = symmetric(SPECTRA["full"])
    together = CALLS[call](operator)
    monkeypatch.setattr(estimators, "_WORKSPACE_ENTRIES", 1)
    torch.testing.assert_close(CALLS[call](operator), together)


@pytest.mark.parametrize("call", CALLS)
def test_estimators__keep_the_dtype_and_need_no_graph(call: str) -> None:
    operator = Dense(symmetric(SPECTRA["full"]).matrix.float().requires_grad_())
    value = CALLS[call](operator)
    assert value.dtype == torch.float32
    assert not value.requires_grad


@pytest.mark.parametrize("call", CALLS)
def test_estimators__refuse_products_that_are_not_finite(call: str) -> None:
    with pytest.raises(NonFiniteError, match=r"Dense.matvec: got NaN or infinity in a product; expected finite"):
        CALLS[call](Dense(torch.full((D, D), float("nan"), dtype=torch.float64)))


@pytest.mark.parametrize("call", CALLS)
def test_estimators__refuse_products_of_another_dtype(call: str) -> None:
    operator = Dense(torch.eye(D, dtype=torch.float64))
    operator.matvec = lambda v: v.float()  # type: ignore[method-assign]
    with pytest.raises(InvalidArgumentError, match=r"Dense.matvec: got a product .* torch.float32; expected .*float64"):
        CALLS[call](operator)


@pytest.mark.parametrize("samples", [0, -1])
def test_estimators__refuse_no_samples(samples: int) -> None:
    operator = symmetric(SPECTRA["full"])
    message = rf": got samples={samples}; expected an integer, 1 or more"
    for name in ("hutchinson_trace", "hutchinson_diagonal", "lanczos_logdet", "lanczos_spectrum"):
        options = {"damping": 1.0} if name == "lanczos_logdet" else {}
        with pytest.raises(InvalidArgumentError, match=name + message):
            getattr(estimators, name)(operator, samples=samples, **options)


@pytest.mark.parametrize("k", [0, D + 1])
def test_eigenvalues__refuse_more_than_there_are(k: int) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"lanczos_eigenvalues: got k={k}; expected .* from 1 to 60"):
        estimators.lanczos_eigenvalues(symmetric(SPECTRA["full"]), k)


def test_lanczos__refuses_no_steps() -> None:
    operator = symmetric(SPECTRA["full"])
    with pytest.raises(InvalidArgumentError, match=r"lanczos_eigenvalues: got steps=0"):
        estimators.lanczos_eigenvalues(operator, 1, steps=0)
    with pytest.raises(InvalidArgumentError, match=r"lanczos_spectrum: got steps=0"):
        estimators.lanczos_spectrum(operator, steps=0)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_lanczos__refuses_damping_that_is_not_positive(damping: float) -> None:
    for name, why in (("lanczos_logdet", "Products"), ("lanczos_effective_dimension", "At λ")):
        with pytest.raises(
            InvalidArgumentError, match=rf"{name}: got damping=.*; expected a finite .* above 0\. {why}"
        ):
            getattr(estimators, name)(symmetric(SPECTRA["full"]), damping=damping)


def test_logdet__refuses_an_indefinite_operator() -> None:
    with pytest.raises(InvalidArgumentError, match=r"an eigenvalue of -.*expected a positive semi-definite one"):
        estimators.lanczos_logdet(symmetric(torch.linspace(-1, 1, D)), damping=2.0)


@pytest.mark.parametrize("call", CALLS)
def test_estimators__refuse_what_is_no_operator_or_generator(call: str) -> None:
    operator: Any = torch.eye(D)
    with pytest.raises(InvalidTypeError, match=rf"{call}: got a Tensor as operator; .*matvec"):
        CALLS[call](operator)
    with pytest.raises(InvalidTypeError, match=rf"{call}: got an int as generator"):
        CALLS[call](symmetric(SPECTRA["full"]), generator=3)


def test_supports_matvec__is_a_structural_type() -> None:
    assert isinstance(symmetric(SPECTRA["scalar"]), estimators.SupportsMatvec)
    assert not isinstance(object(), estimators.SupportsMatvec)
