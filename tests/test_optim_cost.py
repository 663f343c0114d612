"""What a training step costs beside its arithmetic: calls of kernels and functions, and reads that the host waits for.

Counts and no times, so that they are the same on every machine. Bounds have a few calls of room.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from tests.test_fixed_cost import Kernels, data, nothing_compiled, own_calls, perceptron  # noqa: F401  a fixture

STEPS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), 0.01),
    "ief": lambda m: fk.optim.NaturalGradient(m, 0.01, kind="ief", gram_damping=0.1),
    "block": lambda m: fk.optim.NaturalGradient(m, 0.01, kind="ief", gram_damping=0.1, structure="block"),
    "truncated": lambda m: fk.optim.NaturalGradient(m, 0.01, kind="truncated:2", damping=0.1),
    "diagonal": lambda m: fk.optim.NaturalGradient(m, 0.01, damping=0.1, structure="diagonal", ema=0.9),
    "kronecker": lambda m: fk.optim.Preconditioner(m, structure="kfac", damping=0.1),
    "eigenvalues": lambda m: fk.optim.Preconditioner(m, structure="ekfac", damping=0.1),
    "leading": lambda m: fk.optim.Preconditioner(m, structure="kfac", damping=0.1, max_rank=4),
    "between updates": lambda m: fk.optim.Preconditioner(m, structure="kfac", damping=0.1, update_every=100),
}


def counted(name: str, hidden: int, steps: int) -> tuple[int, int]:
    """Kernel calls and host reads of some steps, none of which looks at the loss more closely."""
    model, (x, y) = perceptron(hidden), data()
    optimizer = STEPS[name](model)
    for _ in range(8):
        _step(model, optimizer, x, y)
    with Kernels() as found:
        for _ in range(steps):
            _step(model, optimizer, x, y)
    return found.calls, found.reads


def _step(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "calls", "a_layer", "reads"),
    [("ief", 170, 46, 3), ("block", 181, 56, 3), ("truncated", 281, 76, 4), ("diagonal", 187, 40, 3),
     ("between updates", 98, 44, 1)],
)  # fmt: skip
def test_step__kernel_calls_and_host_reads(name: str, calls: int, a_layer: int, reads: int) -> None:
    shallow, two, four = (counted(name, hidden, 1) for hidden in (1, 2, 4))
    assert shallow[0] <= calls
    assert (four[0] - two[0]) / 2 <= a_layer
    assert shallow[1] == two[1] == four[1] <= reads
    several = counted(name, 1, 3)
    assert several == (3 * shallow[0], 3 * shallow[1])


@pytest.mark.parametrize(
    ("name", "most", "a_layer"),
    [("ief", 538, 97), ("truncated", 667, 118), ("diagonal", 565, 97), ("between updates", 115, 19)],
)
def test_step__calls_of_functions(name: str, most: int, a_layer: int) -> None:
    def counted(hidden: int) -> int:
        model, (x, y) = perceptron(hidden), data()
        optimizer = STEPS[name](model)
        for _ in range(9):
            _step(model, optimizer, x, y)
        return own_calls(lambda: _step(model, optimizer, x, y))

    shallow, deep = counted(2), counted(4)
    assert shallow <= most
    assert (deep - shallow) / 2 <= a_layer


@pytest.mark.parametrize(("name", "a_layer"), [("kronecker", 96), ("eigenvalues", 131), ("leading", 145)])
def test_step__of_kronecker_factors_looks_at_all_of_them_at_once(name: str, a_layer: int) -> None:
    two, four = (counted(name, hidden, 1) for hidden in (2, 4))
    assert four[1] == two[1] <= 4
    assert (four[0] - two[0]) / 2 <= a_layer


def test_step__plain_for_comparison() -> None:
    """What the bounds above contain of a plain step: about 41 calls, and 18 a layer."""
    calls, reads = counted("sgd", 1, 1)
    assert calls <= 45
    assert reads == 0
