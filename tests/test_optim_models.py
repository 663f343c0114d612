"""The optimizers with models of many forms."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fisherkit as fk
from fisherkit.errors import ModelError
from fisherkit.kinds import KINDS
from tests.bad_input import X, Y, mlp, wrapped
from tests.optim_cases import close
from tests.optim_loops import backward, each_setting, expected, flat, natural, train

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


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.thorough)])
def test_compiled__models_that_the_optimizer_was_made_for_step_as_others_do(backend: str) -> None:
    ends = []
    for compiled in (False, True):
        model = mlp()[0]
        watched = torch.compile(model, backend=backend) if compiled else model
        optimizer = natural(watched)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(watched(X), Y).backward()
            optimizer.step()
        ends.append(flat(model))
    close(*ends)


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
