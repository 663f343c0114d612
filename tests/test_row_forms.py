"""rᵀ(F + λI)⁻¹r' in sample space and by solved columns: the same numbers, chosen by a count of operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.data import Source
from fisherkit.influence import InfluenceScores
from fisherkit.operators.factorization import BlockProducts, SolvedProducts
from fisherkit.operators.kronecker import EigenProducts
from fisherkit.operators.low_rank import GramProducts
from fisherkit.rows.base import StoredRows, aligned_product
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.problem import Problem
from fisherkit.rows.verified import plan_for
from fisherkit.vectors import EmpiricalVectors
from tests.axes import pairwise
from tests.conformance_cases import build, problem
from tests.influence_cases import data
from tests.small_data import X, Y, mlp, same

FAMILIES = ("mlp", "conv2d", "linear_3d", "embedding", "hf_conv1d", "token_attention", "tied_linears")


def loss_rows(family: str, *, lean: bool) -> Rows:
    """∂ℓ/∂θ of a family's examples."""
    of = problem(family)
    source = Source(data(of))
    plan = plan_for(of.model, fk.ParameterSpace.of(of.model, of.params), source.first())
    made = Problem(
        plan, source, fk.likelihoods.resolve(of.likelihood), EmpiricalVectors(), False, False, None, False
    ).measured()  # fmt: skip
    made.choose(lean=lean)
    return next(iter(made.batches("rows"))).rows


def written_out(rows: Rows) -> Rows:
    """The same, no unit factored."""
    return Rows(rows.space, [UnitSlot(slot.names, StoredRows(slot.rows.dense())) for slot in rows.slots])


def forms(family: str, kind: str) -> tuple[GramProducts, SolvedProducts, Tensor]:
    """Both forms of a full Fisher, and (F + λI)⁻¹."""
    fisher = build(family, kind, "full")
    inverse: Any = fisher.factorize(fk.RelativeDamping(0.3))
    dense = fisher.to_dense()
    expected = torch.linalg.inv(dense + inverse.damping * torch.eye(fisher.size, dtype=dense.dtype))
    return inverse._gram_products, SolvedProducts(inverse._solve_rows, fisher.size), expected


@pytest.mark.parametrize("kind", ["ef", "sf5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_primal_and_dual__agree_whatever_way_rows_are_kept(family: str, kind: str) -> None:
    gram, solved, inverse = forms(family, kind)
    lean, fast = loss_rows(family, lean=True), loss_rows(family, lean=False)
    dense = fast.dense()
    for queries in (lean, fast, written_out(lean)):
        for form in (gram, solved):
            solution = form.solve(queries)
            for rows in (lean, fast, written_out(fast)):
                same(solution.products(rows).to(dense.dtype), dense @ inverse @ dense.T)
                parts = dict(solution.parts(rows))
                assert list(parts) == [slot.names for slot in rows.slots]
                same(torch.stack(list(parts.values())).sum(0), dense @ inverse @ dense.T)
    same(gram.squares(lean), (dense @ inverse * dense).sum(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_weighted_squares__are_those_of_the_rows_written_out(family: str) -> None:
    for lean in (True, False):
        rows = loss_rows(family, lean=lean)
        weights = torch.rand(rows.space.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        same(rows.weighted_squares(weights), rows.dense().square() @ weights)
        same(rows.some(slice(1, 3)).dense(), rows.dense()[1:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("damping", [1e-6, 1.0])
def test_sample_space__is_accurate_where_differences_cancel(dtype: torch.dtype, damping: float) -> None:
    exact = scores_of(torch.float64, dtype, damping)
    found = scores_of(dtype, dtype, damping)
    scale = exact.abs().max()
    # Rounding of the rows themselves, seen through the inverse, is not the form's to undo.
    assert float((found.double() - exact).abs().max() / scale) < {torch.float32: 2e-3, torch.bfloat16: 0.5}[dtype]


def scores_of(dtype: torch.dtype, rounded: torch.dtype, damping: float) -> Tensor:
    """Scores of a network whose weights and data are exact in a shorter dtype, computed in a longer one."""
    x = X.to(rounded).to(dtype)
    model = mlp().to(rounded).to(dtype)
    fisher = fk.EmpiricalFisher(model, (x, Y))
    return InfluenceScores(fisher, model, damping=fk.RelativeDamping(damping)).scores((x[:3] + 1, Y[:3]), (x, Y))


@pytest.mark.parametrize(("family", "method", "turned"), pairwise(FAMILIES, ["kfac", "ekfac"], [True, False]))
def test_turned_rows__give_what_solved_columns_do(
    family: str, method: str, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inverse: Any = build(family, "ef", method).factorize(fk.RelativeDamping(0.3))
    lean, fast = loss_rows(family, lean=True), loss_rows(family, lean=False)
    expected = fast.dense() @ inverse._solve(fast.dense().mT)
    monkeypatch.setattr(EigenProducts, "worthwhile", lambda *_: turned)
    for probe in (lean, fast):
        form = inverse._row_products(probe, 1, 1)
        for queries, rows in itertools.product((lean, fast, written_out(lean)), repeat=2):
            same(form.solve(queries).products(rows), expected.mT)
    same(inverse._row_squares(lean), expected.diagonal())


def test_turned_rows__are_exact_where_bases_leave_something_out() -> None:
    model, x, y = wide()
    fisher = fk.EmpiricalFisher(model.double(), (x.double(), y), structure="ekfac")
    assert any(block._null for block in fisher.held.blocks)  # type: ignore[attr-defined]
    inverse: Any = fisher.factorize(fk.RelativeDamping(1.0))
    rows = fk.EmpiricalFisher(model, (x.double(), y)).held.row_source  # type: ignore[attr-defined]
    expected = rows.dense() @ inverse._solve(rows.dense().mT)
    form = inverse._row_products(rows, 1_000_000, 1)
    assert [type(part) for _, part in form._parts] == [EigenProducts] * 2
    same(form.solve(rows).products(rows), expected)
    back = inverse._row_products(rows, 1, 1_000_000)
    assert [type(part) for _, part in back._parts] == [SolvedProducts] * 2
    same(back.solve(rows).products(rows), expected)
    same(inverse._row_squares(rows), expected.diagonal())
    # Rows of other examples lie in part where the bases have nothing, which is divided by λ.
    others = fk.EmpiricalFisher(model, (x.double().flip(0) + x.double().roll(1, 1), y)).held.row_source  # type: ignore[attr-defined]
    outside = others.dense() @ inverse._solve(others.dense().mT)
    same(form.solve(others).products(others), outside)
    same(inverse._row_squares(others), outside.diagonal())


def wide() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        return model, torch.randn(50, 64), torch.randint(10, (50,))


def test_the_form__is_the_one_with_fewer_operations() -> None:
    model, x, y = wide()
    fisher = fk.EmpiricalFisher(model, (x, y))
    inverse = fisher.factorize(1e-2)
    probe = fisher.held.row_source  # type: ignore[attr-defined]
    assert isinstance(inverse._row_products(probe, queries=1, others=1_000_000), SolvedProducts)
    assert isinstance(inverse._row_products(probe, queries=1_000, others=1_000), GramProducts)
    blocks = fk.EmpiricalFisher(model, (x, y), structure="block").factorize(1e-2)
    assert isinstance(blocks._row_products(probe, queries=1_000, others=1_000), BlockProducts)


def test_sample_space__never_writes_a_row_over_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = wide()
    fisher = fk.EmpiricalFisher(model, (x, y))
    influence = InfluenceScores(fisher, model)
    with no_dense_rows(monkeypatch):
        influence.scores((x, y), (x, y))
        influence.self_influence((x, y))
    kfac = InfluenceScores(fk.EmpiricalFisher(model, (x, y), structure="ekfac"), model)
    with no_dense_rows(monkeypatch):
        kfac.self_influence((x, y))


@contextmanager
def no_dense_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refused(_: Any) -> Tensor:
        raise AssertionError("rows written out")

    with monkeypatch.context() as patch:
        for kind in (FactoredRows, Rows):
            patch.setattr(kind, "dense", refused)
        yield


def test_blocks_that_cut_a_layer__are_solved_whole() -> None:
    model = mlp()
    matrix = fk.EmpiricalFisher(model, (X, Y), structure="diagonal").diagonal()
    space = fk.ParameterSpace.of(model)
    each = [
        fk.operators.DiagonalOperator(space.restrict([name]), matrix[space.slices[name]].clone())
        for name in space.names
    ]
    operator = fk.operators.BlockDiagonalOperator(space, each)
    cut = InfluenceScores(operator, model, likelihood="categorical", examples=7)
    whole = InfluenceScores(fk.EmpiricalFisher(model, (X, Y), structure="diagonal"), model)
    same(cut.scores((X, Y), (X, Y)), whole.scores((X, Y), (X, Y)))
    same(cut.self_influence((X, Y)), whole.self_influence((X, Y)))


@pytest.mark.parametrize("kind", ["ef", "exact"])
def test_streamed_rows_and_sums__are_solved_iteratively(kind: str) -> None:
    model = mlp()
    kinds = {"ef": fk.EmpiricalFisher, "exact": fk.ExactFisher}
    full = kinds[kind](model, (X, Y))
    streamed = kinds[kind](model, (X, Y), memory_budget=1)
    found, expected = (InfluenceScores(f, model, damping=0.1) for f in (streamed, full))
    torch.testing.assert_close(found.scores((X, Y), (X, Y)), expected.scores((X, Y), (X, Y)), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.self_influence((X, Y)), expected.self_influence((X, Y)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("m", "k"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_gram__of_rows_ordered_by_example_has_the_bytes_of_listed_ones(m: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def made(n: int, each: int) -> tuple[FactoredRows, FactoredRows]:
        a, g = (torch.randn(size, 1, width, generator=generator) for size, width in ((n, 4), (n * each, 3)))
        listed = torch.arange(n).repeat_interleave(each)
        return FactoredRows(a, g, bias=True), FactoredRows(a, g, listed, bias=True)

    (left, left_listed), (right, right_listed) = made(5, m), made(7, k)
    expected = left.double().dense() @ right.double().dense().mT
    for mine, theirs in ((left, right), (left, right_listed), (left_listed, right), (left_listed, right_listed)):
        torch.testing.assert_close(mine.double().gram(theirs.double()), expected)
        assert torch.equal(mine.gram(theirs), left_listed.gram(right_listed))
    assert torch.equal(left.gram(left), left_listed.gram(left_listed))


def test_written_out_rows__meet_factors_as_they_meet_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    a, g = torch.randn(90, 5, 300, generator=generator), torch.randn(90, 5, 40, generator=generator)
    factors = FactoredRows(1 + 0.01 * a, 1 + 0.01 * g, bias=True)
    rows = StoredRows(factors.dense())
    space = fk.ParameterSpace.of(nn.Linear(300, 40))
    mine, theirs = (Rows(space, [UnitSlot(space.names, unit)]) for unit in (rows, factors))
    # Sums of 12,000 terms of one sign: in one float32 sum their error would be larger than between written out rows.
    assert torch.equal(mine.cross_gram(theirs, precise=False), rows.gram(StoredRows(factors.dense()), precise=False))
    assert torch.equal(theirs.written_out().cross_gram(mine, precise=True), rows.gram(rows, precise=True))


@pytest.mark.parametrize("columns", [10, 64, 257])
def test_aligned_product__is_the_product(columns: int) -> None:
    x, u = torch.randn(3, 50, 20, dtype=torch.float64), torch.randn(20, columns, dtype=torch.float64)
    found = aligned_product(x, u)
    assert found.shape == (3, 50, columns)
    torch.testing.assert_close(found, torch.einsum("abc,cd->abd", x, u))


def test_a_block_diagonal__solves_one_block_at_a_time_and_keeps_all_solutions() -> None:
    model, x, y = wide()
    inverse = fk.EmpiricalFisher(model, (x, y), structure="kfac").factorize(1e-2)
    probe = fk.EmpiricalFisher(model, (x, y)).held.row_source  # type: ignore[attr-defined]
    form = inverse._row_products(probe, queries=1, others=1_000_000)
    first, last = 64 * 65, 10 * 65
    assert (form.held, form.passing) == (first + last, 3 * first)
