"""Statistics of a batch that decide what is done to its examples, where parts of the batch decide as the whole does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from tests.axes import pairwise
from tests.test_later_uses import Model, check

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
ODD = 17
"""The one example that would decide otherwise if it were alone; in no half of the batch does it weigh enough."""
X[ODD] -= 10
FEW = X[:8]


def noted(x: Tensor) -> bool:
    NOTES.append(x.mean().item())
    return True


def total(x: Tensor) -> Tensor:
    return torch.sum(x.detach(), (0, 1), out=torch.empty((), dtype=x.dtype))


NOTES: list[float] = []
DECIDE: dict[str, Callable[[Tensor], Any]] = {
    "bool": lambda x: x.mean() > 0,
    "item of a bool": lambda x: (x.mean() > 0).item(),
    "not": lambda x: not x.mean() <= 0,
    "number": lambda x: float(x.mean()) > 0,
    "item": lambda x: x.mean().item() > 0,
    "whole number": lambda x: int(x.mean()) > 0,
    "list": lambda x: sum(x[:, 0].tolist()) > 0,
    "numpy": lambda x: x.numpy().mean() > 0,
    "any": lambda x: (x > 0).any(),
    "count": lambda x: bool((x > 0).sum() > 0),
    "extreme": lambda x: x.amax() > 0,
    "filled": lambda x: total(x) > 0,
    "places": lambda x: len((x > 0).nonzero()) > 0,
    "column of places": lambda x: torch.where(x > 0)[0].shape[0] > 0,
    "chosen": lambda x: x[x > 0].numel() > 0,
    "close": lambda x: not torch.allclose(x, torch.full_like(x, -5.0), atol=5.0),
}
"""Yes for the batch and its halves, no for one example."""


def branch(x: Tensor, w: Tensor, b: Tensor, *, decide: Callable[[Tensor], Any], inside: bool, forward: bool) -> Tensor:
    h = F.linear(x, w, b)
    z = h.tanh()
    if not decide(h if inside else x):
        return z * 2 if forward else 2 * z - z.detach()
    return z


def model(decide: str, *, inside: bool = False, forward: bool = True) -> Model:
    found = Model(branch, (3, 3), (3,), decide=DECIDE[decide], inside=inside, forward=forward)
    with torch.no_grad():
        next(found.parameters()).copy_(torch.eye(3))  # what holds of x holds of h
    return found


def products(model: nn.Module, *data: Tensor, **options: Any) -> Tensor:
    """What makes rows in any case."""
    fisher = fk.ExactFisher(model, [(x, None) for x in data], likelihood="gaussian", **options)
    return fisher @ torch.ones(fisher.size, dtype=torch.float64)


@pytest.mark.parametrize(
    ("decide", "options", "inside"),
    pairwise(DECIDE, [{}, {"structure": "kfac"}, {"storage": "stream"}], [False, True]),
    ids=str,
)
def test_statistic_that_python_reads__is_refused_where_one_example_alone_would_decide_otherwise(
    decide: str, options: dict[str, Any], inside: bool
) -> None:
    one = model(decide, inside=inside and decide not in ("list", "numpy"))
    for _ in range(2):
        with pytest.raises(fk.ModelError, match="change with the rest"):
            products(one, FEW, X, **options)
    check(one, FEW)  # all decide alike


@pytest.mark.parametrize("decide", ["bool", "number"])
@pytest.mark.parametrize("options", [{}, {"structure": "diagonal"}, {"storage": "stream"}], ids=str)
def test_statistic_that_python_reads__and_that_decides_about_gradients_alone(
    decide: str, options: dict[str, Any]
) -> None:
    one = model(decide, forward=False)
    if "storage" in options:
        with pytest.raises(fk.ModelError, match="change with the rest"):
            products(one, X, **options)
    else:
        check(one, X, **options)


# What a tensor decides, without a word to Python.
TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda x: torch.where(x.mean() > 0, 1.0, 2.0),
    "sign": lambda x: 1.5 - x.mean().sign() / 2,
    "rounded": lambda x: 2 - (x.mean() > 0).to(x.dtype),
    "any": lambda x: torch.where((x > 0).any(), 1.0, 2.0),
    "filled": lambda x: torch.where(total(x) > 0, 1.0, 2.0),
    "least": lambda x: 1 + F.relu(-x.mean()),
    "pairs": lambda x: 2 - ((x + x.detach().flip(0)).sum(1, keepdim=True) > -15).to(x.dtype),
}


@pytest.mark.parametrize(
    ("options", "way", "inside"),
    pairwise([{}, {"structure": "diagonal"}, {"storage": "stream"}], TENSORS, [False, True]),
    ids=str,
)
def test_statistic_in_tensors__is_refused_where_one_example_alone_would_decide_otherwise(
    way: str, inside: bool, options: dict[str, Any]
) -> None:
    def times(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = F.linear(x, w, b)
        return h.tanh() * TENSORS[way](h if inside else x)

    one = Model(times, (3, 3), (3,))
    with torch.no_grad():
        next(one.parameters()).copy_(torch.eye(3))  # what holds of x holds of h
    with pytest.raises(fk.ModelError, match="change with the rest"):
        products(one, X, **options)


def checks(x: Tensor) -> Tensor:
    """What people write to find errors early."""
    if torch.isnan(x).any() or not torch.isfinite(x).all():
        raise ValueError("not finite")
    assert (x.abs() < 100).all().item()
    return x


def test_answers_that_hold_for_every_part__cost_no_pass() -> None:
    calls = []

    def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        calls.append(len(x))
        return F.linear(checks(x), w, b).tanh()

    one = Model(linear, (3, 3), (3,))
    check(one, X)
    calls.clear()
    fk.ExactFisher(one, (X, None), likelihood="gaussian", structure="diagonal")
    assert calls.count(1) <= 2


# -- optimizers --------------------------------------------------------------------------------------------------------

OPTIMIZERS: list[dict[str, Any]] = [
    {"kind": "ef", "damping": 0.1}, {"kind": "exact", "damping": 0.1, "structure": "kfac"},
]  # fmt: skip


class Net(nn.Module):
    def __init__(self, decide: Callable[[Tensor], Any], dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dropout, self.decide = nn.Linear(3, 3).double(), nn.Dropout(dropout), decide

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.layer(x).tanh())
        return h if self.decide(x) else 2 * h


def step(net: Net, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(net(x), torch.arange(len(x)) % 3).backward()
    optimizer.step()


@pytest.mark.parametrize(("decide", "options", "dropout"), pairwise([*DECIDE, noted], OPTIMIZERS, [0.0, 0.3]))
def test_step__of_a_batch_whose_statistic_decides(decide: Any, options: dict[str, Any], dropout: float) -> None:
    net = Net(DECIDE.get(decide, decide), dropout)
    optimizer = fk.optim.NaturalGradient(net, lr=0.1, **options)
    for x in (FEW, X[:12]):
        step(net, optimizer, x)
    if decide is noted:
        step(net, optimizer, X)
        return
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(fk.ModelError, match="change with the rest"):
        step(net, optimizer, X)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    step(net, optimizer, X[:12])


def test_step__looks_at_no_example_alone_where_nothing_decides() -> None:
    sizes: list[int] = []
    net = Net(lambda x: sizes.append(len(x)) is None and torch.isfinite(x).all())
    optimizer = fk.optim.NaturalGradient(net, lr=0.1, kind="ef", damping=0.1)
    step(net, optimizer, X)
    sizes.clear()
    step(net, optimizer, X)
    assert sizes == [len(X)]
