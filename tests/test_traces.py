"""Passes that do what earlier ones did are not followed again: whatever does otherwise must be noticed all the same.

Everything is decided by a switch that no comparison of models sees, and compared with gradients example by example.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.errors import DataError, ModelError
from fisherkit.rows.batch_axis import Tracker
from tests import by_hand

WAY = {"": ""}
see = Tracker.see
CONSTANT = {"rows": torch.ones(12, 1, dtype=torch.float64)}


class Model(nn.Module):
    """Two linear layers, between which the switch decides what becomes of the features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.c = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        second = self.b(first.tanh())
        return self.c(WAYS[WAY[""]](first, second).tanh())


def _written(h: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():  # where nobody sees it
        return h.mul_(2.0)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "": lambda first, second: second * 1.5,
    "another number": lambda first, second: second * 2.5,
    "another operand": lambda first, second: first * 1.5,
    "another function": lambda first, second: second / 1.5,
    "less": lambda first, second: second,
    "more": lambda first, second: (second * 1.5).relu(),
    "a number of another type": lambda first, second: second * 1,
    "other arguments": lambda first, second: torch.mul(input=second, other=1.5),
    "without a gradient": lambda first, second: second.detach() * 1.5,
    "in place": lambda first, second: second.mul_(1.5),
    "unseen in place": lambda first, second: _written(second) * 1.5,
    "a constant": lambda first, second: second * torch.full((5,), 1.5, dtype=second.dtype),
}
MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "in another order": lambda first, second: second.flip(0),
    "with a mean": lambda first, second: second - second.mean(0),
    "by place": lambda first, second: second * torch.arange(1.0, 1 + len(second), dtype=second.dtype).unsqueeze(1),
}
WAYS |= MIXED


def data(size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 5, generator=generator).double(), torch.randint(3, (size,), generator=generator)


@pytest.mark.parametrize("structure", ["full", "kfac"])
@pytest.mark.parametrize("way", [way for way in WAYS if way and way not in MIXED])
def test_build__another_way_is_followed(way: str, structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Model().double(), data()
    for _ in range(3):
        fk.EmpiricalFisher(model, batch, structure=structure)
    monkeypatch.setitem(WAY, "", way)
    for _ in range(3):
        fisher = fk.EmpiricalFisher(model, batch, structure=structure)
        rows = by_hand.rows(model, batch)
        if structure == "full":
            torch.testing.assert_close(fisher.to_dense(), rows.mT @ rows / len(rows))
        else:
            own = fk.EmpiricalFisher(_fresh(model), batch, structure=structure)
            torch.testing.assert_close(fisher.to_dense(), own.to_dense())
    monkeypatch.setitem(WAY, "", "")
    rows = by_hand.rows(model, batch)
    torch.testing.assert_close(fk.EmpiricalFisher(model, batch).to_dense(), rows.mT @ rows / len(rows))


@pytest.mark.parametrize("way", MIXED)
def test_build__examples_that_meet_later_are_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Model().double(), data()
    for _ in range(3):
        fk.EmpiricalFisher(model, batch)
    monkeypatch.setitem(WAY, "", way)
    with pytest.raises(ModelError, match="rest of"):
        fk.EmpiricalFisher(model, batch)


@pytest.mark.parametrize("way", [way for way in WAYS if way and way not in MIXED])
def test_step__another_way_is_followed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Model().double(), data()
    optimizer = fk.optim.NaturalGradient(model, 1e-3, kind="ef", gram_damping=0.1)
    for _ in range(4):
        _step(model, batch, optimizer)
    for now in (way, way, "", way):
        monkeypatch.setitem(WAY, "", now)
        rows = by_hand.rows(model, batch)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        gram = rows @ rows.mT + 0.1 * torch.eye(len(rows), dtype=rows.dtype)
        expected = before - 1e-3 * rows.mT @ torch.linalg.solve(gram, torch.ones(len(rows), dtype=rows.dtype))
        _step(model, batch, optimizer)
        torch.testing.assert_close(torch.cat([p.detach().flatten() for p in model.parameters()]), expected)


@pytest.mark.parametrize("way", MIXED)
def test_step__examples_that_meet_later_are_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Model().double(), data()
    optimizer = fk.optim.NaturalGradient(model, 1e-3, kind="ef", gram_damping=0.1)
    for _ in range(4):
        _step(model, batch, optimizer)
    monkeypatch.setitem(WAY, "", way)
    with pytest.raises(ModelError, match="rest of"):
        _step(model, batch, optimizer)


def _exchanged(h: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction(), torch.no_grad():  # where nobody sees it
        h.copy_(h.flip(0))
    return h


MEETING: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "an axis": (lambda h: h.roll(1, 1), lambda h: h.roll(1, 0)),
    "an axis by name": (lambda h: h.roll(shifts=1, dims=1), lambda h: h.roll(shifts=1, dims=0)),
    "axes in a tuple": (lambda h: h.flip((1,)), lambda h: h.flip((0,))),
    "a slice": (lambda h: torch.cat([h, h])[: len(h)], lambda h: torch.cat([h.detach(), h])[1 : len(h) + 1]),
    "an operand": (lambda h: (h.mT, h.mT.mT)[1], lambda h: (h.mT, h.mT)[1]),
    "what is returned": (lambda h: (h.flip(0), h * 1.5)[1], lambda h: (h.flip(0), h * 1.5)[0]),
    "memory": (lambda h: h * 1.5, lambda h: _exchanged(h) * 1.5),
}
"""What keeps examples apart, and what calls the same functions and does not; of as many examples as features."""


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("way", MEETING)
def test_examples__that_meet_by_the_same_functions_are_refused(
    way: str, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, other = MEETING[way]
    x, y = data(5)
    if last:  # what becomes of the outputs
        monkeypatch.setattr(Model, "forward", lambda self, x: WAYS[""](self.b(self.a(x).tanh()), x))
        known, other = (lambda h, _, f=f: f(h) for f in (known, other))  # type: ignore[misc]
    else:
        known, other = (lambda _, h, f=f: f(h) for f in (known, other))  # type: ignore[misc]
    monkeypatch.setitem(WAYS, "", known)
    model = Model().double()
    optimizer = fk.optim.NaturalGradient(model, 1e-3, kind="ef", gram_damping=0.1)
    for _ in range(4):
        fk.EmpiricalFisher(model, (x, y))
        _step(model, (x, y), optimizer)
    monkeypatch.setitem(WAYS, "", other)
    with pytest.raises((ModelError, DataError)):
        fk.EmpiricalFisher(model, (x, y))
    with pytest.raises((ModelError, DataError, RuntimeError)):
        _step(model, (x, y), optimizer)


@pytest.mark.parametrize("hook", ["on the output", "on a node"])
def test_step__hooks_that_come_later_are_noticed(hook: str) -> None:
    model, batch = Model().double(), data()
    optimizer = fk.optim.NaturalGradient(model, 1e-3, kind="ef", gram_damping=0.1)
    for _ in range(4):
        _step(model, batch, optimizer)

    def forward(module: nn.Module, args: Any, output: Tensor) -> None:
        if hook == "on the output":
            output.register_hook(lambda g: g.flip(0))
        else:
            output.grad_fn.register_prehook(lambda gradients: (gradients[0].flip(0),))  # type: ignore[union-attr]

    model.b.register_forward_hook(forward)
    with pytest.raises(ModelError):
        _step(model, batch, optimizer)


def test_sizes__batches_of_all_sizes_and_constants_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().double()
    monkeypatch.setitem(WAYS, "", lambda first, second: second * CONSTANT["rows"][: len(second)])
    monkeypatch.setitem(CONSTANT, "rows", torch.ones(12, 1).double())
    for size in (12, 6, 12, 7, 6):
        fk.EmpiricalFisher(model, data(size))
    monkeypatch.setitem(CONSTANT, "rows", torch.arange(1.0, 13.0).double().unsqueeze(1))
    with pytest.raises(ModelError, match="rest of"):
        fk.EmpiricalFisher(model, data())


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 3)),
    lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(6, 3)),
    lambda: nn.Sequential(
        nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        nn.Flatten(), nn.Linear(20, 3),
    ),
])  # fmt: skip
def test_trace__a_pass_that_does_the_same_is_not_followed(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make().double(), data()
    seen: list[Any] = []
    monkeypatch.setattr(Tracker, "see", lambda self, *args: (seen.append(args[0]), see(self, *args))[1])
    optimizer = fk.optim.NaturalGradient(model, 1e-3, kind="ef", gram_damping=0.1)
    for run in (lambda: fk.EmpiricalFisher(model, batch), lambda: _step(model, batch, optimizer)):
        for _ in range(3):
            run()
        seen.clear()
        run()
        assert not seen


def test_trace__dropout_is_known_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double(), data()
    optimizer = fk.optim.NaturalGradient(model, 1e-3, kind="ef", gram_damping=0.1)
    calls: list[Any] = []
    monkeypatch.setattr(Tracker, "see", lambda self, *args: calls.append(see(self, *args)))
    for _ in range(3):
        _step(model, batch, optimizer)
    calls.clear()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer.zero_grad()
    z = model(batch[0])
    assert not calls
    losses = F.cross_entropy(z, batch[1], reduction="none")
    rows = torch.stack([by_hand.gradient(loss, model) for loss in losses])
    losses.mean().backward()
    optimizer.step()
    gram = rows @ rows.mT + 0.1 * torch.eye(len(rows), dtype=rows.dtype)
    expected = before - 1e-3 * rows.mT @ torch.linalg.solve(gram, torch.ones(len(rows), dtype=rows.dtype))
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in model.parameters()]), expected)


def _fresh(model: nn.Module) -> nn.Module:
    other = Model().double()
    other.load_state_dict(model.state_dict())
    return other


def _step(model: nn.Module, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


class Toggled(nn.Module):
    """A model of positions whose step between the layers does something else when it is told to, by the same calls."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.step = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3), step
        self.orders = {n: torch.arange(n) for n in range(1, 13)}
        self.constants = {n: torch.zeros(n, 6).double() for n in range(1, 13)}
        self.filled = {n: torch.zeros(n, 6).double() for n in range(1, 13)}
        self.on = False

    def turn(self) -> None:
        self.on, self.orders[12] = True, torch.arange(12).roll(1)
        self.constants = {n: torch.arange(6.0 * n).double().reshape(n, 6) / 10 for n in range(1, 13)}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x, x * 2, x * 3], 1)
        return self.c(self.step(self, torch.tanh(self.b(torch.tanh(self.a(x))))[:, 0]))


class Clamped(torch.autograd.Function):
    """Known to nobody, of which the outputs were made without gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.clamp(x, -5, 5)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * 1.0


def _filled(model: Any, h: Tensor) -> Tensor:
    model.filled[len(h)][:] = h.detach()
    return h + (model.constants if model.on else model.filled)[len(h)]


def _cast(model: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=model.on):
        return h + h @ model.c.weight.mT @ model.c.weight


STEPS_BY_NUMBERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "places by content": lambda model, h: h + h[model.orders[len(h)], h.argmax(1)][:, None],
    "a permutation": lambda model, h: h[model.orders[len(h)]],
    "a constant filled by examples": _filled,
    "an added constant": lambda model, h: h + model.constants[len(h)],
    "a factor": lambda model, h: h * (1 + model.constants[len(h)]),
    "numbers that nobody saw": lambda model, h: h * (float(h.sum()) if model.on else 2.0),
    "autocast": _cast,
}


@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
@pytest.mark.parametrize("name", STEPS_BY_NUMBERS)
def test_trace__of_a_known_model_says_what_a_new_one_would(name: str, structure: str) -> None:
    def outcome(model: Toggled) -> Tensor | str:
        try:
            fisher = fk.EmpiricalFisher(model, data(), structure=structure)
            return fisher @ torch.arange(1.0, fisher.size + 1, dtype=fisher.dtype)
        except fk.FisherkitError as error:
            return type(error).__name__

    known, new = (Toggled(STEPS_BY_NUMBERS[name]).double() for _ in range(2))
    first = [outcome(known) for _ in range(3)]
    assert all(
        type(one) is type(first[0]) and (one == first[0] if isinstance(one, str) else torch.allclose(one, first[0]))
        for one in first
    )
    known.turn()
    new.turn()
    found, expected = outcome(known), outcome(new)
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("change", ["dtype", "layout"])
def test_trace__is_of_dtypes_and_layouts(change: str) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.tanh(self.b(torch.tanh(self.a(x.contiguous()))))[:, 0])

    x, y = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2])
    known, new = Joined(), Joined()
    for _ in range(3):
        fk.EmpiricalFisher(known, (x, y), structure="kfac")
    if change == "dtype":
        known, new, x = known.double(), new.double(), x.double()
    else:
        x = x.mT.contiguous().mT
    found, expected = (fk.EmpiricalFisher(one, (x, y), structure="kfac").to_dense() for one in (known, new))
    torch.testing.assert_close(found, expected)


def test_trace__what_was_made_inside_of_a_function_has_another_graph_outside() -> None:
    class Ended(Toggled):
        def forward(self, x: Tensor) -> Tensor:
            return Clamped.apply(super().forward(x))

    model = Ended(lambda _, h: h).double()
    first, *others = (fk.EmpiricalFisher(model, data(), structure="kfac").to_dense() for _ in range(3))
    for one in others:
        torch.testing.assert_close(one, first)
