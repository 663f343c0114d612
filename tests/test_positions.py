"""Kronecker factors do not depend on how the data are cut: batch sizes, chunks, order."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from tests.test_ownership import CLASSES, WIDTH, Dispatched, Doubled, Folded, Packed, Routed, Sorted

LENGTH = 5


class LastOne(nn.Module):
    """Reads one position of packed tokens: all others of the last layer are dead."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head, self.whole = nn.Linear(WIDTH, CLASSES), choose.random() < 0.5

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        tokens, lengths = x[mask], mask.sum(1)
        tokens = torch.tanh(self.second(torch.tanh(self.first(tokens))))
        last = tokens[lengths.cumsum(0) - 1]
        if self.whole:
            last = last + torch.zeros_like(tokens)[lengths.cumsum(0) - lengths]
        return self.head(last)


class LastOfAll(nn.Module):
    """The same without packing; a function of which nothing is known hides the batch's axis."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.hidden = choose.random() < 0.5

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = torch.tanh(self.second(torch.tanh(self.first(x))))
        y = Doubled.apply(y) if self.hidden else y
        return self.head(y[torch.arange(len(x)), mask.sum(1) - 1])


class Steps(nn.Module):
    """A recurrent cell on the sequences that are that long, longest first, as packed sequences go."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.own, self.back = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        order = mask.sum(1).argsort(descending=True, stable=True)
        lengths, x = mask.sum(1)[order], x[order]
        h = x.new_zeros(len(x), WIDTH)
        for t in range(int(lengths.max())):
            n = int((lengths > t).sum())
            h = torch.cat([torch.tanh(self.own(x[:n, t]) + self.back(h[:n])), h[n:]])
        return self.head(h)[order.argsort()]


class Slots(nn.Module):
    """Experts with a number of slots that depends on the batch, of which some stay empty."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head, self.spare = nn.Linear(WIDTH, CLASSES), choose.randint(1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        chosen = self.router(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            own = (chosen == number).nonzero().squeeze(1)
            slots = torch.cat([flat[own], flat.new_zeros(len(x) // 2 + self.spare, WIDTH)])
            out = out.index_add(0, own, torch.tanh(expert(slots))[: len(own)])
        return self.head(out.view_as(x).mul(mask.unsqueeze(-1)).mean(1))


class OneHead(nn.Module):
    """Tokens have outputs of their own, computed packed; attention of one head mixes those of a sequence."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.attends, self.packs = choose.random() < 0.5, choose.random() < 0.8

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not self.packs:
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        y = torch.zeros_like(x)
        y[mask] = torch.tanh(self.first(x[mask]))
        if self.attends:
            scores = (y @ y.mT).masked_fill(~mask.unsqueeze(1), -torch.inf)
            y = scores.softmax(-1) @ y
        z = x.new_zeros(*x.shape[:2], CLASSES)
        z[mask] = self.head(torch.tanh(self.second(y[mask])))
        return z


WHOLE = [Packed, Routed, Dispatched, Sorted, Folded, LastOne, LastOfAll, Steps, Slots]


def case(seed: int, made: Callable[[random.Random], nn.Module]) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A model, and sequences of several lengths with labels, a part of which do not count."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    model, n = made(choose).double(), 6
    x, lengths = torch.randn(n, LENGTH, WIDTH).double(), torch.randint(1, LENGTH + 1, (n,))
    lengths[choose.randrange(n)] = LENGTH  # one is as long as the outputs
    mask = torch.arange(LENGTH) < lengths.unsqueeze(1)
    tokens = made is OneHead
    y = torch.randint(CLASSES, (n, LENGTH) if tokens else (n,))
    if tokens:
        y = y.masked_fill(~mask | (torch.rand(n, LENGTH) < 0.2), -100)
        y[:, 0] = 1
    elif choose.random() < 0.5:
        y[choose.randrange(n)] = -100
    return model, x, mask, y


def agree(seed: int, model: nn.Module, x: Tensor, mask: Tensor, y: Tensor, cls: Any, **options: Any) -> None:
    """Two of the five ways to cut."""
    n = len(x)

    def built(index: Tensor, size: int, **more: Any) -> fk.FisherApproximation:
        return cls(model, [((x[i], mask[i]), y[i]) for i in index.split(size)], **options, **more)

    order = torch.arange(n)
    whole = built(order, n).to_dense()
    cuts = (
        (order, 1, None),
        (order.flip(0), 2, None),
        (torch.randperm(n), n, None),
        (order, n, 1),
        (torch.randperm(n), 4, 3),
    )
    for index, size, chunk in (cuts[seed % 5], cuts[(seed + 2) % 5]):
        found = built(index, size, chunk_size=chunk).to_dense()
        torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10 * float(whole.abs().max()))


@pytest.mark.parametrize("seed", range(27))
def test_kronecker_factors__do_not_depend_on_how_data_are_cut(seed: int) -> None:
    model, x, mask, y = case(seed, WHOLE[seed % len(WHOLE)])
    cls = (fk.EmpiricalFisher, fk.ExactFisher, fk.ImprovedEmpiricalFisher)[seed % 4 % 3]
    options = ({"structure": "kfac"}, {"structure": "ekfac"}, {"structure": "kfac", "kfac_positions": "reduce"})
    agree(seed, model, x, mask, y, cls, **options[seed // len(WHOLE) % 3])


@pytest.mark.parametrize("example", ["sequence", "token"])
@pytest.mark.parametrize("seed", range(9))
def test_kronecker_factors__of_tokens_do_not_depend_on_how_data_are_cut(seed: int, example: str) -> None:
    model, x, mask, y = case(seed, OneHead)
    cls = (fk.EmpiricalFisher, fk.ExactFisher, fk.ImprovedEmpiricalFisher)[seed % 3]
    options = ({"structure": "kfac"}, {"structure": "ekfac"}, {"structure": "kfac", "kfac_positions": "reduce"})
    agree(seed, model, x, mask, y, cls, example=example, **options[seed // 3 % 3])


@pytest.mark.parametrize("hidden", [False, True])
def test_kfac__counts_all_positions_where_the_axis_is_followed_and_else_those_that_are_read(hidden: bool) -> None:
    """The two definitions, on one model whose last positions alone are read."""
    torch.manual_seed(0)
    model = LastOfAll(random.Random(0)).double()
    model.hidden = hidden
    x, mask = torch.randn(4, LENGTH, WIDTH).double(), torch.arange(LENGTH) < torch.tensor([[3], [5], [1], [2]])
    y = torch.randint(CLASSES, (4,))
    found = fk.EmpiricalFisher(model, ((x, mask), y), structure="kfac", params=["first.weight"]).to_dense()
    where = torch.zeros(4, LENGTH, dtype=torch.bool)
    where[torch.arange(4), mask.sum(1) - 1] = True
    inputs = x[where] if hidden else x.flatten(0, 1)
    moment = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for n in range(4):
        h = model.first(x[n : n + 1])
        read = torch.tanh(model.second(torch.tanh(h)))[:, int(mask[n].sum()) - 1]
        z = model.head(2 * read if hidden else read)  # what `Doubled` does
        (g,) = torch.autograd.grad(torch.nn.functional.cross_entropy(z, y[n : n + 1]), h)
        moment += g[0].mT @ g[0] / 4
    expected = torch.kron(moment, inputs.mT @ inputs / len(inputs))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["ef", "exact"])
@pytest.mark.parametrize("made", [*WHOLE, OneHead])
def test_steps__of_kronecker_factors_do_not_depend_on_how_batches_are_cut(
    made: Callable[[random.Random], nn.Module], kind: str
) -> None:
    for seed in (0, 1) if kind == "ef" else (1, 2):
        model, x, mask, y = case(seed, made)
        found = []
        for size in (len(x), 4, 1):
            own = copy.deepcopy(model)
            optimizer = fk.optim.NaturalGradient(own, lr=1.0, kind=kind, structure="kfac", damping=0.1)
            for i in torch.arange(len(x)).split(size):
                z = own(x[i], mask[i])
                (F.cross_entropy(z.flatten(0, -2), y[i].flatten(), reduction="sum") / len(x)).backward()
            optimizer.step()
            found.append(torch.cat([p.detach().flatten() for p in own.parameters()]))
        torch.testing.assert_close(found[1:], found[:1] * 2, rtol=1e-8, atol=1e-10)
