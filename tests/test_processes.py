"""Fishers of several processes: equal to that of one process with all the data, and an error in all where one fails."""

import contextlib
import copy
import datetime
import functools
import os
import pickle
import signal
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fisherkit as fk
from tests import ranks
from tests.axes import paired

KINDS = ("ef", "ief:0.5", "sf:2", "exact", "truncated:2")
STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac", "nkp")
CUTS = {2: (0, 7, 11), 3: (0, 4, 4, 11), 4: (0, 5, 6, 6, 11)}
"""Where the examples of each rank begin; some have none."""


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4)).double()


def whole_data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(11, 5, generator=g, dtype=torch.float64), torch.randint(0, 4, (11,), generator=g)


def own_data(rank: int, size: int, each: int = 3) -> list[tuple[Tensor, Tensor]]:
    x, y = whole_data()
    start, stop = CUTS[size][rank : rank + 2]
    return [(x[i : min(i + each, stop)], y[i : min(i + each, stop)]) for i in range(start, stop, each)]


def answers(fisher: fk.FisherOperator) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    v = torch.randn(fisher.size, 2, generator=g, dtype=torch.float64)
    found = {
        "matvec": fisher.matvec(v), "diagonal": fisher.diagonal(), "trace": fisher.trace(),
        "solve": fisher.solve(v, damping=1e-2),
    }  # fmt: skip
    found["products"] = fisher.matvec(torch.eye(fisher.size, dtype=torch.float64))
    asked = {
        "gram": lambda: fisher.gram(), "logdet": lambda: fisher.logdet(damping=1e-2),
        "eigenvalues": lambda: fisher.eigenvalues(3), "dense": lambda: fisher.to_dense(),
    }  # fmt: skip
    for name, ask in asked.items():
        with contextlib.suppress(fk.NoClosedFormError, fk.MemoryBudgetError):
            found[name] = ask()
    return found


def compare(rank: int, size: int, cases: list[tuple[str, dict[str, Any]]]) -> dict[str, float]:
    worst = {}
    for kind, options in cases:
        one = fk.FisherApproximation(network(), [whole_data()], kind, group=False, **options)
        fisher = fk.FisherApproximation(network(), own_data(rank, size), kind, **options)
        assert (fisher.examples, fisher.rows) == (one.examples, one.rows)
        for a, b in ((one.dropped_trace, fisher.dropped_trace), (one.dropped_share, fisher.dropped_share)):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=1e-12)
        expected, everything = (
            {**answers(f), "draws": f.factorize(1e-2).sample(torch.Generator().manual_seed(3), 2)}
            for f in (one, fisher)
        )
        assert everything.keys() == expected.keys()
        for name, found in everything.items():
            error = (found - expected[name]).norm() / expected[name].norm().clamp_min(1e-30)
            worst[f"{kind} {options} {name}"] = float(error)
    return worst


IN_PARTS, PARTED = 2760, ("kfac", "ekfac")
"""Bytes of the network's ekfac, beside which the sums of no two layers fit, nor of its kfac."""

CASES: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [(kind, {"structure": "ekfac"}) for kind in KINDS]
    + [("exact", {"normalization": "sum"}), *(("exact", {"structure": s, "memory_budget": IN_PARTS}) for s in PARTED)],
    3: [(kind, {"structure": s}) for kind, s in paired(KINDS, STRUCTURES)]
    + [("ef", {"memory_budget": 1}), ("exact", {"memory_budget": 1}), ("truncated:2", {"max_rows": 5})],
    4: [("sf:2", {"structure": s}) for s in ("full", "block", "ekfac")],
}
ALL = [(kind, {"structure": s}) for kind in KINDS for s in STRUCTURES]
"""What those of three processes stand for, in ``make test-thorough``."""


class Routed(nn.Module):
    """Two experts, of which the sign of an example's first feature chooses one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 6) for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(len(x), 6, dtype=x.dtype)
        for i, expert in enumerate(self.experts):
            own = (x[:, 0] > 0) == bool(i)
            if own.any():
                hidden[own] = expert(x[own])
        return self.head(torch.tanh(hidden))


def late_expert(rank: int, size: int, structure: str) -> float:
    torch.manual_seed(0)
    model = Routed().double()
    x, y = whole_data()
    order = (x[:, 0] > 0).double().argsort(stable=True)
    x, y = x[order], y[order]
    number = int((x[:, 0] <= 0).sum())  # the second expert's examples are all in the second process
    own = [(x[:number], y[:number])] if rank == 0 else [(x[number:], y[number:])]
    one = fk.ExactFisher(model, [(x, y)], structure=structure, group=False).to_dense()
    found = fk.ExactFisher(model, own, structure=structure)
    return float((found.to_dense() - one).norm() / one.norm())


def failing(rank: int, size: int, fault: str) -> tuple[str, float] | None:
    model, data, options = network(), own_data(rank, size), {}
    if fault == "data" and rank == 1:
        data[-1] = (data[-1][0] / 0, data[-1][1])
    if fault == "weights" and rank == 1:
        model = network(seed=1)
    if fault == "setting" and rank == 1:
        options = {"normalization": "sum"}
    began = time.monotonic()
    try:
        fisher = fk.EmpiricalFisher(model, data, **options)
        if fault == "questions":
            _ = fisher.matvec(torch.ones(fisher.size, dtype=torch.float64) * (1 + rank))
        if fault == "operations":
            _ = fisher.diagonal() if rank else fisher.gram()
    except fk.FisherkitError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return None


def losing(rank: int, size: int, victim: int, how: str, where: str) -> tuple[str, float]:
    """What a process says when another one is killed or stopped in a build, a step or a product, and when."""
    model, data = network(), own_data(rank, size)
    lose = functools.partial(os.kill, os.getpid(), getattr(signal, how))

    class Losing(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            yield from data[:1]
            if rank == victim:
                lose()
            yield from data[1:]

    if where == "build":
        ask: Any = functools.partial(fk.EmpiricalFisher, model, Losing(data), structure="kfac")
    elif where == "step":
        trained = DistributedDataParallel(model)
        optimizer = fk.optim.NaturalGradient(trained, lr=0.1, kind="ef", damping=1e-2)
        x, y = data[0] if data else whole_data()
        nn.functional.cross_entropy(trained(x), y).backward()
        ask = optimizer.step
    else:
        fisher = fk.EmpiricalFisher(model, data)
        ask = functools.partial(fisher.matvec, torch.ones(fisher.size, dtype=torch.float64))
    if rank == victim and where != "build":
        lose()
    dist.group.WORLD.set_timeout(datetime.timedelta(seconds=3 if how == "SIGSTOP" else ranks.TIMEOUT))
    began = time.monotonic()
    try:
        ask()
    except fk.ProcessError as error:
        return str(error), time.monotonic() - began
    return "no error", 0.0


def subgroups(rank: int, size: int) -> float:
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    if rank == 1:
        alone = fk.EmpiricalFisher(network(), [whole_data()], group=groups[1]).to_dense()
        return float((alone - fk.EmpiricalFisher(network(), [whole_data()], group=False).to_dense()).norm())
    one = fk.EmpiricalFisher(network(), [whole_data()], group=False).to_dense()
    found = fk.EmpiricalFisher(network(), own_data(rank, size), group=groups[0]).to_dense()
    return float((found - one).norm() / one.norm())


def streamed_gram(rank: int, size: int) -> None:
    with pytest.raises(fk.NoClosedFormError, match='storage="rows"'):
        fk.EmpiricalFisher(network(), own_data(rank, size), storage="stream").gram()


STEPS: dict[str, dict[str, Any]] = {
    "the paper's": {"kind": "ief", "gram_damping": 1e-2, "momentum": 0.9},
    "the paper's, by module": {"kind": "ef", "gram_damping": 1e-2, "structure": "block"},
    "exact": {"kind": "exact", "damping": 1e-2, "trust_region": 1e-2},
    "averaged": {"kind": "truncated:2", "damping": 1e-2, "structure": "kfac", "ema": 0.5},
    "now and then": {"kind": "ief", "damping": 1e-2, "structure": "ekfac", "ema": 0.9, "update_every": 2},
    "of a sum": {"kind": "ief", "damping": 1e-2, "structure": "diagonal", "reduction": "sum"},
}


def optimizer_for(model: nn.Module, options: dict[str, Any], group: Any) -> fk.optim.NaturalGradient:
    return fk.optim.NaturalGradient(model, lr=0.1, group=group, **options)


def train(model: nn.Module, optimizer: fk.optim.NaturalGradient, batches: Any, reduction: str) -> Tensor:
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y, reduction=reduction).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def batches_of(rank: int = 0, size: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(4, 8, 5, generator=g, dtype=torch.float64), torch.randint(0, 4, (4, 8), generator=g)
    own = slice(rank * 8 // size, (rank + 1) * 8 // size)
    return list(zip(x[:, own], y[:, own], strict=True))


def steps(rank: int, size: int) -> dict[str, float]:
    found = {}
    for name, options in STEPS.items():
        reduction, one, model = options.get("reduction", "mean"), network(), DistributedDataParallel(network())
        alone, together = optimizer_for(one, options, False), optimizer_for(model, options, None)
        expected = train(one, alone, batches_of(), reduction)
        own = batches_of(rank, size)
        train(model, together, own[:2], reduction)
        # Two more steps after a way through a checkpoint, which another number of processes may read.
        state = copy.deepcopy(together.state_dict())  # torch's optimizers share what they load
        again = DistributedDataParallel(network())
        again.load_state_dict(model.state_dict())
        resumed = optimizer_for(again, options, None)
        resumed.load_state_dict(copy.deepcopy(state))
        error = (train(again, resumed, own[2:], reduction) - expected).norm() / expected.norm()
        single = network()
        single.load_state_dict(model.module.state_dict())
        resumed = optimizer_for(single, options, False)
        resumed.load_state_dict(state)
        other = (train(single, resumed, batches_of()[2:], reduction) - expected).norm() / expected.norm()
        found[name] = max(float(error), float(other))
    model = network()  # nobody averages its gradients
    with pytest.raises(fk.ProcessError):
        train(model, optimizer_for(model, STEPS["exact"], None), batches_of(rank, size), "mean")
    return found


FAULTS = ("data", "weights", "setting", "questions", "operations")
"""What goes wrong in one process, and leaves the group as it was."""


def everything(rank: int, size: int) -> dict[str, Any]:
    found: dict[str, Any] = {"equal": compare(rank, size, CASES[size])}
    if size == 2:
        found |= {fault: failing(rank, size, fault) for fault in FAULTS}
        found["steps"] = steps(rank, size)
        found |= {f"expert, {s}": late_expert(rank, size, s) for s in ("full", "kfac", "ekfac")}
    if size == 3:
        found["subgroups"] = subgroups(rank, size)
        found["streamed"] = streamed_gram(rank, size)
    return found


@pytest.fixture(scope="module")
def found() -> Any:
    """What the processes of a group of some size find; one group of each size for all tests, as starting it is slow."""
    return functools.lru_cache(lambda size: ranks.run(size, everything))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_fisher__equals_that_of_one_process(found: Any, size: int) -> None:
    for one in found(size):
        assert isinstance(one, dict), one
        assert max(one["equal"].values()) < 1e-10, {case: e for case, e in one["equal"].items() if e >= 1e-10}


@pytest.mark.thorough
@pytest.mark.parametrize("size", [2, 3, 4])
def test_fisher__of_every_kind_and_structure_equals_that_of_one_process(size: int) -> None:
    for one in ranks.run(size, functools.partial(compare, cases=ALL)):
        assert isinstance(one, dict), one
        assert len(one) > len(ALL)
        assert max(one.values()) < 1e-10, {case: e for case, e in one.items() if e >= 1e-10}


@pytest.mark.parametrize("structure", ["full", "kfac", "ekfac"])
def test_expert__that_one_process_alone_uses(found: Any, structure: str) -> None:
    assert max(one[f"expert, {structure}"] for one in found(2)) < 1e-10


@pytest.mark.parametrize("name", STEPS)
def test_optimizer__steps_and_resumes_as_one_process_with_all_batches(found: Any, name: str) -> None:
    assert max(one["steps"][name] for one in found(2)) < 1e-10


def test_group__of_some_processes(found: Any) -> None:
    assert max(one["subgroups"] for one in found(3)) < 1e-10


def test_gram__of_streamed_rows_is_refused_by_name(found: Any) -> None:
    assert all(one["streamed"] is None for one in found(3))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault__in_one_process_is_an_error_in_all(found: Any, fault: str) -> None:
    (first, _), (second, _) = (one[fault] for one in found(2))
    assert first.startswith("ProcessError"), first
    assert second.startswith("NonFiniteError" if fault == "data" else "ProcessError"), second
    if fault in ("data", "weights", "setting"):
        assert "rank 1" in first


@pytest.mark.parametrize(
    ("size", "victim", "how", "where", "by_tcp"),
    [
        (2, 1, "SIGKILL", "build", False),
        (4, 1, "SIGKILL", "product", True),
        (3, 0, "SIGSTOP", "step", True),
    ],
)
def test_fault__a_process_that_is_lost_is_named_by_all_others(
    size: int, victim: int, how: str, where: str, by_tcp: bool
) -> None:
    found = ranks.run(size, losing, victim, how, where, lost=victim, by_tcp=by_tcp)
    for rank, answer in enumerate(found):
        if rank != victim:
            said, seconds = answer
            assert f"no answer from rank {victim} of {size}" in said
            assert seconds < 20, "the timeout, if it was stopped, and some seconds"


def sent(rank: int, size: int, structure: str, batches: int) -> tuple[int, int]:
    """Bytes that meet in sums while a Fisher is built, and bytes of all other exchanges."""
    counts = {"all_reduce": 0, "broadcast": 0, "all_gather_object": 0, "broadcast_object_list": 0}

    def counted(name: str, place: int) -> Any:
        exchange = getattr(dist, name)

        def made(*arguments: Any, **options: Any) -> Any:
            value = arguments[place]
            counts[name] += value.nbytes if isinstance(value, Tensor) else len(pickle.dumps(value))
            return exchange(*arguments, **options)

        return made

    g = torch.Generator().manual_seed(rank)
    data = [
        (torch.randn(4, 5, generator=g, dtype=torch.float64), torch.randint(0, 4, (4,), generator=g))
        for _ in range(batches)
    ]
    with mock.patch.multiple(dist, **{name: counted(name, name == "all_gather_object") for name in counts}):
        fk.EmpiricalFisher(network(), data, structure=structure)
    return counts.pop("all_reduce"), sum(counts.values())


@pytest.mark.parametrize(
    ("structure", "numbers"),
    # Two counts of examples beside the factors of both layers, and the layer norm's block.
    [("diagonal", 76), ("kfac", 6**2 + 6**2 + 7**2 + 4**2 + 12**2 + 2)],
)
def test_build__sends_sums_once_whatever_the_number_of_batches(structure: str, numbers: int) -> None:
    few, many = (ranks.run(2, sent, structure, batches)[0] for batches in (3, 12))
    assert few == many
    assert few[0] == 8 * numbers
    assert few[1] < 2_000, "names, settings, and numbers of examples"


def test_nkp__sends_names_once_whatever_the_number_of_passes() -> None:
    assert ranks.run(2, sent, "nkp", 3)[0][1] < 4_000


def test_group__that_is_none_is_refused() -> None:
    with pytest.raises(fk.InvalidTypeError, match="init_process_group"):
        fk.EmpiricalFisher(network(), [whole_data()], group="gloo")
