"""Fine-tuning of a suite's models from their common start, kept in files so that every experiment merges the same.

Owns the training loop and its folder. Knows nothing of Fishers or of merging.
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.merging.suites import Split, Suite

State = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """Adam on batches of 64, until the mean loss of an epoch is small.

    Args:
        learning_rate: constant.
        start: epochs of the common start.
        until: the mean training loss that ends a fine-tuning.
        epochs: the most that it takes.
    """

    learning_rate: float = 1e-2
    start: int = 1
    until: float = 5e-3
    epochs: int = 200


@dataclass(frozen=True)
class Trained:
    """A suite's models.

    Args:
        start: the state that all begin at.
        models: the state of each task.
        joint: the state after training on all tasks at once.
        record: loss, epochs and accuracies of each, in percent, as JSON has them.
    """

    start: State
    models: tuple[State, ...]
    joint: State
    record: dict[str, Any]


def trained(suite: Suite, folder: Path, seed: int, recipe: Recipe) -> Trained:
    """A suite's models, from the folder, or trained and written there.

    Args:
        suite: what is trained on.
        folder: for ``<suite>-<seed>.safetensors`` and its record beside it.
        seed: of the initialization and of the examples' order.
        recipe: how.
    """
    path = folder / f"{suite.name}-{seed}.safetensors"
    record = path.with_suffix(".json")
    if not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        found = _train(suite, seed, recipe)
        states = {"start": found.start, "joint": found.joint, **{str(i): s for i, s in enumerate(found.models)}}
        save_file({f"{key}/{name}": t for key, state in states.items() for name, t in state.items()}, path)
        part = record.with_suffix(".part")
        part.write_text(json.dumps(found.record, indent=1) + "\n", "utf-8")
        os.replace(part, record)
    return _read(path, len(suite.tasks))


def accuracy(model: nn.Module, split: Split) -> float:
    """Percent of the examples that are classified correctly."""
    with torch.no_grad():
        right = model(split.inputs.to(next(model.parameters()).dtype)).argmax(1) == split.labels
    return 100 * float(right.double().mean())


def _train(suite: Suite, seed: int, recipe: Recipe) -> Trained:
    start = suite.build(seed)
    _fit(start, suite.start, seed, recipe, epochs=recipe.start, until=0.0)
    record: dict[str, Any] = {"start": [accuracy(start, task.test) for task in suite.tasks], "tasks": []}
    models = []
    for task in suite.tasks:
        model = copy.deepcopy(start)
        loss, epochs = _fit(model, task.train, seed, recipe, epochs=recipe.epochs, until=recipe.until)
        models.append(_state(model))
        own = {"name": task.name, "examples": len(task.train), "accuracy": accuracy(model, task.test)}
        record["tasks"].append({**own, "loss": loss, "epochs": epochs})
    joint = copy.deepcopy(start)
    loss, epochs = _fit(joint, suite.joint(), seed, recipe, epochs=recipe.epochs, until=recipe.until)
    record["joint"] = {"accuracy": [accuracy(joint, t.test) for t in suite.tasks], "loss": loss, "epochs": epochs}
    return Trained(_state(start), tuple(models), _state(joint), record)


def _fit(model: nn.Module, split: Split, seed: int, recipe: Recipe, *, epochs: int, until: float) -> tuple[float, int]:
    """Train in place; the mean loss of the last epoch and the number of epochs."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    mean, epoch = float("inf"), 0
    while epoch < epochs and mean >= until:
        total = torch.zeros(())
        for inputs, labels in split.batches(64, generator):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(labels)
        mean, epoch = float(total) / len(split), epoch + 1
    return mean, epoch


def _state(model: nn.Module) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _read(path: Path, tasks: int) -> Trained:
    states: dict[str, State] = {}
    for name, tensor in load_file(path).items():
        key, _, parameter = name.partition("/")
        states.setdefault(key, {})[parameter] = tensor
    models = tuple(states[str(i)] for i in range(tasks))
    return Trained(states["start"], models, states["joint"], json.loads(path.with_suffix(".json").read_text("utf-8")))
