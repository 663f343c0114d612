"""What a model keeps of a batch's shape, and first stumbles with arguments: named with what to do, or taken."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from tests.test_later_uses import Model, X, check


class Kept(nn.Module):
    """Adds what it kept of the batch before, or what it has for a batch of a size."""

    def __init__(self, size: int | None) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.state = None if size is None else torch.zeros(size, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.state = (self.body(x) + (0 if self.state is None else 0.5 * self.state.detach())).tanh()
        z: Tensor = self.head(self.state)
        return z


def data(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


@pytest.mark.parametrize("size", [None, 6, 1])
@pytest.mark.parametrize("cut", [6, 3, 1])
def test_state_of_a_batchs_shape__is_refused_in_words(size: int | None, cut: int) -> None:
    x, y = data()
    with pytest.raises(fk.ModelError, match=r"keeps|changes with the rest of its batch"):
        fk.EmpiricalFisher(Kept(size), list(zip(x.split(cut), y.split(cut), strict=True)), structure="diagonal")


def test_outputs_as_long_as_the_longest_example__are_refused_with_what_to_do() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 5)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            z: Tensor = self.head(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])
            return z

    inputs = torch.randn(4, 5, 3), torch.tensor([3, 2, 5, 4])
    with pytest.raises(fk.ModelError, match="total_length"):
        fk.ExactFisher(Packed(), (inputs, None))


@pytest.mark.parametrize("form", ["pair", "triple"])
def test_variances_beside_targets__are_refused_with_what_to_do(form: str) -> None:
    x, y, variance = torch.randn(6, 4), torch.randn(6, 3), torch.rand(6, 3) + 0.1
    loss, model = nn.GaussianNLLLoss(), nn.Linear(4, 3)
    batch: Any = (x, (y, variance)) if form == "pair" else (x, y, variance)
    with pytest.raises(fk.InvalidTypeError, match=r"torch\.stack\(\(y, variance\), -1\)"):
        fk.EmpiricalFisher(model, [batch], likelihood=loss)
    assert fk.EmpiricalFisher(model, [(x, torch.stack((y, variance), -1))], likelihood=loss).examples == 6


def test_arguments__whole_floats_and_patterns_of_names_are_taken() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    fisher = fk.EmpiricalFisher(model, data(), params="2.*", memory_budget=1e9)
    assert fisher.space.names == ("2.weight", "2.bias")
    assert fk.EmpiricalFisher(model, data(), params=["*.bias", "0.weight"]).space.names[0] == "0.weight"
    with pytest.raises(fk.UnknownParameterError):
        fk.EmpiricalFisher(model, data(), params="3.*")
    with pytest.raises(fk.InvalidTypeError):
        fk.EmpiricalFisher(model, data(), memory_budget=1.5)


@pytest.mark.parametrize("kind", [fk.EmpiricalFisher, fk.TruncatedFisher])
def test_help__of_a_kind_lists_all_options(kind: type[fk.FisherApproximation]) -> None:
    shared = set(inspect.signature(fk.FisherApproximation).parameters) - {"kind"}
    assert shared <= set(inspect.signature(kind).parameters)
    assert all(f"    {name}: " in (inspect.getdoc(kind) or "") for name in shared - {"model", "data"})


def test_warnings__point_at_the_users_line() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fk.EmpiricalFisher(model, data())
    assert [one.filename for one in found if "probabilities" in str(one.message)] == [__file__]


# -- what passes inside of passes take ---------------------------------------------------------------------------------


def jacobian(x: Tensor, w: Tensor) -> Tensor:
    return torch.vmap(torch.func.jacrev(lambda one: (w @ one).tanh()))(x).flatten(1)


def adapted(x: Tensor, w: Tensor) -> Tensor:
    """A step of gradient descent on each example before the output."""

    def one(example: Tensor) -> Tensor:
        return (w - 0.1 * torch.func.grad(lambda v: (v @ example).tanh().square().sum())(w)) @ example

    return torch.vmap(one)(x)


def nested(x: Tensor, w: Tensor, *, layout: torch.layout) -> Tensor:
    rows = torch.nested.as_nested_tensor(list(x), layout=layout)
    return torch.nested.to_padded_tensor(F.linear(rows, w).relu(), 0.0).sum(1)


SEQUENCES = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"structure": "diagonal"}, {"storage": "stream"}], ids=str)
@pytest.mark.parametrize(
    ("function", "x", "settings"),
    [
        (jacobian, X, {}),
        (adapted, X, {}),
        (nested, SEQUENCES, {"layout": torch.jagged}),
        (nested, SEQUENCES, {"layout": torch.strided}),
    ],
    ids=["jacobian", "adapted", "jagged", "strided"],
)
def test_transforms_and_nested_tensors__in_forward_are_taken(
    function: Callable[..., Tensor], x: Tensor, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    check(Model(function, (2, 3), **settings), x, **options)
