"""Training by a task's baseline, and the checkpoints along it, kept in files so that every experiment sees the same.

Owns the training loop and its folder. Knows nothing of Fishers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.shared.tasks import Split, Task, logits, trained_parameters


@dataclass(frozen=True)
class Checkpoint:
    """A model after some epochs.

    Args:
        epoch: how many; 0 is the initialization.
        loss: mean cross-entropy of the training examples.
        accuracy: share of the held-out examples that are classified correctly.
        state: the trained parameters.
    """

    epoch: int
    loss: float
    accuracy: float
    state: dict[str, Tensor]

    def model(self, task: Task, seed: int = 0) -> nn.Module:
        """A model of its own at this checkpoint, in the evaluation's precision."""
        model = task.build(seed)
        with torch.no_grad():
            for name, parameter in trained_parameters(model).items():
                parameter.copy_(self.state[name])
        return model.to(task.dtype).eval()


def baseline(task: Task, folder: Path, *, seed: int = 0, epochs: int | None = None) -> list[Checkpoint]:
    """The checkpoints of a task's baseline: read from the folder, or trained and written there.

    Args:
        task: what is trained, and how.
        folder: for ``<task>-<seed>-<epoch>.safetensors`` and ``<task>-<seed>.json``.
        seed: of the initialization and of the examples' order.
        epochs: end earlier than the recipe does.
    """
    kept = [e for e in task.recipe.checkpoints if epochs is None or e <= epochs]
    record = folder / f"{task.name}-{seed}.json"
    if record.exists():
        found = json.loads(record.read_text("utf-8"))
        if found["title"] == task.title and [c["epoch"] for c in found["checkpoints"]] == kept:
            return [
                Checkpoint(**c, state=load_file(_file(folder, task, seed, c["epoch"]))) for c in found["checkpoints"]
            ]
    checkpoints = train(task, kept, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for c in checkpoints:
        save_file(c.state, _file(folder, task, seed, c.epoch))
    rows = [{"epoch": c.epoch, "loss": c.loss, "accuracy": c.accuracy} for c in checkpoints]
    record.write_text(json.dumps({"title": task.title, "checkpoints": rows}, indent=1) + "\n", "utf-8")
    return checkpoints


def train(task: Task, kept: list[int], seed: int) -> list[Checkpoint]:
    """Train, and keep the model at some epochs; the last of them ends it.

    No dropout: the loss that is trained is the one whose Fisher is asked for.
    """
    model = task.build(seed)
    generator = torch.Generator().manual_seed(seed)
    parameters = list(trained_parameters(model).values())
    optimizer = task.recipe.start(parameters)
    checkpoints = []
    for epoch in range(max(kept) + 1):
        if epoch:
            for inputs, labels in task.train.batches(task.recipe.batch, generator):
                optimizer.zero_grad()
                F.cross_entropy(logits(model, inputs), labels).backward()
                optimizer.step()
        if epoch in kept:
            checkpoints.append(_checkpoint(model, task, epoch))
    return checkpoints


def measure(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and share of correct predictions."""
    loss, right, count = 0.0, 0, 0
    with torch.no_grad():
        for inputs, labels in split.batches(256):
            z, y = logits(model, inputs).flatten(0, -2), labels.flatten()
            loss += F.cross_entropy(z, y, reduction="sum").item()
            right += int((z.argmax(1) == y).sum())
            count += len(y)
    return loss / count, right / count


def _checkpoint(model: nn.Module, task: Task, epoch: int) -> Checkpoint:
    state = {name: p.detach().clone() for name, p in trained_parameters(model).items()}
    return Checkpoint(epoch, measure(model, task.train)[0], measure(model, task.test)[1], state)


def _file(folder: Path, task: Task, seed: int, epoch: int) -> Path:
    return folder / f"{task.name}-{seed}-{epoch}.safetensors"
