"""Whatever way rows are made, the model comes back whole: identities, ties, plain attributes, buffers, copies."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fisherkit as fk
from fisherkit.rows import plan
from tests import by_hand
from tests.snapshot import of_model, untouched

F64 = torch.float64
STOP = 1e6


class Base(nn.Module):
    """A bare parameter, which no rule covers, around whatever a model is about; raises at a marked input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.head = nn.Linear(5, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return self.fc(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(x)
        return self.head(self.scale.exp() * h)


class Aliased(Base):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.net = nn.Sequential(self.fc, nn.Tanh())

    def hidden(self, x: Tensor) -> Tensor:
        return self.net(x)


class Tied(Base):
    """One parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
        self.two.weight = self.one.weight

    def hidden(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())


class Normed(Base):
    """Weight norm of old, whose pre-hook writes a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.fc = nn.utils.weight_norm(nn.Linear(5, 5))


class Spectral(Base):
    """Spectral norm of old, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.utils.spectral_norm(nn.Linear(5, 5))


class Parametrized(Base):
    """Weight norm of today."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))


class Caching(Base):
    """Keeps what it has seen in plain attributes, lists, dicts, and buffers that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.calls, self.last, self.seen = 0, None, []
        self.memory: dict[str, Any] = {"h": torch.zeros(1), "all": []}
        self.register_buffer("table", torch.zeros(1, 5), persistent=False)

    def hidden(self, x: Tensor) -> Tensor:
        h = self.fc(x).tanh()
        self.calls += 1
        self.last, self.memory["h"], self.longest = h, h, max(self.calls, 3)
        self.seen.append(h)
        self.memory["all"].append(self.scale * 2)
        self.table = x.new_zeros(len(x), 5)
        return h + self.table


class Averaging(Base):
    """Moves a buffer and a plain tensor in place, and uses neither."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.register_buffer("mean", torch.zeros(5))
        self.steps = torch.zeros(1)

    def hidden(self, x: Tensor) -> Tensor:
        h = self.fc(x).tanh()
        if not torch._C._functorch.is_batchedtensor(h):
            self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        self.steps += 1
        return h


class Recurrent(Base):
    """Its weights are in a list beside the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, 5, batch_first=True)

    def hidden(self, x: Tensor) -> Tensor:
        return self.rnn(x.unsqueeze(2))[0][:, -1]


class Hooked(Base):
    """Hooks of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)
        self.fc.register_forward_hook(_twice)
        self.fc.register_forward_pre_hook(_half)
        self.fc.register_full_backward_hook(_nothing)


class Checkpointed(Base):
    """A reentrant checkpoint."""

    reentrant = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(5, 5), nn.Linear(5, 5)

    def hidden(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = checkpoint(self.fc, h, use_reentrant=True) if self.reentrant else self.fc(h)
        return h.tanh()


class Spare(Base):
    """A parameter and a layer that the outputs do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other = nn.Linear(5, 5), nn.Linear(5, 2)
        self.bare = nn.Parameter(torch.ones(2))


def _twice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def _half(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] / 2,)


def _nothing(module: nn.Module, into: Any, out: Any) -> None:
    return None


ZOO: dict[str, type[Base]] = {
    cls.__name__: cls
    for cls in (
        Aliased, Tied, Normed, Spectral, Parametrized, Caching, Averaging, Recurrent, Hooked, Checkpointed, Spare
    )
}  # fmt: skip


def build(name: str) -> Base:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ZOO[name]().double().eval()
        with torch.no_grad():
            model(torch.ones(2, 5, dtype=F64))  # what a forward pass leaves behind is there before ours
    model.head.weight.grad = torch.ones_like(model.head.weight)
    return model


def copies_of(model: Base) -> list[Base]:
    """By both ways; torch pickles no parametrized module."""
    pickled = [] if isinstance(model, Parametrized) else [pickle.loads(pickle.dumps(model))]
    return [copy.deepcopy(model), *pickled]


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, 5, generator=generator, dtype=F64)
    y = torch.randint(3, (7,), generator=generator)
    return [(x[:4], y[:4]), (x[4:], y[4:])]


def by_rules(model: nn.Module) -> Any:
    return fk.EmpiricalFisher(model, batches(), structure="kfac").trace()


def by_torch_func(model: nn.Module) -> Any:
    fisher = fk.TruncatedFisher(model, batches(), params=lambda name, p: "weight" not in name or "fc" in name)
    return fisher @ torch.ones(fisher.size, dtype=F64)


def by_loop(model: nn.Module) -> Any:
    return fk.TruncatedFisher(model, batches(), structure="diagonal").trace()


def streamed(model: nn.Module) -> Any:
    fisher = fk.ExactFisher(model, batches(), memory_budget=1)
    return fisher @ torch.ones(fisher.size, dtype=F64), fisher @ torch.ones(fisher.size, 2, dtype=F64)


def gradient(model: nn.Module) -> Any:
    return fk.evaluation.loss_gradient(model, batches())


def influence(model: nn.Module) -> Any:
    fisher = fk.EmpiricalFisher(model, batches(), structure="diagonal")
    return fk.influence.InfluenceScores(fisher, model, damping=0.1).scores(batches(), batches())


def compared(model: nn.Module) -> Any:
    return fk.evaluation.compare(model, batches()[0], kinds=["ef", "sf:2"])


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    f.__name__: f for f in (by_rules, by_torch_func, by_loop, streamed, gradient, influence, compared)
}


@pytest.fixture
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "by_loop" in request.node.name:
        monkeypatch.setattr(plan, "recurrent", lambda model: True)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ZOO)
def test_model__comes_back_whole(name: str, way: str) -> None:
    model = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with untouched(model, []):
            WAYS[way](model)
        copies = copies_of(model)
    x = batches()[0][0]
    with torch.no_grad():
        expected = model(x)
        for other in copies:
            torch.testing.assert_close(other(x), expected)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("way", ["by_rules", "by_torch_func", "by_loop", "streamed", "gradient", "influence"])
@pytest.mark.parametrize("name", ["Aliased", "Normed", "Caching", "Averaging", "Recurrent", "Checkpointed"])
def test_model__comes_back_whole_from_an_exception(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised in the second batch's forward pass, after the body wrote what it writes."""
    calls = batches()
    calls[1][0][0, 0] = STOP
    model = build(name)

    def forward(self: Base, x: Tensor) -> Tensor:
        h = self.hidden(x)
        marked = x.detach() == STOP
        if not torch._C._functorch.is_batchedtensor(marked) and bool(marked.any()):
            raise RuntimeError("planned")
        return self.head(self.scale.exp() * h)

    monkeypatch.setattr(Base, "forward", forward)
    monkeypatch.setitem(globals(), "batches", lambda: calls)
    with untouched(model, []), pytest.raises(RuntimeError, match="planned"):
        WAYS[way](model)
    copies_of(model)


@pytest.mark.parametrize("name", ZOO)
def test_rows__are_those_of_single_examples(name: str) -> None:
    model = build(name)
    fisher = fk.EmpiricalFisher(model, batches(), normalization="sum")
    reference = copy.deepcopy(model)
    if isinstance(reference, Checkpointed):
        reference.reentrant = False
    rows = by_hand.rows(reference, batches(), of=map(reference.get_parameter, fisher.space.names))
    torch.testing.assert_close(fisher.to_dense(), rows.mT @ rows)
    exact = fk.ExactFisher(model, batches(), likelihood="gaussian", structure="diagonal", memory_budget=10**9)
    again = fk.ExactFisher(model, batches(), likelihood="gaussian", memory_budget=1)
    torch.testing.assert_close(again.diagonal(), exact.diagonal())


STEPS: dict[str, Callable[[nn.Module], Any]] = {
    "ief": lambda m: fk.optim.NaturalGradient(m, lr=0.1, kind="ief", gram_damping=0.1),
    "exact": lambda m: fk.optim.NaturalGradient(m, lr=0.1, kind="exact", damping=0.1),
    "kfac": lambda m: fk.optim.NaturalGradient(m, lr=0.1, kind="ef", structure="kfac", damping=0.1),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", [name for name in ZOO if name != "Checkpointed"])
def test_optimizer__leaves_parameters_and_copies_whole(name: str, step: str) -> None:
    model, (x, y) = build(name), batches()[0]
    before = {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)}
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = STEPS[step](model)
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.close()
        with torch.no_grad():
            model(x)
        if name != "Caching":  # its history is of the user's own passes
            copies_of(model)
    assert {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)} == before
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_snapshot__notices_attributes() -> None:
    traces: dict[str, Callable[[Any], object]] = {
        "a tensor": lambda m: setattr(m, "last", torch.ones(1)),
        "a list": lambda m: m.seen.append(torch.ones(1)),
        "a dict in a dict": lambda m: m.memory["all"].append(1),
        "a counter": lambda m: setattr(m, "calls", 7),
        "a new one": lambda m: setattr(m, "new", 7),
    }
    for name, leave in traces.items():
        model = build("Caching")
        with pytest.raises(AssertionError, match="touched"), untouched(model, []):
            leave(model)
        assert of_model(model), name


def test_recurrent_layers__have_a_rule() -> None:
    rules = {
        n: e.rule for e in fk.EmpiricalFisher(build("Recurrent"), batches()).coverage().entries for n in e.parameters
    }
    assert rules["rnn.weight_hh_l0"] == "lstm"


def test_counts__of_a_module_without_tensors_of_its_own_go_on() -> None:
    """As those of whoever watches how often a model is called."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.calls, self.sizes = build("Caching"), 0, []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.sizes.append(len(x))
            return self.body(x)

    model = Counting()
    with untouched(model.body, []):
        fk.EmpiricalFisher(model, batches(), structure="diagonal")
    assert model.calls == len(model.sizes) > 2
    assert model.body.calls == 1
