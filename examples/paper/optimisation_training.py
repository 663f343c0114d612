"""One training run of `examples.paper.optimisation`, with its losses, its time, and how it failed if it did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fisherkit as fk
from examples.paper.optimisation_methods import Method, Settings, Stepper, start
from examples.paper.training import measure
from examples.shared.tasks import Task, logits

FAILURES = (fk.NonFiniteError, fk.SingularMatrixError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]  # documented, not in __all__
"""How an optimizer, or torch's linear algebra, says that it cannot go on."""

EXPLODED = 10.0
"""A run ends, as diverged, where a batch's loss is so many times the loss of all examples at the start."""


def train(task: Task, method: Method, settings: Settings, *, seed: int, epochs: int) -> dict[str, Any]:
    """Train a new model by a method at one configuration; see `fit`."""
    return fit(task, lambda model, steps: start(method, settings, model, steps), seed=seed, epochs=epochs)


def fit(task: Task, begin: Callable[[nn.Module, int], Stepper], *, seed: int, epochs: int) -> dict[str, Any]:
    """Train a new model.

    Args:
        task: what is learned; the recipe's batch size is used.
        begin: makes what follows a backward pass, for a model and a number of steps.
        seed: of the initialization and of the examples' order.
        epochs: how long.

    Returns:
        "losses": of all training examples, at the start and after each epoch; "accuracy": on held-out examples, at the
        end; "milliseconds": processor time a step; "diverged": what went wrong and at which step, else None.
    """
    model = task.build(seed)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = math.ceil(len(task.train) / task.recipe.batch)
    stepper = begin(model, epochs * per_epoch)
    found: dict[str, Any] = {"losses": [measure(model, task.train)[0]], "diverged": None}
    seconds, steps = 0.0, 0
    for _ in range(epochs):
        for inputs, labels in task.train.batches(task.recipe.batch, generator):
            start_time = time.process_time()
            stepper.zero_grad()
            loss = F.cross_entropy(logits(model, inputs).flatten(0, -2), labels.flatten())
            if not float(loss.detach()) < EXPLODED * found["losses"][0]:
                return {**found, "diverged": f"loss {loss.item():.3g} at step {steps}"}
            try:
                loss.backward()
                stepper.step()
            except FAILURES as error:
                return {**found, "diverged": f"{type(error).__name__} at step {steps}"}
            seconds += time.process_time() - start_time
            steps += 1
        found["losses"].append(measure(model, task.train)[0])
    if not math.isfinite(found["losses"][-1]):
        found["diverged"] = f"loss is {found['losses'][-1]} at the end"
    return {**found, "accuracy": measure(model, task.test)[1], "milliseconds": 1e3 * seconds / steps}
