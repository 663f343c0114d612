"""The four uses of a Fisher, each measured on digits beside what people do without one."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

import fisherkit as fk
from examples.demo.digits import Batch, Digits, network

ANGLE = 45
"""Degrees by which the second task's digits are turned."""

RATES = {"SGD": (0.3, 1.0, 3.0), "AdamW": (0.003, 0.01, 0.03), "natural gradient": (0.3, 1.0, 3.0)}
"""Learning rates that each optimizer is tried at; the one with the lowest loss at the end is shown."""


@dataclass(frozen=True)
class Uses:
    """What was measured.

    Args:
        kept: held-out accuracy on the old task before, and after each epoch of, learning the new one, by method.
        learned: the same on the new task.
        merged: held-out accuracy on the old and the new task, by model.
        losses: training loss after each epoch, by optimizer with its rate.
        query: place of a held-out digit that is classified wrongly.
        helpful: places of the training digits with the highest scores for it.
        harmful: places of those with the lowest.
    """

    kept: dict[str, list[float]]
    learned: dict[str, list[float]]
    merged: dict[str, tuple[float, float]]
    losses: dict[str, list[float]]
    query: int
    helpful: list[int]
    harmful: list[int]


def measure_uses(digits: Digits, *, epochs: int, seed: int) -> Uses:
    """All four.

    Args:
        digits: the data.
        epochs: passes over the training examples, of each training.
        seed: of initializations and orders.
    """
    turned = _turned(digits)
    old = network(seed)
    _train(old, digits, epochs, seed)
    kept, learned = {}, {}
    for name in ("as usual", "with EWC"):
        model = copy.deepcopy(old)
        ewc = fk.continual.EWC(model)
        if name == "with EWC":
            ewc.consolidate(fk.ImprovedEmpiricalFisher(model, digits.training, structure="kfac", power=0.75))
        models = [old, *_train(model, turned, epochs, seed, ewc=ewc)]
        kept[name], learned[name] = ([_accuracy(m, task) for m in models] for task in (digits, turned))
    query, helpful, harmful = _explain(old, digits)
    merged, losses = _merge(digits, turned, epochs, seed), _optimize(digits, epochs, seed)
    return Uses(kept, learned, merged, losses, query, helpful, harmful)


def _turned(digits: Digits) -> Digits:
    def turn(pixels: Tensor) -> Tensor:
        turned = ndimage.rotate(pixels.reshape(-1, 8, 8).numpy(), ANGLE, axes=(1, 2), reshape=False, order=1)
        return torch.from_numpy(turned).reshape(-1, 64)

    return Digits(turn(digits.inputs), digits.targets, turn(digits.test_inputs), digits.test_targets)


def _train(
    model: nn.Module, digits: Digits, epochs: int, seed: int, *,
    optimizer: torch.optim.Optimizer | None = None, ewc: fk.continual.EWC | None = None,
) -> list[nn.Module]:  # fmt: skip
    """Train in place; a copy after each epoch."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, copies = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.targets), generator=generator).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(digits.inputs[chosen]), digits.targets[chosen])
            (loss if ewc is None else loss + ewc.penalty()).backward()
            optimizer.step()
        copies.append(copy.deepcopy(model))
    return copies


@torch.no_grad()
def _accuracy(model: nn.Module, digits: Digits) -> float:
    return float((model(digits.test_inputs).argmax(1) == digits.test_targets).float().mean())


def _merge(digits: Digits, turned: Digits, epochs: int, seed: int) -> dict[str, tuple[float, float]]:
    """Two models that begin with the same few epochs, each then trained on its own task."""
    start = network(seed)
    _train(start, digits, 2, seed)
    models = [copy.deepcopy(start), copy.deepcopy(start)]
    tasks = (digits, turned)
    for model, task in zip(models, tasks, strict=True):
        _train(model, task, epochs, seed)
    fishers = [
        fk.TruncatedFisher(model, task.training, structure="kfac") for model, task in zip(models, tasks, strict=True)
    ]
    average = {name: (tensor + models[1].state_dict()[name]) / 2 for name, tensor in models[0].state_dict().items()}
    found = {"trained on old": models[0].state_dict(), "trained on new": models[1].state_dict(), "average": average}
    found["merged by Fishers"] = fk.merging.merge(models, fishers)
    merged = copy.deepcopy(start)
    result = {}
    for name, state in found.items():
        merged.load_state_dict(state)
        result[name] = (_accuracy(merged, digits), _accuracy(merged, turned))
    return result


def _optimize(digits: Digits, epochs: int, seed: int) -> dict[str, list[float]]:
    """Mean training loss after each epoch."""
    found = {}
    for name, rates in RATES.items():
        runs = {}
        for lr in rates:
            model = network(seed)
            copies = _train(model, digits, epochs, seed, optimizer=_optimizer(name, model, lr))
            runs[lr] = [_loss(m, digits) for m in [network(seed), *copies]]
        best = min(runs, key=lambda lr: runs[lr][-1])
        found[f"{name}, rate {best:g}"] = runs[best]
    return found


def _optimizer(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    if name == "natural gradient":
        return fk.optim.NaturalGradient(model, lr=lr, kind="ief", gram_damping=1e-3)
    return (torch.optim.SGD if name == "SGD" else torch.optim.AdamW)(model.parameters(), lr)


@torch.no_grad()
def _loss(model: nn.Module, digits: Digits) -> float:
    return float(F.cross_entropy(model(digits.inputs), digits.targets))


def _explain(model: nn.Module, digits: Digits) -> tuple[int, list[int], list[int]]:
    """A held-out digit with a high loss, and the training digits that helped and harmed it most."""
    losses = F.cross_entropy(model(digits.test_inputs), digits.test_targets, reduction="none")
    query = int(losses.argmax())
    fisher = fk.TruncatedFisher(model, digits.training, structure="ekfac")
    queries: Batch = (digits.test_inputs[query : query + 1], digits.test_targets[query : query + 1])
    scores = fk.influence.InfluenceScores(fisher, model).scores(queries, digits.training)[0]
    order = scores.argsort()
    return query, order.flip(0)[:3].tolist(), order[:3].tolist()
