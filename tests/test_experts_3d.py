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


def rows(model: nn.Module, data: list[tuple[Any, Tensor]], kind: str) -> Tensor:
    """One autograd call a row; [N, M, D]."""
    found = []
    for (x, mask), y in data:
        for n in range(len(y)):
            z = model(x[n : n + 1], mask[n : n + 1])[0]
            p = z.detach().softmax(0)
            root = p.sqrt().diag() - torch.outer(p, p.sqrt())
            vectors = root.T if kind == "exact" else [p - F.one_hot(y[n], CLASSES)]
            own = []
            for v in vectors:
                g = torch.autograd.grad(
                    z, list(model.parameters()), v, retain_graph=True, materialize_grads=True, allow_unused=True
                )
                own.append(torch.cat([one.flatten() for one in g]))
            found.append(torch.stack(own))
    return torch.stack(found)


KINDS = {"exact": fk.ExactFisher, "ef": fk.EmpiricalFisher}


def close(got: Tensor, expected: Tensor) -> None:
    bound = 1e-10 if expected.dtype == torch.float64 else 1e-4
    assert float((got - expected).norm()) <= bound * float(expected.norm()), (got - expected).abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("product", ALL)
def test_rows__equal_autograd_s_and_are_kept_by_slice(product: Products, kind: str) -> None:
    for seed in range(ALL.index(product), 3 * len(ALL), len(ALL)):
        model, data = made(product, seed)
        expected = rows(model, data, kind).flatten(0, 1)
        whole = expected.T @ expected / 9
        full = KINDS[kind](model, data)
        covered = {name: entry for entry in full.coverage().entries for name in entry.parameters}
        assert {covered[name].rule for name in EXPERTS}.isdisjoint({"loop", "torch.func"}), full.coverage()
        close(full.to_dense(), whole)
        close(
            torch.linalg.eigvalsh(full.gram()).flip(0)[:18],
            torch.linalg.eigvalsh(whole).flip(0)[: min(18, full.gram().shape[0])],
        )
        close(KINDS[kind](model, data, structure="diagonal").diagonal(), whole.diagonal())
        block = KINDS[kind](model, data, structure="block").to_dense()
        close(block, whole * (block != 0))
