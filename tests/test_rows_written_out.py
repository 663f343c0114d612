"""Products of factored rows with many columns, which write rows out, against J by its definition in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisherkit as fk
from fisherkit.rows import factored
from fisherkit.rows.base import StoredRows
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.patches import Patches

N, T, INPUTS, OUTPUTS = 5, 9, 4, 6
MANY, FEW = 40, 1


def by_definition(a: Tensor, g: Tensor, example: Tensor, *, bias: bool, transposed: bool) -> Tensor:
    """Σ_t g_rt a_ntᵀ of every row, flat."""
    rows = []
    for r, n in enumerate(example.tolist()):
        weight = sum(torch.outer(g[r, t], a[n, t]) for t in range(a.shape[1]))
        assert isinstance(weight, Tensor)
        flat = (weight.T if transposed else weight).flatten()
        rows.append(torch.cat([flat, g[r].sum(0)]) if bias else flat)
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("layout", ["one", "three", "listed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products__with_many_columns_are_those_of_the_definition(
    layout: str, bias: bool, transposed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factored, "LONGEST", 3 * INPUTS)  # some outputs at a time
    torch.manual_seed(0)
    each = 3 if layout == "three" else 1
    a, g = torch.randn(N, T, INPUTS, dtype=torch.float64), torch.randn(N * each, T, OUTPUTS, dtype=torch.float64)
    example = torch.tensor([3, 0, 0, 4, 1]) if layout == "listed" else torch.arange(N).repeat_interleave(each)
    j = by_definition(a, g, example, bias=bias, transposed=transposed)
    listed = example if layout == "listed" else None
    rows = FactoredRows(a.to(dtype), g.to(dtype), listed, bias=bias, transposed=transposed)
    assert rows.writes_out(MANY)
    assert not rows.writes_out(FEW)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    for columns in (MANY, FEW):
        u = torch.randn(j.shape[1], columns, dtype=torch.float64)
        w = torch.randn(j.shape[0], columns, dtype=torch.float64)
        found = rows.matmul(u.to(dtype)).double()
        assert float((found - j @ u).norm() / (j @ u).norm()) < tolerance
        for out in (None, torch.empty(j.shape[1], columns, dtype=dtype)):
            found = rows.rmatmul(w.to(dtype), out).double()
            assert float((found - j.T @ w).norm() / (j.T @ w).norm()) < tolerance


def test_products__of_patches_with_many_columns() -> None:
    torch.manual_seed(0)
    x = torch.randn(N, 3, 7, 7, dtype=torch.float64)
    patches = Patches(x, (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1)))
    g = torch.randn(N, 49, OUTPUTS, dtype=torch.float64)
    a = torch.nn.functional.unfold(x, 3, padding=1).mT
    j = by_definition(a, g, torch.arange(N), bias=True, transposed=False)
    rows = FactoredRows(patches, g, bias=True)
    assert rows.writes_out(MANY)
    u, w = torch.randn(j.shape[1], MANY, dtype=torch.float64), torch.randn(N, MANY, dtype=torch.float64)
    torch.testing.assert_close(rows.matmul(u), j @ u, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(rows.rmatmul(w), j.T @ w, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("columns", [4, 8, 100])
def test_matmul__keeps_its_digits_over_long_rows(columns: int) -> None:
    torch.manual_seed(0)
    rows = FactoredRows(torch.randn(20, 32, 256), torch.randn(20, 32, 512), bias=False)
    u = torch.randn(rows.size, columns)
    assert rows.writes_out(columns)
    expected = rows.double().dense() @ u.double()
    for kept in (rows, StoredRows(rows.dense())):
        assert float((kept.matmul(u) - expected).norm() / expected.norm()) < 3e-6


def test_products__of_rows_without_shared_positions_are_never_written_out() -> None:
    assert not FactoredRows(torch.randn(4, 1, 3), torch.randn(4, 1, 2), bias=True).writes_out(1 << 20)


@pytest.mark.parametrize(
    ("x", "kernel", "stride", "dilation", "padding"),
    [
        ((6, 3, 120, 120), (3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))),
        ((6, 3, 241, 240), (3, 2), (2, 2), (1, 2), ((0, 2), (-1, 1))),
        ((6, 5, 20_000), (4,), (1,), (2,), ((3, 0),)),
        ((6, 2, 22, 26, 25), (3, 2, 3), (1, 1, 1), (1, 1, 1), ((1, 1), (0, 0), (0, 1))),
    ],
    ids=str,
)
@pytest.mark.parametrize("group", [1, 3])
def test_rows__of_many_windows_by_a_convolution_s_own_gradient(
    x: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...],
    padding: tuple[tuple[int, int], ...], group: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    patches = Patches(torch.randn(x, generator=generator), kernel, stride, dilation, padding, group)
    g = torch.randn(*patches.shape[:2], 4, generator=generator)
    assert patches.has_kernel
    rows, expected = FactoredRows(patches, g, bias=True), g.double().mT @ patches.double()[:]
    for chosen in (slice(0, 4), slice(1, 3)):
        found = torch.cat([tile for _, tile in rows._tiles(chosen)]).double()
        assert float((found - expected[:, chosen]).norm()) <= 1e-5 * float(expected.norm())
    dense = rows.dense()[:, : expected[0].numel()].double()
    assert float((dense - expected.flatten(1)).norm()) <= 1e-5 * float(expected.norm())
    entries = g.unflatten(1, (group, -1)).flatten(0, 1)
    for bias in (True, False):
        torch.testing.assert_close(
            patches.rows(entries, bias=bias), FactoredRows(patches, g, bias=bias).dense(), rtol=1e-4, atol=1e-3
        )
    squares = rows.squared_sum()[: expected[0].numel()].double()
    assert float((squares - expected.square().sum(0).flatten()).norm()) <= 1e-5 * float(expected.square().sum(0).norm())


class Views(nn.Module):
    """Images of an example are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(0, 1)).mean((2, 3)).unflatten(0, (len(x), -1)).mean(1))


class Copies(TorchDispatchMode):
    """Entries of the largest tensor that was copied."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_):
            self.largest = max(self.largest, found.numel())
        return found


@pytest.mark.parametrize("structure", ["diagonal", "full"])
@pytest.mark.parametrize("params", [None, ["body.0.weight", "body.2.weight", "body.2.bias"]], ids=["all", "some"])
def test_build__of_views_copies_no_gradient_of_a_layer(structure: str, params: list[str] | None) -> None:
    torch.manual_seed(0)
    model, x, y = Views().eval(), torch.randn(5, 6, 3, 40, 40), torch.tensor([0, 2, -100, 1, 1])
    chosen = {name: p for name, p in model.named_parameters() if params is None or name in params}
    fk.EmpiricalFisher(model, (x, y), structure=structure, params=params)  # what a first build looks at, it may copy
    with Copies() as copies:
        fisher = fk.EmpiricalFisher(model, (x, y), structure=structure, params=params)
    assert copies.largest <= x.numel()  # which a model may write to
    double, rows = copy.deepcopy(model).double(), []
    own = [dict(double.named_parameters())[name] for name in chosen]
    for n in (0, 1, 3, 4):
        loss = nn.functional.cross_entropy(double(x[n : n + 1].double()), y[n : n + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, own)]))
    j = torch.stack(rows)
    assert float((fisher.diagonal() - j.square().mean(0)).norm() / j.square().mean(0).norm()) < 1e-5
    u = torch.randn(j.shape[1], generator=torch.Generator().manual_seed(1))
    if structure == "full":
        expected = j.T @ (j @ u.double()) / 4
        assert float((fisher.matvec(u) - expected).norm() / expected.norm()) < 1e-5
