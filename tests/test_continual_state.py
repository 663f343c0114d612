"""EWC saved, resumed, copied and moved, and the rates at which its penalty is stable."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherkit as fk
from fisherkit.continual import EWC
from tests.operator_cases import DTYPES
from tests.small_data import mlp
from tests.test_continual import STRUCTURES, flat, learned, move, task
from tests.test_optim_resume import through_file as through_a_file

Learned = tuple[nn.Module, EWC, Any]


def of(structure: str, dtype: torch.dtype = torch.float64, **options: Any) -> Learned:
    return learned(
        lambda model, t: fk.ExactFisher(model, task(t, dtype), structure=structure), 3, dtype, decay=0.6, **options
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_load_state_dict__goes_on_where_the_other_stood(structure: str, dtype: torch.dtype) -> None:
    """Bit for bit, now and after another task."""
    model, ewc, _ = of(structure, dtype)
    state = through_a_file(ewc.state_dict())
    other = copy.deepcopy(model)
    fresh = EWC(other, 0.3, decay=0.6, normalize="trace")
    fresh.load_state_dict(state)
    assert fresh.consolidations == 3
    assert torch.equal(fresh.penalty(), ewc.penalty())
    for each, own in ((ewc, model), (fresh, other)):
        each.consolidate(fk.ExactFisher(own, task(9, dtype), structure=structure))
        move(own, 9)
    assert torch.equal(fresh.penalty(), ewc.penalty())


def test_load_state_dict__takes_nothing_of_the_constructor() -> None:
    model, ewc, _ = of("kfac")
    fresh = EWC(model, 3.0, normalize="trace")
    fresh.load_state_dict(ewc.state_dict())
    torch.testing.assert_close(fresh.penalty(), 10 * ewc.penalty())
    assert fresh.decay == 1.0


@pytest.mark.parametrize("what", ["model", "nothing", "list"])
def test_load_state_dict__of_something_else_is_refused_with_advice(what: str) -> None:
    model, ewc, _ = of("diagonal")
    before = float(ewc.penalty().detach())
    state: Any = {"model": model.state_dict(), "nothing": {}, "list": [1]}[what]
    with pytest.raises(fk.InvalidArgumentError, match=r"EWC\.load_state_dict: got .*EWC\.state_dict\(\).*Try: saving"):
        ewc.load_state_dict(state)
    assert float(ewc.penalty().detach()) == before


def test_load_state_dict__shares_no_memory_with_the_state() -> None:
    model, ewc, _ = of("diagonal")
    fresh = EWC(model, 0.3, normalize="trace")
    state = ewc.state_dict()
    fresh.load_state_dict(state)
    for term in state["_extra_state"]["terms"]:
        term["quadratic"]["centre"].zero_()
    assert not torch.equal(fresh.penalty(), ewc.penalty())


def test_state_dict__of_an_empty_one_loads() -> None:
    model = nn.Linear(2, 2)
    fresh = EWC(model)
    fresh.load_state_dict(through_a_file(EWC(model).state_dict()))
    assert fresh.penalty().item() == 0


def test_ewc__has_nothing_of_the_model() -> None:
    model, ewc, _ = of("diagonal")
    assert ewc.model is model
    assert list(ewc.parameters()) == list(ewc.modules())[1:] == []
    assert set(ewc.state_dict()) == {"_extra_state"}
    ewc.model = other = copy.deepcopy(model)
    assert ewc.model is other
    assert list(ewc.modules()) == [ewc]
    holder = nn.ModuleDict({"model": other, "ewc": ewc})
    assert set(holder.state_dict()) == {f"model.{name}" for name in model.state_dict()} | {"ewc._extra_state"}


def test_deepcopy__alone_is_bound_to_the_same_model() -> None:
    model, ewc, _ = of("kfac")
    twin = copy.deepcopy(ewc)
    assert twin.model is model
    assert torch.equal(twin.penalty(), ewc.penalty())
    ewc.consolidate(fk.ExactFisher(model, task(5), structure="kfac"))
    assert (twin.consolidations, ewc.consolidations) == (3, 4)
    twin.strength = 5.0
    assert ewc.strength == 0.3


@pytest.mark.parametrize("order", [("model", "ewc"), ("ewc", "model")])
def test_deepcopy__within_a_container_is_bound_to_the_copied_model(order: tuple[str, str]) -> None:
    model, ewc, _ = of("diagonal")
    parts = {"model": model, "ewc": ewc}
    for twin in (
        copy.deepcopy(nn.ModuleDict({name: parts[name] for name in order})),
        copy.deepcopy({name: parts[name] for name in order}),
    ):
        assert twin["ewc"].model is twin["model"]
        assert twin["model"] is not model
        before = ewc.penalty()
        move(twin["model"], 8)
        assert torch.equal(ewc.penalty(), before)
        assert not torch.equal(twin["ewc"].penalty(), before)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_to__the_same_place_and_dtype_changes_nothing(structure: str) -> None:
    model, ewc, _ = of(structure, torch.float32)
    before = ewc.penalty()
    ewc.to("cpu").float().to(torch.float32)
    assert torch.equal(ewc.penalty(), before)
    assert flat(model).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("structure", STRUCTURES)
def test_to__an_accelerator_and_back(structure: str) -> None:
    model, ewc, _ = of(structure, torch.float64)
    before = ewc.penalty()
    model.cuda()
    with pytest.raises(fk.InvalidArgumentError, match=r"ewc.to\("):
        ewc.penalty()
    ewc.cuda()
    torch.testing.assert_close(ewc.penalty().cpu(), before)
    state = ewc.state_dict()
    model.cpu()
    back = EWC(model, 0.3, decay=0.6, normalize="trace")
    back.load_state_dict(state)
    torch.testing.assert_close(back.penalty(), before)


# -- eWC and the optimizer's step --------------------------------------------------------------------------------------


def kept(structure: str = "kfac", strength: float = 1.0) -> tuple[nn.Module, EWC]:
    """A model that has consolidated one task and stands off its centre."""
    model = mlp()
    ewc = EWC(model, strength)
    ewc.consolidate(fk.ImprovedEmpiricalFisher(model, task(0), structure=structure))
    move(model, 1)
    return model, ewc


def train(model: nn.Module, ewc: EWC, optimizer: torch.optim.Optimizer, steps: int, data: bool = True) -> list[float]:
    """The penalties on the way."""
    x, y = task(1)
    values = []
    for _ in range(steps):
        penalty = ewc.penalty()
        values.append(float(penalty.detach()))
        optimizer.zero_grad()
        ((F.cross_entropy(model(x), y) if data else 0.0) + penalty).backward()
        optimizer.step()
    return values


@pytest.mark.parametrize("structure", STRUCTURES)
def test_largest_stable_lr__is_where_gradient_descent_on_one_task_begins_to_diverge(structure: str) -> None:
    ends = []
    for factor in (0.98, 1.02):
        model, ewc = kept(structure, strength=0.7)
        optimizer = torch.optim.SGD(model.parameters(), lr=factor * ewc.largest_stable_lr())
        values = train(model, ewc, optimizer, 15, data=False)
        ends.append([b / a for a, b in zip(values[-4:], values[-3:], strict=False)])
    assert all(ratio < 1 for ratio in ends[0])
    assert all(ratio > 1 for ratio in ends[1])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_largest_stable_lr__is_safe_for_several_tasks(structure: str) -> None:
    _, ewc, reference = learned(
        lambda model, t: fk.ImprovedEmpiricalFisher(model, task(t), structure=structure), tasks=3, decay=0.6
    )
    total = sum(0.6**age * len(F) / F.trace() * F for age, (F, _) in enumerate(reversed(reference)))
    true = 2 / (ewc.strength * float(torch.linalg.eigvalsh(total)[-1]))
    rate = ewc.largest_stable_lr()
    if structure in ("kfac", "ekfac"):
        assert true / 3 < rate <= true * (1 + 1e-9)
    else:
        assert rate == pytest.approx(true, rel=1e-6)


def test_largest_stable_lr__is_infinite_without_a_penalty() -> None:
    model = mlp()
    assert EWC(model).largest_stable_lr() == math.inf
    _, ewc = kept(strength=0.0)
    assert ewc.largest_stable_lr() == math.inf


@pytest.mark.parametrize("factor", [1.2, 4.0, 1e4])
def test_penalty__warns_once_where_a_run_diverges(factor: float) -> None:
    model, ewc = kept(strength=3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=factor * ewc.largest_stable_lr())
    with pytest.warns(UserWarning, match=r"too long .*largest_stable_lr\(\), which strength=3 is part of") as record:
        train(model, ewc, optimizer, 64)
    assert sum("largest_stable_lr" in str(w.message) for w in record) == 1
    assert record[0].filename == __file__


def test_penalty__warns_of_a_rate_that_is_raised_late_and_again_after_a_consolidation() -> None:
    model, ewc = kept()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * ewc.largest_stable_lr())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, ewc, optimizer, 100)
    for _ in range(2):
        optimizer.param_groups[0]["lr"] = 2 * ewc.largest_stable_lr()
        with pytest.warns(UserWarning, match="largest_stable_lr"):
            train(model, ewc, optimizer, 160)
        model.load_state_dict(mlp().state_dict())
        ewc.consolidate(fk.ImprovedEmpiricalFisher(model, task(0), structure="kfac"))


@pytest.mark.parametrize(
    "make",
    [
        lambda p, lr: torch.optim.SGD(p, lr=0.9 * lr),
        lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
        lambda p, lr: torch.optim.Adam(p, lr=1e-2),
        lambda p, lr: torch.optim.AdamW(p, lr=1e-4),
    ],
)
@pytest.mark.parametrize("strength", [1e-2, 1.0, 1e4])
def test_penalty__is_silent_in_runs_that_are_stable(make: Any, strength: float) -> None:
    model = mlp()
    ewc = EWC(model, strength)
    ewc.consolidate(fk.ImprovedEmpiricalFisher(model, task(0), structure="kfac"))
    optimizer = make(model.parameters(), ewc.largest_stable_lr() if strength > 0.1 else 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, ewc, optimizer, 260)
