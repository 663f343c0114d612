"""The benches: sequences of small classification tasks, made of packages' data, one sequence a seed.

Owns data and how it is cut into tasks. Knows nothing of models, training or Fishers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherkit.randomness import untouched_rng


@dataclass(frozen=True)
class TaskData:
    """One task for every seed at once.

    Args:
        train: inputs ``[E, n, I]``; E seeds.
        train_labels: ``[E, n]``, counted from the window's start.
        test: inputs ``[E, m, I]``.
        test_labels: ``[E, m]``.
        window: the outputs that this task uses.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    window: slice


@dataclass(frozen=True)
class Bench:
    """A sequence of tasks.

    Args:
        name: short.
        title: what it is.
        widths: of the multilayer perceptron, inputs and outputs included.
        epochs: a task, by regime: "fit" to near zero loss, "early" stopped.
        make: the tasks for some seeds.
        left_out: kinds and structures that are not measured.
    """

    name: str
    title: str
    widths: tuple[int, ...]
    epochs: Mapping[str, int]
    make: Callable[[tuple[int, ...]], list[TaskData]]
    left_out: tuple[str, ...] = ()

    def includes(self, *names: str) -> bool:
        """Whether a method of this kind and structure is measured."""
        return not set(names) & set(self.left_out)


def permuted(
    inputs: Tensor, labels: Tensor, *, tasks: int, train: int, test: int, seeds: tuple[int, ...]
) -> list[TaskData]:
    """The same examples with their inputs in another order in each task; the first task's are as they come.

    Args:
        inputs: ``[N, I]``.
        labels: class indices ``[N]``.
        tasks: how many.
        train: examples to learn from, drawn anew for each seed.
        test: held-out examples.
        seeds: of the draws.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = torch.stack([torch.randperm(len(labels), generator=g)[: train + test] for g in generators])
    x, y = inputs[drawn], labels[drawn]
    found = []
    for number in range(tasks):
        identity = torch.arange(inputs.shape[1])
        orders = [torch.randperm(len(identity), generator=g) if number else identity for g in generators]
        own = torch.stack([one[:, order] for one, order in zip(x, orders, strict=True)])
        found.append(
            TaskData(own[:, :train], y[:, :train], own[:, train:], y[:, train:], slice(0, int(labels.max()) + 1))
        )
    return found


def split(
    inputs: Tensor, labels: Tensor, *, each: int, train: int, test: int, seeds: tuple[int, ...]
) -> list[TaskData]:
    """A few classes a task, in their order; a task knows its own outputs alone, as with a head for each.

    Args:
        inputs: ``[N, I]``.
        labels: class indices ``[N]``.
        each: classes a task.
        train: examples of each class to learn from, drawn anew for each seed.
        test: held-out examples of each class.
        seeds: of the draws.
    """
    found = []
    for first in range(0, int(labels.max()) + 1, each):
        parts = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(1000 * seed + first)
            rows = [torch.nonzero(labels == label)[:, 0] for label in range(first, first + each)]
            rows = [own[torch.randperm(len(own), generator=generator)] for own in rows]
            learn, hold = (torch.cat([own[a:b] for own in rows]) for a, b in ((0, train), (train, train + test)))
            parts.append((inputs[learn], labels[learn] - first, inputs[hold], labels[hold] - first))
        x, y, held, held_labels = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        found.append(TaskData(x, y, held, held_labels, slice(first, first + each)))
    return found


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 handwritten digits of 64 pixels, all standardised by one mean and one deviation."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return _standardised(found.data), torch.as_tensor(found.target, dtype=torch.long)


def mnist1d() -> tuple[Tensor, Tensor]:
    """The package's 5,000 signals of 40 samples, moved by at most 2 of them.

    With the package's own 48, a perceptron learns too little of a task to forget.
    """
    import numpy as np
    from mnist1d.data import get_dataset_args, make_dataset

    settings = get_dataset_args()
    settings.max_translation = 2
    with untouched_rng([]):  # the package seeds and uses the global generators
        found = make_dataset(settings)
    x = np.concatenate([found["x"], found["x_test"]])
    y = np.concatenate([found["y"], found["y_test"]])
    return _standardised(x), torch.as_tensor(y, dtype=torch.long)


def _standardised(x: Any) -> Tensor:
    found = torch.as_tensor(x, dtype=torch.float32)
    return (found - found.mean()) / found.std()


def _permuted_digits(seeds: tuple[int, ...]) -> list[TaskData]:
    return permuted(*digits(), tasks=8, train=1437, test=360, seeds=seeds)


def _split_digits(seeds: tuple[int, ...]) -> list[TaskData]:
    return split(*digits(), each=2, train=140, test=34, seeds=seeds)  # the rarest class has 174


def _permuted_mnist1d(seeds: tuple[int, ...]) -> list[TaskData]:
    return permuted(*mnist1d(), tasks=5, train=1000, test=1000, seeds=seeds)


BENCHES: Mapping[str, Bench] = {
    bench.name: bench
    for bench in (
        Bench(
            "permuted-digits", "8 tasks: digits with their pixels permuted, one head",
            (64, 32, 32, 10), {"fit": 20, "early": 2}, _permuted_digits,
        ),
        Bench(
            "split-digits", "5 tasks: two digits each, a head for each task",
            (64, 32, 32, 10), {"fit": 20, "early": 3}, _split_digits,
            ("truncated-1", "truncated-2"),  # of two outputs, any rank is exact
        ),
        Bench(
            "permuted-mnist1d", "5 tasks: MNIST-1D, moved by at most 2 samples, with its samples permuted, one head",
            (40, 32, 32, 10), {"fit": 50, "early": 4}, _permuted_mnist1d,
            ("full",),
        ),
    )
}  # fmt: skip
"""By name."""
