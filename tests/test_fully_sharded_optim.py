"""Optimizers of models that `fully_shard` has sharded (FSDP2): steps are those of the whole model, by one process or
by `DistributedDataParallel` where each process draws or averages for itself."""

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fisherkit as fk
from fisherkit.wrappers import full
from tests import ranks
from tests.test_fully_sharded import Tied, sharded
from tests.test_processes import STEPS, Routed, batches_of, network

NATURAL: dict[str, dict[str, Any]] = {
    **STEPS,
    "truncated, by rows": {"kind": "truncated:2", "damping": 1e-2, "weight_decay": 0.1, "momentum": 0.9},
    "normalized": {"kind": "ef", "gram_damping": 1e-2, "normalize_update": True},
}  # fmt: skip
PRECONDITIONED: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "ekfac": {"structure": "ekfac", "damping": 1e-2, "ema": 0.5, "update_every": 2, "trust_region": 1e-2, "lr": 0.1},
    "diagonal": {"structure": "diagonal", "kind": "truncated:2"},
    "the paper's": {"structure": "full", "gram_damping": 1e-2},
}
Make = Callable[[nn.Module, Any], tuple[Any, Any]]
"""Of a model and a group: what makes the step, and what follows it, if anything does."""


GONE_ON = ("averaged", "now and then", "of a sum", "truncated, by rows")
"""Whose state another model in shards, and one process, go on from."""


def natural(options: dict[str, Any], **more: Any) -> Make:
    return lambda model, group: (fk.optim.NaturalGradient(model, lr=0.1, group=group, **options, **more), None)


def preconditioned(options: dict[str, Any]) -> Make:
    return lambda model, group: (
        fk.optim.Preconditioner(model, group=group, **options),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    )


CASES: dict[str, Make] = {name: natural(options) for name, options in NATURAL.items()} | {
    f"preconditioned, {name}": preconditioned(options) for name, options in PRECONDITIONED.items()
}


def train(
    model: nn.Module, made: tuple[Any, Any], batches: Any, *, reduction: str = "mean", parts: int = 1,
    synced: bool = True, half: bool = False,
) -> None:  # fmt: skip
    optimizer, follower = made
    for x, y in batches:
        (follower or optimizer).zero_grad()
        for i, (own, labels) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True), 1):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(synced or i == parts)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                z = model(own.float() if half else own)
            (F.cross_entropy(z.flatten(0, -2), labels.flatten(), reduction=reduction) / parts).backward()
        optimizer.step()
        if follower is not None:
            follower.step()


def flat(model: nn.Module) -> Tensor:
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return torch.cat([full(p.detach()).flatten() for p in model.parameters()])


def distance(a: nn.Module, b: nn.Module) -> float:
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


def alike(rank: int, size: int) -> dict[str, float]:
    """Four steps, of one process with the joint batch and of shards; the last two also by way of a checkpoint."""
    worst, own = {}, batches_of(rank, size)
    for name, make in CASES.items():
        reduction = NATURAL.get(name, {}).get("reduction", "mean")
        one, model = network(), sharded(network())
        alone, together = make(one, False), make(model, None)
        train(one, alone, batches_of(), reduction=reduction)
        train(model, together, own[:2], reduction=reduction)
        if name in GONE_ON:
            again, single = sharded(network(1)), network(1)
            again.load_state_dict(model.state_dict())
            single.load_state_dict({key: full(value) for key, value in model.state_dict().items()})
            for other, group, rest in ((again, None, own), (single, False, batches_of())):
                resumed = make(other, group)
                state = copy.deepcopy(together[0].state_dict())  # optimizers of torch share what they load
                resumed[0].load_state_dict(state)
                train(other, resumed, rest[2:], reduction=reduction)
            worst[f"{name}, gone on"] = max(distance(again, one), distance(single, one))
        train(model, together, own[2:], reduction=reduction)
        worst[name] = distance(model, one)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        twin = together[0]._curvature.capture.model
        assert all(p.untyped_storage().nbytes() == 0 and p.grad is None for p in twin.parameters())
    return worst


class Own(nn.Module):
    """A parameter that no rule knows, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(5, 6), nn.Parameter(torch.rand(6, 6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) @ torch.linalg.matrix_exp(self.scale))


def of_one(name: str) -> nn.Module:
    torch.manual_seed(0)
    layers: dict[str, Callable[[], nn.Module]] = {
        "own arithmetic": Own,
        "dropout": lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 4)),
        "batch norm": lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 4)),
        "experts": Routed,
        "tied": Tied,
    }
    return layers.get(name, network)().double()


def by_processes(rank: int, size: int) -> dict[str, float]:
    """What `DistributedDataParallel` comes to."""
    worst = {}
    plain = {"kind": "ief", "structure": "kfac", "damping": 1e-2, "ema": 0.5}
    cases: dict[str, tuple[Make, dict[str, Any]]] = {
        "own arithmetic": (natural({"kind": "truncated:2", "damping": 1e-2}), {}),
        "dropout": (natural(plain), {}),
        "batch norm": (preconditioned({"damping": 1e-2, "structure": "diagonal"}), {}),
        "experts": (natural(plain), {}),
        "tied": (preconditioned({"damping": 1e-2, "structure": "kfac"}), {}),
        "frozen": (natural({"kind": "ief", "gram_damping": 1e-2, "momentum": 0.9}), {}),
        "accumulated": (natural(plain), {"parts": 2}),
        "accumulated before they meet": (natural(plain), {"parts": 2, "synced": False}),
        "drawn": (natural({"kind": "sf:2", "damping": 1e-2, "structure": "diagonal", "ema": 0.5}), {}),
        "chosen": (natural(plain, params=["3.weight", "0.bias"]), {}),
        "replicated": (natural(plain), {}),
        "autocast": (natural(plain), {"half": True}),
    }
    for name, (make, options) in cases.items():
        batches = batches_of(rank, size)
        if name == "tied":
            g = torch.Generator().manual_seed(rank)
            batches = [tuple(torch.randint(0, 7, (2, 5, 4), generator=g)) for _ in range(3)]
        if name == "experts":  # the first process has one expert's examples alone
            x, y = map(torch.cat, zip(*batches_of(), strict=True))
            order = x[:, 0].argsort()
            batches = [(x[order].chunk(size)[rank], y[order].chunk(size)[rank])] * 3
        ends = []
        for shard in (False, True):
            one = of_one(name).to(torch.float32 if name == "autocast" else torch.float64)
            if name == "frozen":
                one[0].requires_grad_(False)
            cut = fully_shard if name in ("experts", "tied") else sharded  # which all processes must call whole
            if name == "replicated":
                cut = functools.partial(
                    fully_shard, mesh=init_device_mesh("cpu", (size, 1), mesh_dim_names=("replicas", "shards"))
                )
            model = cut(one) if shard else DistributedDataParallel(one, find_unused_parameters=name == "experts")
            if shard and name == "experts":
                model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]
            torch.manual_seed(rank)
            made = make(model, None)
            train(model, made, batches, **options)
            ends.append((model, torch.rand(1)))
        worst[name] = distance(ends[1][0], ends[0][0])
        assert torch.equal(ends[1][1], ends[0][1]), f"{name}: random numbers were drawn"
    return worst


def left_out(rank: int, size: int) -> dict[str, float]:
    """Passes that lead to no step, and what changes about the model between steps."""
    one, model = network(), sharded(network())
    batches, own = batches_of(), batches_of(rank, size)
    options = {"kind": "ief", "structure": "ekfac", "damping": 1e-2, "ema": 0.5}
    alone, together = natural(options)(one, False), natural(options)(model, None)
    for other, made, data in ((one, alone, batches), (model, together, own)):
        train(other, made, data[:1])
        x = data[3][0].clone().requires_grad_()
        torch.autograd.grad(other(x).sum(), x)
        F.cross_entropy(other(data[3][0]), data[3][1]).backward()
        other.zero_grad()  # by the model, of which the optimizer is not told
        with made[0].paused():
            F.cross_entropy(other(data[3][0]), data[3][1]).backward()
        other.zero_grad(set_to_none=False)
        train(other, made, data[1:2])
        other.eval()
        with torch.no_grad():
            other(data[3][0])
        other[0].requires_grad_(False)
        train(other, made, data[2:])
        made[0].close()
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        assert len(getattr(model, hooks)) == len(getattr(sharded(network()), hooks))
    return {"left out": distance(model, one)}


def mixed(rank: int, size: int) -> float:
    """A step in bfloat16 over float32 weights beside one in float32: the updates' distance."""
    ends = []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for cut in (lambda m: fully_shard(m), lambda m: fully_shard(m, mp_policy=policy)):
        model = cut(network().float())
        before = flat(model)
        made = preconditioned({"damping": 1e-2, "structure": "ekfac"})(model, None)
        train(model, made, [(x.float(), y) for x, y in batches_of(rank, size)][:1])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        ends.append(flat(model) - before)
    return float((ends[1] - ends[0]).norm() / ends[0].norm())


def refused(rank: int, size: int) -> list[str]:
    found = []
    for make in (natural({"damping": 1e-2}), preconditioned({})):
        with pytest.raises(fk.ModelError, match="shards of 2 processes, and a group of 1") as error:
            make(sharded(network()), False)
        found.append(str(error.value))
    (x, y), model = batches_of(rank, size)[0], sharded(network())
    made = natural({"damping": 1e-2})(model, None)
    F.cross_entropy(model(x).div_(2), y).backward()
    with pytest.raises(fk.ModelError, match="a copy with all weights does not have") as error:
        made[0].step()
    found.append(str(error.value))
    mixed = network().float()
    fully_shard(mixed[0], mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(fk.ModelError, match="the same for all modules") as error:
        natural({"damping": 1e-2})(fully_shard(mixed), None)
    found.append(str(error.value))
    model = sharded(network())
    made = natural({"damping": 1e-2})(model, None)
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(fk.ModelError, match="that was used"):
        loss.backward()
    model = sharded(network())
    made = natural({"damping": 1e-2})(model, None)
    F.cross_entropy(model(x), y, label_smoothing=0.1 * rank).backward()
    with pytest.raises(fk.ModelError if rank else fk.ProcessError, match="no positive multiple") as error:
        made[0].step()
    found.append(str(error.value))
    return found


def saved(rank: int, size: int, folder: str) -> dict[str, Tensor]:
    """A checkpoint that all write together, and the end of training."""
    model = sharded(network())
    made = natural(NATURAL["truncated, by rows"])(model, None)
    own = batches_of(rank, size)
    train(model, made, own[:2])
    dcp.save({"model": model.state_dict(), "optimizer": made[0].state_dict()}, checkpoint_id=folder)
    train(model, made, own[2:])
    again = sharded(network(1))
    dcp.load({"model": again.state_dict()}, checkpoint_id=folder)
    resumed = natural(NATURAL["truncated, by rows"])(again, None)
    resumed[0].load_state_dict(read(folder)["optimizer"])
    train(again, resumed, own[2:])
    assert torch.equal(flat(again), flat(model))
    return {"end": flat(model)}


def read(folder: str) -> Any:
    with tempfile.TemporaryDirectory() as own:
        dcp_to_torch_save(folder, f"{own}/state.pt")
        return torch.load(f"{own}/state.pt", weights_only=True)


def everything(rank: int, size: int, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    errors = alike(rank, size) | by_processes(rank, size) | left_out(rank, size)
    return {
        "errors": errors, "end": saved(rank, size, folder), "mixed": mixed(rank, size), "refused": refused(rank, size)
    }  # fmt: skip


def test_steps_of_shards__equal_those_of_the_whole_model() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = ranks.run(2, everything, folder)
        for one in found:
            assert isinstance(one, dict), one
            assert max(one["errors"].values()) < 1e-10, one
            assert 0 < one["mixed"] < 0.05, one
        state = read(folder)
    model = network(1)
    model.load_state_dict(state["model"])
    made = natural(NATURAL["truncated, by rows"])(model, False)
    made[0].load_state_dict(state["optimizer"])
    train(model, made, batches_of()[2:])
    end = found[0]["end"]["end"]
    assert float((flat(model) - end).norm() / end.norm()) < 1e-10
