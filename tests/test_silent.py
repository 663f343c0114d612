"""Layers of no consequence in some batch: the graph that would tell is let go on the way back, and asked for again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk


class Sometimes(nn.Module):
    """A layer that is always used, and of consequence only where the first input is positive.

    Args:
        in_place: its output is overwritten where it is not; else it is left alone.
    """

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.body, self.extra, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 5)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        h, e = self.body(x).tanh(), self.extra(x)
        if bool(x[0, 0] > 0):
            return self.head(h + e)
        return self.head(h + e.zero_().add(1.0) if self.in_place else h)


def batches(*signs: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for sign in signs:
        x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        x[:, 0] = sign * x[:, 0].abs()
        found.append((x, torch.randint(5, (6,), generator=generator)))
    return found


def diagonal_by_hand(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    total: Any = 0
    for x, y in data:
        for n in range(len(x)):
            loss = nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
            found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            zeros = (torch.zeros_like(p) for p in model.parameters())
            total = (
                total
                + torch.cat([(z if g is None else g).flatten() for g, z in zip(found, zeros, strict=True)]).square()
            )
    return total / sum(len(x) for x, _ in data)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("signs", [(1, -1, 1), (-1, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("structure", ["diagonal", "ekfac", "full", "block"])
def test_build__of_a_layer_that_is_silent_in_some_batch(structure: str, signs: tuple[int, ...], in_place: bool) -> None:
    torch.manual_seed(0)
    model, data = Sometimes(in_place).double(), batches(*signs)
    expected = diagonal_by_hand(model, data)
    whole = fk.EmpiricalFisher(model, data, structure=structure)
    if structure == "ekfac":
        torch.testing.assert_close(whole.trace(), expected.sum())
    else:
        torch.testing.assert_close(whole.diagonal(), expected)


@pytest.mark.parametrize("structure", ["ekfac", "nkp"])
def test_build__in_parts_of_a_layer_that_is_silent_in_a_later_batch(structure: str) -> None:
    torch.manual_seed(0)
    model, data = Sometimes(False).double(), batches(1, -1, 1)
    budget = fk.plan(model, batches(1, 1), structure=structure).result_bytes
    found = fk.EmpiricalFisher(model, data, structure=structure, memory_budget=budget)
    torch.manual_seed(0)
    fresh = Sometimes(False).double()
    whole = fk.EmpiricalFisher(fresh, data, structure=structure)
    torch.testing.assert_close(found.to_dense(), whole.to_dense())


class Mixing(nn.Module):
    """Positions that are apart only where the first input is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        return self.head(h if bool(x[0, 0, 0] > 0) else h + h.mean(1, keepdim=True))


@pytest.mark.parametrize("in_parts", [False, True])
def test_build__of_positions_that_are_mixed_in_a_later_batch(in_parts: bool) -> None:
    torch.manual_seed(0)
    model, generator = Mixing().double(), torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 6, 3, generator=generator, dtype=torch.float64), torch.zeros(4, 6).long()) for _ in "ab"]
    for (x, _), sign in zip(data, (1, -1), strict=True):
        x[..., 0] = sign * x[..., 0].abs()
    options = {"structure": "ekfac"}
    if in_parts:
        options["memory_budget"] = fk.plan(model, data[:1], "exact", **options).result_bytes
        assert len(fk.plan(model, data[:1], "exact", **options).parts) > 1
    found = fk.ExactFisher(model, data, **options)
    torch.testing.assert_close(found.trace(), fk.ExactFisher(model, data, storage="rows").trace())
