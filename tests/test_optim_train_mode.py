"""Train mode: dropout, batch norm, mixed precision and skipped steps."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.errors import ModelError
from tests import by_hand
from tests.bad_input import F64, X, Y, mlp, normal
from tests.optim_cases import close
from tests.optim_loops import backward, flat, natural
from tests.reference.zoo import Compose, parameter

DAMPING = 1e-2


def rows_of(model: nn.Module, forward: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Per-example loss gradients and s_n, of z = forward(x) made of one graph, example by example."""
    z = forward(x)
    parameters, J, s = list(model.parameters()), [], []
    for n in range(len(y)):
        loss = F.cross_entropy(z[n : n + 1], y[n : n + 1])
        found = torch.autograd.grad(
            loss, [*parameters, z], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        J.append(torch.cat([g.flatten() for g in found[:-1]]))
        s.append(found[-1].square().sum())
    return torch.stack(J), torch.stack(s)


def gram_update(J: Tensor, t: Tensor) -> Tensor:
    return J.T @ torch.linalg.solve(J @ J.T + DAMPING * torch.eye(len(J), dtype=J.dtype), t)


# -- dropout -----------------------------------------------------------------------------------------------------------


class DropPath(nn.Module):
    """Stochastic depth as vision models have it: whole examples of a branch are dropped, the others scaled."""

    def __init__(self, p: float, by: str) -> None:
        super().__init__()
        self.p, self.by = p, by

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape, keep = (len(x),) + (1,) * (x.ndim - 1), 1 - self.p
        if self.by == "bernoulli":
            return x * x.new_empty(shape).bernoulli_(keep).div_(keep)
        return x.div(keep) * (keep + torch.rand(shape, dtype=x.dtype)).floor_()


class Branch(nn.Module):
    """x + a branch of it that is dropped."""

    def __init__(self, by: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branch, self.drop = nn.Linear(5, 5).double(), DropPath(0.4, by)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.branch(x))


DROPS: dict[str, Any] = {
    "dropout": lambda: nn.Dropout(0.4), "bernoulli": lambda: Branch("bernoulli"), "rand": lambda: Branch("rand"),
}  # fmt: skip


@pytest.mark.parametrize("by", ["bernoulli", "rand"])
@pytest.mark.parametrize("structure", ["full", "kfac"])
def test_drop_path__in_a_build_needs_eval_mode_where_it_is_not_there(structure: str, by: str) -> None:
    model, plain = mlp(Branch(by)), mlp(Branch(by))
    plain[1].drop = nn.Identity()
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"Try: model.eval\(\)"):
        fk.EmpiricalFisher(model.train(), (X, Y), structure=structure)
    found, expected = (fk.EmpiricalFisher(m.eval(), (X, Y), structure=structure) for m in (model, plain))
    assert torch.equal(found.to_dense(), expected.to_dense())


@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("kind", ["ef", "ief", "exact"])
def test_dropout__rows_are_those_of_the_masks_that_the_loss_saw(kind: str, drop: str) -> None:
    model = mlp(DROPS[drop]()).train()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    J, s = rows_of(twin, twin, X, Y)
    if kind == "exact":
        torch.manual_seed(3)
        z = twin(X)
        F_dense = torch.zeros(J.shape[1], J.shape[1], dtype=F64)
        for n in range(len(Y)):
            p = torch.softmax(z[n].detach(), -1)
            H = torch.diag(p) - torch.outer(p, p)
            Jz = torch.stack([by_hand.gradient(entry, twin) for entry in z[n]])
            F_dense += Jz.T @ H @ Jz / len(Y)
        expected = torch.linalg.solve(F_dense + DAMPING * torch.eye(len(F_dense), dtype=F64), J.mean(0))
        optimizer = natural(model, 1.0, kind="exact", damping=DAMPING, gram_damping=None)
    else:
        expected = gram_update(J, s if kind == "ief" else torch.ones_like(s))
        optimizer = natural(model, 1.0, kind=kind, gram_damping=DAMPING)
    before = flat(model)
    torch.manual_seed(3)
    backward(model)
    optimizer.step()
    close(before - flat(model), expected)


def test_dropout__masks_are_those_of_a_run_without_the_optimizer() -> None:
    """The first forward pass verifies rules with passes of its own, which draw nothing from the generator."""
    model = mlp(nn.Dropout(0.4)).train()
    torch.manual_seed(5)
    z = model(X), model(X)
    optimizer = natural(model)
    torch.manual_seed(5)
    assert torch.equal(model(X), z[0])
    assert torch.equal(model(X), z[1])
    assert all(module.training for module in model.modules())
    assert optimizer is not None


def test_dropout__beside_a_parameter_without_a_rule_is_refused_by_name() -> None:
    model = Compose(lambda m, x: m.drop(torch.cdist(x, m.own)), own=parameter(3, 4), drop=nn.Dropout(0.5)).double()
    optimizer = natural(model.train())
    with pytest.raises(ModelError, match=r"active dropout.*\['own'\].*model.eval\(\)"):
        model(X)
    model.eval()
    backward(model)
    optimizer.step()


def test_instance_norm__with_running_statistics_is_refused_by_name() -> None:
    norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), norm, nn.Flatten(), nn.Linear(9, 3)).double().train()
    optimizer = natural(model)
    with pytest.raises(ModelError, match=r"'1' beside parameters without a layer rule"):
        model(normal(6, 2, 5))
    model.eval()
    backward(model, normal(6, 2, 5))
    optimizer.step()


# -- batch norm --------------------------------------------------------------------------------------------------------


def with_norm(*more: nn.Module) -> nn.Sequential:
    model = mlp(nn.BatchNorm1d(5), *more)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    return model.train()


def constant_statistics(model: nn.Sequential, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The forward pass in which the norm's mean and variance have no gradient."""
    h = model[0](x)
    mean, variance = h.detach().mean(0), h.detach().var(0, correction=0)
    norm: Any = model[1]
    h = (h - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias
    h = h if mask is None else h * mask
    return model[-1](torch.tanh(h))


@pytest.mark.parametrize("setting", ["ief-gram", "ef-gram", "ief"])
def test_batch_norm__statistics_are_constants_for_the_rows(setting: str) -> None:
    model = with_norm()
    J, s = rows_of(model, lambda x: constant_statistics(model, x), X, Y)
    own = {"gram_damping": None, "damping": DAMPING} if setting == "ief" else {"gram_damping": DAMPING}
    optimizer, before = natural(model, 1.0, **({"kind": setting.removesuffix("-gram")} | own)), flat(model)
    with pytest.warns(UserWarning, match=r"NaturalGradient: '1' in train mode"):
        backward(model)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    optimizer.step()
    if setting == "ief":
        F_dense = J.T @ (J / s[:, None]) / len(J)
        expected = torch.linalg.solve(F_dense + DAMPING * torch.eye(len(F_dense), dtype=F64), gradient)
    else:
        expected = gram_update(J, s if setting == "ief-gram" else torch.ones_like(s))
    close(before - flat(model), expected)


def test_batch_norm__running_statistics_are_updated_once_and_gradients_are_torchs_own() -> None:
    model, twin = with_norm(), with_norm()
    optimizer = natural(model)
    for step in range(2):
        x = normal(6, 4, seed=step)
        for own in (model, twin):
            own.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                backward(own, x)
        for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b), name
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    optimizer.zero_grad()


def test_batch_norm__warns_once() -> None:
    model = with_norm()
    optimizer = natural(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
    assert len([w for w in caught if "batch's statistics" in str(w.message)]) == 1


def test_batch_norm__behind_dropout_sees_the_same_masks() -> None:
    model = with_norm(nn.Dropout(0.4))
    torch.manual_seed(2)
    seen: list[Tensor] = []
    handle = model[2].register_forward_hook(lambda _m, args, out: seen.append((out != 0) / 0.6))
    model(X)
    handle.remove()
    J, s = rows_of(model, lambda x: constant_statistics(model, x, seen[0]), X, Y)
    optimizer, before = natural(model, 1.0, gram_damping=DAMPING), flat(model)
    torch.manual_seed(2)
    with pytest.warns(UserWarning, match="train mode"):
        backward(model)
    after = torch.rand(1)
    optimizer.step()
    torch.manual_seed(2)
    model(X)
    assert torch.equal(after, torch.rand(1))  # the replay draws from no one's stream
    close(before - flat(model), gram_update(J, s))


# -- what examples do to each other in train mode alone ----------------------------------------------------------------


class Centred(nn.Module):
    """A batch norm of one's own, of statistics with or without a gradient."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.detached = detached
        self.register_buffer("mean", torch.zeros(5, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        mean: Any = self.mean
        if self.training:
            mean = x.detach().mean(0) if self.detached else x.mean(0)
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
        return x - mean


CHANCE: dict[str, Any] = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "mask": lambda x: x * (torch.rand_like(x) > 0.4) / 0.6,
    "other mask": lambda x: x * (torch.rand(len(x), 1) < 0.6) / 0.6,
    "depth": lambda x: x * x.new_empty(len(x), 1).bernoulli_(0.6),
    "floor": lambda x: x * (0.6 + torch.rand(len(x), 1)).floor(),
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
}


class Chance(nn.Module):
    """Noise in one of the usual ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return CHANCE[self.way](x) if self.training else x


@pytest.mark.parametrize("way", CHANCE)
@pytest.mark.parametrize("detached", [True, False])
def test_chance__hides_no_layer_in_which_examples_meet(detached: bool, way: str) -> None:
    model = mlp(Centred(detached), Chance(way)).train()
    optimizer = natural(model, kind="ef" if len(way) % 2 else "exact", gram_damping=None, damping=0.1)
    assert optimizer is not None
    with pytest.raises(ModelError, match="change with the rest"):
        model(X)


@pytest.mark.parametrize("way", CHANCE)
def test_chance__alone_is_no_reason_to_refuse(way: str) -> None:
    model = mlp(Chance(way), nn.BatchNorm1d(5)).train()
    optimizer = natural(model, kind="ef", gram_damping=None, damping=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(3):
            backward(model, normal(6, 4, seed=seed))
            optimizer.step()


# -- mixed precision ---------------------------------------------------------------------------------------------------


def single(*between: nn.Module) -> nn.Sequential:
    return mlp(*between).float()


@pytest.mark.parametrize("kind", ["ief", "exact"])
def test_autocast__bfloat16_steps_are_near_the_float32_ones(kind: str) -> None:
    changes = []
    for enabled in (False, True):
        model = single()
        optimizer = natural(model, 1.0, kind=kind, gram_damping=None, damping=0.1)
        before = flat(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(X.float()), Y)
        loss.backward()
        optimizer.step()
        changes.append(before - flat(model))
    assert changes[1].dtype == torch.float32
    close(changes[1], changes[0], 0.05)


def test_bfloat16__backward_inside_autocast_is_the_same() -> None:
    model = single()
    optimizer, before = natural(model, 1.0), flat(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.cross_entropy(model(X.float()), Y).backward()
        optimizer.step()
    twin = single()
    plain = natural(twin, 1.0)
    F.cross_entropy(twin(X.float()), Y).backward()
    plain.step()
    close(before - flat(model), before - flat(twin), 0.05)


@pytest.mark.parametrize("kind", ["ief", "ef", "sf"])
@pytest.mark.parametrize("gram", [True, False], ids=["gram_damping", "damping"])
def test_grad_scaler__steps_equal_the_unscaled_ones(kind: str, gram: bool) -> None:
    changes = []
    for enabled in (False, True):
        model = single()
        optimizer = natural(model, 1.0, kind=kind, gram_damping=0.1 if gram else None, damping=None if gram else 0.1)
        scaler, before = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=enabled), flat(model)
        scaler.scale(F.cross_entropy(model(X.float()), Y)).backward()
        scaler.step(optimizer)
        scaler.update()
        changes.append(before - flat(model))
    close(changes[1], changes[0], 1e-4)


@pytest.mark.parametrize("beside", [False, True], ids=["natural", "preconditioner"])
def test_grad_scaler__a_skipped_step_leaves_nothing_behind(beside: bool) -> None:
    results = []
    for skip in (False, True):
        model = single()
        preconditioner = fk.optim.Preconditioner(model, damping=0.1) if beside else None
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1) if beside else natural(model, gram_damping=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for step in range(3):
            if step == 1 and not skip:
                continue
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X.float()), Y) * (float("inf") if step == 1 else 1.0)
            before = flat(model)
            scaler.scale(loss).backward()
            if preconditioner is not None:
                scaler.unscale_(optimizer)
                preconditioner.step()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, flat(model)) == (step == 1)
        results.append(flat(model))
    close(results[1], results[0], 1e-5)


def test_outputs__large_logits_are_no_reason_to_doubt_the_loss() -> None:
    for scale in (10.0, 100.0, 1000.0):
        model = single()
        with torch.no_grad():
            model[2].weight.mul_(scale)
        optimizer = natural(model)
        F.cross_entropy(model(X.float()), Y).backward()
        optimizer.step()
