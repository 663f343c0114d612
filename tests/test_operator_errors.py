"""Bad vectors, numbers and sums: each is refused, and the message says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fisherkit.errors import (
    FisherkitError,
    InvalidArgumentError,
    InvalidTypeError,
    NonFiniteError,
    UnknownParameterError,
)
from fisherkit.operators import (
    FisherOperator,
    RelativeDamping,
    SumOperator,
)
from fisherkit.space import ParameterSpace
from tests.operator_cases import (
    CONV1D,
    LAYER,
    diagonal,
    kronecker,
)

F64, F32 = torch.float64, torch.float32
ONES = torch.ones(15, dtype=F64)


def operator() -> FisherOperator:
    return kronecker(F64)[0]


def named(**changes: Any) -> dict[str, Any]:
    tensors = {name.replace(".", "_"): tensor for name, tensor in LAYER.unflatten(ONES).items()} | changes
    return {name.replace("_", "."): tensor for name, tensor in tensors.items() if tensor is not None}


CALLS: dict[str, tuple[Callable[[], object], type[FisherkitError], str]] = {
    # vectors
    "wrong length": (
        lambda: operator() @ ONES[:-1],
        InvalidArgumentError,
        "KroneckerOperator.matvec: got shape [14]; expected [D] or [D, K] with D = 15.",
    ),
    "rows instead of columns": (lambda: operator() @ ONES.unsqueeze(0), InvalidArgumentError, "columns last"),
    "three axes": (lambda: operator() @ ONES.reshape(15, 1, 1), InvalidArgumentError, "got shape [15, 1, 1]"),
    "scalar": (lambda: operator() @ torch.tensor(1.0), InvalidArgumentError, "got shape []"),
    "wrong dtype": (
        lambda: operator() @ ONES.float(),
        InvalidTypeError,
        "KroneckerOperator.matvec: got a vector of torch.float32; expected torch.float64, the operator's. "
        "Nothing is cast silently. Try: v.to(torch.float64).",
    ),
    "integers": (lambda: operator() @ ONES.long(), InvalidTypeError, "a vector of torch.int64"),
    "wrong device": (lambda: operator() @ ONES.to("meta"), InvalidArgumentError, "a vector on meta; expected cpu"),
    "NumPy array": (lambda: operator() @ ONES.numpy(), InvalidTypeError, "a ndarray; expected a tensor"),
    "NaN": (lambda: operator() @ (ONES * torch.nan), NonFiniteError, "a vector with NaN or infinite entries"),
    "infinity": (lambda: operator().quadratic_form(ONES / 0), NonFiniteError, "finite numbers"),
    "missing name": (
        lambda: operator() @ named(l_bias=None),
        UnknownParameterError,
        "missing names ['l.bias'] and unknown names []; expected exactly the 2 names of space.names",
    ),
    "unknown name": (lambda: operator() @ named(l_gain=ONES), UnknownParameterError, "unknown names ['l.gain']"),
    "shape in a dict": (
        lambda: operator() @ named(l_bias=ONES[:4]),
        InvalidArgumentError,
        "got shape [4] for 'l.bias'; expected [3], or [3, 'K'] with one K for all names",
    ),
    "columns in some entries of a dict": (
        lambda: operator() @ named(l_bias=torch.ones(3, 2, dtype=F64)),
        InvalidArgumentError,
        "one K for all names",
    ),
    "dtypes in a dict": (
        lambda: operator() @ {name: tensor.float() for name, tensor in named().items()},
        InvalidTypeError,
        "a vector of torch.float32",
    ),
    "unflatten": (lambda: LAYER.unflatten(ONES[:3]), InvalidArgumentError, "space.unflatten: got shape [3]"),
    "vector to an inverse": (
        lambda: operator().factorize(0.1).matvec(ONES[:2]),
        InvalidArgumentError,
        "KroneckerOperator.factorize().matvec: got shape [2]",
    ),
    # numbers
    "negative damping": (
        lambda: operator().solve(ONES, damping=-1.0),
        InvalidArgumentError,
        "KroneckerOperator.solve(damping=-1.0): got damping -1.0; expected a finite number, 0 or more. "
        "F + damping·I must stay positive semi-definite.",
    ),
    "NaN damping": (lambda: operator().factorize(float("nan")), InvalidArgumentError, "got damping nan"),
    "infinite damping": (lambda: operator().logdet(float("inf")), InvalidArgumentError, "got damping inf"),
    "bool damping": (
        lambda: operator().factorize(True),
        InvalidTypeError,
        "got damping of type bool; expected a float or fk.RelativeDamping",
    ),
    "string damping": (lambda: operator().logdet("auto"), InvalidTypeError, "got damping of type str"),
    "tensor damping": (lambda: operator().factorize(torch.tensor(0.1)), InvalidTypeError, "Try: float(damping)"),
    "negative relative damping": (lambda: RelativeDamping(-0.1), InvalidArgumentError, "RelativeDamping(damping=-0.1)"),
    "no eigenvalues": (
        lambda: operator().eigenvalues(0),
        InvalidArgumentError,
        "KroneckerOperator.eigenvalues(k=0): got k = 0; expected an integer from 1 to D = 15.",
    ),
    "too many eigenvalues": (lambda: operator().eigenvalues(16), InvalidArgumentError, "got k = 16"),
    "fractional eigenvalues": (lambda: operator().eigenvalues(2.5), InvalidArgumentError, "got k = 2.5"),
    "negative scale": (
        lambda: -0.5 * operator(),
        InvalidArgumentError,
        "KroneckerOperator * -0.5: got scale -0.5; expected a finite number, 0 or more. Operators form a cone",
    ),
    "NaN scale": (lambda: operator() * float("nan"), InvalidArgumentError, "got scale nan"),
    "infinite scale": (lambda: operator() * float("inf"), InvalidArgumentError, "got scale inf"),
    "bool scale": (lambda: operator() * True, InvalidTypeError, "got a bool; expected a number"),
    "tensor scale": (lambda: operator() * torch.tensor(2.0), InvalidTypeError, "got a Tensor; expected a number"),
    # sums
    "add a number": (lambda: operator() + 1.0, InvalidTypeError, "got a float; expected a FisherOperator"),
    "add other names": (
        lambda: operator() + diagonal(F64, CONV1D)[0],
        InvalidArgumentError,
        "KroneckerOperator + DiagonalOperator: got operators over different parameters: only the first has "
        "['l.weight', 'l.bias']; only the second has ['t.weight', 't.bias']; expected the same names, shapes and",
    ),
    "add other shapes": (
        lambda: operator() + diagonal(F64, ParameterSpace(LAYER.names, ((3, 4), (2,))))[0],
        InvalidArgumentError,
        "shapes differ in 'l.bias': [3] and [2]",
    ),
    "add another order": (
        lambda: operator() + diagonal(F64, ParameterSpace(LAYER.names[::-1], LAYER.shapes[::-1]))[0],
        InvalidArgumentError,
        "the names are in another order",
    ),
    "add another dtype": (
        lambda: operator() + diagonal(F32)[0],
        InvalidTypeError,
        "got torch.float64 and torch.float32; expected one dtype",
    ),
    "empty sum": (lambda: SumOperator([]), InvalidArgumentError, "got no terms"),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, id=name.replace(" ", "-")) for name in CALLS])
def test_bad_input__is_refused_with_advice(name: str) -> None:
    call, error, message = CALLS[name]
    with pytest.raises(error, match=re.escape(message).replace("a\\ Kronecker", "[aA]\\ Kronecker")):
        call()
    assert issubclass(error, (ValueError, TypeError, LookupError, ArithmeticError))
