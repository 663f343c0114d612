"""Approximate scores: exact at full size, seeded, with the error that they have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.influence import InfluenceScores, LowRankQueries
from fisherkit.influence.blocks import KeptBlocks, RowBlock
from fisherkit.operators.factorization import SolvedProducts
from fisherkit.operators.kronecker import EigenKroneckerOperator
from tests.conformance_cases import build, problem
from tests.influence_cases import data
from tests.small_data import F64, X, Y, mlp, same

Data = tuple[Tensor, Tensor]


def larger(structure: str) -> tuple[InfluenceScores, Data, Data]:
    """A network with layers worth compressing."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 48), nn.Tanh(), nn.Linear(48, 44), nn.Tanh(), nn.Linear(44, 5)).double()
    x, y = torch.randn(300, 40, generator=generator, dtype=F64), torch.arange(300) % 5
    fisher = fk.EmpiricalFisher(model, (x, y), structure=structure)
    return InfluenceScores(fisher, model), (x[:20] + 0.1, y[:20]), (x, y)


@pytest.mark.parametrize("structure", ["full", "diagonal", "ekfac"])
def test_full_rank__is_exact(structure: str) -> None:
    scores, queries, train = larger(structure)
    found = scores.approximate_scores(queries, train, LowRankQueries(64))
    same(found.scores, scores.scores(queries, train))
    assert float(found.error.max()) < 1e-9
    assert found.checked >= 64


@pytest.mark.parametrize("family", ["conv2d", "token_mlp", "linear_3d", "embedding", "hf_conv1d", "mapping_batch"])
def test_every_layer__is_compressed_and_the_error_is_the_measured_one(family: str) -> None:
    of = problem(family)
    scores = InfluenceScores(build(family, "ef", "ekfac"), of.model)
    found = scores.approximate_scores(data(of), data(of), LowRankQueries(2))
    exact = scores.scores(data(of), data(of))
    same(found.error, ((found.scores - exact).norm(dim=1) / exact.norm(dim=1)).nan_to_num(0.0))


def test_queries_of_low_rank__are_nearly_exact_for_kfac_and_better_with_rank() -> None:
    scores, queries, train = larger("kfac")
    errors = [float(scores.approximate_scores(queries, train, LowRankQueries(r)).error.max()) for r in (2, 6, 20)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-5


def test_kronecker_solutions__are_compressed_in_the_eigenbasis(monkeypatch: pytest.MonkeyPatch) -> None:
    (scores, queries, train), approximation = larger("kfac"), LowRankQueries(4)
    found = scores.approximate_scores(queries, train, approximation)
    inverse: Any = scores._inverse
    with monkeypatch.context() as patch:
        # The same from solutions that are written out.
        patch.setattr(type(inverse), "_solve_rows", lambda self, rows: self._solve(rows.dense().mT))
        patch.setattr(
            type(inverse), "_unit_products", lambda self, _: SolvedProducts(self._solve_rows, self.operator.size)
        )
        expected = scores.approximate_scores(queries, train, approximation)
    exact = scores.scores(queries, train)  # their range finders start elsewhere
    assert max(float((both.scores - exact).norm() / exact.norm()) for both in (found, expected)) < 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(EigenKroneckerOperator, "_apply", None)
        scores.approximate_scores(queries, train, approximation)


@pytest.mark.parametrize(
    ("family", "structure", "budget"),
    [*itertools.product(["conv2d"], ["full", "block", "diagonal", "kfac", "ekfac"], [None, 1]),
     ("mlp", "kfac", 1), ("hf_conv1d", "ekfac", None)],
)  # fmt: skip
def test_queries_without_a_label_that_counts__score_0(family: str, structure: str, budget: int | None) -> None:
    of = problem(family)
    scores = InfluenceScores(build(family, "ef", structure), of.model, memory_budget=budget)
    x, y = data(of)
    ignored = torch.full_like(y, -100)
    ignored[1] = y[1]
    expected = scores.scores((x, ignored), (x, y))
    assert torch.equal(expected[[0, 2]], torch.zeros(2, len(y), dtype=F64))
    assert float(expected[1].abs().max()) > 0
    found = scores.approximate_scores((x, ignored), (x, y), LowRankQueries(64))
    same(found.scores, expected)
    assert torch.equal(found.error[[0, 2]], torch.zeros(2, dtype=F64))
    assert torch.equal(scores.scores((x[:1], ignored[:1]), (x, y)), torch.zeros(1, len(y), dtype=F64))


@pytest.mark.parametrize(("structure", "budget"), [("full", 30_000), ("full", 150_000), ("kfac", 1), ("kfac", 30_000)])
def test_queries_that_do_not_fit__are_taken_in_groups(
    structure: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores, (x, y), train = larger(structure)
    y = y.clone()
    y[0] = -100  # one without a row, and so without a number to tell what a query takes
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    expected = scores.approximate_scores((x, y), train, LowRankQueries(4))
    model = scores._model_rows.model
    small = InfluenceScores(fk.EmpiricalFisher(model, train, structure=structure), model, memory_budget=budget)
    rows, passes = small.prepare(train), []

    def counted(self: KeptBlocks) -> Iterator[RowBlock]:
        passes.append(0)
        return iter(self.blocks)

    monkeypatch.setattr(KeptBlocks, "__iter__", counted)
    found = small.approximate_scores(batches, rows, LowRankQueries(4))
    same(found.scores, expected.scores)
    same(found.error, expected.error)
    query = 8 * 4 * (48 + 41 + 44 + 49 + 5 + 45)  # bytes: both sides of three layers at rank 4
    assert found.checked == expected.checked == 75
    assert len(passes) == 1 + -(-20 // max(1, budget // 2 // query))  # one for the sample


def test_a_seed__decides_everything(tmp_path: Path) -> None:
    scores, queries, train = larger("full")
    first = scores.approximate_scores(queries, train, LowRankQueries(8, seed=3))
    state = torch.get_rng_state()
    again = scores.approximate_scores(queries, scores.prepare(train), LowRankQueries(8, seed=3))
    assert torch.equal(state, torch.get_rng_state())
    same(first.scores, again.scores)
    same(first.error, again.error)
    other = scores.approximate_scores(queries, train, LowRankQueries(8, seed=4))
    assert not torch.allclose(first.scores, other.scores)
    model = scores._model_rows.model
    small = InfluenceScores(fk.EmpiricalFisher(model, train), model, memory_budget=200_000)
    split = small.approximate_scores(queries, small.prepare(train, folder=tmp_path / "rows"), LowRankQueries(8, seed=3))
    same(first.scores, split.scores)


def test_bad_input__is_refused() -> None:
    model = mlp()
    scores = InfluenceScores(fk.EmpiricalFisher(model, (X, Y)), model)
    with pytest.raises(fk.InvalidTypeError, match="LowRankQueries"):
        scores.approximate_scores((X, Y), (X, Y), 3)  # type: ignore[arg-type]
    with pytest.raises(fk.InvalidArgumentError, match="checked=0"):
        scores.approximate_scores((X, Y), (X, Y), LowRankQueries(), checked=0)
    with pytest.raises(fk.InvalidArgumentError, match="rank=0"):
        LowRankQueries(0)
    with pytest.raises(fk.InvalidTypeError, match="seed of type float"):
        LowRankQueries(3, seed=0.5)  # type: ignore[arg-type]
