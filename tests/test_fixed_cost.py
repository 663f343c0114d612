"""What a build costs beside its arithmetic: calls of kernels, reads by the host, and passes over the model.

Counts and no times, so that they are the same on every machine. Bounds have a few calls of room.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisherkit as fk
from tests import by_hand
from tests.real import zoo

READS = {"aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default"}


class Kernels(TorchDispatchMode):
    """Counts calls of kernels, and those among them that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        self.reads += str(func) in READS
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Kernels:
        self.tolist = Tensor.tolist
        Tensor.tolist = self._listed  # type: ignore[method-assign]  # a read that no dispatch mode sees on the CPU
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        Tensor.tolist = self.tolist  # type: ignore[method-assign]

    @property
    def _listed(self) -> Callable[[Tensor], Any]:
        def listed(tensor: Tensor) -> Any:
            self.reads += 1
            return self.tolist(tensor)

        return listed


@contextmanager
def passes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Counter[int], list[int]]]:
    """Forward passes by their number of examples, and backward passes by that of the outputs."""
    forwards: Counter[int] = Counter()
    backwards: list[int] = []
    call, grad = nn.Module.__call__, torch.autograd.grad

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module is model:
            forwards[len(args[0])] += 1
        return call(module, *args, **kwargs)

    def differentiated(*args: Any, **kwargs: Any) -> Any:
        backwards.append(1)
        return grad(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__call__", counted)
        patch.setattr(torch.autograd, "grad", differentiated)
        yield forwards, backwards


def perceptron(hidden: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(hidden) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(16, 10))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 10))


class Attention(nn.Module):
    """A layer of a transformer over the 16 inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(1, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x[..., None])).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer under a linear one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[..., None])[0][:, -1])


class Looped(Recurrent):
    """The same beside a parameter without a rule, so that rows are made example by example."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(10, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(x[..., None])[0][:, -1]
        return self.head(h) + nn.functional.bilinear(h, h, self.mix)


def data(size: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 16, generator=generator), torch.randint(10, (size,), generator=generator)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rows.differentiable", "optim.watch"):
        monkeypatch.setattr(f"fisherkit.{module}.COMPILER", "no module")


def counted(model: nn.Module, batches: Any, structure: str) -> Kernels:
    """Of a build on a known model, without the forward and the backward pass of a plain gradient."""
    fk.EmpiricalFisher(model, batches, structure=structure)
    with Kernels() as found:
        fk.EmpiricalFisher(model, batches, structure=structure)
    with Kernels() as plain:
        for x, y in [batches] if isinstance(batches, tuple) else batches:
            torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    found.calls -= plain.calls
    return found


@pytest.mark.parametrize(
    ("make", "structure", "most"),
    [
        (perceptron, "diagonal", 67), (perceptron, "full", 28), (perceptron, "kfac", 63),
        (convolutions, "diagonal", 73), (Attention, "diagonal", 186),
    ],
)  # fmt: skip
def test_build__kernel_calls_on_a_known_model(make: Callable[[], nn.Module], structure: str, most: int) -> None:
    assert counted(make().eval(), data(), structure).calls <= most


def own_calls(run: Callable[[], Any]) -> int:
    """Calls of the package's functions, but for lambdas and comprehensions, which not every Python counts alike."""
    home, found = str(Path(fk.__file__).parent), 0

    def seen(frame: FrameType, event: str, _: Any) -> None:
        nonlocal found
        code = frame.f_code
        found += event == "call" and code.co_filename.startswith(home) and not code.co_name.startswith("<")

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize(
    ("kind", "structure", "most", "a_layer"),
    [("ef", "diagonal", 662, 98), ("ef", "full", 712, 110), ("ef", "kfac", 787, 127), ("exact", "diagonal", 680, 100)],
)
def test_build__calls_of_functions_on_a_known_model(kind: str, structure: str, most: int, a_layer: int) -> None:
    def counted(hidden: int) -> int:
        model = perceptron(hidden)
        for _ in range(2):
            fk.FisherApproximation(model, data(), kind, structure=structure)
        return own_calls(lambda: fk.FisherApproximation(model, data(), kind, structure=structure))

    shallow, deep = counted(2), counted(4)
    assert shallow <= most
    assert (deep - shallow) / 2 <= a_layer


@pytest.mark.parametrize(
    ("structure", "a_batch", "a_layer", "reads"),
    [("diagonal", 58, 12, 4), ("kfac", 43, 12, 4), ("full", 56, 1, 3), ("ekfac", 106, 59, 4)],
)
def test_build__kernel_calls_grow_by_little_and_reads_by_batches_alone(
    structure: str, a_batch: int, a_layer: int, reads: int
) -> None:
    batch = data()
    one, three = (counted(perceptron(), [batch] * n, structure) for n in (1, 3))
    deep = counted(perceptron(4), [batch], structure)
    assert (three.calls - one.calls) / 2 <= a_batch
    assert (deep.calls - one.calls) / 2 <= a_layer
    # Outputs, labels and rows of each batch must be finite and in range before anything is added up.
    assert (three.reads - one.reads) / 2 <= 3
    assert deep.reads == one.reads <= reads


@pytest.mark.parametrize("make", [perceptron, convolutions, Attention, Recurrent, Looped])
@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_build__two_examples_are_probed_once(
    structure: str, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make().eval(), data()
    loop, kernel = make is Looped, make in (Recurrent, Looped)
    own = 24 if loop else 1  # passes over the data themselves
    with passes(model, monkeypatch) as (forwards, backwards):
        fk.EmpiricalFisher(model, batch, structure=structure)
    # The probe; one example beside itself, the other alone; forwards and backwards, where company, order and places
    # must not matter.
    # A recurrent layer's steps are judged by its own kernel, in a pass more.
    assert forwards == {2: 2 + kernel, 8: 2, 1: 1 + 24 * loop, **({} if loop else {24: 1})}
    assert len(backwards) == 2 + 2 * kernel + own
    with passes(model, monkeypatch) as (forwards, backwards):
        fk.EmpiricalFisher(model, batch, structure=structure)
    # The graph of the pass over the data confirms what is known of layers; of recurrent ones, passes of two examples.
    assert forwards == {24: 1, **({2: 1} if kernel else {})} or (loop and forwards == {2: 1, 1: 26})
    # In a loop, two more show whose its entries are, and each of its examples has its own.
    assert len(backwards) == own + (5 if loop else int(kernel))


@pytest.mark.parametrize("kind", [fk.ExactFisher, fk.TruncatedFisher, fk.SampledFisher])
def test_build__other_kinds_probe_no_more(kind: type[fk.FisherApproximation], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = perceptron(), data()
    with passes(model, monkeypatch) as (forwards, _):
        kind(model, batch, structure="diagonal")
    assert forwards == {2: 2, 1: 1, 8: 2, 24: 1}


class Hidden(nn.Module):
    """Two linear layers; what else is done to the first one's weight is decided where no comparison looks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if SWITCH["way"] == "graph":
            h = h + 0.5 * x @ self.a.weight.clone()
        if SWITCH["way"] == "function":
            h = Unseen.apply(h, self.a.weight)
        return self.b(h.tanh())


class Unseen(torch.autograd.Function):
    """Adds a weight's sum, out of sight of function modes."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor) -> Tensor:
        return h + weight.sum()

    @staticmethod
    def backward(ctx: Any, *g: Any) -> tuple[Tensor, Tensor]:
        return g[0], g[0].sum().expand(16, 16)


SWITCH = {"way": ""}


@pytest.mark.parametrize("way", ["graph", "function"])
def test_build__a_known_pass_is_told_from_any_other(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no comparison of models sees, a backward pass of two examples must."""
    model, (x, y) = Hidden().double(), data()
    x = x.double()
    for _ in range(2):
        fk.EmpiricalFisher(model, (x, y), structure="diagonal")
    monkeypatch.setitem(SWITCH, "way", way)
    for _ in range(2):
        fisher = fk.EmpiricalFisher(model, (x, y), structure="diagonal")
        torch.testing.assert_close(fisher.diagonal(), by_hand.rows(model, (x, y)).square().mean(0))


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_build__a_known_model_that_asks_for_padding_goes_through_its_data_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = zoo.ARCHITECTURES[name]
    model, batch = architecture.model(), architecture.batch(6)
    forwards: list[int] = []
    call = nn.Module.__call__

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module is model:
            forwards.append(len(next(iter(kwargs.values()))))
        return call(module, *args, **kwargs)

    fk.EmpiricalFisher(model, batch, structure="diagonal")
    monkeypatch.setattr(nn.Module, "__call__", counted)
    for _ in range(2):
        forwards.clear()
        fk.EmpiricalFisher(model, batch, structure="diagonal")
        assert forwards.count(6) == 1
        assert sum(forwards) <= 6 + 2
