"""What rows of parameters without a rule cost: the cheaper of the two ways, within the memory budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.kinds import KINDS
from fisherkit.rows import generic, linearized, problem
from fisherkit.rows.verified import _KNOWN

F64 = torch.float64
N = 30


class Sequences(nn.Module):
    """A recurrent layer beside a parameter without a rule; notes the passes that are differentiated."""

    def __init__(self, layer: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.rnn, self.head = layer(3, 4, batch_first=True, **options), nn.Linear(4, 3)
            self.mix = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            PASSES.append(len(x))
        h = self.rnn(x)[0][:, -1]
        return self.head(h) + F.bilinear(h, h, self.mix)


PASSES: list[int] = []


class Scaled(nn.Module):
    """A parameter that no rule covers between two linear layers; shared positions before it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.mix, self.head = nn.Linear(3, 4), nn.Parameter(torch.ones(4, 4, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.head(F.bilinear(h, h, self.mix).tanh().mean(1))


def data(size: int = N, length: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, length, 3, generator=generator, dtype=F64)
    return x, torch.randint(3, (size,), generator=generator)


def rows_by_hand(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    found = []
    for n in range(len(x)):
        loss = F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(found)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("structure", ["full", "block", "diagonal"])
def test_loop__rows_are_those_of_single_examples(structure: str, layer: type[nn.RNNBase]) -> None:
    model, (x, y) = Sequences(layer, num_layers=2, bias=structure != "block").double(), data()
    rows = rows_by_hand(model, x, y)
    fisher = fk.EmpiricalFisher(model, [(x[:11], y[:11]), (x[11:], y[11:])], structure=structure)
    torch.testing.assert_close(fisher.diagonal(), rows.square().mean(0))
    # torch's own kernel is faster for single examples than the steps that rules see.
    rules = {name: entry.rule for entry in fisher.coverage().entries for name in entry.parameters}
    assert {rule for name, rule in rules.items() if not name.startswith("head")} == {"loop"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["full", "kfac", "ekfac"])
def test_loop__is_the_vectorised_way(structure: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind, with examples that do not count; what the loop makes and what torch.func does."""
    model, (x, y) = Scaled().double(), data()
    y[3:6] = -100
    built = []
    for recurrent in (True, False):
        monkeypatch.setattr("fisherkit.rows.plan.recurrent", lambda model, answer=recurrent: answer)
        monkeypatch.setattr("fisherkit.rows.plan.loop_is_cheaper", lambda *args: False)
        _KNOWN.clear()
        built.append(KINDS[kind](model, (x, y), structure=structure))
    loop, vectorised = built
    assert {e.rule for e in loop.coverage().entries} == {"loop", "linear"}
    assert {e.rule for e in vectorised.coverage().entries} == {"torch.func", "linear"}
    assert (loop.examples, loop.rows) == (vectorised.examples, vectorised.rows)
    v = torch.linspace(-1, 1, loop.size, dtype=F64)
    torch.testing.assert_close(loop @ v, vectorised @ v)


def test_loop__takes_one_pass_an_example() -> None:
    model = Sequences(nn.LSTM).double()
    fk.EmpiricalFisher(model, data(), structure="diagonal")  # finds out how
    PASSES.clear()
    fk.EmpiricalFisher(model, data(), structure="diagonal")
    assert sum(PASSES) <= N + 4  # what was found is confirmed on two examples


def test_loop__holds_no_more_graphs_than_the_budget_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Noting(linearized.OneByOne):
        def __init__(self, plan: Any, batch: Any, **options: Any) -> None:
            sizes.append(batch.size)
            super().__init__(plan, batch, **options)

    monkeypatch.setattr(problem, "OneByOne", Noting)
    monkeypatch.setattr(problem, "SMALLEST", 1)
    model, batch = Sequences(nn.LSTM).double(), data(60, 40)
    generous = fk.EmpiricalFisher(model, batch, structure="diagonal", memory_budget=1 << 30)
    assert max(sizes) == 30
    sizes.clear()
    x = batch[0][:2]
    _, kept = generic.kept_numbers(model, fk.data.Batch.of((x, batch[1][:2]), ""))
    budget = 4 * 8 * 5 * (kept + generous.size)
    frugal = fk.EmpiricalFisher(model, batch, structure="diagonal", memory_budget=budget)
    assert 1 <= max(sizes) <= 5
    torch.testing.assert_close(frugal.diagonal(), generous.diagonal())


def test_kept_numbers__are_of_one_example_and_leave_out_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 2, bias=False))
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    assert generic.kept_numbers(model, fk.data.Batch.of((x, y), ""))[1] == 3 + 5


@pytest.mark.parametrize(
    ("seconds", "size", "expected"),
    [
        ([1e-4, 1e-4], 100, False),  # quick: not even measured
        ([1.0, 1.0, 4.0, 16.0], 100, True),  # twice as long for each example
        ([1.0, 1.0, 1.0], 100, False),  # half as long already for two
        ([1.0, 1.0, 4.0, 4.6], 100, False),  # a fixed part of 3.8 that many examples pay for
        ([1.0, 1.0, 4.0], 2, True),  # ... and two do not
        ([9.0, 1.0, 4.0, 16.0], 100, True),  # a first call that waited for something
    ],
)
def test_choice__is_by_what_the_batch_will_take(
    seconds: list[float], size: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(seconds)
    monkeypatch.setattr(generic, "_seconds", lambda function, device: next(left))
    x, y = data()
    two = fk.data.Batch.of((x[:2], y[:2]), "")
    got = generic.loop_is_cheaper(nn.Linear(3, 3), {}, two, torch.ones(1, 2, 3), size, 10)
    assert got is expected
    assert next(left, None) is None
