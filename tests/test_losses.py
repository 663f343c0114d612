"""Torch's own loss modules as likelihoods, and models whose outputs are probabilities already.

The reference is the module itself with reduction="sum" on the example alone; its gradient and Hessian in the outputs
are torch's. It shares no code with the package.
"""

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.likelihoods import Bernoulli, Categorical, Gaussian, GaussianNLL, Likelihood, Poisson
from tests import by_hand

F64 = torch.float64
N = 7


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def labels(*shape: int, classes: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def some_ignored(y: Tensor, ignore: int) -> Tensor:
    y = y.clone()
    y.view(len(y), -1)[1:3, 0] = ignore
    return y


@dataclass(frozen=True)
class Case:
    """A loss with data and a model.

    Args:
        loss: the module for a reduction.
        x: inputs.
        y: targets as the package takes them.
        body: the model up to the outputs that the loss is a function of.
        named: the same by a class of `fisherkit.likelihoods`.
        apply: the loss of one example; None for ``loss(z, y)``.
        head: what the model ends in, where the package is given more than the body.
    """

    loss: Callable[[str], nn.Module]
    x: Tensor
    y: Tensor
    body: Callable[[], nn.Module]
    named: Likelihood | None
    apply: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    head: nn.Module | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        body = self.body().double()
        return body if self.head is None else nn.Sequential(body, self.head)

    def example_loss(self, z: Tensor, n: int) -> Tensor:
        """Of example n alone, from the body's outputs ``[1, ...]``."""
        z = z if self.head is None else self.head(z)
        loss = self.loss("sum").double()
        y = self.y[n : n + 1]
        return loss(z, y) if self.apply is None else self.apply(loss, z, y)


def mlp(outputs: int = 4) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))


def conv1d() -> nn.Module:
    return nn.Conv1d(2, 4, 3, padding=1)


def conv2d() -> nn.Module:
    return nn.Conv2d(2, 3, 2)


W = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=F64)
X, Y = normal(N, 3), labels(N)
Q = normal(N, 4, seed=5).softmax(1)
LINES, IMAGES = normal(N, 2, 5), normal(N, 2, 3, 3)
BITS = labels(N, 4, classes=2).double()
POS = torch.tensor([3.0, 0.5, 1.0, 2.0], dtype=F64)
VARIANCE = normal(N, 4, seed=8).exp()


def cross_entropy(**options: Any) -> Callable[[str], nn.Module]:
    return lambda reduction: nn.CrossEntropyLoss(reduction=reduction, **options)


CASES: dict[str, Case] = {
    "cross-entropy": Case(cross_entropy(), X, Y, mlp(), Categorical()),
    "ce weighted": Case(cross_entropy(weight=W), X, Y, mlp(), Categorical(weight=W)),
    "ce smoothed": Case(cross_entropy(label_smoothing=0.1), X, Y, mlp(), Categorical(label_smoothing=0.1)),
    "ce weighted smoothed ignoring": Case(cross_entropy(weight=W, label_smoothing=0.2, ignore_index=9), X,
        some_ignored(Y, 9), mlp(), Categorical(weight=W.tolist(), label_smoothing=0.2, ignore_index=9)),
    "ce probabilities": Case(cross_entropy(), X, Q, mlp(), Categorical()),
    "ce probabilities weighted smoothed": Case(cross_entropy(weight=W, label_smoothing=0.1), X, Q, mlp(),
        Categorical(weight=W, label_smoothing=0.1)),
    "ce (B, C, L)": Case(cross_entropy(weight=W, label_smoothing=0.1), LINES, some_ignored(labels(N, 5), -100), conv1d,
        Categorical(class_axis=1, weight=W, label_smoothing=0.1)),
    "ce (B, C, L) weighted": Case(cross_entropy(weight=W), LINES, labels(N, 5), conv1d,
        Categorical(class_axis=1, weight=W)),
    "ce (B, C, C)": Case(cross_entropy(), normal(N, 2, 4), labels(N, 4), conv1d, Categorical(class_axis=1)),
    "ce (B, C, H, W)": Case(cross_entropy(), IMAGES, some_ignored(labels(N, 2, 2, classes=3), -100), conv2d,
        Categorical(class_axis=1)),
    "ce (B, C, L) probabilities": Case(cross_entropy(), LINES, normal(N, 4, 5, seed=3).softmax(1), conv1d,
        Categorical(class_axis=1)),
    "nll": Case(lambda reduction: nn.NLLLoss(weight=W, reduction=reduction), X, some_ignored(Y, -100), mlp(), None,
        head=nn.LogSoftmax(-1)),
    "nll (B, C, L)": Case(lambda reduction: nn.NLLLoss(reduction=reduction), LINES, labels(N, 5), conv1d, None,
        head=nn.LogSoftmax(1)),
    "bce": Case(lambda reduction: nn.BCEWithLogitsLoss(reduction=reduction), X, BITS, mlp(), Bernoulli()),
    "bce pos_weight": Case(lambda reduction: nn.BCEWithLogitsLoss(pos_weight=POS, reduction=reduction), X, BITS, mlp(),
        Bernoulli(pos_weight=POS)),
    "bce pos_weight and weight, soft": Case(
        lambda reduction: nn.BCEWithLogitsLoss(weight=W, pos_weight=POS, reduction=reduction), X, Q, mlp(),
        Bernoulli(pos_weight=POS, weight=W)),
    "bce one logit": Case(lambda reduction: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(4.0), reduction=reduction), X,
        BITS[:, :1], mlp(1), Bernoulli(pos_weight=4.0)),
    "bce images": Case(lambda reduction: nn.BCEWithLogitsLoss(
            pos_weight=torch.tensor([3.0, 0.5, 1.0], dtype=F64).view(3, 1, 1), reduction=reduction), IMAGES,
        labels(N, 3, 2, 2, classes=2).double(), conv2d,
        Bernoulli(pos_weight=torch.tensor([3.0, 0.5, 1.0], dtype=F64).view(3, 1, 1))),
    "mse": Case(lambda reduction: nn.MSELoss(reduction=reduction), X, normal(N, 4, seed=2), mlp(), Gaussian(0.5)),
    "mse images": Case(lambda reduction: nn.MSELoss(reduction=reduction), IMAGES, normal(N, 3, 2, 2, seed=2), conv2d,
        Gaussian(0.5)),
    "mse (B,)": Case(lambda reduction: nn.MSELoss(reduction=reduction), X, normal(N, seed=2),
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)), Gaussian(0.5)),
    "gaussian nll": Case(lambda reduction: nn.GaussianNLLLoss(reduction=reduction), X,
        torch.stack([normal(N, 4, seed=2), VARIANCE], -1), mlp(), GaussianNLL(),
        apply=lambda loss, z, y: loss(z, y[..., 0], y[..., 1])),
    "poisson": Case(lambda reduction: nn.PoissonNLLLoss(full=True, reduction=reduction), X,
        labels(N, 4, classes=6).double(), mlp(), Poisson()),
}  # fmt: skip


# -- the reference -----------------------------------------------------------------------------------------------------


def flat_jacobian(case: Case, model: nn.Module, n: int) -> tuple[Tensor, Tensor]:
    """The body's outputs at example n, and their Jacobian ``[outputs, D]``, one autograd call an output."""
    body = model if case.head is None else model[0]  # type: ignore[index]
    z = body(case.x[n : n + 1])
    return z.detach(), torch.stack([by_hand.gradient(entry, model) for entry in z.flatten()])


def derivatives(case: Case, z: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """u and H in the outputs joined."""

    def loss(flat: Tensor) -> Tensor:
        return case.example_loss(flat.reshape(z.shape), n)

    flat = z.flatten().requires_grad_()
    (u,) = torch.autograd.grad(loss(flat), flat)
    hessian: Tensor = torch.autograd.functional.hessian(loss, z.flatten())  # type: ignore[no-untyped-call]
    return u, hessian


def counted(case: Case, n: int) -> bool:
    if case.y.is_floating_point():
        return True
    ignore = getattr(case.loss("sum"), "ignore_index", -100)
    return bool((case.y[n] != ignore).any())


def truncated(u: Tensor, h: Tensor, rank: int) -> Tensor:
    """Σ v vᵀ: the gradient's largest multiple below H, then pivoted Cholesky of what is left."""
    rest, found = h.clone(), torch.zeros_like(h)
    form = u @ torch.linalg.pinv(h, rtol=1e-12, hermitian=True) @ u
    for step in range(rank):
        if step == 0 and form > 1e-12:
            v = u / form.sqrt()
        else:
            place = int(rest.diagonal().argmax())
            if float(rest[place, place]) < 1e-12:
                break
            v = rest[:, place] / rest[place, place].sqrt()
        rest, found = rest - torch.outer(v, v), found + torch.outer(v, v)
    return found


@functools.cache
def by_example(name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """J, u and H of each example that counts."""
    case = CASES[name]
    model = case.model()
    found = [(n, *flat_jacobian(case, model, n)) for n in range(N) if counted(case, n)]
    return [(jacobian, *derivatives(case, z, n)) for n, z, jacobian in found]


def expected(name: str, metric: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(1/N) Σ Jᵀ M J."""
    found = by_example(name)
    total: Any = sum(jacobian.T @ metric(u, h) @ jacobian for jacobian, u, h in found)
    return total / len(found)


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


KINDS: dict[str, tuple[type[fk.FisherApproximation], dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "ef": (fk.EmpiricalFisher, {}, lambda u, h: torch.outer(u, u)),
    "ief": (fk.ImprovedEmpiricalFisher, {}, lambda u, h: torch.outer(u, u) / (u @ u)),
    "exact": (fk.ExactFisher, {}, lambda u, h: h),
    "truncated:2": (fk.TruncatedFisher, {"rank": 2}, lambda u, h: truncated(u, h, 2)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_kind__is_that_of_the_module_with_its_loss_summed_over_one_example(name: str, kind: str) -> None:
    case, (make, options, metric) = CASES[name], KINDS[kind]
    model, right = case.model(), expected(name, metric)
    data = [(case.x[:4], case.y[:4]), (case.x[4:], case.y[4:])]
    assert error(make(model, data, likelihood=case.loss("mean"), **options).to_dense(), right) < 1e-10
    diagonal = make(model, data, likelihood=case.named or case.loss("sum"), structure="diagonal", **options)
    assert error(diagonal.diagonal(), right.diagonal()) < 1e-10
    if kind == "exact":
        streamed = make(model, data, likelihood=case.loss("none"), memory_budget=1, **options)
        v = normal(len(right), 2, seed=9)
        assert error(streamed @ v, right @ v) < 1e-10


@pytest.mark.parametrize(
    "name", ["ce weighted smoothed ignoring", "ce (B, C, L)", "nll", "bce pos_weight", "mse images", "poisson"]
)
def test_truncated__is_a_chain_below_the_exact_matrix_that_ends_there(name: str) -> None:
    case = CASES[name]
    model, data, loss = case.model(), (case.x, case.y), case.loss("mean")
    outputs = model(case.x[:1]).numel()
    exact = fk.ExactFisher(model, data, likelihood=loss).to_dense()
    ranks = [1, 3, outputs]
    chain = [fk.TruncatedFisher(model, data, likelihood=loss, rank=rank).to_dense() for rank in ranks]
    for lower, upper in pairwise([*chain, exact]):
        assert float(torch.linalg.eigvalsh(upper - lower).min()) > -1e-10 * float(exact.norm())
    assert error(chain[-1], exact) < 1e-10
    close = fk.TruncatedFisher(model, data, likelihood=loss, tolerance=0.3)
    lacking = [float(h.trace()) for _, _, h in by_example(name)]
    assert close.dropped_trace is not None
    assert bool((close.dropped_trace <= 0.3 * torch.tensor(lacking, dtype=F64) + 1e-12).all())
    assert float(torch.linalg.eigvalsh(exact - close.to_dense()).min()) > -1e-10 * float(exact.norm())


SAMPLED = [
    name
    for name in CASES
    if "weight" not in name and name not in ("bce one logit", "bce images", "nll", "ce (B, C, L)")
]


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled__tends_to_the_exact_matrix(name: str) -> None:
    case = CASES[name]
    options: dict[str, Any] = {"likelihood": case.loss("mean")}
    exact = fk.ExactFisher(case.model(), (case.x, case.y), **options).to_dense()
    sampled = fk.SampledFisher(case.model(), (case.x, case.y), draws=2000, **options)
    assert error(sampled.to_dense(), exact) < 0.08
    # Squared vectors of draws: a scale that is off shows in the trace.
    assert float(sampled.trace() / exact.trace()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", [name for name in CASES if "weight" in name or name == "nll"])
def test_sampled__of_a_weighted_loss_is_refused_with_advice(name: str) -> None:
    case = CASES[name]
    with pytest.raises(fk.InvalidArgumentError, match=r"a weighted loss is no −log p|Weighted|weighted") as caught:
        fk.SampledFisher(case.model(), (case.x, case.y), likelihood=case.loss("mean"))
    assert "fk.ExactFisher" in str(caught.value)


@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "kfac", "ekfac"])
@pytest.mark.parametrize("name", ["ce weighted", "bce pos_weight", "poisson", "mse"])
def test_structure__of_a_weighted_loss_agrees_with_weights_by_hand(name: str, structure: str) -> None:
    """By module and by class the same in every structure, and the module is left as it was."""
    case = CASES[name]
    loss = case.loss("mean")
    before = copy.deepcopy(loss.state_dict())
    found = fk.TruncatedFisher(case.model(), (case.x, case.y), likelihood=loss, structure=structure, rank=2)
    named = fk.TruncatedFisher(case.model(), (case.x, case.y), likelihood=case.named, structure=structure, rank=2)
    assert error(found.to_dense(), named.to_dense()) < 1e-12
    assert all(torch.equal(value, loss.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient__is_that_of_the_summed_loss(name: str) -> None:
    case = CASES[name]
    model = case.model()
    total: Any = sum(u @ jacobian for jacobian, u, _ in by_example(name))
    found = fk.evaluation.loss_gradient(model, (case.x, case.y), likelihood=case.loss("mean"), normalization="sum")
    assert error(found, total) < 1e-10


# -- models that end in probabilities where a likelihood wants logits --------------------------------------------------


def data(n: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 5, dtype=torch.float64, generator=generator), torch.randint(3, (n,), generator=generator)


class Functional(nn.Module):
    """A last step that is no module."""

    def __init__(self, last: Callable[[Tensor], Tensor], outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(5, outputs), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(x))


def ending(last: nn.Module, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, outputs), last).double()


@pytest.mark.parametrize("likelihood", ["categorical", nn.CrossEntropyLoss()], ids=str)
def test_softmax__is_named_once(likelihood: str | nn.Module) -> None:
    model = ending(nn.Softmax(-1))
    with pytest.warns(UserWarning, match=r"look like probabilities; the layer '1', a Softmax") as caught:
        fk.EmpiricalFisher(model, data(), likelihood=likelihood)
    assert len([w for w in caught if "probabilities" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.ExactFisher(model, data(), likelihood=likelihood, structure="kfac")


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("n", [4, 50])
def test_sigmoid__is_named(outputs: int, n: int) -> None:
    x, y = data(n)
    targets = (y[:, None] > 0).double().expand(-1, outputs)
    with pytest.warns(UserWarning, match=r"the layer '1', a Sigmoid.*BCEWithLogitsLoss"):
        fk.EmpiricalFisher(ending(nn.Sigmoid(), outputs), (x, targets), likelihood="bernoulli")


def test_sigmoid__before_a_softmax_likelihood_is_named() -> None:
    with pytest.warns(UserWarning, match="a Sigmoid"):
        fk.EmpiricalFisher(ending(nn.Sigmoid()), data())


def test_log_softmax__before_a_sigmoid_likelihood_is_named() -> None:
    x, y = data()
    with pytest.warns(UserWarning, match="a LogSoftmax"):
        fk.EmpiricalFisher(ending(nn.LogSoftmax(-1)), (x, nn.functional.one_hot(y).double()), likelihood="bernoulli")


def test_function__has_no_name_to_give() -> None:
    model = Functional(lambda z: z.softmax(-1)).double()
    with pytest.warns(UserWarning, match="look like probabilities, and the categorical") as caught:
        fk.ExactFisher(model, data(), memory_budget=1)
    assert "layer '" not in str(caught[0].message)


def test_streamed_and_batched__look_at_more_than_two_examples() -> None:
    x, y = data()
    targets = (y[:, None] > 0).double()
    model = Functional(torch.sigmoid, 1).double()
    with pytest.warns(UserWarning, match="probabilities"):
        fk.EmpiricalFisher(model, [(x[:25], targets[:25]), (x[25:], targets[25:])], likelihood="bernoulli")


def test_right_models__bring_no_warning() -> None:
    x, y = data()
    zero = nn.Linear(5, 3).double()
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    one_hot = nn.functional.one_hot(y).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.EmpiricalFisher(ending(nn.LogSoftmax(-1)), (x, y))
        fk.EmpiricalFisher(ending(nn.LogSoftmax(-1)), (x, y), likelihood=nn.NLLLoss())
        fk.EmpiricalFisher(ending(nn.Identity()), (x, y))
        fk.EmpiricalFisher(zero, (x, y))
        fk.EmpiricalFisher(zero, (x, one_hot), likelihood="bernoulli")
        fk.EmpiricalFisher(ending(nn.Identity()), (x, one_hot), likelihood="bernoulli")
        fk.EmpiricalFisher(ending(nn.Softmax(-1)), (x, one_hot), likelihood="gaussian")  # Brier's score
        torch.manual_seed(0)
        fk.EmpiricalFisher(nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)).double(), (x, y))


def test_log_softmax__under_the_categorical_likelihood_is_right_as_it_is() -> None:
    x, y = data()
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(5, 3)).double()
    whole = nn.Sequential(bare[0], nn.LogSoftmax(-1))
    for make in (fk.EmpiricalFisher, fk.ImprovedEmpiricalFisher, fk.ExactFisher, fk.TruncatedFisher):
        a, b = (make(model, (x, y)).to_dense() for model in (bare, whole))
        torch.testing.assert_close(a, b)


def test_nll__of_outputs_that_are_no_log_probabilities_is_refused() -> None:
    with pytest.raises(fk.DataError, match=r"no log-probabilities.*CrossEntropyLoss"):
        fk.EmpiricalFisher(ending(nn.Identity()), data(), likelihood=nn.NLLLoss())
