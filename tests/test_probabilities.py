"""Models that end in probabilities where a likelihood wants logits: a warning that names the layer, once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk


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
