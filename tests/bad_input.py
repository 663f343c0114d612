"""What a table of bad input holds, and the small models and data that its calls use.

A message is judged by pieces of it: the call, what was got with its value, and what was expected or what to try.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from tests.reference.zoo import Compose

F64 = torch.float64
D = 43  # parameters of `mlp`


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X = normal(6, 4)
Y = torch.tensor([0, 2, 1, 1, 0, 2])


def mlp(*between: nn.Module, outputs: int = 3) -> nn.Sequential:
    """4 inputs, 5 hidden units, 3 outputs, and modules of the caller's choice in the middle."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 5), *between, nn.Tanh(), nn.Linear(5, outputs)).double()


def wrapped(function: Callable[..., Any], body: nn.Module | None = None) -> nn.Module:
    """A model ``function(m, x)`` whose ``m.body`` is an MLP or the module given, in eval mode."""
    return Compose(function, body=mlp() if body is None else body).double().eval()


def ef(model: nn.Module | None = None, data: Any = (X, Y), **options: Any) -> fk.EmpiricalFisher:
    """The empirical Fisher, of the MLP on the standard batch unless told otherwise."""
    return fk.EmpiricalFisher(mlp().eval() if model is None else model, data, **options)


BUILTIN: dict[type[fk.FisherkitError], type[Exception]] = {
    fk.InvalidArgumentError: ValueError, fk.InvalidTypeError: TypeError, fk.UnknownParameterError: LookupError,
    fk.DataError: ValueError, fk.ModelError: RuntimeError, fk.MemoryBudgetError: MemoryError,
    fk.NonFiniteError: ArithmeticError, fk.SingularMatrixError: ArithmeticError,
    fk.NoClosedFormError: NotImplementedError,
}  # fmt: skip
"""What code that does not know the package would catch."""


class Case(NamedTuple):
    """One bad call, the package's error, and pieces of its message."""

    call: Callable[[], object]
    error: type[fk.FisherkitError]
    says: tuple[str, ...]


def ids(table: Iterable[str]) -> list[Any]:
    """Pytest parameters with readable ids."""
    return [pytest.param(name, id=re.sub(r"[^\w.-]+", "-", name)) for name in table]


def check(case: Case) -> None:
    """The call fails with the error, whose message has the five parts' first two, advice, and every piece."""
    with pytest.raises(case.error) as caught:
        case.call()
    error, message = caught.value, str(caught.value)
    assert isinstance(error, BUILTIN[case.error])
    assert message.startswith(f"{error.call}: got {error.got}")
    assert error.expected or error.try_, message
    for piece in case.says:
        assert piece in message, message
