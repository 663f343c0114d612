"""Likelihoods: derivatives are those of the loss, also where a fit is nearly perfect or hopeless.

The loss itself is the reference's, which shares no code with the package.
"""

import pytest
import torch
from torch import Tensor

import fisherkit as fk
from fisherkit.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from tests.axes import pairwise
from tests.reference import outputs as reference
from tests.theorem_cases import error, metric

LIKELIHOODS: dict[str, Likelihood] = {"categorical": Categorical(), "bernoulli": Bernoulli(), "gaussian": Gaussian()}

# Float32 has no number below about 1e-38; what is compared relative to the truth may be lost there.
UNDERFLOW = 4 * torch.finfo(torch.float32).tiny


def case(name: str, *leading: int, outputs: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random outputs ``[*leading, C]`` and targets."""
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(*leading, outputs, dtype=torch.float64, generator=generator)
    if name == "categorical":
        return z, torch.randint(outputs, leading, generator=generator)
    return z, torch.rand(*leading, outputs, dtype=torch.float64, generator=generator)


def true_hessian(name: str, z: Tensor, target: Tensor) -> Tensor:
    """∂²ℓ/∂z² of each leading index, by autograd."""
    flat_z, flat_y = z.flatten(0, -2), target.flatten() if name == "categorical" else target.flatten(0, -2)
    found = [reference.hessian(a, b, name) for a, b in zip(flat_z, flat_y, strict=True)]  # type: ignore[arg-type]
    return torch.stack(found).reshape(*z.shape, z.shape[-1])


# -- derivatives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [2, 5])
@pytest.mark.parametrize("leading", [(7,), (3, 4)], ids=str)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_derivatives__are_those_of_the_loss(name: str, leading: tuple[int, ...], outputs: int) -> None:
    likelihood, (z, y) = LIKELIHOODS[name], case(name, *leading, outputs=outputs)
    h = true_hessian(name, z, y)
    s = likelihood.hessian_factor(z)
    w = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u = reference.gradient(z, y, name)  # type: ignore[arg-type]
    assert error(likelihood.gradient(z, y), u) < 1e-12
    assert error(s @ s.mT, h) < 1e-12
    assert error(likelihood.hessian_matmul(z, w), (h @ w[..., None]).squeeze(-1)) < 1e-12
    assert error(likelihood.hessian_diagonal(z), h.diagonal(dim1=-2, dim2=-1)) < 1e-12
    inverse = torch.linalg.pinv(h, rtol=1e-12, hermitian=True)
    assert error(likelihood.hessian_inverse_form(z, y), (u[..., None, :] @ inverse @ u[..., None])[..., 0, 0]) < 1e-9


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_hessian_factor__has_no_more_columns_than_degrees_of_freedom(name: str) -> None:
    z, _ = case(name, 3)
    assert LIKELIHOODS[name].hessian_factor(z).shape == (3, 5, 4 if name == "categorical" else 5)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_score__has_mean_zero_and_the_hessian_as_its_covariance(name: str) -> None:
    """What makes the sampled kind unbiased: E[u] = 0 and E[u uᵀ] = H under the model's own targets."""
    likelihood, draws = LIKELIHOODS[name], 40_000
    z, _ = case(name, 1, outputs=3)
    uniform = torch.rand(draws, likelihood.channels(3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    many = z.expand(draws, 3)
    u = likelihood.gradient(many, likelihood.sample(many, uniform))
    s = likelihood.hessian_factor(z)[0]
    scale = float((s @ s.T).trace())
    assert float(u.mean(0).norm()) < 4 * (scale / draws) ** 0.5
    assert float((u.T @ u / draws - s @ s.T).norm()) < 8 * scale / draws**0.5


# -- what a user's likelihood inherits ---------------------------------------------------------------------------------


def bare(likelihood: Likelihood) -> Likelihood:
    """The same likelihood as a user would write it, with nothing but what is abstract."""

    class Bare(Likelihood):
        name = "bare"

        def gradient(self, z: Tensor, target: Tensor) -> Tensor:
            return likelihood.gradient(z, target)

        def hessian_factor(self, z: Tensor) -> Tensor:
            return likelihood.hessian_factor(z)

        def sample(self, z: Tensor, uniform: Tensor) -> Tensor:
            return likelihood.sample(z, uniform)

    return Bare()


@pytest.mark.parametrize("leading", [(6,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_defaults__agree_with_the_closed_forms(name: str, leading: tuple[int, ...]) -> None:
    likelihood, plain, (z, y) = LIKELIHOODS[name], bare(LIKELIHOODS[name]), case(name, *leading)
    w = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert error(plain.hessian_matmul(z, w), likelihood.hessian_matmul(z, w)) < 1e-12
    assert error(plain.hessian_diagonal(z), likelihood.hessian_diagonal(z)) < 1e-12
    assert error(plain.hessian_inverse_form(z, y), likelihood.hessian_inverse_form(z, y)) < 1e-9
    assert plain.channels(5) == 5


KINDS = [
    (fk.EmpiricalFisher, {}),
    (fk.ImprovedEmpiricalFisher, {}),
    (fk.SampledFisher, {"draws": 4}),
    (fk.ExactFisher, {}),
    (fk.TruncatedFisher, {"rank": 1}),
    (fk.TruncatedFisher, {"rank": 3}),
    (fk.TruncatedFisher, {"tolerance": 0.2}),
]


@pytest.mark.parametrize(
    ("leading", "name", "kind", "options"),
    [(leading, name, *kind) for leading, name, kind in pairwise([(4,), (2, 3)], ["bernoulli", "gaussian"], KINDS)],
)
def test_defaults__give_every_kind_its_matrix(
    name: str, kind: type[fk.FisherApproximation], options: dict[str, float], leading: tuple[int, ...]
) -> None:
    z, y = case(name, *leading, outputs=3)
    found, expected = (metric(kind, z, y, x, **options) for x in (bare(LIKELIHOODS[name]), LIKELIHOODS[name]))
    assert error(found, expected) < 1e-9


# -- extreme logits ----------------------------------------------------------------------------------------------------

GAPS = [0.0, 1.0, 8.0, 16.0, 28.0, 40.0, 80.0]


def sure_logits(gap: float) -> Tensor:
    """One class ahead of the others by about ``gap``, in each place in turn; float32."""
    others = torch.tensor([0.0, -0.5, 0.25, 0.25])
    return torch.stack([torch.cat([others[:k], torch.tensor([gap + 0.5]), others[k:]]) for k in range(5)])


def assert_relative(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Entry by entry, the smallest included."""
    assert got.dtype == torch.float32
    assert bool(torch.isfinite(got).all())
    worst = (got.double() - expected).abs() / (tolerance * expected.abs() + UNDERFLOW)
    assert float(worst.max()) <= 1, f"relative error {tolerance * float(worst.max()):.2g}"


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("label", range(5))
def test_categorical__gradient_in_float32_has_relative_accuracy(gap: float, label: int) -> None:
    """P_y − 1 as written would be 0 from a gap of 17 on, with no digit right long before."""
    z, y = sure_logits(gap), torch.full((5,), label)
    likelihood = Categorical()
    assert_relative(likelihood.gradient(z, y), likelihood.gradient(z.double(), y), 2e-6)


@pytest.mark.parametrize("gap", GAPS)
def test_categorical__hessian_factor_in_float32_has_relative_accuracy(gap: float) -> None:
    z, likelihood = sure_logits(gap), Categorical()
    assert_relative(likelihood.hessian_factor(z), likelihood.hessian_factor(z.double()), 2e-5)


@pytest.mark.parametrize("gap", GAPS)
def test_categorical__hessian_columns_are_those_of_the_factor(gap: float) -> None:
    z, likelihood = sure_logits(gap), Categorical()
    columns = [likelihood.hessian_columns(z, torch.full((len(z),), k)) for k in range(4)]
    assert_relative(torch.stack(columns, -1), likelihood.hessian_factor(z.double()), 2e-5)


@pytest.mark.parametrize("gap", GAPS)
def test_categorical__hessian_diagonal_in_float32_has_relative_accuracy(gap: float) -> None:
    z, likelihood = sure_logits(gap), Categorical()
    p = torch.softmax(z.double(), -1)
    others = torch.stack([torch.cat([row[:k], row[k + 1 :]]).sum() for row in p for k in range(5)]).reshape(5, 5)
    assert_relative(likelihood.hessian_diagonal(z), p * others, 2e-5)


@pytest.mark.parametrize("gap", GAPS)
def test_categorical__hessian_products_in_float32_have_relative_accuracy(gap: float) -> None:
    """Of the product as a whole: its entries are differences of two likely classes' when w is alike in them."""
    z, likelihood = sure_logits(gap), Categorical()
    w = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    s = likelihood.hessian_factor(z.double())
    expected = (s @ (s.mT @ w.double()[..., None])).squeeze(-1)
    found = likelihood.hessian_matmul(z, w).double()
    assert float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-4


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("label", range(5))
def test_categorical__inverse_form_in_float32_has_relative_accuracy(gap: float, label: int) -> None:
    z, y = sure_logits(gap), torch.full((5,), label)
    likelihood = Categorical()
    assert_relative(likelihood.hessian_inverse_form(z, y), likelihood.hessian_inverse_form(z.double(), y), 4e-5)


@pytest.mark.parametrize("target", [0.0, 1.0, 0.25])
def test_bernoulli__everything_in_float32_has_relative_accuracy(target: float) -> None:
    z = torch.tensor([s * gap for gap in GAPS for s in (1, -1)])[:, None]
    y, likelihood = torch.full_like(z, target), Bernoulli()
    wide, wide_y = z.double(), y.double()
    assert_relative(likelihood.gradient(z, y), likelihood.gradient(wide, wide_y), 2e-6)
    assert_relative(likelihood.hessian_diagonal(z), likelihood.hessian_diagonal(wide), 2e-6)
    assert_relative(likelihood.hessian_factor(z), likelihood.hessian_factor(wide), 2e-6)
    assert_relative(likelihood.hessian_inverse_form(z, y), likelihood.hessian_inverse_form(wide, wide_y), 2e-5)


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("gap", GAPS[:-1])
def test_ef__of_a_nearly_perfect_fit_in_float32_has_relative_accuracy(gap: float, right: bool) -> None:
    z = sure_logits(gap)
    y = torch.arange(5) if right else torch.arange(5).roll(1)
    wide = metric(fk.EmpiricalFisher, z.double(), y, "categorical")
    assert_relative(metric(fk.EmpiricalFisher, z, y, "categorical"), wide, 1e-5)


@pytest.mark.parametrize("gap", [*GAPS, 85.0, 100.0])
def test_ief__rows_stay_unit_vectors_until_the_gradient_underflows(gap: float) -> None:
    """At a gap of 100 the gradient is a denormal number with two digits left; its square is no number at all."""
    z, y = sure_logits(gap), torch.arange(5)
    found = metric(fk.ImprovedEmpiricalFisher, z, y, "categorical")
    assert float((found.diagonal(dim1=1, dim2=2).sum(1) - 1).abs().max()) < 2e-6
    expected = metric(fk.ImprovedEmpiricalFisher, z.double(), y, "categorical")
    assert error(found, expected) < (2e-6 if gap <= 80 else 1e-1)


@pytest.mark.parametrize(
    ("name", "z", "y"),
    [("categorical", [200.0, 0, 0], 0), ("gaussian", [1.0, 2, 3], [1.0, 2, 3]), ("bernoulli", [200.0] * 3, [1.0] * 3)],
)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_ief__of_an_exactly_zero_gradient_is_a_zero_row(name: str, z: list[float], y: object, power: float) -> None:
    found = metric(fk.ImprovedEmpiricalFisher, torch.tensor([z]), torch.tensor([y]), name, power=power)
    assert not bool(found.any())


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e18, 1e25])
def test_ief__is_a_unit_vector_for_residuals_whose_square_is_no_number(size: float) -> None:
    y = torch.tensor([[3.0, 0, -4]]) * size
    found = metric(fk.ImprovedEmpiricalFisher, torch.zeros(1, 3), y, "gaussian")[0]
    expected = torch.tensor([[0.36, 0, -0.48], [0, 0, 0], [-0.48, 0, 0.64]])
    assert float((found - expected).abs().max()) < 1e-6
    half = metric(fk.ImprovedEmpiricalFisher, torch.zeros(1, 3), y, "gaussian", power=0.5)[0]
    assert error(half, expected * 5 * size) < 1e-5


# -- how targets are read ----------------------------------------------------------------------------------------------


def test_prepare__gives_positions_and_a_mask_to_every_shape_of_outputs() -> None:
    z, labels = torch.zeros(4, 3, 5), torch.zeros(4, 3).long()
    labels[1, 2] = -100
    prepared = Categorical().prepare(z, labels, "test")
    assert prepared[0].shape == (4, 3, 5)
    assert not bool(prepared[2][1, 2])
    assert int(prepared[2].sum()) == 11
    assert Categorical().prepare(z[:, 0], labels[:, 0], "test")[0].shape == (4, 1, 5)
    for likelihood in (Gaussian(), Bernoulli(), bare(Gaussian())):
        for shape in ((4,), (4, 5), (4, 3, 5)):
            got, target, mask = likelihood.prepare(torch.zeros(shape), torch.zeros(shape), "test")
            assert got.shape == (4, shape[1] if len(shape) == 3 else 1, shape[-1] if len(shape) > 1 else 1)
            assert target is not None
            assert target.shape == got.shape
            assert bool(mask.all())
        assert likelihood.prepare(torch.zeros(4, 1), torch.zeros(4), "test")[0].shape == (4, 1, 1)


def test_ignore_index__may_be_any_label() -> None:
    z, y = case("categorical", 3, outputs=4)
    y = torch.tensor([1, 3, 0])
    by_default = metric(fk.ExactFisher, z, torch.tensor([1, -100, 0]), "categorical")
    assert error(metric(fk.ExactFisher, z, y, Categorical(ignore_index=3)), by_default) < 1e-14
    assert not bool(by_default[1].any())


# -- the loss itself, as users call it ---------------------------------------------------------------------------------

Z, WHOLE = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(2, 3, 3), torch.rand(2, 3, 3, dtype=torch.float64)
FITTING: dict[str, tuple[Likelihood, Tensor, torch.nn.Module]] = {
    "labels": (Categorical(), torch.tensor([[0, 1, 2], [2, -100, 0]]), torch.nn.CrossEntropyLoss(reduction="none")),
    "probabilities": (Categorical(), WHOLE.softmax(-1), torch.nn.CrossEntropyLoss(reduction="none")),
    "bernoulli": (Bernoulli(), WHOLE, torch.nn.BCEWithLogitsLoss(reduction="none")),
    "bernoulli, whole numbers": (Bernoulli(), WHOLE.round().long(), torch.nn.BCEWithLogitsLoss(reduction="none")),
    "gaussian": (Gaussian(0.5), WHOLE, torch.nn.MSELoss(reduction="none")),
    "poisson": (fk.likelihoods.Poisson(), WHOLE, torch.nn.PoissonNLLLoss(reduction="none")),
}


@pytest.mark.parametrize("name", FITTING)
def test_loss__is_torchs_own_at_every_position(name: str) -> None:
    likelihood, target, own = FITTING[name]
    if isinstance(likelihood, Categorical):
        expected = own(Z.flatten(0, 1), target.flatten(0, 1)).reshape(2, 3)
    else:
        expected = own(Z, target.double()).sum(-1)
    torch.testing.assert_close(likelihood.loss(Z, target), expected)


def test_loss__of_labels_counts_the_last_axis_wherever_outputs_of_the_model_have_classes() -> None:
    likelihood, z = Categorical(class_axis=1), torch.linspace(-1, 1, 18).reshape(3, 2, 3)
    assert likelihood.loss(z, torch.full((3, 2), 2)).shape == (3, 2)
