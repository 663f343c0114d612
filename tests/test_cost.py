"""What builds and operations may cost, in floating-point operations and passes over the data, with and without a rule.

The unit is one forward and backward pass of the same batch. Bounds are what the arithmetic says (`docs/costs.md`) plus
a tenth, so that a lost factorisation, a second pass or a loop over outputs fails here and not in somebody's profile.
Time is measured in `examples/benchmarks`, never here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fisherkit as fk
from examples.vocabulary import GOAL, peak
from fisherkit import likelihoods
from fisherkit.kinds import KINDS
from fisherkit.likelihoods import Categorical
from fisherkit.rows import generic, linearized, problem
from fisherkit.rows.verified import _KNOWN
from tests import by_hand
from tests.watching import Largest

C = 5


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, 32), nn.Parameter(torch.randn(16, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, C))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 36, 32), nn.ReLU(), nn.Linear(32, C),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (256, 96)),
    "cnn": (cnn, (128, 3, 12, 12)),
    "encoder": (Encoder, (64, 16, 8)),
}


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    return make().eval(), torch.randn(shape), torch.randint(C, shape[:1])


class Untracked:
    """Stands for the counter's own hooks on modules, which a Fisher would take for the model's and verify."""

    parents = frozenset({"Global"})

    def __enter__(self) -> Untracked:
        return self

    def __exit__(self, *raised: object) -> None:
        pass


def flops(function: Callable[[], Any]) -> int:
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Untracked()
    with counter:
        function()
    return counter.get_total_flops()


def units(name: str, operation: Callable[..., Any]) -> float:
    """Floating-point operations of an operation over those of a forward and backward pass."""
    model, x, y = case(name)
    one = flops(lambda: F.cross_entropy(model(x), y).backward())
    model.zero_grad()
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    return flops(operation(model, (x, y), v)) / one


def build(kind: type[fk.FisherApproximation], **options: Any) -> Callable[..., Any]:
    return lambda model, data, v: lambda: kind(model, data, **options)


def cached(kind: type[fk.FisherApproximation], use: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def operation(model: nn.Module, data: Any, v: Tensor) -> Callable[[], Any]:
        fisher = kind(model, data, **options)
        return lambda: use(fisher, v)

    return operation


# Rows of layers without shared positions take a forward pass and the part of the backward pass that goes to layer
# outputs: 2/3 of a unit or less. Shared positions add writing the rows out, as a weight gradient, 1/3. C − 1 = 4
# vectors take four backward passes. A product with factored rows costs as much as a forward pass, twice; with
# rows written out, 4 operations an entry. A Gram takes 2·R²·Σ(I + O) or 2·R²·D, three quarters of it where R >= 256:
# more than a unit here, with many examples of a small model. The iEF Gram is in its solve. KFAC adds 2·N·T·Σ(I² + O²).
OPERATIONS: dict[str, tuple[Callable[..., Any], dict[str, float]]] = {
    "EF, rows": (build(fk.EmpiricalFisher), {"mlp": 0.73, "cnn": 1.12, "encoder": 1.3}),
    "EF, product": (cached(fk.EmpiricalFisher, lambda f, v: f.matvec(v)), {"mlp": 0.86, "cnn": 0.19, "encoder": 0.06}),
    "EF, diagonal": (build(fk.EmpiricalFisher, structure="diagonal"), {"mlp": 1.15, "cnn": 1.2, "encoder": 1.3}),
    "EF, gram": (cached(fk.EmpiricalFisher, lambda f, v: f.gram()), {"mlp": 1.72, "cnn": 1.2, "encoder": 1.6}),
    "EF, kfac": (build(fk.EmpiricalFisher, structure="kfac"), {"mlp": 1.82, "cnn": 3.4, "encoder": 2.0}),
    "iEF, solve": (cached(fk.ImprovedEmpiricalFisher, lambda f, v: f.solve(v, damping=1.0)),
        {"mlp": 2.56, "cnn": 1.36, "encoder": 1.64}),
    "exact, diagonal": (build(fk.ExactFisher, structure="diagonal"), {"mlp": 1.9, "cnn": 3.0, "encoder": 3.5}),
    "exact, product from rows": (cached(fk.ExactFisher, lambda f, v: f.matvec(v), storage="rows"),
        {"mlp": 0.88, "cnn": 0.22, "encoder": 0.2}),
    "exact, streamed product": (cached(fk.ExactFisher, lambda f, v: f.matvec(v), memory_budget=1 << 10),
        {"mlp": 1.9, "cnn": 1.9, "encoder": 2.0}),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_flops__are_what_the_arithmetic_says(name: str, model: str, record_property: Callable[..., None]) -> None:
    operation, bounds = OPERATIONS[name]
    found = units(model, operation)
    record_property("units", found)
    assert found <= bounds[model], f"{name} of {model}: {found:.2f} units"


class Counted(nn.Module):
    """Counts the examples that pass through a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.examples = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.examples += len(x)
        return self.model(x)


@pytest.mark.parametrize(
    ("structure", "kind", "passes"),
    [
        ("full", fk.EmpiricalFisher, 1),
        ("full", fk.ExactFisher, 1),
        ("diagonal", fk.ExactFisher, 1),
        ("block", fk.EmpiricalFisher, 1),
        ("kfac", fk.ExactFisher, 1),
        ("ekfac", fk.EmpiricalFisher, 1),
    ],
)
def test_build__reads_the_data_once(structure: str, kind: type[fk.FisherApproximation], passes: int) -> None:
    """Beside the data, a build may look at a few examples to verify its rules."""
    model, x, y = case("cnn")
    counted = Counted(model)
    storage = "rows" if structure == "full" else "auto"
    kind(counted, [(x[:64], y[:64]), (x[64:], y[64:])], structure=structure, storage=storage)
    assert passes * len(x) <= counted.examples <= passes * len(x) + 32


def test_outputs__never_cost_one_forward_pass_each() -> None:
    """Backward passes of the C − 1 output vectors are vectorised, and a product from the data needs none of them."""
    model, x, y = case("mlp")
    fisher = fk.ExactFisher(counted := Counted(model), (x, y), memory_budget=1 << 10)
    counted.examples = 0
    fisher.matvec(torch.randn(fisher.size))
    assert len(x) <= counted.examples <= len(x) + 8  # a few by themselves, to compare their outputs


@pytest.mark.parametrize("kind", [fk.EmpiricalFisher, fk.TruncatedFisher, fk.ExactFisher])
def test_vocabulary__is_never_squared(kind: type[fk.FisherApproximation]) -> None:
    """A language model's head: memory for [N, T, V], never for [N, T, V, V], and no pass for each of V outputs."""
    torch.manual_seed(0)
    vocabulary, n, t = 3000, 2, 8
    model = nn.Sequential(nn.Embedding(vocabulary, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, vocabulary))
    x, y = torch.randint(vocabulary, (n, t)), torch.randint(vocabulary, (n, t))
    largest = Largest()
    largest.expanded = False
    with largest:
        options = {"memory_budget": 1 << 20} if kind is fk.ExactFisher else {}
        fisher = kind(counted := Counted(model), (x, y), **options)
        fisher.matvec(torch.randn(fisher.size))
    assert largest.entries <= 4 * n * t * vocabulary
    assert counted.examples <= 32


# -- what rows of parameters without a rule cost -----------------------------------------------------------------------


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


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("structure", ["full", "block", "diagonal"])
def test_loop__rows_are_those_of_single_examples(structure: str, layer: type[nn.RNNBase]) -> None:
    model, (x, y) = Sequences(layer, num_layers=2, bias=structure != "block").double(), data()
    rows = by_hand.rows(model, (x, y))
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


# -- outputs over a large vocabulary are not held more often than a training step holds them ---------------------------


SIZE = 8192, 8, 128


@functools.cache
def training_step() -> int:
    """Bytes."""
    return peak("train", *SIZE)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's peak")
@pytest.mark.parametrize("fisher", ["ef:ekfac", "sf:ekfac"])
def test_peak__is_about_a_training_step_s(fisher: str) -> None:
    assert peak(fisher, *SIZE) <= GOAL * training_step()


def test_draws__do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 3, 7, 11, generator=generator)
    uniform = torch.rand(5, 3, 7, 1, generator=generator, dtype=torch.float64)
    whole = Categorical().sample(z, uniform)
    cumulative = z.double().softmax(-1).cumsum(-1)
    assert torch.equal(whole, torch.searchsorted(cumulative, uniform).squeeze(-1).clamp_max(10))
    for most in (1, 20, 300):
        monkeypatch.setattr(likelihoods, "AT_ONCE", most)
        assert torch.equal(Categorical().sample(z, uniform), whole)


def test_masked_gradient__is_not_mistaken_for_another_view_of_it() -> None:
    """A kind that turns the gradient's axes has its vectors masked by their own positions."""

    class Turned(fk.OutputRule):
        kind_name = "turned"

        def output_vectors(self, outputs: fk.Outputs) -> fk.OutputVectors:
            return fk.OutputVectors(outputs.gradient().mT.unsqueeze(1))

    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 3).double(), torch.randn(5, 3, 4, dtype=torch.float64)
    y = torch.tensor([[0, -100, 2]] * 5)
    found = fk.FisherApproximation(model, (x, y), Turned()).to_dense()
    z = model(x).detach()
    u = z.softmax(-1) - torch.nn.functional.one_hot(y.clamp_min(0), 3)
    v = (u * (y != -100).unsqueeze(-1)).mT * (y != -100).unsqueeze(-1)
    rows = torch.cat([torch.einsum("btc,bti->bci", v, x).flatten(1), v.sum(1)], 1)
    assert torch.allclose(found, rows.T @ rows / 5, rtol=1e-12)
