"""Training that is stopped and goes on from a file takes the same steps, to the last bit."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.model_state import with_checksum
from tests.axes import pairwise
from tests.bad_input import X, Y, mlp, normal
from tests.optim_loops import flat

STEPS, CUT = 7, 4

SETTINGS: dict[str, dict[str, Any]] = {
    "ief-gram": {"gram_damping": 1e-2},
    "ef-block": {"kind": "ef", "gram_damping": 1e-2, "structure": "block"},
    "truncated": {"kind": "truncated", "rank": 2, "damping": 1e-2},
    "sf": {"kind": "sf", "draws": 2, "damping": 1e-2},
    "exact": {"kind": "exact", "damping": 1e-2},
    "relative": {"kind": "exact", "damping": fk.RelativeDamping(0.1)},
    "momentum": {"gram_damping": 1e-2, "momentum": 0.9, "weight_decay": 0.01},
    "normalized": {"gram_damping": 1e-2, "normalize_update": True, "trust_region": 1e-3},
    "diagonal": {"damping": 1e-2, "structure": "diagonal", "ema": 0.9},
    "kfac": {"damping": 1e-2, "structure": "kfac", "ema": 0.9},
    "kfac-every": {"damping": 1e-2, "structure": "kfac", "ema": 0.9, "update_every": 3},
    "kfac-reduce": {"damping": 1e-2, "structure": "kfac", "ema": 0.9, "kfac_positions": "reduce"},
    "kfac-refresh": {"damping": 1e-2, "structure": "kfac", "ema": 0.9, "refresh_every": 3},
    "kfac-gram-sum": {"gram_damping": 1e-2, "structure": "kfac", "update_every": 3, "reduction": "sum"},
    "ekfac": {"damping": 1e-2, "structure": "ekfac", "ema": 0.9, "refresh_every": 2, "momentum": 0.5},
    "layer-every": {"kind": "exact", "damping": fk.optim.LayerDamping(10.0), "structure": "kfac", "ema": 0.5,
                     "update_every": 2, "trust_region": 1e-3},
    "ekfac-sf": {"kind": "sf", "damping": 1e-2, "structure": "ekfac", "ema": 0.9, "update_every": 3},
}  # fmt: skip
each = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


def through_file(state: Any) -> Any:
    """As a checkpoint that runs no code when it is read."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def batch(step: int) -> tuple[Tensor, Tensor]:
    size = 6 - step % 2
    return normal(size, 4, seed=step), Y[:size]


def model_with_norm() -> nn.Module:
    return mlp(nn.LayerNorm(5).double())


class Run:
    """A model with its optimizer, its schedule, and a preconditioner in front if asked for."""

    def __init__(self, setting: dict[str, Any], beside: bool, model: nn.Module | None = None) -> None:
        self.model = model_with_norm() if model is None else model
        own = {k: v for k, v in setting.items() if k not in ("momentum", "weight_decay", "normalize_update")}
        self.reduction = setting.get("reduction", "mean")
        self.preconditioner = fk.optim.Preconditioner(self.model, **({"structure": "full"} | own)) if beside else None
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(self.model.parameters(), lr=0.01)
            if beside
            else fk.optim.NaturalGradient(self.model, 0.1, **setting)
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            x, y = batch(step)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y, reduction=self.reduction).backward()
            if self.preconditioner is not None:
                self.preconditioner.step()
            self.optimizer.step()
            self.scheduler.step()

    def parts(self) -> dict[str, Any]:
        return {name: part for name, part in vars(self).items() if name != "reduction" and part is not None}

    def state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load(self, state: dict[str, Any]) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


@pytest.mark.parametrize("beside", [False, True], ids=["natural", "preconditioner"])
@pytest.mark.parametrize("name", SETTINGS)
def test_resume__goes_on_bit_for_bit(name: str, beside: bool) -> None:
    straight = Run(SETTINGS[name], beside)
    straight.steps(0, STEPS)
    for cut in (0, CUT, CUT + 1) if "every" in name or "refresh" in name else (CUT,):
        stopped, resumed = Run(SETTINGS[name], beside), Run(SETTINGS[name], beside)
        stopped.steps(0, cut)
        resumed.load(through_file(stopped.state()))
        resumed.steps(cut, STEPS)
        assert torch.equal(flat(resumed.model), flat(straight.model)), cut


@each
def test_load__does_not_share_memory_with_the_state(setting: dict[str, Any]) -> None:
    run, other = Run(setting, False), Run(setting, False)
    run.steps(0, 2)
    state = run.state()
    other.load(copy.deepcopy(state))
    kept = copy.deepcopy(state["optimizer"])
    other.steps(2, STEPS)
    assert str(state["optimizer"]) == str(kept)


def test_state__says_which_damping_was_chosen() -> None:
    for name, chosen, other in (("ief-gram", "gram_damping", "damping"), ("exact", "damping", "gram_damping")):
        group = Run(SETTINGS[name], False).optimizer.state_dict()["param_groups"][0]
        assert group[chosen] == 1e-2
        assert group[other] is None


@pytest.mark.parametrize(
    ("own", "loaded", "says"),
    [
        ("ief-gram", "exact", "kind"),
        ("ief-gram", "ef-block", "kind"),
        ("kfac", "diagonal", "structure"),
        ("kfac", "kfac-gram-sum", "gram"),
        ("sf", "ekfac-sf", "options"),
        ("kfac", "kfac-reduce", "kfac_positions"),
    ],
)
@pytest.mark.parametrize("beside", [False, True], ids=["natural", "preconditioner"])
def test_load__of_another_kind_structure_or_damping_is_refused(own: str, loaded: str, says: str, beside: bool) -> None:
    target, source = Run(SETTINGS[own], beside), Run(SETTINGS[loaded], beside)
    part = "preconditioner" if beside else "optimizer"
    with pytest.raises(InvalidArgumentError, match=f"a state with {says} = "):
        getattr(target, part).load_state_dict(getattr(source, part).state_dict())


LIKELIHOODS: dict[str, tuple[Any, Any]] = {
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss()),
    "weights": (nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0])), nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 2.0]))),
    "gaussian": ("gaussian", nn.MSELoss()),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("cls", [fk.optim.NaturalGradient, fk.optim.Preconditioner])
def test_load__of_another_likelihood_is_refused_and_older_states_load(cls: type, name: str) -> None:
    first, second = (cls(mlp(), lr=0.1, damping=1e-2, structure="kfac", likelihood=one) for one in LIKELIHOODS[name])
    state = first.state_dict()
    cls(mlp(), lr=0.1, damping=1e-2, structure="kfac", likelihood=LIKELIHOODS[name][0]).load_state_dict(state)
    with pytest.raises(InvalidArgumentError, match="a state with likelihood = "):
        second.load_state_dict(state)
    old = state.get("curvature", state)
    del old["likelihood"], old["checksum"]
    second.load_state_dict(state)


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "width": (lambda: nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)).double(),
              r"'0.weight': float64 \[5, 4\] and not float64 \[7, 4\]"),
    "dtype": (lambda: model_with_norm().float(), r"'0.weight': float64 \[5, 4\] and not float32 \[5, 4\]"),
    "more": (lambda: nn.Sequential(*model_with_norm(), nn.Linear(3, 3).double()),
             r"'4.weight': none and not float64 \[3, 3\]"),
    "fewer": (lambda: mlp(nn.Identity()), r"'1.weight': float64 \[5\] and not none"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "beside", "other"),
    pairwise(["momentum", "diagonal", "kfac", "kfac-every", "ekfac", "layer-every"], [False, True], OTHERS),
)
def test_load__of_another_models_state_is_refused_and_changes_nothing(name: str, beside: bool, other: str) -> None:
    source, (make, words) = Run(SETTINGS[name], beside), OTHERS[other]
    source.steps(0, 2)
    target, part = Run(SETTINGS[name], beside, make()), "preconditioner" if beside else "optimizer"
    own, state = getattr(target, part), source.state()[part]
    before = str(own.state_dict())
    with pytest.raises(InvalidArgumentError, match=rf"load_state_dict: got a state of other parameters \(.*{words}"):
        own.load_state_dict(state)
    assert str(own.state_dict()) == before
    # States of before did not say of which parameters they are.
    old = state if beside else state["curvature"]
    del old["parameters"], old["checksum"]
    if other in ("width", "dtype") and old["averages"]:
        with pytest.raises(InvalidArgumentError, match="averages cannot be read"):
            own.load_state_dict(state)
        assert str(own.state_dict()) == before


def unsaid(state: dict[str, Any]) -> dict[str, Any]:
    """The state without its checksums, as one that was edited on purpose."""
    bare = {k: v for k, v in state.items() if "checksum" not in k}
    return {**bare, "curvature": unsaid(state["curvature"])} if "curvature" in state else bare


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state["param_groups"][0].pop(name)


def setting(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state["param_groups"][0].update({name: value})


def spoilt(*path: Any) -> Callable[[dict[str, Any]], Any]:
    def spoil(state: Any) -> None:
        for key in path:
            state = state[key]
        state.view(-1)[-1] = float("nan")

    return spoil


def tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = state.get("curvature", state)["averages"][0]["tensors"]
    return found


def spoil_averages(state: dict[str, Any]) -> None:
    next(t for t in tensors_of(state).values() if t.is_floating_point() and t.ndim).view(-1)[-1] = float("nan")


DAMAGES: dict[str, tuple[bool, Callable[[dict[str, Any]], Any], str]] = {
    **{f"without {name}": (False, without(name), rf"param_groups\[0\] without \['{name}'\]")
       for name in ("lr", "momentum", "damping", "gram_damping", "trust_region", "normalize_update", "params")},
    "lr": (False, setting("lr", float("nan")), r"\['lr'\]=nan"),
    "text": (False, setting("momentum", "a"), r"\['momentum'\] of type str"),
    "damping": (False, setting("damping", float("inf")), "damping=inf"),
    "trust region": (False, setting("trust_region", float("nan")), "trust_region=nan"),
    "momentum": (False, spoilt("state", 0, "momentum_buffer"), "momentum with NaN or infinite entries"),
    "steps": (False, lambda state: state["curvature"].update(steps=2.5), "steps of type float"),
    "averages": (False, spoil_averages, "NaN or infinite entries"),
    "averages beside": (True, spoil_averages, "NaN or infinite entries"),
    "momentum beside": (True, spoilt("momentum", "0.weight"), "momentum with NaN or infinite entries"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_load__of_a_damaged_state_is_refused_and_changes_nothing(name: str) -> None:
    beside, damage, words = DAMAGES[name]
    runs = [Run({**SETTINGS["ekfac"], "gradient_momentum": 0.5} if beside else SETTINGS["ekfac"], beside)
            for _ in range(2)]  # fmt: skip
    part = "preconditioner" if beside else "optimizer"
    for run in runs:
        run.steps(0, 2)
    own, state = getattr(runs[0], part), through_file(getattr(runs[1], part).state_dict())
    damage(state)
    before = str(own.state_dict())
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=rf"load_state_dict.*{words}"):
        own.load_state_dict(unsaid(state))
    assert str(own.state_dict()) == before


def test_load__of_momentum_for_other_parameters_is_refused_and_changes_nothing() -> None:
    found = []
    for reverse in (False, True):
        model = model_with_norm()
        groups = [{"params": [p]} for p in model.parameters()][:: -1 if reverse else 1]
        found.append(fk.optim.NaturalGradient(model, 0.1, damping=1e-2, momentum=0.9, params=groups))
        nn.functional.cross_entropy(model(X), Y).backward()
        found[-1].step()
    before = str(found[1].state_dict())
    with pytest.raises(InvalidArgumentError, match="momentum of other shapes"):
        found[1].load_state_dict(found[0].state_dict())
    assert str(found[1].state_dict()) == before


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_load__of_a_state_of_before_momentum_was_kept(momentum: float) -> None:
    old, new, whole = (Run({**SETTINGS["kfac"], "layer_rms": 0.1}, True) for _ in range(3))
    for run in (old, new, whole):
        assert run.preconditioner is not None
        own = run.preconditioner._curvature
        own.settings = replace(own.settings, gradient_momentum=momentum)
    old.steps(0, CUT)
    state = through_file(old.state())
    assert ("momentum" in state["preconditioner"]) == (momentum > 0)
    whole.load(through_file(state))
    known = {k: v for k, v in state["preconditioner"].items() if k not in {"momentum", "checksum"}}
    new.load({**state, "preconditioner": with_checksum({**known, "least": 0.1})})
    for run in (old, new, whole):
        run.steps(CUT, STEPS)
    assert torch.equal(flat(old.model), flat(whole.model))
    assert torch.equal(flat(old.model), flat(new.model)) == (momentum == 0)


def test_load__of_another_optimizers_state_is_refused() -> None:
    model = mlp()
    natural, preconditioner = (
        fk.optim.NaturalGradient(model, 0.1, damping=1e-2),
        fk.optim.Preconditioner(model, damping=1e-2),
    )
    adam = torch.optim.Adam(model.parameters()).state_dict()
    with pytest.raises(InvalidArgumentError, match=r"NaturalGradient.load_state_dict.*without \['curvature'\]"):
        natural.load_state_dict(adam)
    with pytest.raises(InvalidArgumentError, match=r"Preconditioner.load_state_dict.*without"):
        preconditioner.load_state_dict(adam)


def test_load__of_the_other_class_names_it() -> None:
    natural, preconditioner = (
        cls(mlp(), lr=0.1, damping=1e-2) for cls in (fk.optim.NaturalGradient, fk.optim.Preconditioner)
    )
    with pytest.raises(InvalidArgumentError, match=r"Preconditioner.load_state_dict: got a state of NaturalGradient"):
        preconditioner.load_state_dict(natural.state_dict())
    with pytest.raises(InvalidArgumentError, match=r"NaturalGradient.load_state_dict: got a state of Preconditioner"):
        natural.load_state_dict(preconditioner.state_dict())


@pytest.mark.parametrize("kept", [0.0, 0.5], ids=["into none", "into some"])
def test_load__between_gradient_momenta_leaves_it_out_or_begins_it(kept: float) -> None:
    """As the page says: without one the next update is of g alone, and one that begins is of g + μg."""
    settings: dict[str, Any] = {"damping": 1e-2, "structure": "kfac", "update_every": 5}
    model, state = mlp(), None
    for momentum in (0.5 - kept, kept):
        preconditioner = fk.optim.Preconditioner(model, gradient_momentum=momentum, **settings)
        if state is not None:
            preconditioner.load_state_dict(state)
        for _ in range(2 if state is None else 1):
            model.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            preconditioner.step()
        state = through_file(preconditioner.state_dict()) if state is None else state
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    plain = fk.optim.Preconditioner(model, **settings)
    plain.load_state_dict({k: v for k, v in state.items() if k not in {"momentum", "checksum"}})
    model.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()
    plain.step()
    torch.testing.assert_close(found, (1 + kept) * torch.cat([p.grad.flatten() for p in model.parameters()]))


@pytest.mark.parametrize("cls", [fk.optim.NaturalGradient, fk.optim.Preconditioner])
def test_load__of_single_precision_into_half_keeps_the_averages(cls: type) -> None:
    model = mlp().float()
    own = cls(model, lr=0.1, damping=1e-2, structure="kfac")
    nn.functional.cross_entropy(model(X.float()), Y).backward()
    own.step()
    other = cls(copy.deepcopy(model).bfloat16(), lr=0.1, damping=1e-2, structure="kfac")
    other.load_state_dict(own.state_dict())
    assert str(other.state_dict()) == str(own.state_dict())


def test_load__with_other_groups_leaves_the_running_averages() -> None:
    model = mlp()
    split = [{"params": [p]} for p in model.parameters()]
    optimizer = fk.optim.NaturalGradient(model, 0.1, damping=1e-2, structure="kfac", params=split)
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()
    other = fk.optim.NaturalGradient(mlp(), 0.1, damping=1e-2, structure="kfac")
    before = str(optimizer.state_dict()["curvature"])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(other.state_dict())
    assert str(optimizer.state_dict()["curvature"]) == before


def test_names__with_any_characters_survive() -> None:
    runs = []
    for _ in range(2):
        model = nn.Sequential()
        for name, part in zip(("a+b", "/", "c+"), mlp(), strict=True):
            model.add_module(name, part)
        runs.append((model, fk.optim.NaturalGradient(model, 0.1, damping=1e-2, structure="kfac", update_every=2)))
    for model, optimizer in runs[:1]:
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    runs[1][0].load_state_dict(runs[0][0].state_dict())
    runs[1][1].load_state_dict(through_file(runs[0][1].state_dict()))
    for model, optimizer in runs:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    assert torch.equal(flat(runs[0][0]), flat(runs[1][0]))
