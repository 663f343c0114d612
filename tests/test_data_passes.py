"""Every pass over the data sees the same examples in the same order, and the sampled kind draws the same labels."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

import fisherkit as fk
from fisherkit.kinds import KINDS
from tests.small_data import DATASET, N, X, Y, cut, mlp, normal, same, seeded


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Noise on every example, of a library's global generator."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + self.draw(), Y[index]


SHUFFLED: dict[str, Callable[[], DataLoader[Any]]] = {
    "global generator": lambda: DataLoader(DATASET, 3, shuffle=True),
    "loader's generator": lambda: DataLoader(DATASET, 3, shuffle=True, generator=seeded()),
    "sampler's generator": lambda: DataLoader(DATASET, 3, sampler=RandomSampler(DATASET, generator=seeded())),
    "batch sampler's generator": lambda: DataLoader(
        DATASET, batch_sampler=BatchSampler(RandomSampler(DATASET, generator=seeded()), 3, drop_last=False)
    ),
    "torch augmentation": lambda: DataLoader(Augmented(lambda: float(torch.rand(()))), 3, shuffle=True),
    "NumPy augmentation": lambda: DataLoader(Augmented(lambda: float(np.random.rand())), 3),  # noqa: NPY002  global
    "Python augmentation": lambda: DataLoader(Augmented(random.random), 3),
}


@pytest.mark.parametrize("name", SHUFFLED)
def test_order__of_a_shuffling_loader_is_the_same_in_every_pass(name: str) -> None:
    """SampledFisher's draws belong to places in the data: another order in the next pass would be another matrix."""
    streamed = fk.SampledFisher(mlp(), SHUFFLED[name](), draws=2, memory_budget=1)
    v = normal(streamed.size, 2, seed=5)
    first = streamed @ v
    torch.rand(3)  # the user's own draws between two products
    assert torch.equal(streamed @ v, first)
    same((v * first).sum(0), streamed.quadratic_form(v))
    same(streamed.diagonal().sum(), streamed.trace())


@pytest.mark.parametrize("kind", KINDS)
def test_order__streamed_products_equal_stored_ones(kind: str) -> None:
    state = torch.get_rng_state()
    stored = KINDS[kind](mlp(), SHUFFLED["global generator"]())
    torch.set_rng_state(state)
    streamed = KINDS[kind](mlp(), SHUFFLED["global generator"](), memory_budget=1)
    v = normal(stored.size, 3, seed=5)
    same(streamed @ v, stored @ v)
    same(streamed.diagonal(), stored.diagonal())
    same(streamed.trace(), stored.trace())
    # Streamed rows are solved by conjugate gradients, with a relative residual of 1e-6.
    torch.testing.assert_close(streamed.solve(v, 0.1, tolerance=1e-12), stored.solve(v, 0.1), rtol=1e-7, atol=1e-9)


# -- draws -------------------------------------------------------------------------------------------------------------

SPLITS = [(7,), (1, 6), (3, 4), (2, 2, 2, 1), (1,) * 7]


def sampled(data: Any = (X, Y), **options: Any) -> Tensor:
    return fk.SampledFisher(mlp(), data, **{"draws": 2, **options}).to_dense()


@pytest.mark.parametrize(
    ("likelihood", "split"),
    [*(("categorical", split) for split in SPLITS), ("gaussian", (3, 4)), ("bernoulli", (2, 2, 2, 1))], ids=str,
)  # fmt: skip
def test_draws__do_not_depend_on_how_the_data_is_cut(likelihood: str, split: tuple[int, ...]) -> None:
    whole = sampled((X, None), likelihood=likelihood, seed=4)
    parts = [(x, None) for x, _ in cut(*split)]
    same(sampled(parts, likelihood=likelihood, seed=4), whole)
    same(sampled(parts, likelihood=likelihood, seed=4, chunk_size=2), whole)


def test_draws__of_positions_do_not_depend_on_how_the_data_is_cut() -> None:
    x, y = normal(5, 3, 4), torch.tensor([[0, 1, 2]] * 5)
    y[0, 1], y[2] = -100, -100
    for example in ("sequence", "token"):
        whole = sampled((x, y), example=example)
        same(sampled([(x[:1], y[:1]), (x[1:3], y[1:3]), (x[3:], y[3:])], example=example, chunk_size=1), whole)


def test_draws__follow_the_seed_alone() -> None:
    first = sampled(seed=1)
    torch.manual_seed(99)
    assert torch.equal(sampled(seed=1), first)
    assert torch.equal(sampled(), sampled(seed=0))
    different = [sampled(seed=seed) for seed in (0, 1, 2, -1, 1 << 40, -(1 << 70) - 5)]
    for i, a in enumerate(different):
        assert all(not torch.allclose(a, b) for b in different[:i]), i


def test_draws__more_of_them_do_not_repeat_the_first() -> None:
    one, many = sampled(draws=1), sampled(draws=64)
    exact = fk.ExactFisher(mlp(), (X, Y)).to_dense()
    assert (many - exact).norm() < 0.5 * (one - exact).norm()


def test_draws__a_generator_gives_the_seed_and_moves_on_once() -> None:
    a, b = seeded(), seeded()
    first, second = sampled(generator=a), sampled(generator=a)
    assert not torch.allclose(first, second)
    assert torch.equal(sampled(generator=b), first)
    assert torch.equal(a.get_state(), b.get_state()) is False
    sampled(generator=b)
    assert torch.equal(a.get_state(), b.get_state())


def test_draws__are_the_same_in_every_pass() -> None:
    streamed = fk.SampledFisher(mlp(), cut(3, 4), draws=3, seed=2, memory_budget=1)
    stored = fk.SampledFisher(mlp(), cut(2, 5), draws=3, seed=2)
    v = normal(stored.size, seed=5)
    for _ in range(3):
        same(streamed @ v, stored @ v)
    for structure in ("block", "diagonal"):
        other = fk.SampledFisher(mlp(), cut(6, 1), draws=3, seed=2, structure=structure)
        same(other.diagonal(), stored.diagonal())


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_draws__kronecker_factors_see_one_draw_in_both_passes(structure: str) -> None:
    fishers = [fk.SampledFisher(mlp(), data, draws=2, seed=6, structure=structure) for data in ((X, Y), cut(1, 6))]
    same(fishers[0].to_dense(), fishers[1].to_dense())
    full = fk.SampledFisher(mlp(), (X, Y), draws=2, seed=6)
    if structure == "ekfac":
        same(fishers[0].trace(), full.trace())


@pytest.mark.parametrize("structure", ["full", "diagonal", "kfac"])
def test_first_batch_of_one_example_counts_once_in_every_pass(structure: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(6, 3).double(), torch.randint(2, (6,))
    batches = [(x[:1], y[:1]), (x[1:], y[1:])]
    whole = fk.EmpiricalFisher(model, (x, y), structure=structure)
    v = torch.randn(whole.size, dtype=torch.float64)
    for _ in range(2):  # the second build knows the model
        torch.testing.assert_close(fk.EmpiricalFisher(model, batches, structure=structure) @ v, whole @ v)
