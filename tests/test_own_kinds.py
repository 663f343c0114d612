"""Kinds and likelihoods of users."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.likelihoods import Bernoulli, Categorical, Gaussian, GaussianNLL, Likelihood, Poisson
from fisherkit.outputs import Columns
from tests import by_hand

F64 = torch.float64
N, T, C = 5, 4, 3


def data() -> tuple[nn.Module, Tensor, Tensor]:
    """A model of positions, with positions and one whole example that are ignored."""
    torch.manual_seed(0)
    y = torch.randint(C, (N, T))
    y[0, 1:], y[2], y[3, 0] = -100, -100, -100
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C)).double(), torch.randn(N, T, 3, dtype=F64), y


class Answer(fk.OutputRule):
    """Whatever a function makes of the outputs."""

    def __init__(self, function: Callable[[fk.Outputs], Any]) -> None:
        self.function = function

    def output_vectors(self, outputs: fk.Outputs) -> fk.OutputVectors:
        found: fk.OutputVectors = self.function(outputs)
        return found


def both(outputs: fk.Outputs) -> Tensor:
    """Two vectors of all positions, whether they count or not."""
    return torch.stack([outputs.z.softmax(-1), outputs.z.tanh()], 1)


def columns(outputs: fk.Outputs) -> Columns:
    v = both(outputs)
    return Columns(2, lambda unit, vector: v[unit, vector])


def ignored_as_nan(outputs: fk.Outputs) -> Tensor:
    return torch.where(outputs.mask[:, None, :, None], both(outputs), torch.nan)


def reference() -> Tensor:
    """(1/N) Σ Jᵀv (Jᵀv)ᵀ by one autograd call a vector, over the positions that count."""
    model, x, y = data()
    rows, counted = [], 0
    for n in range(N):
        keep = y[n] != -100
        counted += bool(keep.any())
        for make in (lambda z: z.softmax(-1), torch.tanh):
            z = model(x[n])
            rows.append(by_hand.gradient((z * make(z.detach()))[keep].sum(), model))
    J = torch.stack(rows)
    return J.T @ J / counted


@pytest.mark.parametrize("memory_budget", [None, 1], ids=["kept", "streamed"])
@pytest.mark.parametrize("answer", [both, columns, ignored_as_nan])
def test_vectors__do_not_count_where_the_labels_do_not(answer: Any, memory_budget: int | None) -> None:
    model, x, y = data()
    rule = Answer(lambda outputs: fk.OutputVectors(answer(outputs)))
    fisher = fk.FisherApproximation(model, (x, y), rule, memory_budget=memory_budget)
    eye = torch.eye(fisher.size, dtype=F64)
    torch.testing.assert_close(fisher @ eye, reference(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", ["diagonal", "block", "kfac", "ekfac", "nkp"])
def test_structure__is_that_of_vectors_that_are_zero_where_nothing_counts(structure: str) -> None:
    model, x, y = data()
    found, right = (
        fk.FisherApproximation(model, (x, y), Answer(answer), structure=structure).to_dense()
        for answer in (
            lambda o: fk.OutputVectors(both(o)),
            lambda o: fk.OutputVectors(both(o) * o.mask[:, None, :, None]),
        )
    )
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


WRONG: dict[str, tuple[Callable[[fk.Outputs], Any], type[Exception], tuple[str, ...]]] = {
    "a tensor": (lambda o: o.gradient(), TypeError, ("got a Tensor", "fk.OutputVectors")),
    "nothing": (lambda o: None, TypeError, ("got a NoneType", "fk.OutputVectors")),
    "another type": (lambda o: fk.OutputVectors([1.0]), TypeError, ("a list as v", "a tensor")),  # type: ignore[arg-type]
    "no axis of vectors": (
        lambda o: fk.OutputVectors(o.gradient()),
        ValueError,
        ("[2, 4, 3]", "[n, M, P, C] = [2, M, 4, 3]", "unsqueeze(1)"),
    ),
    "other outputs": (lambda o: fk.OutputVectors(both(o)[..., :2]), ValueError, ("[2, 2, 4, 2]", "[2, M, 4, 3]")),
    "vectors first": (lambda o: fk.OutputVectors(both(o)[:1].mT), ValueError, ("[1, 2, 3, 4]", "[2, M, 4, 3]")),
    "no vector": (lambda o: fk.OutputVectors(both(o)[:, :0]), ValueError, ("no vector", "M from 1 on")),
    "integers": (lambda o: fk.OutputVectors(both(o).long()), ValueError, ("torch.int64", "torch.float64")),
    "another dtype": (
        lambda o: fk.OutputVectors(both(o).float()), ValueError, ("torch.float32", "v.to(torch.float64)"),
    ),
    "weights as keep": (
        lambda o: fk.OutputVectors(both(o), torch.ones(2, 2)), ValueError, ("keep of torch.float32", "[n, M] = [2, 2]"),
    ),
    "keep of another shape": (
        lambda o: fk.OutputVectors(both(o), torch.ones(2, 1, dtype=torch.bool)),
        ValueError,
        ("keep of", "[2, 1]", "[2, 2]"),
    ),
    "dropped of another shape": (
        lambda o: fk.OutputVectors(both(o), None, torch.ones(2, 2)), ValueError, ("dropped of", "[2, 2]", "[n] = [2]"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("structure", ["full", "diagonal"])
@pytest.mark.parametrize("name", WRONG)
def test_vectors__of_another_form_are_refused_in_words(name: str, structure: str) -> None:
    model, x, y = data()
    function, builtin, words = WRONG[name]
    with pytest.raises(fk.FisherkitError) as caught:
        fk.FisherApproximation(model, (x, y), Answer(function), structure=structure)
    assert isinstance(caught.value, builtin)
    for word in ("Answer.output_vectors: got", *words):
        assert word in str(caught.value)


def test_vectors__are_checked_in_an_optimizer_and_under_row_damping() -> None:
    model, x, y = data()
    for rule in (Answer(both), fk.optim.RowDamped(Answer(both), 0.1)):
        optimizer = fk.optim.NaturalGradient(model, lr=0.1, kind=rule, damping=0.1)
        with pytest.raises(fk.InvalidTypeError, match=r"Answer\.output_vectors: got a Tensor"):
            nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.close()


# -- a likelihood on top of a built-in one -----------------------------------------------------------------------------


def classified() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(5, 4).double()
    return model, torch.randn(30, 5, dtype=F64), torch.randint(4, (30,))


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Smoothed(Categorical):
    """cross_entropy(label_smoothing=e): H is Categorical's, the gradient is not."""

    name = "smoothed"

    def __init__(self, e: float) -> None:
        super().__init__()
        self.e = e

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        c = z.shape[-1]
        return super().gradient(z, target) + self.e * (F.one_hot(self._valid(target), c).to(z) - 1 / c)


class Noise(Gaussian):
    """A variance of ¼ in the gradient alone."""

    def gradient(self, z: Tensor, target: Tensor) -> Tensor:
        return (z - target) / 0.25


class FullNoise(Noise):
    """The same in all that follows from it."""

    def hessian_factor(self, z: Tensor) -> Tensor:
        return 2 * torch.eye(z.shape[-1], dtype=z.dtype).expand(*z.shape, -1)

    def sample(self, z: Tensor, uniform: Tensor) -> Tensor:
        return z + 0.5 * torch.special.ndtri(uniform)


def test_changed_gradient__leaves_no_closed_form_that_followed_from_it() -> None:
    model, x, y = classified()
    own, torchs = Smoothed(0.1), nn.CrossEntropyLoss(label_smoothing=0.1)
    exact = fk.ExactFisher(model, (x, y), likelihood=own).to_dense()
    assert error(exact, fk.ExactFisher(model, (x, y)).to_dense()) < 1e-12
    for rank in (1, 2, 3):
        found = fk.TruncatedFisher(model, (x, y), likelihood=own, rank=rank).to_dense()
        assert error(found, fk.TruncatedFisher(model, (x, y), likelihood=torchs, rank=rank).to_dense()) < 1e-9
        assert float(torch.linalg.eigvalsh(exact - found).min()) > -1e-12
    assert error(found, exact) < 1e-10


def test_changed_gradient__draws_no_labels_of_another_loss() -> None:
    model, x, y = classified()
    for likelihood, targets in ((Smoothed(0.1), y), (Noise(), None)):
        with pytest.raises(fk.InvalidArgumentError, match="inherits sample"):
            fk.SampledFisher(model, (x, targets), likelihood=likelihood)


def test_changed_gradient__refuses_an_inherited_hessian_that_is_not_its_derivative() -> None:
    model, x, _ = classified()
    y = torch.zeros(30, 4, dtype=F64)
    for make in (fk.ExactFisher, fk.TruncatedFisher):
        with pytest.raises(fk.InvalidArgumentError, match="hessian_factor does not belong to its gradient"):
            make(model, (x, y), likelihood=Noise())
    with pytest.raises(fk.InvalidArgumentError, match="hessian_factor does not belong to its gradient"):
        fk.ExactFisher(model, (x, None), likelihood=Noise(), memory_budget=1) @ torch.ones(24, dtype=F64)


def test_changed_methods_together__are_used_for_all_that_follows() -> None:
    model, x, _ = classified()
    y = torch.randn(30, 4, dtype=F64)
    for kind, options in (
        (fk.EmpiricalFisher, {}), (fk.ExactFisher, {}), (fk.TruncatedFisher, {"rank": 2}),
        (fk.TruncatedFisher, {"rank": 4}), (fk.SampledFisher, {"draws": 3}),
    ):  # fmt: skip
        make: Any = kind
        found, right = (
            make(model, (x, y), likelihood=likelihood, **options).to_dense()
            for likelihood in (FullNoise(), Gaussian(variance=0.25))
        )
        assert error(found, right) < 1e-9


def test_changed_factor__is_behind_products_diagonals_and_columns() -> None:
    class Doubled(Bernoulli):
        def hessian_factor(self, z: Tensor) -> Tensor:
            return 2 * super().hessian_factor(z)

    z, w = torch.randn(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64)
    plain, own = Bernoulli(), Doubled()
    assert error(own.hessian_matmul(z, w), 4 * plain.hessian_matmul(z, w)) < 1e-12
    assert error(own.hessian_diagonal(z), 4 * plain.hessian_diagonal(z)) < 1e-12
    assert (
        error(own.hessian_columns(z, torch.tensor([0, 1, 2])), 2 * plain.hessian_columns(z, torch.tensor([0, 1, 2])))
        < 1e-12
    )
    assert not own.columnwise
    assert plain.columnwise


@pytest.mark.parametrize("method", ["hessian_matmul", "hessian_diagonal", "hessian_columns"])
def test_closed_form__that_is_not_the_factors_is_refused(method: str) -> None:
    def tripled(self: Likelihood, z: Tensor, *args: Any) -> Tensor:
        return 3 * getattr(Poisson, method)(self, z, *args)

    model, x, _ = classified()
    own = type("Tripled", (Poisson,), {method: tripled})()
    with pytest.raises(
        fk.InvalidArgumentError, match=f"a Tripled whose {method} does not belong to its hessian_factor"
    ):
        fk.ExactFisher(model, (x, None), likelihood=own)


def test_mixin__counts_as_what_the_class_changed() -> None:
    class Scale:
        def gradient(self, z: Tensor, target: Tensor) -> Tensor:
            return 3 * Poisson.gradient(self, z, target)  # type: ignore[arg-type]

    class Mixed(Scale, Poisson):  # type: ignore[misc]
        pass

    model, x, _ = classified()
    with pytest.raises(fk.InvalidArgumentError, match="does not belong to its gradient"):
        fk.ExactFisher(model, (x, torch.ones(30, 4, dtype=F64)), likelihood=Mixed())
    assert Mixed().target_from_gradient(x, x) is None


def test_subclass_of_a_subclass__keeps_what_its_parent_derived() -> None:
    class Child(Smoothed):
        name = "child"

    model, x, y = classified()
    found, right = (fk.TruncatedFisher(model, (x, y), likelihood=own, rank=3) for own in (Child(0.1), Smoothed(0.1)))
    assert error(found.to_dense(), right.to_dense()) < 1e-12


def test_inverse_form__of_a_gradient_outside_the_hessians_range_is_infinite() -> None:
    """So that the truncated kind starts with a pivot and stays below the exact matrix."""

    class Shifted(Likelihood):
        name = "shifted"

        def gradient(self, z: Tensor, target: Tensor) -> Tensor:
            return z.softmax(-1)

        def hessian_factor(self, z: Tensor) -> Tensor:
            return Categorical().hessian_factor(z)

        def sample(self, z: Tensor, uniform: Tensor) -> Tensor:
            return z

    model, x, _ = classified()
    assert bool(torch.isinf(Shifted().hessian_inverse_form(x, x)).all())
    exact = fk.ExactFisher(model, (x, x[:, :4]), likelihood=Shifted()).to_dense()
    for rank in (1, 2, 3):
        found = fk.TruncatedFisher(model, (x, x[:, :4]), likelihood=Shifted(), rank=rank).to_dense()
        assert float(torch.linalg.eigvalsh(exact - found).min()) > -1e-12
    assert error(found, exact) < 1e-10


def test_frozen_dataclass__may_be_a_likelihood() -> None:
    @dataclass(frozen=True)
    class Scaled(Gaussian):  # type: ignore[misc]  # the base is no frozen dataclass
        scale: float = 2.0

        def gradient(self, z: Tensor, target: Tensor) -> Tensor:
            return self.scale * (z - target)

        def hessian_factor(self, z: Tensor) -> Tensor:
            return self.scale**0.5 * torch.eye(z.shape[-1], dtype=z.dtype).expand(*z.shape, -1)

    model, x, _ = classified()
    found, right = (fk.ExactFisher(model, (x, None), likelihood=own) for own in (Scaled(), Gaussian(variance=0.5)))
    assert error(found.to_dense(), right.to_dense()) < 1e-12


def test_changed_loss__is_what_the_gradient_follows() -> None:
    """One of the two was inherited and belongs to another loss."""

    class Focal(Categorical):
        def loss(self, z: Tensor, target: Tensor) -> Tensor:
            sure = z.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
            return -((1 - sure.exp()) ** 2) * sure

    class Double(Bernoulli):
        def loss(self, z: Tensor, target: Tensor) -> Tensor:
            return 2 * super().loss(z, target)

        def hessian_factor(self, z: Tensor) -> Tensor:
            return 2**0.5 * super().hessian_factor(z)

    model, x, y = classified()
    rows = by_hand.rows(model, (x, y), loss=lambda z, t, reduction: Focal().loss(z, t).sum())
    for structure in ("full", "diagonal"):
        found = fk.EmpiricalFisher(model, (x, y), likelihood=Focal(), structure=structure).diagonal()
        assert error(found, rows.square().mean(0)) < 1e-12
    for make in (fk.ExactFisher, fk.TruncatedFisher):
        with pytest.raises(fk.InvalidArgumentError, match="hessian_factor does not belong to its gradient"):
            make(model, (x, y), likelihood=Focal())
    with pytest.raises(fk.InvalidArgumentError, match="inherits sample"):
        fk.SampledFisher(model, (x, y), likelihood=Focal())
    optimizer = fk.optim.NaturalGradient(model, lr=0.1, damping=1e-2, likelihood=Focal())
    with pytest.raises(fk.ModelError, match="target_from_gradient"):
        Focal().loss(model(x), y).mean().backward()
    optimizer.close()
    labels = F.one_hot(y, 4).double()
    for kind, times, options in (
        (fk.EmpiricalFisher, 4, {}),
        (fk.ExactFisher, 2, {}),
        (fk.TruncatedFisher, 2, {"rank": 4}),
    ):
        make_: Any = kind
        right = make_(model, (x, labels), likelihood="bernoulli", **options).to_dense()
        assert error(make_(model, (x, labels), likelihood=Double(), **options).to_dense(), times * right) < 1e-12


def test_changed_scale__is_refused_beside_the_gradient_of_another() -> None:
    class Weighted(Categorical):
        def hessian_scale(self, z: Tensor, target: Tensor) -> Tensor:
            return torch.full_like(z[..., :1], 4.0)

    model, x, y = classified()
    with pytest.raises(fk.InvalidArgumentError, match="hessian_factor does not belong to its gradient"):
        fk.ExactFisher(model, (x, y), likelihood=Weighted())


def test_scale__of_an_own_class_needs_no_word_to_be_used() -> None:
    """The exact kind asks for the targets that it depends on."""

    class Own(Likelihood):
        def gradient(self, z: Tensor, target: Tensor) -> Tensor:
            return (1 + target) * z

        def hessian_factor(self, z: Tensor) -> Tensor:
            return torch.eye(z.shape[-1], dtype=z.dtype).expand(*z.shape, -1)

        def hessian_scale(self, z: Tensor, target: Tensor) -> Tensor:
            return 1 + target

        def sample(self, z: Tensor, uniform: Tensor) -> Tensor:
            return z

    model, x, _ = classified()
    y = torch.full((30, 4), 3.0, dtype=F64)
    right = 4 * fk.ExactFisher(model, (x, None), likelihood="gaussian").to_dense()
    assert error(fk.ExactFisher(model, (x, y), likelihood=Own()).to_dense(), right) < 1e-12
    with pytest.raises(fk.DataError, match="depends on them"):
        fk.ExactFisher(model, (x, None), likelihood=Own())


@pytest.mark.parametrize("base", [Categorical, Bernoulli, Gaussian])
def test_reason_not_to_draw__may_be_set_on_the_object(base: type[Likelihood]) -> None:
    def init(self: Any) -> None:
        base.__init__(self)
        self.unlikely, self.hessian_of_targets = "its labels are no draws", False

    own, (model, x, y) = type("Own", (base,), {"__init__": init})(), classified()
    targets = y if base is Categorical else F.one_hot(y, 4).double()
    right = fk.ExactFisher(model, (x, None), likelihood=base()).to_dense()
    assert error(fk.ExactFisher(model, (x, targets), likelihood=own).to_dense(), right) < 1e-12
    with pytest.raises(fk.InvalidArgumentError, match="Its labels are no draws"):
        fk.SampledFisher(model, (x, targets), likelihood=own)


def test_scale__that_is_said_not_to_depend_on_targets_is_refused_where_it_does() -> None:
    class Own(Categorical):
        def __init__(self) -> None:
            super().__init__()
            self.hessian_of_targets = False

        def gradient(self, z: Tensor, target: Tensor) -> Tensor:
            return (1 + target).unsqueeze(-1) * super().gradient(z, target)

        def hessian_scale(self, z: Tensor, target: Tensor) -> Tensor:
            return (1 + target).unsqueeze(-1)

    model, x, y = classified()
    with pytest.raises(fk.FisherkitError):
        fk.ExactFisher(model, (x, y), likelihood=Own())


def test_weights__of_a_subclass_count_however_they_were_set() -> None:
    class Classes(Categorical):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.tensor([1.0, 2.0, 3.0, 4.0])

    class Positives(Bernoulli):
        def __init__(self) -> None:
            super().__init__()
            self.pos_weight = torch.tensor([1.0, 2.0, 3.0, 4.0])

    model, x, y = classified()
    w = torch.tensor([1.0, 2.0, 3.0, 4.0])
    labels = F.one_hot(y, 4).double()
    for own, right, targets in (
        (Classes(), nn.CrossEntropyLoss(weight=w), y),
        (Positives(), nn.BCEWithLogitsLoss(pos_weight=w), labels),
    ):
        found = fk.ExactFisher(model, (x, targets), likelihood=own).to_dense()
        assert error(found, fk.ExactFisher(model, (x, targets), likelihood=right).to_dense()) < 1e-12
        with pytest.raises(fk.InvalidArgumentError, match="no −log p"):
            fk.SampledFisher(model, (x, targets), likelihood=own)


@pytest.mark.parametrize(("base", "settings"), [(Gaussian, {"variance": 0.25}), (Categorical, {"ignore_index": 2})])
def test_setting__as_an_attribute_that_init_writes_over_is_refused(base: type, settings: dict[str, Any]) -> None:
    with pytest.raises(fk.InvalidArgumentError, match=f"{next(iter(settings))} as an attribute of the class"):
        type("Own", (base,), settings)


def test_prepare__that_changes_the_outputs_is_refused() -> None:
    """A factor that v = ∂ℓ/∂z is taken behind would be missing in Jᵀv."""

    class Cold(Categorical):
        def prepare(self, z: Tensor, target: Tensor | None, call: str) -> Any:
            z, target, mask = super().prepare(z, target, call)
            return 2 * z, target, mask

    model, x, y = classified()
    with pytest.raises(fk.InvalidArgumentError, match="prepare changes the outputs"):
        fk.EmpiricalFisher(model, (x, y), likelihood=Cold())


def test_name__of_a_subclass_is_never_the_built_in_ones() -> None:
    """A file that says "categorical" is read as categorical."""

    class Unnamed(Categorical):
        pass

    model, x, y = classified()
    assert fk.EmpiricalFisher(model, (x, y), likelihood=Unnamed()).metadata["likelihood"] == "Unnamed"
    recorded = fk.EmpiricalFisher(model, (x, y), likelihood=Categorical(ignore_index=3)).metadata["likelihood"]
    assert recorded == "categorical(ignore_index=3)"


def test_optimizer__asks_a_subclass_for_its_own_targets() -> None:
    model, x, y = classified()
    optimizer = fk.optim.NaturalGradient(model, lr=0.1, damping=1e-2, likelihood=Smoothed(0.1))
    with pytest.raises(fk.ModelError, match="target_from_gradient"):
        F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
    optimizer.close()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Categorical(class_axis=2), "-1 or 1"),
        (lambda: Categorical(label_smoothing=1.5), "from 0 to 1"),
        (lambda: Categorical(weight=[-1.0, 1.0]), "from 0 on"),
        (lambda: Categorical(weight=torch.ones(2, 2)), "All examples share"),
        (lambda: Gaussian(variance=0.0), "above 0"),
        (lambda: Gaussian(variance=[1.0, float("nan")]), "above 0"),
        (lambda: Bernoulli(pos_weight=torch.ones(5, 2)), "All examples share"),
        (lambda: fk.likelihoods.resolve(nn.PoissonNLLLoss(log_input=False)), "log-rates"),
        (lambda: Categorical(class_axis="last"), "class_axis='last'.*-1 or 1"),  # type: ignore[arg-type]
        (lambda: Categorical(class_axis=True), "class_axis=True.*-1 or 1"),
        (lambda: Bernoulli(pos_weight=[]), r"shape \[0\]"),
        (lambda: GaussianNLL(eps=-1.0), "eps=-1.0"),
    ],
    ids=[
        "axis", "smoothing", "negative weight", "weights by example", "variance", "nan", "pos_weight", "rates",
        "axis in words", "axis True", "no weight", "negative eps",
    ],
)  # fmt: skip
def test_settings__that_are_none_are_refused(make: Any, words: str) -> None:
    with pytest.raises(fk.InvalidArgumentError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Categorical(weight="balanced"), "weight of type str"),  # type: ignore[arg-type]
        (lambda: Bernoulli(pos_weight=[1.0, None]), "pos_weight of type list"),  # type: ignore[list-item]
        (lambda: Gaussian(variance=None), "variance of type NoneType"),  # type: ignore[arg-type]
        (lambda: Gaussian(variance=[[1.0], [2.0, 3.0]]), "variance of type list"),  # type: ignore[list-item]
        (lambda: Gaussian(variance=1j), "variance of type complex"),  # type: ignore[arg-type]
        (lambda: GaussianNLL(eps="small"), "eps of type str"),  # type: ignore[arg-type]
        (lambda: Categorical(label_smoothing=None), "label_smoothing of type NoneType"),  # type: ignore[arg-type]
        (lambda: Categorical(ignore_index=None), "ignore_index of type NoneType"),  # type: ignore[arg-type]
        (lambda: Categorical(ignore_index="pad"), "ignore_index of type str"),  # type: ignore[arg-type]
    ],
    ids=["weight", "pos_weight", "None", "ragged", "complex", "eps", "smoothing", "no index", "index"],
)
def test_settings__of_another_type_are_refused(make: Any, words: str) -> None:
    with pytest.raises(fk.InvalidTypeError, match=words):
        make()


@pytest.mark.parametrize(
    "loss", [nn.L1Loss(), nn.HuberLoss(), nn.SmoothL1Loss(), nn.BCELoss(), nn.KLDivLoss(), nn.Linear(2, 2)], ids=str
)
def test_other_modules__are_refused_with_advice(loss: nn.Module) -> None:
    model, x, y = classified()
    with pytest.raises(fk.InvalidTypeError, match="Try: a "):
        fk.EmpiricalFisher(model, (x, y), likelihood=loss)


def test_repr__says_the_settings_that_are_not_the_default() -> None:
    assert repr(Poisson()) == "Poisson()"
    assert repr(Categorical(ignore_index=3, label_smoothing=0.1)) == "Categorical(ignore_index=3, label_smoothing=0.1)"
    assert repr(Bernoulli(pos_weight=[1, 2])) == "Bernoulli(pos_weight=[1 2])"


def test_functions_and_classes__are_refused_with_advice() -> None:
    model, x, y = classified()
    for loss in (F.cross_entropy, nn.CrossEntropyLoss):
        with pytest.raises(fk.InvalidTypeError, match=r"got the .*as in nn.CrossEntropyLoss\(\)"):
            fk.EmpiricalFisher(model, (x, y), likelihood=loss)  # type: ignore[arg-type]
