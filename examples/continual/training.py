"""A sequence of tasks learned by a whole stack of models, each with a strength of its own.

Owns the optimizer, the order of the examples and what is measured. A Fisher is a term that somebody builds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from examples.continual.benches import TaskData
from examples.continual.penalties import Penalty, Term
from examples.continual.stacked import Pass, Perceptron, Stack, with_ones
from fisherkit.randomness import untouched_rng


@dataclass(frozen=True)
class Training:
    """How each task is learned: Adam on loss plus penalty, its step falling linearly to zero within the task.

    Args:
        epochs: a task.
        rate: the first step.
        batch: examples a step; what is left of an epoch is left out.
    """

    epochs: int
    rate: float = 1e-2
    batch: int = 64


Step = tuple[int, Tensor]
"""A task's number and the examples ``[E, B]`` of one step."""


class Consolidate(Protocol):
    """Builds a task's term."""

    def __call__(self, stack: Stack, task: TaskData, number: int) -> Term:
        """Of the stack as it is after task ``number``."""


@dataclass
class Outcome:
    """What a sequence came to.

    Args:
        losses: training loss after each task on it, ``[T, S]``.
        learned: test accuracy after each task on it, ``[T, S]``.
        final: test accuracy after the last task on each, ``[T, S]``.
    """

    losses: Tensor
    learned: Tensor
    final: Tensor


def initial(widths: Sequence[int], seeds: Sequence[int], dtype: torch.dtype = torch.float32) -> Stack:
    """A model a seed, initialized as torch does."""
    stack = Stack(widths, len(seeds), 1, dtype=dtype)
    rows = []
    for seed in seeds:
        with untouched_rng([]):
            torch.manual_seed(seed)
            rows.append(nn.utils.parameters_to_vector(Perceptron(widths).parameters()).detach().to(dtype))
    return stack.put(torch.stack(rows))


def orders(count: int, seeds: Sequence[int], task: int, training: Training) -> list[Tensor]:
    """The batches of a task, ``[E, B]`` each: every seed's own order of the examples in every epoch."""
    generators = [torch.Generator().manual_seed(1_000_003 * task + seed) for seed in seeds]
    found = []
    for _ in range(training.epochs):
        epoch = torch.stack([torch.randperm(count, generator=g) for g in generators])
        found += [batch for batch in epoch.split(training.batch, 1) if batch.shape[1] == training.batch]
    return found


def learn(
    stack: Stack, tasks: Sequence[TaskData], steps: Sequence[Step], training: Training, penalty: Penalty | None = None
) -> None:
    """Train the stack, in place.

    Args:
        stack: the models.
        tasks: whose examples the steps take.
        steps: in their order.
        training: how.
        penalty: on the way.
    """
    gradient = stack.like()
    passes = [Pass(stack, task.window) for task in tasks]
    inputs, rows = [with_ones(task.train) for task in tasks], torch.arange(stack.seeds).unsqueeze(1)
    parameter = nn.Parameter(stack.storage)  # shares its memory
    parameter.grad = gradient.storage
    optimizer = torch.optim.Adam([parameter], lr=training.rate, fused=True)
    for number, (own, index) in enumerate(steps):
        passes[own].gradient(inputs[own][rows, index], tasks[own].train_labels[rows, index], gradient)
        if penalty is not None:
            penalty.add_gradient(stack, gradient)
        optimizer.param_groups[0]["lr"] = training.rate * (1 - number / len(steps))
        optimizer.step()


def joint(stack: Stack, tasks: Sequence[TaskData], seeds: Sequence[int], training: Training) -> Outcome:
    """Learn all tasks at once: their batches in a random order, as many epochs of each as in a sequence."""
    parts = [orders(task.train.shape[1], seeds, number, training) for number, task in enumerate(tasks)]
    steps = [(number, batch) for number, batches in enumerate(parts) for batch in batches]
    mixed = torch.randperm(len(steps), generator=torch.Generator().manual_seed(0)).tolist()
    learn(stack, tasks, [steps[place] for place in mixed], training)
    loss, right = (torch.stack(values) for values in zip(*(_measured(stack, task) for task in tasks), strict=True))
    return Outcome(loss, right, right)


def sequence(
    stack: Stack, tasks: Sequence[TaskData], seeds: Sequence[int], training: Training, each: int = 1,
    consolidate: Consolidate | None = None,
) -> Outcome:  # fmt: skip
    """Learn the tasks one after the other.

    Args:
        stack: one model a seed; the first task, which has no penalty, is learned before they part.
        tasks: in their order.
        seeds: of the examples' order.
        training: of each task.
        each: members a seed from the first term on.
        consolidate: builds the term after each task but the last; None for no penalty.
    """
    penalty, losses, learned = Penalty(), [], []
    for number, task in enumerate(tasks):
        batches = orders(task.train.shape[1], seeds, number, training)
        learn(stack, tasks, [(number, batch) for batch in batches], training, penalty if penalty.terms else None)
        if number == 0:
            stack = stack.repeat(each)
        loss, right = _measured(stack, task)
        losses.append(loss)
        learned.append(right)
        if consolidate is not None and number + 1 < len(tasks):
            penalty.append(consolidate(stack, task, number))
    final = [_measured(stack, task)[1] for task in tasks]
    return Outcome(torch.stack(losses), torch.stack(learned), torch.stack(final))


def _measured(stack: Stack, task: TaskData) -> tuple[Tensor, Tensor]:
    """Training loss and test accuracy on a task, ``[S]``."""
    passes = Pass(stack, task.window)
    loss, _ = passes.measure(with_ones(task.train), task.train_labels)
    return loss, passes.measure(with_ones(task.test), task.test_labels)[1]
