"""Models whose outputs or gradients depend on an example's place in its batch, or on how many examples there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from tests import by_hand
from tests.test_later_uses import Model, check

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PLACES = torch.randn(64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
FEW = 8
"""Examples that a first look at a model has at most."""


def own(x: Tensor) -> Tensor:
    return PLACES[: len(x)]


# What is done to the outputs h of a layer, or to its inputs.
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "added": lambda h: h + own(h)[:, None],
    "counted": lambda h: h * torch.arange(len(h), dtype=h.dtype)[:, None],
    "where": lambda h: torch.where(torch.arange(len(h))[:, None] == 4, 0.0, h),
    "filled": lambda h: h.masked_fill(torch.arange(len(h))[:, None] % 5 == 4, 0.0),
    "written": lambda h: _written(h),
    "dropped": lambda h: torch.stack([row * (0.0 if n == 4 else 1.0) for n, row in enumerate(h.unbind(0))]),
    "joined": lambda h: torch.cat([h[:, :2], own(h)[:, None]], 1),
    "stacked": lambda h: torch.stack([h, own(h)[:, None].expand_as(h)], 1).sum(1),
    "matrices": lambda h: torch.bmm(h[:, None], own(h)[:, None, None] * torch.eye(3, dtype=h.dtype))[:, 0],
    "matmul": lambda h: (h[:, None] @ (own(h)[:, None, None] * torch.eye(3, dtype=h.dtype)))[:, 0],
    "einsum": lambda h: torch.einsum("bi,b->bi", h, own(h)),
    "baddbmm": lambda h: torch.baddbmm(own(h)[:, None, None], h[:, None], h.new_ones(3, 3).expand(len(h), 3, 3))[:, 0],
    "lerp": lambda h: torch.lerp(h, torch.zeros_like(h), own(h)[:, None].sigmoid()),
    "gathered": lambda h: h.gather(1, (torch.arange(len(h))[:, None] + torch.arange(3)) % 3),
    "taken": lambda h: h[torch.arange(len(h)), torch.arange(len(h)) % 3][:, None] * torch.ones(3, dtype=h.dtype),
    "in place": lambda h: (h + 0).mul_(own(h)[:, None]),
    "size": lambda h: h / len(h),
    "parity": lambda h: h * (1 + len(h) % 2),
    "attention": lambda h: F.scaled_dot_product_attention(
        h[:, :, None], h[:, :, None], h[:, :, None],
        attn_mask=own(h)[:, None, None] * torch.arange(3, dtype=h.dtype).expand(3, 3))[:, :, 0],
}  # fmt: skip


def _written(h: Tensor) -> Tensor:
    h = h.clone()
    h[4:5] = 0.0
    return h


class Halved(torch.autograd.Function):
    """A gradient divided by the number of examples."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0] / len(g[0])


class Placed(Halved):
    """A gradient times the number of its place."""

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0] * own(g[0])[:, None]


def _hooked(h: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    h = h + 0
    h.register_hook(change)
    return h


def _scaled(h: Tensor, by: Any) -> Tensor:
    """A gradient times a number, of which outputs know nothing."""
    return h * by + (h * (1 - by)).detach()


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "function by size": Halved.apply,
    "function by place": Placed.apply,
    "hook by size": lambda h: _hooked(h, lambda g: g / len(g)),
    "hook by place": lambda h: _hooked(h, lambda g: g * own(g)[:, None]),
    "straight through by size": lambda h: h / len(h) + h.detach() * (1 - 1 / len(h)),
    "scaled by a constant": lambda h: _scaled(h, torch.tensor(1 / len(h))),
    "scaled by a sum": lambda h: _scaled(h, 1 / torch.ones(len(h)).sum()),
    "scaled by a mean": lambda h: _scaled(h, h.detach().mean()),
    "scaled by a share": lambda h: _scaled(h, (h.detach() > 0).double().mean()),
    "scaled in a norm": lambda h: h.detach() + (n := F.layer_norm(h, (3,), eps=1 / len(h))) - n.detach(),
    "detached last": lambda h: torch.cat([h[:-1], h[-1:].detach()]) if len(h) > 1 else h,
    "straight through by place": lambda h: h.detach() + (h - h.detach()) * own(h)[:, None],
}


class Switch:
    """What no comparison of models sees."""

    __slots__ = ("on",)

    def __init__(self, on: Callable[[Tensor], bool]) -> None:
        self.on = on


def layers(x: Tensor, w: Tensor, b: Tensor, u: Tensor, *, change: Callable[[Tensor], Tensor], switch: Switch) -> Tensor:
    h = F.linear(x, w, b)
    h = change(h) if switch.on(x) else h
    return F.linear(h.tanh(), u)


def model(change: Callable[[Tensor], Tensor], on: Callable[[Tensor], bool]) -> Model:
    return Model(layers, (3, 3), (3,), (2, 3), change=change, switch=Switch(on))


def refused_or_right(model: nn.Module, data: list[Tensor], **options: Any) -> None:
    """Rows of one autograd call an example, or a refusal."""
    message = ""
    try:
        fisher = fk.ExactFisher(model, [(x, None) for x in data], likelihood="gaussian", **options)
        found = fisher @ torch.eye(fisher.size, dtype=torch.float64)
    except fk.ModelError as error:
        message = str(error)
    if message:
        assert "change" in message
        return
    expected = by_hand.fisher(model, (torch.cat(data), None), "gaussian")
    torch.testing.assert_close(found, torch.diag(expected.diagonal()) if "structure" in options else expected)


WAYS = {**OUTPUTS, **GRADIENTS}
OPTIONS: list[dict[str, Any]] = [{}, {"structure": "diagonal"}, {"storage": "stream"}]
CASES = [(way, OPTIONS[i % 3]) for i, way in enumerate(WAYS)] + [
    (way, one) for way in ("added", "size", "hook by place", "straight through by place") for one in OPTIONS
]


@pytest.mark.parametrize(("way", "options"), CASES, ids=str)
def test_places__that_begin_to_count_beyond_the_first_look(way: str, options: dict[str, Any]) -> None:
    refused_or_right(model(WAYS[way], lambda x: len(x) > FEW), [X], **options)


@pytest.mark.parametrize(("way", "options"), CASES, ids=str)
def test_places__that_begin_to_count_in_a_later_batch(way: str, options: dict[str, Any]) -> None:
    refused_or_right(model(WAYS[way], lambda x: len(x) == 7), [X[:12], X[12:19], X[19:]], **options)


@pytest.mark.parametrize(("way", "options"), CASES, ids=str)
def test_places__that_begin_to_count_after_a_first_build(way: str, options: dict[str, Any]) -> None:
    one = model(WAYS[way], lambda x: False)
    check(one, X, **options)
    one.settings["switch"].on = lambda x: True
    for _ in range(2):
        refused_or_right(one, [X], **options)
        refused_or_right(one, [X[:5], X[5:]], **options)


@pytest.mark.parametrize("way", WAYS)
def test_places__that_count_from_the_first_look_on(way: str) -> None:
    for data in ([X[:2]], [X[:6]], [X[:1], X[1:3]]):
        one = model(lambda h: WAYS[way](h) if way in GRADIENTS or len(h) > 4 else h, lambda x: True)
        refused_or_right(one, data, structure="diagonal")


# -- optimizers --------------------------------------------------------------------------------------------------------


class Trained(nn.Module):
    """The same with dropout before the last layer, and whether it counts noted by the mode."""

    def __init__(self, change: Callable[[Tensor], Tensor], on: Callable[[Tensor], bool], dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.dropout = nn.Linear(3, 3).double(), nn.Linear(3, 2).double(), nn.Dropout(dropout)
        self.change, self.on = change, on

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = self.change(h) if self.on(x) else h
        return self.last(self.dropout(h.tanh()))  # type: ignore[no-any-return]


STEPS: list[dict[str, Any]] = [{"kind": "ef"}, {"kind": "exact"}, {"kind": "ef", "structure": "kfac"}]
MEETING: dict[str, Callable[[Tensor], Tensor]] = {
    **WAYS,
    "room for a few": lambda h: h * ((h[:, 0].detach() > 0).cumsum(0) <= 2)[:, None],
    "order": lambda h: h * (1 + h[:, 0].detach().argsort().argsort())[:, None],
    "noise of company": lambda h: h + h.detach().flip(0),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("way", MEETING)
def test_step__of_a_later_batch_in_which_places_or_company_count(way: str, dropout: float) -> None:
    options = STEPS[len(way) % 3]
    net = Trained(MEETING[way], lambda x: len(x) == 7, dropout)
    optimizer = fk.optim.NaturalGradient(net, lr=0.1, damping=0.1, **options)

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(x), torch.arange(len(x)) % 2).backward()
        optimizer.step()

    step(X[:12])
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(fk.ModelError, match="change"):
        step(X[12:19])
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    step(X[19:])


@pytest.mark.parametrize("options", STEPS, ids=str)
@pytest.mark.parametrize("mode", ["dropout", "train", "eval"])
def test_step__of_another_number_of_examples_that_begins_with_those_first_seen(
    mode: str, options: dict[str, Any]
) -> None:
    net = Trained(lambda h: h, lambda x: False, 0.3 * (mode == "dropout")).train(mode != "eval")
    optimizer = fk.optim.NaturalGradient(net, lr=0.1, damping=0.1, **options)
    for size in (8, 12, 4, 8):
        optimizer.zero_grad()
        F.cross_entropy(net(X[:size]), torch.arange(size) % 2).backward()
        optimizer.step()


def test_step__looks_at_nothing_again_where_nothing_meets() -> None:
    sizes: list[int] = []
    net = Trained(lambda h: h, lambda x: sizes.append(len(x)) is None, 0.3)
    optimizer = fk.optim.NaturalGradient(net, lr=0.1, damping=0.1, kind="ef")
    for _ in range(3):
        sizes.clear()
        F.cross_entropy(net(X), torch.arange(len(X)) % 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sizes == [len(X)]


class Normed(nn.Module):
    """Batch norm, and examples that meet where one of them is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Linear(3, 4).double(),
            nn.BatchNorm1d(4).double(),
            nn.Linear(4, 2).double(),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        return self.last(torch.where(x[:, :1] > 5, h - h.mean(0), h))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:.*in train mode")
def test_step__of_examples_that_meet_beside_a_batch_norm_in_train_mode() -> None:
    net = Normed().train()
    optimizer = fk.optim.NaturalGradient(net, lr=0.1, damping=0.1, kind="ef")
    F.cross_entropy(net(X[:8]), torch.arange(8) % 2).backward()
    optimizer.step()
    optimizer.zero_grad()
    far = X[:8].clone()
    far[3] = 9.0

    def step() -> None:
        F.cross_entropy(net(far), torch.arange(8) % 2).backward()
        optimizer.step()

    with pytest.raises(fk.ModelError, match="change with the rest of the batch"):
        step()
