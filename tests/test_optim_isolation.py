"""Optimizers beside each other, exceptions, copies, and models of every kind."""

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
from torch.utils.checkpoint import checkpoint

import fisherkit as fk
from fisherkit.errors import ModelError
from fisherkit.kinds import KINDS
from tests import by_hand
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


# -- the optimizers with models of many forms --------------------------------------------------------------------------


# -- models ------------------------------------------------------------------------------------------------------------


class Keywords(nn.Module):
    """Called with keywords alone; returns a mapping; integer inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, *, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        z = self.head(torch.tanh(self.table(ids)).mean(1))
        return {"logits": z} if labels is None else {"logits": z, "loss": F.cross_entropy(z, labels)}


@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
def test_models__with_keywords_mappings_and_their_own_loss(inside: bool) -> None:
    torch.manual_seed(0)
    model = Keywords().double()
    ids = torch.randint(7, (6, 5))
    change = []
    for own in (model, copy.deepcopy(model)):
        optimizer, before = natural(own), flat(own)
        output = own(ids=ids, labels=Y) if inside and own is model else own(ids=ids)
        (output["loss"] if "loss" in output else F.cross_entropy(output["logits"], Y)).backward()
        optimizer.step()
        change.append(flat(own) - before)
    close(change[0], change[1])


@pytest.mark.parametrize("kind", ["ief", "sf"])
def test_models__with_gradient_checkpointing(kind: str) -> None:
    def segments(m: Any, x: Tensor) -> Tensor:
        h: Tensor = checkpoint(lambda t: torch.tanh(m.body[0](t)), x, use_reentrant=False) if m.training else (
            torch.tanh(m.body[0](x))
        )  # fmt: skip
        return m.body[2](h)

    model = wrapped(segments).train()
    options = {"kind": kind, "damping": 1e-2, "gram_damping": None}
    close(train(model, natural(model, **options)), expected(options))


def test_models__that_differentiate_in_forward() -> None:
    """A Jacobian of a layer by torch.func, whose uses inside are no rule's; the same, written out."""

    def by_func(m: Any, x: Tensor) -> Tensor:
        jacobian = torch.vmap(torch.func.jacrev(lambda t: torch.tanh(m.body[0](t))))(x)
        return m.body[2](jacobian.sum(2))

    def by_hand(m: Any, x: Tensor) -> Tensor:
        layer = m.body[0]
        return m.body[2]((1 - torch.tanh(layer(x)).square()) * layer.weight.sum(1))

    changes = []
    for function in (by_func, by_hand):
        model = wrapped(function)
        changes.append(train(model, natural(model)))
    close(changes[0], changes[1])


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "nkp"])
@pytest.mark.parametrize("kind", ["exact", "sf", "ief"])
def test_positions__that_only_ignored_outputs_depend_on_do_not_count(kind: str, structure: str) -> None:
    """In the factors of a model that hides whose its positions are, as a Fisher of the same batch has them."""

    def hidden(m: Any, ids: Tensor) -> Tensor:
        h = m.body[0](F.embedding(ids, torch.eye(4, dtype=torch.float64)))
        return m.body[2](torch.tanh(torch.index_add(torch.zeros_like(h), 0, torch.arange(len(h)), h)))

    model = wrapped(hidden)
    ids, labels = torch.randint(4, (4, 6), generator=torch.Generator().manual_seed(0)), torch.arange(24).view(4, 6) % 3
    labels[0, 4:], labels[1, 0] = -100, -100
    optimizer = natural(model, kind=kind, structure=structure, damping=1e-2, gram_damping=None)
    F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum").div(4).backward()
    gradient, before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), flat(model)
    seed = {"seed": 0} if kind == "sf" else {}
    fisher = KINDS[kind](copy.deepcopy(model), (ids, labels), structure=structure, **seed)
    optimizer.step()
    close(flat(model) - before, -optimizer.param_groups[0]["lr"] * fisher.solve(gradient, damping=1e-2))


def test_models__with_operations_in_place_behind_layers() -> None:
    def inplace(m: Any, x: Tensor) -> Tensor:
        return m.body[2](m.body[0](x).tanh_())

    model = wrapped(inplace)
    close(train(model, natural(model)), expected())


def test_auxiliary_loss__on_features_is_in_the_gradient_and_not_in_the_rows() -> None:
    class WithFeatures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: Tensor) -> Tensor:
            self.features = self.body[0](x)
            return self.body[2](torch.tanh(self.features))

    model = WithFeatures()
    optimizer, before = natural(model, lr=1.0, gram_damping=None, damping=1e-2), flat(model)
    dense = fk.ImprovedEmpiricalFisher(mlp().eval(), (X, Y)).to_dense()
    for number in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y) + 0.3 * model.features.square().mean()
        if number == 0:
            with pytest.warns(UserWarning, match="other ways than through the model's outputs"):
                loss.backward()
        else:
            loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    optimizer.step()
    close(before - flat(model), torch.linalg.solve(dense + 1e-2 * torch.eye(len(dense)).double(), gradient))


@each_setting
def test_preconditioner__works_beside_adam(setting: dict[str, Any]) -> None:
    model = mlp()
    options = {k: v for k, v in setting.items() if k != "ema"}
    preconditioner = fk.optim.Preconditioner(model, **({"structure": "full"} | options))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first = F.cross_entropy(model(X), Y).item()
    for _ in range(20):
        optimizer.zero_grad()
        backward(model)
        preconditioner.step()
        optimizer.step()
    assert F.cross_entropy(model(X), Y).item() < 0.8 * first


def test_compiled__models_are_refused_at_the_step() -> None:
    model = mlp()
    optimizer = natural(model)
    compiled = torch.compile(model, backend="eager")
    F.cross_entropy(compiled(X), Y).backward()
    with pytest.raises(ModelError, match="compiled"):
        optimizer.step()
    torch._dynamo.reset()


@pytest.mark.parametrize("part", [False, True])
def test_compiled__models_that_the_optimizer_was_made_for_step_as_others_do(part: bool) -> None:
    """What is watched is not compiled, which would take seconds; what is not, is."""
    torch._dynamo.reset()
    ends, compiled = [], []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    for compile_it in (False, True):
        model = nn.Sequential(mlp()[0])
        watched: Any = model
        if compile_it and part:
            model[0] = torch.compile(model[0], backend=backend)  # type: ignore[assignment]
        elif compile_it:
            watched = torch.compile(model, backend=backend)
        optimizer = natural(watched)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(watched(X), Y).backward()
            optimizer.step()
        ends.append(flat(model))
        fk.EmpiricalFisher(watched, (X, Y), structure="kfac")
        with pytest.raises(RuntimeError, match="shapes"):
            watched(X[:, 1:])
        assert not compiled
        optimizer.close()
    close(*ends)
    watched(X)
    assert compiled
    torch._dynamo.reset()


def test_compiled__parts_of_a_model_run_as_they_were_written() -> None:
    graphs: list[Any] = []
    model = nn.Sequential(nn.Linear(X.shape[1], 4), nn.LayerNorm(4), nn.Linear(4, 3)).to(X)
    j = by_hand.rows(model, (X, Y))
    model[1] = torch.compile(model[1], backend=lambda graph, _: graphs.append(graph) or graph.forward)
    close(fk.EmpiricalFisher(model, (X, Y)).to_dense(), j.mT @ j / len(j))
    optimizer = fk.optim.NaturalGradient(model, lr=1.0, kind="ef", damping=1e-2)
    close(by_hand.stepped(model, optimizer, X, Y), by_hand.natural(j, 1e-2))
    assert not graphs
    optimizer.close()
    model(X)
    assert graphs
    torch._dynamo.reset()


class Cubed(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w**3


def swapped(model: nn.Sequential) -> None:
    model[0] = copy.deepcopy(model[0])


def parametrized(model: nn.Sequential) -> None:
    nn.utils.parametrize.register_parametrization(model[0], "weight", Cubed())


@pytest.mark.parametrize("change", [swapped, parametrized])
@pytest.mark.parametrize("kind", ["ief", "exact"])
def test_models__whose_parameters_are_others_than_the_optimizers(kind: str, change: Any) -> None:
    model = mlp()
    optimizer = natural(model, kind=kind, damping=1e-2, gram_damping=None)
    train(model, optimizer)
    optimizer.zero_grad()
    change(model)
    backward(model)
    before = flat(model)
    with pytest.raises(ModelError, match=r"0\..*weight.*a new NaturalGradient"):
        optimizer.step()
    assert torch.equal(before, flat(model))


def test_optimizer__that_is_collected_in_the_middle_of_a_forward_pass() -> None:
    model = mlp()
    model.register_forward_pre_hook(lambda *_: (gc.collect(), None)[1])
    for before in (False, True):
        optimizer: Any = fk.optim.Preconditioner(model)
        optimizer.itself = optimizer  # only the collector finds it
        if before:
            F.cross_entropy(model(X), Y).backward()
        gc.disable()
        try:
            del optimizer
            model(X)
        finally:
            gc.enable()
        assert not model._forward_hooks


def test_compiled__a_stance_that_cannot_be_set_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()[0]
    optimizer = natural(model)

    def refuse(stance: str) -> None:
        raise RuntimeError("not here")

    with monkeypatch.context() as patch:
        patch.setattr("torch.compiler.set_stance", refuse)
        for module in ("rows.differentiable", "optim.watch"):
            patch.setattr(f"fisherkit.{module}.COMPILER", "torch")
        with pytest.raises(RuntimeError, match="not here"):
            fk.EmpiricalFisher(model, (X, Y))
        with pytest.raises(RuntimeError, match="not here"):
            model(X)
    before = flat(model).clone()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    assert not torch.equal(flat(model), before)
