"""Rows of many batches put together: the same rows, and of each unit's parts none is held longer than needed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.rows import collection, linearized
from fisherkit.rows import problem as problem_module
from fisherkit.rows.base import StoredRows
from fisherkit.rows.collection import Rows, UnitSlot
from tests import by_hand
from tests.conformance_cases import problem
from tests.influence_cases import data
from tests.small_data import mlp


@pytest.mark.parametrize("size", [1, 700, 1 << 30])
@pytest.mark.parametrize("family", ["mlp", "token_attention", "embedding", "conv2d"])
def test_rows__gathered_by_groups_are_those_of_the_batches(
    family: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, y) = problem(family).model, data(problem(family))
    batches = [(x[i : i + 2], y[i : i + 2]) for i in range(0, len(y), 2)]
    alone = [fk.EmpiricalFisher(model, batch).held.row_source.dense() for batch in batches]  # type: ignore[attr-defined]
    monkeypatch.setattr(collection, "GROUP", size)
    fisher = fk.EmpiricalFisher(model, batches)
    torch.testing.assert_close(fisher.held.row_source.dense(), torch.cat(alone))  # type: ignore[attr-defined]


@pytest.mark.parametrize("small", [False, True], ids=["large", "small"])
def test_rows__smaller_than_the_layers_outputs_are_made_in_pieces_that_a_cache_holds(
    small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    pooled = nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    model = nn.Sequential(*(pooled if small else (nn.Flatten(), nn.Linear(100, 2)))).double()
    data, sizes = (torch.randn(50, 1, 10, 10).double(), torch.randint(2, (50,))), list[int]()
    forward = problem_module.forward

    def counted(plan: Any, batch: Any, **options: Any) -> Any:
        sizes.append(batch.size)
        return forward(plan, batch, **options)

    monkeypatch.setattr(problem_module, "forward", counted)
    rows = []
    for entries in (problem_module.GRAPH, 500):
        for name in ("GRAPH", "LAYER"):
            monkeypatch.setattr(problem_module, name, min(entries, getattr(problem_module, name)))
        sizes.clear()
        fisher = fk.EmpiricalFisher(model, data, storage="rows")
        rows.append(fisher.held.row_source.dense())  # type: ignore[attr-defined]
        assert (max(sizes) < 50) is (small and entries == 500)
    torch.testing.assert_close(*rows, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(rows[1], by_hand.rows(model, data))


@pytest.mark.parametrize(("name", "entries"), [("GRAPH", 500), ("LAYER", 200)])
def test_sums__of_many_vectors_and_large_layers_in_passes_that_a_cache_holds(
    name: str, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(75, 5)).double()
    data, passes = (torch.randn(12, 1, 5, 5).double(), torch.randint(5, (12,))), list[tuple[int, int]]()
    rows = linearized.Linearized.rows

    def counted(self: Any, v: Tensor, *given: Any, **options: Any) -> Any:
        passes.append((v.shape[0], v.shape[1]))
        return rows(self, v, *given, **options)

    monkeypatch.setattr(linearized.Linearized, "rows", counted)
    for limit in ("GRAPH", "LAYER"):
        monkeypatch.setattr(problem_module, limit, 500)
    monkeypatch.setattr(problem_module, name, entries)
    kind = "exact" if name == "GRAPH" else "ef"
    found = fk.FisherApproximation(model, data, kind, structure="diagonal").diagonal()
    # A vector of an example takes 80 entries, 75 of them the convolution's: of the largest layer, two examples fit.
    assert max(k * batch for k, batch in passes) * 80 <= 500
    assert name == "GRAPH" or max(batch for _, batch in passes) == 2
    torch.testing.assert_close(torch.as_tensor(found), by_hand.fisher(model, data, kind).diagonal())


@pytest.mark.parametrize("size", [1, 100, 1 << 30])
def test_parts__are_let_go_unit_by_unit(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "GROUP", size)
    space = fk.ParameterSpace.of(mlp())
    space = space.restrict(space.names[:2])
    first: list[weakref.ref[Tensor]] = []
    held: list[int] = []

    def parts() -> Iterator[Rows]:
        for _ in range(6):
            units = [StoredRows(torch.ones(2, int(torch.Size(shape).numel()))) for shape in space.shapes]
            first.append(weakref.ref(units[0].values))
            yield Rows(space, [UnitSlot((name,), unit) for name, unit in zip(space.names, units, strict=True)])

    def cat(parts: Sequence[StoredRows]) -> StoredRows:
        held.append(sum(reference() is not None for reference in first))
        return StoredRows(torch.cat([part.values for part in parts]))

    monkeypatch.setattr(StoredRows, "cat", cat)
    rows = Rows.gathered(parts())
    assert torch.equal(rows.dense(), torch.ones(12, space.size))
    # Of the second unit, the last call: all that is left of the first is what holds the part that came last.
    assert held[-1] <= 1
