"""Optimizers of several processes: checkpoints, parameters that some processes do not use, and nothing that drifts."""

import copy
import functools
import tempfile
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

import fisherkit as fk
from tests import ranks
from tests.by_hand import weights as flat
from tests.test_fully_sharded import sharded
from tests.test_fully_sharded_optim import distance, preconditioned
from tests.test_fully_sharded_optim import train as train_both
from tests.test_processes import Routed, batches_of, network, train

OPTIONS: dict[str, dict[str, Any]] = {
    "kfac": {"kind": "truncated:2", "damping": 1e-2, "structure": "kfac", "ema": 0.5, "momentum": 0.9},
    "ekfac": {"kind": "ief", "damping": 1e-2, "structure": "ekfac", "ema": 0.9, "update_every": 2, "refresh_every": 2},
    "ekfac, renewed": {"kind": "ief", "damping": 1e-2, "structure": "ekfac", "ema": 0.9},
    "drawn": {"kind": "sf:2", "damping": 1e-2, "structure": "diagonal", "ema": 0.5, "weight_decay": 0.1},
    "full": {"kind": "ief", "gram_damping": 1e-2, "momentum": 0.9},
}  # fmt: skip


def optimizer_for(model: nn.Module, name: str, group: Any) -> fk.optim.NaturalGradient:
    return fk.optim.NaturalGradient(model, lr=0.1, group=group, **OPTIONS[name])


def same_everywhere(value: Tensor) -> bool:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return all(torch.equal(one, value) for one in found)


def tensors_of(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors_of(value)]


def saved(rank: int, size: int, folder: str) -> dict[str, Tensor]:
    """Two steps, a checkpoint that all write together, and two more; uneven batches, as those of the last epoch."""
    ends = {}
    for name in OPTIONS:
        model = DistributedDataParallel(network())
        optimizer = optimizer_for(model, name, None)
        own = batches_of(rank, size)
        train(model, optimizer, own[:2], "mean")
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        assert same_everywhere(torch.cat([t.double().flatten() for t in tensors_of(state)])), name
        dcp.save(state, checkpoint_id=f"{folder}/{name}")
        train(model, optimizer, own[2:], "mean")
        assert same_everywhere(flat(model)), name
        ends[name] = flat(model)
    return ends


def resumed(model: nn.Module, name: str, folder: str, group: Any) -> fk.optim.NaturalGradient:
    """From the checkpoint, whoever wrote it."""
    with tempfile.TemporaryDirectory() as own:
        dcp_to_torch_save(f"{folder}/{name}", f"{own}/state.pt")
        state = torch.load(f"{own}/state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer = optimizer_for(model, name, group)
    optimizer.load_state_dict(state["optimizer"])
    return optimizer


def go_on(rank: int, size: int, folder: str) -> dict[str, Tensor]:
    ends = {}
    for name in OPTIONS:
        inner = network()
        optimizer = resumed(inner, name, folder, None)
        model = DistributedDataParallel(inner)
        train(model, optimizer, batches_of(rank, size)[2:], "mean")
        ends[name] = flat(model)
    return ends


def experts(rank: int, size: int) -> dict[str, float]:
    """A parameter without a row, and without a gradient but that of others, in one process.

    With bases of each step: few examples leave a part of a basis free, and rounding chooses it.
    """
    found = {}
    x, y = next(iter(batches_of()))
    order = x[:, 0].argsort()
    x, y = x[order], y[order]
    some = int((x[:, 0] <= 0).sum())
    for name in ("kfac", "ekfac, renewed"):
        torch.manual_seed(0)
        one = Routed().double()
        both = DistributedDataParallel(copy.deepcopy(one), find_unused_parameters=True)
        ends = []
        assert 2 <= some <= len(x) - 2
        half = min(some, len(x) - some)
        chosen = [slice(some - half, some), slice(some, some + half)]  # the first process has one expert's alone
        whole = torch.cat([x[chosen[0]], x[chosen[1]]]), torch.cat([y[chosen[0]], y[chosen[1]]])
        for model, batch, group in ((one, whole, False), (both, (x[chosen[rank]], y[chosen[rank]]), None)):
            optimizer = optimizer_for(model, name, group)
            train(model, optimizer, [batch] * 3, "mean")
            ends.append(flat(model))
        found[name] = float((ends[1] - ends[0]).norm() / ends[0].norm())
    optimizer = optimizer_for(both, "full", None)
    with pytest.raises(fk.ModelError, match=r"others' do not.*experts\.0.*structure=\"kfac\""):
        train(both, optimizer, [(x[chosen[rank]], y[chosen[rank]])], "mean")
    return found


OTHERS: dict[str, dict[str, Any]] = {
    "kind": {"kind": "ef"}, "damping": {"damping": 0.2}, "structure": {"structure": "ekfac"}, "ema": {"ema": 0.9},
    "update_every": {"update_every": 2}, "refresh_every": {"refresh_every": 2}, "reduction": {"reduction": "sum"},
    "kfac_positions": {"kfac_positions": "reduce"}, "max_rank": {"max_rank": 2}, "trust_region": {"trust_region": 1.0},
    "likelihood": {"likelihood": fk.likelihoods.Categorical(label_smoothing=0.1)},
}  # fmt: skip
"""What the second process asks for otherwise; then each of the optimizers must refuse a step."""


def differing(rank: int, size: int) -> dict[str, bool]:
    """Whether all processes refuse, by name, and change nothing."""
    warnings.simplefilter("ignore")
    found, (x, y) = {}, next(iter(batches_of(rank, size)))
    makers: tuple[Any, ...] = (functools.partial(fk.optim.NaturalGradient, lr=0.1), fk.optim.Preconditioner)
    for make in makers:
        for name, other in {
            **OTHERS,
            "number of steps": {},
            "lr": {"lr": 0.2},
            **({"lr of group 1": {}, "lr of group 1, backwards": {}} if make is makers[0] else {}),
        }.items():
            inner = network()
            model, before = DistributedDataParallel(inner), flat(inner)
            options = {"kind": "ief", "damping": 0.1, "structure": "kfac", "ema": 0.5, **(other if rank else {})}
            if name == "lr" and make is makers[1]:
                options["trust_region"] = 1.0
            if "group 1" in name and rank == ("backwards" not in name):
                first, *rest = inner.parameters()
                options["params"] = [{"params": [first]}, {"params": rest}]
            optimizer = make(model, **options)
            if name == "number of steps" and rank:
                alone = network()
                single = make(alone, group=False, **options)
                nn.functional.cross_entropy(alone(x), y).backward()
                single.step()
                optimizer.load_state_dict(single.state_dict())
            smoothing = 0.1 if name == "likelihood" and rank else 0.0
            nn.functional.cross_entropy(model(x), y, label_smoothing=smoothing).backward()
            state = str(optimizer.state_dict())
            with pytest.raises(fk.ProcessError) as caught:
                optimizer.step()
            alike = torch.equal(flat(inner), before) and str(optimizer.state_dict()) == state
            found[f"{make}: {name}"] = alike and f"different {name.partition(',')[0]}" in str(caught.value)
    return found


def everything(rank: int, size: int, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    ends = saved(rank, size, folder)
    again = go_on(rank, size, folder)
    bits = {name: bool(torch.equal(ends[name], again[name])) for name in OPTIONS}
    return {"ends": ends, "bits": bits, "experts": experts(rank, size), "differing": differing(rank, size)}


@pytest.fixture(scope="module")
def found() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        result = ranks.run(2, everything, folder)
        assert all(isinstance(one, dict) for one in result), result
        ends = {}
        for name in OPTIONS:
            model = network()
            optimizer = resumed(model, name, folder, False)
            train(model, optimizer, batches_of()[2:], "mean")
            ends[name] = flat(model)
        return result, ends


@pytest.mark.parametrize("name", OPTIONS)
def test_checkpoint__that_processes_write_together_is_gone_on_with_bit_for_bit(found: Any, name: str) -> None:
    assert all(one["bits"][name] for one in found[0])


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "drawn"])  # each process draws by itself
def test_checkpoint__is_gone_on_with_in_one_process(found: Any, name: str) -> None:
    together, alone = found[0][0]["ends"][name], found[1][name]
    assert float((together - alone).norm() / alone.norm()) < 1e-10


def test_expert__that_one_process_alone_uses(found: Any) -> None:
    assert max(error for one in found[0] for error in one["experts"].values()) < 1e-10


def test_settings__that_differ_between_processes_are_refused(found: Any) -> None:
    for one in found[0]:
        assert [name for name, refused in one["differing"].items() if not refused] == []
        assert len(one["differing"]) == 2 * len(OTHERS) + 6


FOLLOWED = preconditioned({"kind": "truncated:2", "structure": "kfac", "damping": 1e-2, "ema": 0.5})
WRAPPERS = {"replicated": DistributedDataParallel, "in shards": sharded}


def four_steps(rank: int = 0, size: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(6)
    x, y = torch.randn(4, 12, 5, generator=g, dtype=torch.float64), torch.randint(0, 4, (4, 12), generator=g)
    own = slice(rank * 12 // size, (rank + 1) * 12 // size)
    return list(zip(x[:, own], y[:, own], strict=True))


def write_followed(rank: int, size: int, folder: str) -> dict[str, float]:
    """A checkpoint of each wrapper's after two steps, and how far from one process two others end."""
    warnings.simplefilter("ignore")
    for name, wrapped in WRAPPERS.items():
        inner = network()
        model = wrapped(inner)
        preconditioner, sgd = FOLLOWED(model, None)
        train_both(model, (preconditioner, sgd), four_steps(rank, size)[:2])
        state = {"model": inner.state_dict(), "preconditioner": preconditioner.state_dict()}
        state["sgd"] = get_optimizer_state_dict(model, sgd)
        dcp.save({**state, "by number": sgd.state_dict()}, checkpoint_id=f"{folder}/{name}")
        if rank == 0:
            dcp_to_torch_save(f"{folder}/{name}", f"{folder}/{name}.pt")
    dist.barrier()
    return resume_followed(rank, size, folder)


def resume_followed(rank: int, size: int, folder: str) -> dict[str, float]:
    """How far from one process that nobody interrupted: as the docs say, and by torch's numbers of parameters."""
    warnings.simplefilter("ignore")
    alone, found = network(), {}
    train_both(alone, FOLLOWED(alone, False), four_steps())
    for written in WRAPPERS:
        for name, wrapped in WRAPPERS.items() if size > 1 else [("alone", lambda inner: inner)]:
            for saved in ("sgd", "by number") if name == "alone" else ("sgd",):
                state = torch.load(f"{folder}/{written}.pt", weights_only=True)
                model = network(1)
                model.load_state_dict(state["model"])
                model = wrapped(model)
                preconditioner, sgd = FOLLOWED(model, None)
                preconditioner.load_state_dict(state["preconditioner"])
                if saved == "sgd":
                    whole = StateDictOptions(full_state_dict=True)
                    set_optimizer_state_dict(model, sgd, state["sgd"], options=whole)
                else:
                    sgd.load_state_dict(state["by number"])
                train_both(model, (preconditioner, sgd), four_steps(rank, size)[2:])
                found[f"{saved}: {written}, {name}"] = distance(model, alone)
    return found


def test_checkpoint__of_an_optimizer_that_follows_is_by_names_of_parameters() -> None:
    """By their numbers, torch loses the momentum without a word: `dcp_to_torch_save` makes them strings."""
    with tempfile.TemporaryDirectory() as folder:
        for size, function in ((2, write_followed), (1, resume_followed), (3, resume_followed)):
            for one in ranks.run(size, function, folder):
                assert isinstance(one, dict), one
                assert max(error for name, error in one.items() if name.startswith("sgd")) < 1e-10, one
                lost = [error for name, error in one.items() if name.startswith("by number")]
                assert size > 1 or (len(lost) == 2 and min(lost) > 1e-3), one
