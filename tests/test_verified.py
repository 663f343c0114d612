"""Findings about a model are used again, and only where they still hold."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.rows import verified
from fisherkit.rows.plan import make_plan
from tests import by_hand


class Switched(nn.Module):
    """A linear layer that uses its weight in one more, hidden way if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.hidden = False
        self.config = {"hidden": False}

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z + x @ (self.layer.weight * 1.0) if self.hidden or self.config["hidden"] else z


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Switched().double()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, generator=generator).double(), torch.tensor([0, 1, 2, 0, 1])


@pytest.fixture
def verifications(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were verified."""
    found: list[nn.Module] = []

    def noted(model: nn.Module, *args: object) -> object:
        found.append(model)
        return make_plan(model, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(verified, "make_plan", noted)
    return found


def test_verified__once_for_all_kinds_structures_and_values(
    model: nn.Module, data: tuple[Tensor, Tensor], verifications: list[nn.Module]
) -> None:
    for kind in (fk.EmpiricalFisher, fk.ExactFisher):
        for structure in ("full", "kfac", "diagonal"):
            kind(model, data, structure=structure)
    with torch.no_grad():
        model.layer.weight.mul_(2)
    fisher = fk.EmpiricalFisher(model, data)
    assert len(verifications) == 1
    torch.testing.assert_close(fisher.to_dense(), by_hand.fisher(model, data), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(fk.EmpiricalFisher(model, data, memory_budget=1) @ fisher.diagonal(),
                               fisher @ fisher.diagonal(), rtol=1e-10, atol=1e-14)  # fmt: skip


def _attribute(model: nn.Module) -> None:
    model.hidden = True


def _unseen(model: nn.Module) -> None:
    model.config["hidden"] = True


def _forward(model: nn.Module) -> None:
    original = model.forward
    model.forward = lambda x: original(x) + x @ (model.layer.weight * 1.0)  # type: ignore[method-assign]


def _hook(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, z: z + args[0] @ (module.layer.weight * 1.0))


def _module(model: nn.Module) -> None:
    model.layer = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def _parametrization(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.layer)


@pytest.mark.parametrize("change", [_attribute, _unseen, _forward, _hook, _module, _parametrization])
def test_verified__anew_when_the_model_has_changed(
    change: Callable[[nn.Module], None], model: nn.Module, data: tuple[Tensor, Tensor], verifications: list[nn.Module]
) -> None:
    fk.EmpiricalFisher(model, data)
    change(model)
    fisher = fk.EmpiricalFisher(model, data)
    assert len(verifications) == 2
    torch.testing.assert_close(fisher.to_dense(), by_hand.fisher(model, data), rtol=1e-10, atol=1e-14)


def test_verified__anew_for_other_parameters_and_other_inputs(
    model: nn.Module, data: tuple[Tensor, Tensor], verifications: list[nn.Module]
) -> None:
    fk.EmpiricalFisher(model, data)
    fk.EmpiricalFisher(model, data, params=["layer.bias"])
    fk.EmpiricalFisher(model, (data[0][:, None], data[1][:, None]))
    assert len(verifications) == 3


def test_verified__train_mode_is_refused_again(data: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).double().eval()
    fk.EmpiricalFisher(model, data)
    with pytest.raises(fk.ModelError, match="train mode"):
        fk.EmpiricalFisher(model.train(), data)


def test_verified__keeps_no_model_alive(data: tuple[Tensor, Tensor]) -> None:
    model = Switched().double()
    known = weakref.ref(model)
    fk.ExactFisher(model, data)
    del model
    gc.collect()
    assert known() is None


class Doubled(torch.autograd.Function):
    """Twice a weight, out of sight of function modes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return 2 * weight

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return 2 * g[0]


class Beside(torch.autograd.Function):
    """Its input, with a gradient for a weight that no function was given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, Tensor]:
        return g[0], g[0].sum().expand(3, 3)


class Unbatched(torch.autograd.Function):
    """Its input; its gradient, of which a number is read, cannot be vectorised or carried forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Tensor:
        return g[0] if g[0].sum().isfinite().item() else g[0] * 0


class Hidden(Switched):
    """Two layers; what is done with them is decided where no comparison of models looks."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.config = nn.Linear(3, 3), {"way": ""}

    def forward(self, x: Tensor) -> Tensor:
        way, w, b = self.config["way"], self.last.weight, self.last.bias
        h = self.layer(x).tanh()
        if way == "unbatched":
            h = Unbatched.apply(h)
        if way == "input":
            h = h + x @ Doubled.apply(w)
        if way == "weight":
            w = Doubled.apply(w)
        if way == "sum":
            w = w + Doubled.apply(w)
        if way == "bias of both":
            b = b + Doubled.apply(self.layer.bias)
        z = nn.functional.linear(h, w, b)
        if way == "graph alone":
            z = Beside.apply(z, w)
        if way == "behind a layer":
            h = h.sigmoid()
            z = nn.functional.linear(h, w) + h.mul_(2)
        written = {"layer's": h, "data": x}.get(way)
        return z if written is None else z + written.mul_(2)


@pytest.mark.parametrize("structure", ["full", "diagonal"])
@pytest.mark.parametrize("way", ["input", "weight", "sum", "bias of both", "graph alone"])
def test_verified__anew_for_what_hides_in_a_known_pass(
    way: str, structure: str, data: tuple[Tensor, Tensor], verifications: list[nn.Module]
) -> None:
    torch.manual_seed(0)
    model = Hidden().double()
    for _ in range(2):
        fk.EmpiricalFisher(model, data, structure=structure)
    model.config["way"] = way
    for _ in range(2):
        found, expected = fk.EmpiricalFisher(model, data, structure=structure), by_hand.fisher(model, data)
        expected = expected if structure == "full" else expected.diagonal().diag()
        torch.testing.assert_close(found.to_dense(), expected, rtol=1e-10, atol=1e-14)
    assert len(verifications) == 2


@pytest.mark.parametrize("storage", ["rows", "stream"])
def test_verified__anew_for_a_custom_function_that_forbids_what_was_tried(
    storage: str, data: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    model = Hidden().double()
    model.last = nn.Linear(3, 9).double()  # so many outputs that products would be made without rows
    eye = torch.eye(48, dtype=torch.float64)
    expected = fk.ExactFisher(model, data, storage=storage) @ eye
    model.config["way"] = "unbatched"
    for _ in range(2):
        found = fk.ExactFisher(model, data, storage=storage) @ eye
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_verified__a_parameters_hook_that_does_something_else_now(
    structure: str, data: tuple[Tensor, Tensor], verifications: list[nn.Module]
) -> None:
    torch.manual_seed(0)
    model, scale = Hidden().double(), {"of gradients": 1.0}
    model.last.weight.register_hook(lambda g: g * scale["of gradients"])
    fk.EmpiricalFisher(model, data, structure=structure)
    scale["of gradients"] = 3.0
    found, expected = fk.EmpiricalFisher(model, data, structure=structure), by_hand.fisher(model, data)
    expected = expected if structure == "full" else expected.diagonal().diag()
    torch.testing.assert_close(found.to_dense(), expected, rtol=1e-10, atol=1e-14)
    assert len(verifications) == 1  # each example's own backward pass meets the hook as it is
    assert next(e for e in found.coverage().entries if "last.weight" in e.parameters).rule == "loop"


@pytest.mark.parametrize(
    ("way", "chosen"), [("layer's", None), ("data", None), ("behind a layer", ["layer.weight"])], ids=str
)
def test_verified__a_known_layers_input_that_is_written_to_since_is_named(
    way: str, chosen: list[str] | None, data: tuple[Tensor, Tensor]
) -> None:
    """Also that of a layer that was not chosen."""
    model = Hidden().double()
    fk.EmpiricalFisher(model, data, params=chosen)
    model.config["way"] = way
    for _ in range(2):
        with pytest.raises(fk.ModelError, match="in place"):
            fk.EmpiricalFisher(model, data, params=chosen)


@pytest.mark.parametrize("options", [{"structure": "kfac"}, {"structure": "ekfac"}, {"memory_budget": 1}], ids=str)
def test_verified__the_first_pass_confirms_whatever_is_made_of_it(
    options: dict[str, Any], data: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    known, fresh = Hidden().double(), Hidden().double()
    fresh.load_state_dict(known.state_dict())
    fk.EmpiricalFisher(known, data, **options)
    known.config["way"] = fresh.config["way"] = "input"
    eye = torch.eye(24, dtype=torch.float64)
    found, expected = (fk.EmpiricalFisher(model, data, **options) @ eye for model in (known, fresh))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("structure", ["full", "diagonal"])
def test_hook_on_a_parameter__that_the_first_two_examples_do_not_show(structure: str) -> None:
    """A rule would never ask it: rows are those of one backward pass an example."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = torch.randn(9, 4).double(), torch.arange(9) % 3
    x[2:] *= 8
    largest = float(by_hand.rows(model, (x[:2], y[:2]))[:, :20].abs().max())
    model[0].weight.register_hook(lambda g: g.clamp(-2 * largest, 2 * largest))
    j = by_hand.rows(model, (x, y))
    assert bool((j[:, :20].abs() >= 2 * largest - 1e-12).any())  # where the hook acts
    for _ in range(2):
        fisher = fk.EmpiricalFisher(model, (x, y), structure=structure)
        torch.testing.assert_close(fisher.diagonal(), j.square().mean(0))
    assert next(e for e in fisher.coverage().entries if "0.weight" in e.parameters).rule == "loop"


def test_fingerprint__tells_a_function_from_one_that_lay_in_its_place() -> None:
    model: Any = nn.Linear(2, 2)
    model.act = lambda h: h.tanh()
    before, place = verified.fingerprint(model), id(model.act)
    assert verified.fingerprint(model) == before
    others: list[Any] = []
    del model.act
    for i in range(1000):
        others.append(lambda h, i=i: h * i)
        if id(others[-1]) == place:
            break
    model.act = others[-1]
    assert verified.fingerprint(model) != before


def test_fingerprint__takes_functions_that_cannot_be_followed() -> None:
    class Listed(list[int]):
        def __call__(self, h: Tensor) -> Tensor:
            return h

    model: Any = nn.Linear(2, 2)
    model.act = Listed()
    model.other = torch.nn.functional.relu
    assert hash(verified.fingerprint(model)) == hash(verified.fingerprint(model))
