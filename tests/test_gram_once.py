"""Inverses by Woodbury's identity: the Gram that is asked for is the one that is made, once, and no number changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fisherkit as fk
from fisherkit.operators import low_rank
from fisherkit.rows.collection import Rows

N = 300
DAMPINGS = {
    "corrected": fk.RelativeDamping(0.03),
    "precise": fk.RelativeDamping(1e-3),
    "uncorrected": fk.RelativeDamping(1e3),
}


def case(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 32), nn.GELU(), nn.Linear(32, 5)).to(dtype)
    return model, (torch.randn(N, 40, dtype=dtype), torch.randint(5, (N,)))


def fisher(dtype: torch.dtype = torch.float32) -> tuple[fk.TruncatedFisher, nn.Module, tuple[Tensor, Tensor]]:
    model, data = case(dtype)
    return fk.TruncatedFisher(model, data, rank=2), model, data


@contextmanager
def eagerly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything at construction, by the Gram for solves."""
    with monkeypatch.context() as patch:
        patch.setattr(low_rank, "MANY", 1 << 40)
        yield


def made(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[bool]:
    """Whether in float64, for every Gram that a call makes."""
    found: list[bool] = []
    original = Rows.cross_gram

    def gram(rows: Rows, other: Rows, precise: bool = True) -> Tensor:
        found.extend([precise] if other is rows else [])
        return original(rows, other, precise)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "cross_gram", gram)
        run()
    return found


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_scores__take_one_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    f, model, data = fisher()

    def scores() -> None:
        fk.influence.InfluenceScores(f, model, damping=DAMPINGS["corrected"]).scores(data, data)

    assert made(monkeypatch, scores) == [True]
    once = flops(scores)
    with eagerly(monkeypatch):
        assert made(monkeypatch, scores) == [False, True]
        twice = flops(scores)
    # A Gram is two products for each layer: the N inputs', the R = 2N output gradients'; three quarters of it are made.
    # Some of its rows remain.
    inputs, outputs, rows = 40 + 32, 32 + 5, 2 * N
    gram = 0.75 * 2 * (N**2 * inputs + rows**2 * outputs)
    taken = rows // (rows // low_rank.PILOT) + 1
    pilot = 2 * taken * (N * inputs + rows * outputs)
    assert twice - once == pytest.approx(gram - pilot, abs=pilot)
    assert pilot < 0.1 * gram


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_scores_and_solves__have_the_bits_of_those_made_at_construction(
    monkeypatch: pytest.MonkeyPatch, damping: str, dtype: torch.dtype
) -> None:
    f, model, data = fisher(dtype)
    v = torch.randn(f.size, 2, dtype=dtype, generator=torch.Generator().manual_seed(1))

    def results() -> list[Tensor]:
        influence = fk.influence.InfluenceScores(f, model, damping=DAMPINGS[damping])
        few = tuple(part[:1] for part in data)
        found = [influence.scores(data, data), influence.self_influence(data), influence.scores(few, data)]
        inverse = f.factorize(DAMPINGS[damping])
        return [*found, inverse @ v, inverse.logdet()]

    lazily = results()
    with eagerly(monkeypatch):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(lazily, results(), strict=True))
    matrix = f.to_dense().double() + f.factorize(DAMPINGS[damping]).damping * torch.eye(f.size, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, v.double())
    assert float((lazily[3] - expected).norm() / expected.norm()) < 2e-3


def test_solves__take_one_gram_more_only_where_float32_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    f, _, _ = fisher()
    v = torch.ones(f.size)
    assert made(monkeypatch, lambda: f.solve(v, damping=DAMPINGS["corrected"])) == [False]
    assert made(monkeypatch, lambda: f.solve(v, damping=DAMPINGS["precise"])) == [True]
    with eagerly(monkeypatch):  # too few rows to ask some of them first
        assert made(monkeypatch, lambda: f.solve(v, damping=DAMPINGS["precise"])) == [False, True]
    double, _, _ = fisher(torch.float64)
    assert made(monkeypatch, lambda: double.solve(v.double(), damping=fk.RelativeDamping(1e-13))) == [False]


def test_factorize__an_inverse_that_does_not_exist_is_refused_at_once() -> None:
    model, (x, y) = case()
    twice = (torch.cat([x, x]), torch.cat([y, y]))
    f = fk.EmpiricalFisher(model, twice)
    with pytest.raises(fk.SingularMatrixError, match="below rounding"):
        f.factorize(1e-22)
    with pytest.raises(fk.SingularMatrixError, match="below rounding"):
        fk.influence.InfluenceScores(f, model, damping=1e-22)


def test_scores__of_a_gram_that_float32_made_indefinite(monkeypatch: pytest.MonkeyPatch) -> None:
    f, _, _ = fisher()
    inverse: Any = f.factorize(DAMPINGS["corrected"])
    expected = f.factorize(DAMPINGS["precise"])._precise_gram.factor  # type: ignore[attr-defined]
    assert expected.shape == (2 * N, 2 * N)
    assert inverse._later
    v = torch.ones(f.size)
    solved = inverse @ v
    original = Rows.cross_gram

    def gram(rows: Rows, other: Rows, precise: bool = True) -> Tensor:
        found = original(rows, other, precise)
        return -found if other is rows and not precise else found

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "cross_gram", gram)
        fallen_back = f.factorize(DAMPINGS["corrected"]) @ v
    torch.testing.assert_close(fallen_back, solved, rtol=1e-3, atol=1e-3 * float(solved.abs().max()))
