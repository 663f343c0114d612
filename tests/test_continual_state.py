"""EWC as a module: its state without data or Fishers, copies, devices, and what it does not register."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

import fisherkit as fk
from fisherkit.continual import EWC
from tests.operator_cases import DTYPES
from tests.test_continual import STRUCTURES, flat, learned, move, task

Learned = tuple[nn.Module, EWC, Any]


def of(structure: str, dtype: torch.dtype = torch.float64, **options: Any) -> Learned:
    return learned(
        lambda model, t: fk.ExactFisher(model, task(t, dtype), structure=structure), 3, dtype, decay=0.6, **options
    )


def through_a_file(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_load_state_dict__goes_on_where_the_other_stood(structure: str, dtype: torch.dtype) -> None:
    """Bit for bit, now and after another task."""
    model, ewc, _ = of(structure, dtype)
    state = through_a_file(ewc.state_dict())
    other = copy.deepcopy(model)
    fresh = EWC(other, 0.3, decay=0.6)
    fresh.load_state_dict(state)
    assert fresh.consolidations == 3
    assert torch.equal(fresh.penalty(), ewc.penalty())
    for each, own in ((ewc, model), (fresh, other)):
        each.consolidate(fk.ExactFisher(own, task(9, dtype), structure=structure))
        move(own, 9)
    assert torch.equal(fresh.penalty(), ewc.penalty())


def test_load_state_dict__takes_nothing_of_the_constructor() -> None:
    model, ewc, _ = of("kfac")
    fresh = EWC(model, 3.0)
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
    fresh = EWC(model, 0.3)
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
    back = EWC(model, 0.3, decay=0.6)
    back.load_state_dict(state)
    torch.testing.assert_close(back.penalty(), before)
