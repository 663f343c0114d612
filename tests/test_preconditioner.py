"""A sample of the rows as preconditioner: it changes how fast conjugate gradients are, never what they find."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.data import Source
from fisherkit.operators import unwrap
from fisherkit.operators.low_rank import FEWEST, MOST, LowRankOperator, SampledInverse, sample_stride
from fisherkit.rows.streamed import every_kth, every_kth_example
from fisherkit.solvers import conjugate_gradient
from tests.small_data import normal

N = 1200


def data() -> tuple[Tensor, Tensor]:
    """Inputs of decaying variance, sorted by label, as files often are."""
    x = normal(N, 20, seed=3) * torch.logspace(0, -2, 20, dtype=torch.float64)
    y = torch.arange(N) * 5 // N
    return x + normal(5, 20, seed=4)[y], y


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 5)).double()


def cut(size: int) -> list[tuple[Tensor, Tensor]]:
    x, y = data()
    return list(zip(x.split(size), y.split(size), strict=True))


def low_rank(fisher: Any) -> LowRankOperator:
    operator = unwrap(fisher)
    assert isinstance(operator, LowRankOperator)
    return operator


@pytest.mark.parametrize("kind", [fk.EmpiricalFisher, fk.ExactFisher])
def test_sample__makes_streamed_solves_take_fewer_steps(kind: Any) -> None:
    stored, streamed = (kind(model(), cut(600), memory_budget=budget) for budget in (None, 500_000))
    v = fk.evaluation.loss_gradient(model(), cut(600))
    damping = float(stored.trace()) / stored.size
    x, info = streamed.solve(v, damping, return_info=True, tolerance=1e-6)
    assert info.converged
    torch.testing.assert_close(x, stored.solve(v, damping), rtol=1e-3, atol=1e-4 * float(x.abs().max()))
    _, without = conjugate_gradient(stored._matmat, v.unsqueeze(1), damping=damping, tolerance=1e-6)
    assert info.steps < 0.7 * without.steps


def test_sample__is_positive_definite_and_the_inverse_of_its_fisher() -> None:
    fisher = low_rank(fk.EmpiricalFisher(model(), cut(100)))
    sample = every_kth(fisher.row_source, 20)  # type: ignore[arg-type]
    inverse = SampledInverse(sample, 1 / sample.count, 1e-3)
    dense = LowRankOperator(sample, 1 / sample.count, dtype=torch.float64, device=torch.device("cpu")).to_dense()
    eye = torch.eye(fisher.size, dtype=torch.float64)
    expected = inverse.damping * torch.linalg.inv(dense + inverse.damping * eye)
    found = inverse(eye)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert float(torch.linalg.eigvalsh(found).min()) > 0


def test_sample__of_streamed_rows_is_that_of_stored_ones() -> None:
    stored, streamed = (low_rank(fk.EmpiricalFisher(model(), cut(50), memory_budget=b)) for b in (None, 1))
    a, b = (every_kth(source.row_source, 9) for source in (stored, streamed))  # type: ignore[arg-type]
    assert a.count == b.count == -(-N // 9)
    torch.testing.assert_close(a.dense(), b.dense())


@pytest.mark.parametrize("size", [1, 7, 100, N])
def test_every_kth__data_has_the_same_examples_however_it_is_cut(size: int) -> None:
    taken = torch.cat([batch.targets for batch in every_kth_example(Source(cut(size)), 7)])  # type: ignore[misc]
    assert torch.equal(taken, data()[1][::7])


def test_every_kth__rows_that_share_examples_keep_only_the_examples_they_need() -> None:
    rows = low_rank(fk.ExactFisher(model(), cut(100))).row_source
    few = every_kth(rows, 10)  # type: ignore[arg-type]
    torch.testing.assert_close(few.dense(), rows.dense()[::10])  # type: ignore[attr-defined]
    apart = every_kth(rows, 400)  # type: ignore[arg-type]
    assert apart.nbytes < 0.02 * rows.nbytes  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        ((50_000, 1_000_000, 13_000.0, 200_000_000), MOST),
        ((50_000, 1_000_000, 13_000.0, 20_000_000), 613),  # 32 · 613² + 13,000 · 613 = 20 MB
        ((2_000, 1_000_000, 13_000.0, 200_000_000), 100),
        ((500, 1_000_000, 13_000.0, 200_000_000), None),  # a twentieth is too few
        ((50_000, 60, 100.0, 200_000_000), None),  # as many as there are parameters
        ((50_000, 1_000_000, 13_000.0, 1), None),
    ],
)
def test_stride__keeps_within_budget_share_and_size(arguments: Any, taken: int | None) -> None:
    stride = sample_stride(*arguments)
    if taken is None:
        assert stride is None
    else:
        assert stride is not None
        rows = -(-arguments[0] // stride)
        assert 0.8 * taken <= rows <= taken
        assert 32 * rows**2 + arguments[2] * rows <= arguments[3]
        assert rows >= FEWEST


def test_without_room_for_a_sample__fewer_rows_than_parameters_go_without() -> None:
    """The diagonal would tear the null space, which has the one eigenvalue λ, apart."""
    few = low_rank(fk.EmpiricalFisher(model(), cut(100)[:2], memory_budget=1))
    assert few.row_source.count < few.size
    assert few._approximate_inverse(0.1) is None
    many = low_rank(fk.ExactFisher(model(), cut(100), memory_budget=1))
    assert many.row_source.count > many.size
    assert many._approximate_inverse(0.1) is not None
