"""Experts kept in one parameter, in the ways that models use them, against one autograd call an example."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.rows.base import RowSelection
from fisherkit.rows.sliced import SlicedRows
from tests import by_hand
from tests.watching import Largest

WIDTH, CLASSES = 4, 3

Products = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of tokens ``[n, i]``, the experts of each ``[n]``, weights ``[E, i, o]`` and biases ``[E, o]``."""


def _by_expert(x: Tensor, expert: Tensor, size: int, own: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The loop over experts that are used."""
    out = x.new_zeros(len(x), size)
    for e in expert.unique():
        at = torch.where(expert == e)[0]
        out = out.index_add(0, at, own(x[at], e))
    return out


def by_linear(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return _by_expert(x, expert, w.shape[2], lambda x, e: F.linear(x, w.transpose(1, 2)[e], b[e]))


def by_turned_linear(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return _by_expert(x, expert, w.shape[2], lambda x, e: F.linear(x, w[e].T, b[e].contiguous()))


def by_matmul(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return _by_expert(x, expert, w.shape[2], lambda x, e: x @ w[e] + b[e])


def by_addmm(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return _by_expert(x, expert, w.shape[2], lambda x, e: torch.addmm(b.select(0, int(e)), x, w.select(0, int(e))))


def by_chunks(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    weights, biases = [one.squeeze(0) for one in w.chunk(len(w))], b.unbind()
    return _by_expert(x, expert, w.shape[2], lambda x, e: x.matmul(weights[e]) + biases[e])


def gathered(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(1), w[expert]).squeeze(1) + b[expert]


def gathered_turned(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(w.mT[expert], x.unsqueeze(-1)).squeeze(-1).add_(b[expert])


def gathered_einsum(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("ni,nio->no", x, w.index_select(0, expert)) + F.embedding(expert, b)


def _of_all(out: Tensor, expert: Tensor) -> Tensor:
    """From outputs ``[E, n, o]`` of all experts."""
    return (out * F.one_hot(expert, len(out)).T.unsqueeze(-1).to(out)).sum(0)


def all_by_bmm(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return _of_all(torch.bmm(x.expand(len(w), *x.shape), w) + b[:, None, :], expert)


def all_by_baddbmm(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return _of_all(torch.baddbmm(b.unsqueeze(1), x.repeat(len(w), 1, 1), w), expert)


def all_by_matmul(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return _of_all(x @ w + b[:, None], expert)


def all_by_einsum(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    out = torch.einsum("ni,eio->neo", x, w) + b
    return out[torch.arange(len(x)), expert]


def grouped(x: Tensor, expert: Tensor, w: Tensor, b: Tensor) -> Tensor:
    order = expert.argsort(stable=True)
    ends = torch.bincount(expert, minlength=len(w)).cumsum(0).to(torch.int32)
    out = F.grouped_mm(x[order], w, offs=ends) + b[expert[order]]
    return out[order.argsort()]


EXACT: list[Products] = [
    by_linear, by_turned_linear, by_matmul, by_addmm, by_chunks, gathered, gathered_turned, gathered_einsum,
    all_by_bmm, all_by_baddbmm, all_by_matmul, all_by_einsum,
]  # fmt: skip
ALL = [*EXACT, grouped]


class Experts(nn.Module):
    """A mixture of experts with two layers each."""

    def __init__(self, product: Products, choose: random.Random) -> None:
        super().__init__()
        self.product, self.top, self.packed = product, choose.randint(1, 2), choose.random() < 0.5
        number, hidden = choose.randint(2, 5), 8 if product is grouped else choose.choice([3, 4, 5])
        self.router, self.head = nn.Linear(WIDTH, number), nn.Linear(WIDTH, CLASSES)
        self.up, self.up_bias = (
            nn.Parameter(torch.randn(number, WIDTH, hidden)),
            nn.Parameter(torch.randn(number, hidden)),
        )
        self.down = nn.Parameter(torch.randn(number, hidden, WIDTH))
        self.down_bias = nn.Parameter(torch.randn(number, WIDTH))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        tokens = x[mask] if self.packed else x.flatten(0, 1)
        weight, expert = self.router(tokens).softmax(-1).topk(self.top, -1)
        each, expert = tokens.repeat_interleave(self.top, 0), expert.flatten()
        hidden = torch.tanh(self.product(each, expert, self.up, self.up_bias))
        out = self.product(hidden, expert, self.down, self.down_bias).unflatten(0, (-1, self.top))
        out = tokens + (out * weight.unsqueeze(-1)).sum(1)
        whole = torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), out) if self.packed else out.view_as(x)
        return self.head((whole * mask.unsqueeze(-1)).sum(1))


EXPERTS = ["up", "up_bias", "down", "down_bias"]


def widen(model: nn.Module, number: int, wide: int) -> None:
    """So many experts, so wide."""
    model.router = nn.Linear(WIDTH, number).double()
    for name, shape in zip(EXPERTS, [(WIDTH, wide), (wide,), (wide, WIDTH), (WIDTH,)], strict=True):
        setattr(model, name, nn.Parameter(torch.randn(number, *shape).double()))


def made(product: Products, seed: int, number: int = 9, most: int = 5) -> tuple[nn.Module, list[tuple[Any, Tensor]]]:
    """A model, and its data in batches of 2 examples and more."""
    torch.manual_seed(seed)
    choose = random.Random(seed)
    model = Experts(product, choose).to(torch.float32 if product is grouped else torch.float64)
    x = torch.randn(number, most, WIDTH).to(model.up)
    mask = torch.arange(most) < torch.randint(1, most + 1, (number, 1))
    y = torch.randint(CLASSES, (number,))
    cuts = [0, 2, choose.randint(3, 6), number]
    return model, [((x[i:j], mask[i:j]), y[i:j]) for i, j in itertools.pairwise(cuts)]


KINDS = {"exact": fk.ExactFisher, "ef": fk.EmpiricalFisher}


def close(got: Tensor, expected: Tensor) -> None:
    bound = 1e-10 if expected.dtype == torch.float64 else 1e-4
    assert float((got - expected).norm()) <= bound * float(expected.norm()), (got - expected).abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("product", ALL)
def test_rows__equal_autograd_s_and_are_kept_by_slice(product: Products, kind: str) -> None:
    model, data = made(product, ALL.index(product) + (len(ALL) if kind == "ef" else 0))
    whole = by_hand.fisher(model, data, kind)
    full = KINDS[kind](model, data)
    covered = {name: entry.rule for entry in full.coverage().entries for name in entry.parameters}
    assert {covered[name] for name in EXPERTS}.isdisjoint({"loop", "torch.func"}), full.coverage()
    close(full.to_dense(), whole)
    values = torch.linalg.eigvalsh(full.gram()).flip(0)
    close(values, torch.linalg.eigvalsh(whole.double()).flip(0)[: len(values)].to(whole))
    close(KINDS[kind](model, data, structure="diagonal").diagonal(), whole.diagonal())


@pytest.mark.parametrize("product", [by_matmul, gathered_turned, all_by_baddbmm])
def test_blocks_streams_and_files__are_the_same(product: Products, tmp_path: Path) -> None:
    model, data = made(product, 40)
    whole = by_hand.fisher(model, data, "exact")
    block = fk.ExactFisher(model, data, structure="block").to_dense()
    close(block, whole * (block != 0))
    v = torch.randn(len(whole), 2).to(whole)
    close(fk.ExactFisher(model, data, chunk_size=5) @ v, whole @ v)
    close(fk.ExactFisher(model, data, memory_budget=20_000) @ v, whole @ v)
    fk.ExactFisher(model, data).save(tmp_path / "fisher.safetensors")
    close(fk.load(tmp_path / "fisher.safetensors").to_dense(), whole)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_kronecker__has_exact_blocks_or_the_exact_diagonal_of_experts_and_says_so(structure: str) -> None:
    model, data = made(by_linear, 2)
    widen(model, 16, 5)
    fisher = fk.EmpiricalFisher(model, data, structure=structure)
    expected = by_hand.rows(model, data).square().mean(0)
    for name in EXPERTS:
        at = fisher.space.slices[name]
        close(fisher.diagonal()[at], expected[at])
        entry = next(one for one in fisher.coverage().entries if name in one.parameters)
        assert ("diagonal" in entry.structure) == (at.stop - at.start > 256)
        assert "kron" not in entry.structure


@pytest.mark.parametrize("product", [by_matmul, gathered, all_by_bmm])
def test_natural_gradient__a_step_is_damped_least_squares(product: Products) -> None:
    model, data = made(product, 3)
    optimizer = fk.optim.NaturalGradient(model, lr=0.5, damping=0.1, kind="ef")
    for inputs, y in data:  # every batch routes in its own way
        expected = by_hand.natural(by_hand.rows(model, (inputs, y)), 0.1)
        close(by_hand.stepped(model, optimizer, inputs, y), 0.5 * expected)
    optimizer.close()


class Unusual(nn.Module):
    """Calls that look like those of experts and are not."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(3, WIDTH, 2)), nn.Linear(2, CLASSES)
        self.mask = torch.rand(3, WIDTH, 2) < 0.5

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        trace = torch.einsum("bii->b", torch.einsum("ij,bk->bjk", self.w[0], x[:, 0, :2])[:, :2])
        swapped = x.sum(1) @ self.w[..., 1].T @ self.w[:, 0] + self.w[1, 0] * self.w[self.mask].sum()
        return self.head(swapped + trace.unsqueeze(1) * self.w[[0, 2]].sum((0, 1)))


def test_rows__of_calls_that_look_alike_are_right() -> None:
    torch.manual_seed(0)
    model, data = Unusual().double(), made(by_linear, 1)[1]
    close(fk.EmpiricalFisher(model, data).to_dense(), by_hand.fisher(model, data))


@pytest.mark.parametrize("product", [by_linear, gathered, all_by_bmm])
def test_memory__no_row_over_all_experts_is_made(product: Products) -> None:
    model, _ = made(product, 2)
    number, wide, examples = 32, 24, 40
    model.packed, model.top = False, 1
    widen(model, number, wide)
    x, mask = torch.randn(examples, 1, WIDTH).double(), torch.ones(examples, 1, dtype=torch.bool)
    data = ((x, mask), torch.randint(CLASSES, (examples,)))
    v = torch.randn(sum(p.numel() for p in model.parameters())).double()
    with Largest() as found:
        fisher = fk.EmpiricalFisher(model, data)
        fisher @ v
        fisher.gram()
        for structure in ("diagonal", "block"):
            fk.EmpiricalFisher(model, data, structure=structure) @ v
    assert found.entries < examples * number * WIDTH * wide / (1.5 if product is all_by_bmm else 4)


def drawn(seed: int, selection: RowSelection) -> SlicedRows:
    """Rows of nine positions of four examples over five slices."""
    turned = seed % 2 == 0
    which, whose = torch.randint(5, (9,)), torch.randint(4, (9,))
    a, g = torch.randn(9, 3).double(), torch.randn(2, 9, 2).double()
    found = SlicedRows.gathered(a, g, which, whose, selection, 5, transposed=turned, cache={})
    whole = torch.zeros(2, 4, 5, *((3, 2) if turned else (2, 3))).double()
    for n in range(9):
        outer = g[:, n, :, None] * a[n]
        whole[:, whose[n], which[n]] += outer.mT if turned else outer
    close(found.dense(), selection.take(whole).flatten(1))
    return found


@pytest.mark.parametrize("seed", range(30))
def test_sliced_rows__answer_as_the_dense_ones(seed: int) -> None:
    torch.manual_seed(seed)
    selection = RowSelection(2, 4, torch.device("cpu"), None if seed % 3 else torch.rand(4, 2) < 0.7)
    mine, other = drawn(seed, selection), drawn(seed, selection)
    own, count = mine.dense(), mine.count
    u, w, weights = torch.randn(30, 2).double(), torch.randn(count, 2).double(), torch.randn(30).double()
    close(mine.matmul(u), own @ u)
    close(mine.rmatmul(w), own.mT @ w)
    close(mine.rmatmul(w, torch.ones(30, 2).double()), own.mT @ w)
    close(mine.gram(mine), own @ own.mT)
    close(mine.gram(other), own @ other.dense().mT)
    close(mine.squared_sum(), own.square().sum(0))
    close(mine.weighted_squares(weights), own.square() @ weights)
    order = torch.randperm(count)[: count // 2 + 1]
    close(mine.reordered(order).compact().scaled(2.0).dense(), 2 * own[order])
    both = SlicedRows.cat([mine, other.reordered(order)])
    close(both.dense(), torch.cat([own, other.dense()[order]]))
    back = SlicedRows.from_tensors(both.tensors(), both.options())
    close(back.gram(back), both.dense() @ both.dense().mT)
