"""The optimizers beside each other, after exceptions, and after their end: nothing is left, nothing is heard."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from tests.bad_input import X, Y, mlp, normal, wrapped
from tests.optim_cases import close
from tests.optim_loops import backward, each_setting, expected, flat, natural, train
from tests.snapshot import of_process

# -- two at once -------------------------------------------------------------------------------------------------------


@each_setting
def test_two_optimizers__on_one_model_do_not_hear_each_other(setting: dict[str, Any]) -> None:
    """Each makes passes of its own: the plan's, and the backward passes of sampled and exact kinds."""
    model = mlp()
    options = {"gram_damping": None} | setting
    pair = [natural(model, **options, params=[f"{n}.weight", f"{n}.bias"]) for n in (0, 2)]
    before = flat(model)
    backward(model)
    for one in pair:
        one.step()
    singles = []
    for n in (0, 2):
        single = mlp()
        train(single, natural(single, **options, params=[f"{n}.weight", f"{n}.bias"]), 1)
        singles.append(flat(single) - before)
    close(flat(model) - before, singles[0] + singles[1])


def test_two_optimizers__of_a_model_and_of_its_part() -> None:
    whole = wrapped(lambda m, x: m.body(x)).train()
    inner = fk.optim.NaturalGradient(whole.get_submodule("body"), 0.1, kind="exact", damping=1e-2)
    outer = fk.optim.NaturalGradient(whole, 0.1, kind="exact", damping=1e-2)
    backward(whole)
    single = mlp()
    before = flat(single)
    train(single, natural(single, kind="exact", gram_damping=None, damping=1e-2), 1)
    inner.step()
    close(flat(whole) - before, flat(single) - before)
    outer.step()
    close(flat(whole) - before, 2 * (flat(single) - before))


# -- exceptions --------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """As KeyboardInterrupt: no always-called hook hears of it."""


def interrupted(model: nn.Module, error: type[BaseException]) -> None:
    def stop(*_: Any) -> None:
        raise error

    handle = model[1].register_forward_hook(stop)  # type: ignore[index, operator]
    with pytest.raises(error):
        model(X)
    handle.remove()


@pytest.mark.parametrize("error", [ValueError, Stopped, KeyboardInterrupt])
def test_exception__in_forward_leaves_no_trace(error: type[BaseException]) -> None:
    model = mlp()
    optimizer, before = natural(model), of_process(None)["function modes"]
    found = train(model, optimizer, before=lambda: interrupted(model, error))
    close(found, expected())
    assert of_process(None)["function modes"] == before


@pytest.mark.parametrize("then", ["step", "zero_grad", "collected", "eval"])
def test_interrupt__its_mode_is_left_at_the_next_opportunity(then: str) -> None:
    model = mlp()
    optimizer = natural(model)
    backward(model)
    interrupted(model, KeyboardInterrupt)
    if then == "eval":
        with torch.no_grad():
            model(X)
    elif then == "collected":
        del optimizer
        gc.collect()
    else:
        getattr(optimizer, then)()
    assert of_process(None)["function modes"] == 0


def test_interrupt__a_mode_entered_since_stays() -> None:
    model = mlp()
    optimizer = natural(model)
    with torch.device("cpu"):
        interrupted(model, KeyboardInterrupt)
        optimizer.zero_grad()
        assert of_process(None)["function modes"] == 1
    assert of_process(None)["function modes"] == 0


def test_exception__between_forward_and_step_costs_that_batch_only() -> None:
    model = mlp()
    optimizer = natural(model)

    def failing() -> None:
        loss = F.cross_entropy(model(normal(3, 4)), Y[:3])
        with pytest.raises(RuntimeError):
            raise RuntimeError(f"a data loader's, at loss {loss.item()}")

    close(train(model, optimizer, before=failing), expected())


def test_exception__in_backward_costs_that_batch_only() -> None:
    model = mlp()
    optimizer = natural(model)

    def failing() -> None:
        z = model(normal(3, 4))

        def stop(_: Tensor) -> None:
            raise ValueError("a hook of the user's")

        model[2].weight.register_hook(stop).remove()
        hidden = z.clone()
        hidden.register_hook(stop)
        with pytest.raises(ValueError, match="a hook of the user's"):
            F.cross_entropy(hidden, Y[:3]).backward()
        optimizer.zero_grad()

    close(train(model, optimizer, before=failing), expected())


# -- copies, and letting go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies__of_the_model_are_not_watched(duplicate: Callable[[Any], Any]) -> None:
    model = mlp()
    optimizer = natural(model)
    twin = duplicate(model)

    def other() -> None:
        backward(twin, normal(3, 4), Y[:3])

    close(train(model, optimizer, before=other), expected())
    own = mlp()
    twin = duplicate(own)
    close(train(twin, natural(twin)), expected())


def hooks(model: nn.Module) -> int:
    return len(model._forward_hooks) + len(model._forward_pre_hooks)


@pytest.mark.parametrize("how", ["collected", "closed"])
@pytest.mark.parametrize("cls", [fk.optim.NaturalGradient, fk.optim.Preconditioner])
def test_hooks__are_gone_with_the_optimizer(cls: Any, how: str) -> None:
    model = mlp()
    optimizer = cls(model, lr=0.1, damping=1e-2)
    backward(model)
    optimizer.step()
    assert hooks(model) == 2
    if how == "closed":
        optimizer.close()
    else:
        del optimizer
        gc.collect()
    assert hooks(model) == 0
    backward(model)


@each_setting
def test_memory__nothing_of_a_step_outlives_it(setting: dict[str, Any]) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def remember(m: Any, x: Tensor) -> Tensor:
        hidden = m.body[0](x)
        alive.append(weakref.ref(hidden))
        z: Tensor = m.body[2](torch.tanh(hidden))
        alive.append(weakref.ref(z))
        return z

    model = wrapped(remember)
    optimizer = natural(model, **({"gram_damping": None} | setting))
    model(X)  # waits in vain
    x = X.clone()
    alive.append(weakref.ref(x))
    loss = F.cross_entropy(model(x), Y)
    loss.backward()
    optimizer.step()
    del x, loss
    assert [ref() for ref in alive if ref() is not None] == []


def test_memory__waiting_forward_passes_are_few() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def remember(m: Any, x: Tensor) -> Tensor:
        z: Tensor = m.body(x)
        alive.append(weakref.ref(z))
        return z

    model = wrapped(remember)
    optimizer = natural(model)
    for _ in range(20):
        model(X)
    assert sum(ref() is not None for ref in alive) <= 8
    assert optimizer is not None
