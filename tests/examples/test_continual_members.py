"""Members of a bench of modules: their losses and penalties are those of models alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from examples.continual.members import Keeper, Members
from examples.continual.methods import KINDS, METHODS
from examples.continual.modules import Heads, LastState, Reader, Task

F64 = torch.float64
STRENGTHS = (0.5, 3.0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def models(name: str) -> list[Heads]:
    """Of two seeds."""
    found = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            body = LastState(3, 4) if name == "gru" else Reader(9, 4)
            found.append(Heads(body, 4, 3, heads=2).double())
    return found


def data(name: str, seed: int, head: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x = normal(20, 4, 3, seed=seed) if name == "gru" else torch.randint(9, (20, 5), generator=generator)
    y = torch.randint(3, (20,), generator=generator)
    return Task((x, y), (x, y), head)


def move(members: Members, seed: int) -> None:
    with torch.no_grad():
        for place, own in enumerate(members.parameters.values()):
            own += 0.2 * normal(*own.shape, seed=100 * seed + place)


def alone(members: Members, number: int) -> Heads:
    return copy.deepcopy(members.load(number))


def stated(method: str, model: Heads, task: Task, past: list[tuple[Tensor, Tensor]]) -> None:
    """A task's diagonal and centre, by one backward pass a batch or example."""
    x, y = task.train
    total = [torch.zeros_like(p) for p in model.parameters()]
    size = 5 if method == "diagonal-squared" else 1
    for start in range(0, len(y), size):
        loss = F.cross_entropy(model(x[start : start + size]), y[start : start + size])
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        weight = float(torch.exp(-loss.detach())) if size == 1 else 1.0
        for own, g in zip(total, gradients, strict=True):
            own += 0 if g is None else weight * g.square() * size / len(y)
    diagonal = nn.utils.parameters_to_vector(total)
    centre = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    if method == "diagonal-mammoth" and past:
        diagonal = diagonal + past.pop()[0]
    past.append((diagonal, centre))


@pytest.mark.parametrize("name", ["gru", "text"])
@pytest.mark.parametrize(
    "key", ["diagonal-ef", "kfac-ief", "ekfac-exact", "kfac-sf", "l2", "diagonal-squared", "diagonal-mammoth"]
)
def test_gradient__is_that_of_loss_and_penalty_of_each_model_alone(name: str, key: str) -> None:
    method, members = METHODS[key], Members(models(name))
    members.repeat(2)
    normalize = "trace" if method.kind in KINDS else None
    keeper = Keeper(method, torch.tensor(STRENGTHS * 2, dtype=F64), normalize, batch=5)
    past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(4)]
    kept: list[list[fk.FisherOperator]] = [[] for _ in range(4)]
    centres: list[list[dict[str, Tensor]]] = [[] for _ in range(4)]
    for number in range(2):
        move(members, number)
        members.model.head = number
        tasks = [data(name, 10 * number + seed, number) for seed in range(2)]
        keeper.consolidate(members, tasks, number)
        for member in range(4):
            model, task = alone(members, member), tasks[member // 2]
            if method.kind in KINDS:
                _, kind, options = KINDS[method.kind]
                options = {"seed": number} if method.kind == "sf" else options
                kept[member].append(kind(model, task.train, structure=method.structure, params=model.own(), **options))
                centres[member].append(copy.deepcopy(model.state_dict()))
            elif key == "l2":
                flat = nn.utils.parameters_to_vector(model.parameters()).detach()
                own = [torch.full_like(p, float(n in model.own())) for n, p in model.named_parameters()]
                past[member].append((nn.utils.parameters_to_vector(own), flat))
            else:
                stated(key, model, task, past[member])
    move(members, 7)
    members.model.head = 1
    x = torch.stack([data(name, 50 + seed, 1).train[0] for seed in range(2)])
    y = torch.stack([data(name, 50 + seed, 1).train[1] for seed in range(2)])
    torch.autograd.backward(members.losses(x, y).sum())
    members._penalize(keeper.parts)
    for member in range(4):
        model, strength = alone(members, member), STRENGTHS[member % 2]
        loss = F.cross_entropy(model(x[member // 2]), y[member // 2])
        if method.kind in KINDS:
            now, ewc = copy.deepcopy(model.state_dict()), fk.continual.EWC(model, strength)
            for fisher, centre in zip(kept[member], centres[member], strict=True):
                model.load_state_dict(centre)
                ewc.consolidate(1.0 * fisher, uncovered="free")
            model.load_state_dict(now)
            (F.cross_entropy(model(x[member // 2]), y[member // 2]) + ewc.penalty()).backward()
        else:
            theta = nn.utils.parameters_to_vector(model.parameters())
            total = sum(0.5 * strength * (d * (theta - c).square()).sum() for d, c in past[member])
            (loss + total).backward()
        for parameter_name, p in model.named_parameters():
            found = members.parameters[parameter_name].grad
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            own = torch.zeros_like(p) if found is None else found[member]
            torch.testing.assert_close(own, expected, rtol=1e-7, atol=1e-10)
