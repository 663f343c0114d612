"""The Gram matrix is made once, with usual damping and without any rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fisherkit as fk
from fisherkit.operators import FisherOperator, low_rank, unwrap, usual_damping
from fisherkit.rows.collection import Rows
from tests.small_data import X, Y, mlp, same

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


# -- the damping that suits a structure --------------------------------------------------------------------------------


USUAL = {"full": 1.0, "block": 1.0, "kfac": 0.1, "ekfac": 0.1, "diagonal": 0.01}


def measured(structure: str) -> FisherOperator:
    return fk.ExactFisher(mlp(), (X, Y), structure=structure)


@pytest.mark.parametrize(("structure", "scale"), USUAL.items())
def test_usual_damping__is_the_structure_s_also_from_a_file(structure: str, scale: float, tmp_path: Path) -> None:
    found = measured(structure)
    found.save(tmp_path / "f.safetensors")
    for operator in (found, unwrap(found), 3.0 * found, fk.load(tmp_path / "f.safetensors")):
        assert usual_damping(operator) == fk.RelativeDamping(scale)


def test_usual_damping__looks_into_sums_and_blocks() -> None:
    kfac, ekfac, full, diagonal = (measured(s) for s in ("kfac", "ekfac", "full", "diagonal"))
    for total, scale in [
        (kfac + ekfac, 0.1), (full + kfac, 0.1), (0.5 * (diagonal + ekfac), 0.1), (full + diagonal, 1.0),
        (full + full, 1.0), (diagonal + diagonal, 0.01),
    ]:  # fmt: skip
        assert usual_damping(total).scale == scale
    norms = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    mixed = fk.ExactFisher(norms, (X, Y), structure="kfac")
    assert {entry.structure for entry in mixed.coverage().entries} == {"kfac", "exact block"}
    assert usual_damping(mixed).scale == 0.1
    bare = fk.ExactFisher(norms, (X, Y), structure="kfac", params=["1.weight", "1.bias"])
    assert usual_damping(bare).scale == 1.0
    assert usual_damping(fk.ExactFisher(mlp(), (X, Y), memory_budget=500)).scale == 1.0


@pytest.mark.parametrize("structure", USUAL)
def test_scores__take_the_usual_damping_unless_told(structure: str) -> None:
    found, model = measured(structure), mlp()
    mean = float(found.trace()) / found.size
    default = fk.influence.InfluenceScores(found, model)
    assert default.damping == pytest.approx(USUAL[structure] * mean)
    told = fk.influence.InfluenceScores(found, model, damping=fk.RelativeDamping(USUAL[structure]))
    same(default.scores((X, Y), (X, Y)), told.scores((X, Y), (X, Y)))
    for damping, number in ((fk.RelativeDamping(2.0), 2 * mean), (0.25, 0.25)):
        other = fk.influence.InfluenceScores(found, model, damping=damping)
        assert other.damping == pytest.approx(number)
        assert not torch.allclose(other.scores((X, Y), (X, Y)), default.scores((X, Y), (X, Y)))


# -- a Fisher without any row is the zero matrix -----------------------------------------------------------------------


LAMBDA = 1e-2
STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")


def sure() -> tuple[nn.Module, Tensor, Tensor]:
    """A model so sure and right that no vector of the truncated kind is a number above zero."""
    model = nn.Linear(1, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-900.0], [900.0]]))
        model.bias.zero_()
    return model, torch.ones(4, 1).double(), torch.ones(4).long()


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.1}], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_rows__is_the_zero_matrix(structure: str, options: dict[str, float], tmp_path: Path) -> None:
    model, x, y = sure()
    fisher = fk.TruncatedFisher(model, (x, y), structure=structure, **options)
    v = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert fisher.rows == 0
    assert float(fisher.trace()) == 0
    fisher.save(tmp_path / "f")
    for operator in (fisher, fk.load(tmp_path / "f"), fisher + fisher):
        torch.testing.assert_close(operator.solve(v, damping=LAMBDA), v / LAMBDA)
        assert not bool((operator @ v).any())
    inverse = fisher.factorize(damping=LAMBDA)
    torch.testing.assert_close(inverse.logdet(), 4 * torch.tensor(LAMBDA, dtype=torch.float64).log())
    assert inverse.sample(torch.Generator().manual_seed(0)).shape == (4,)
    with pytest.raises(fk.SingularMatrixError):
        fisher.factorize(damping=0.0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_rows__influence_is_the_gradients_product_over_lambda(structure: str) -> None:
    model, x, y = sure()
    fisher = fk.TruncatedFisher(model, (x, y), structure=structure)
    found = fk.influence.InfluenceScores(fisher, model, damping=LAMBDA).scores((x[:2], 0 * y[:2]), (x, 0 * y))
    # The gradient at the wrong label is (-1, 1) for the weights, as x = 1, and for the bias.
    torch.testing.assert_close(found, torch.full_like(found, 4.0 / LAMBDA / 4))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_rows__a_step_is_the_gradient_over_lambda(structure: str) -> None:
    model, x, y = sure()
    optimizer = fk.optim.NaturalGradient(model, lr=1.0, kind="truncated", damping=LAMBDA, structure=structure)
    nn.functional.cross_entropy(model(x), y).backward()
    before = model.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before)
