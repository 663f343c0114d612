"""Suites of tasks that one small network is fine-tuned on from one start: domains, and subsets of the classes.

Owns data, transformations and the network. Knows nothing of training, Fishers or merging.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shared import tasks
from fisherkit.randomness import untouched_rng

Change = Callable[[Tensor, torch.Generator], Tensor]
"""Inputs ``[B, I]`` to inputs of a domain."""

SUBSETS: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "classes": ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)), "halves": ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)),
}  # fmt: skip
"""Classes of each task of a suite of class subsets."""

START = 400
"""Examples, as they are, that the common start is trained on."""


@dataclass(frozen=True)
class Split:
    """Examples along axis 0.

    Args:
        inputs: ``[N, I]``.
        labels: class indices ``[N]``.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """All examples once, in a random order."""
        order = torch.randperm(len(self), generator=generator)
        return [(self.inputs[index], self.labels[index]) for index in order.split(size)]

    def of_classes(self, classes: tuple[int, ...]) -> Split:
        """Those of some classes."""
        kept = torch.isin(self.labels, torch.tensor(classes))
        return Split(self.inputs[kept], self.labels[kept])

    def first(self, count: int) -> Split:
        """Some examples, the first ones."""
        return Split(self.inputs[:count], self.labels[:count])

    def changed(self, change: Change, generator: torch.Generator) -> Split:
        """The same labels with changed inputs."""
        return Split(change(self.inputs, generator), self.labels)


@dataclass(frozen=True)
class Task:
    """What one model is fine-tuned on.

    Args:
        name: of the domain or subset.
        train: examples to learn from.
        test: held-out examples of the same kind.
    """

    name: str
    train: Split
    test: Split


@dataclass(frozen=True)
class Suite:
    """Tasks with a common start.

    Args:
        name: as the command has it.
        title: what it is.
        start: examples that the common start is trained on.
        tasks: what each model is fine-tuned on.
        hidden: how many layers of 32 the network has.
    """

    name: str
    title: str
    start: Split
    tasks: tuple[Task, ...]
    hidden: int = 2

    def build(self, seed: int) -> nn.Sequential:
        """The network I-32-…-32-10 with tanh, at its initialization, float32, in eval mode."""
        with untouched_rng([]):
            torch.manual_seed(seed)
            widths = (self.start.inputs.shape[1], *[32] * self.hidden)
            layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.Tanh())]
            return nn.Sequential(*layers, nn.Linear(32, 10)).eval()

    def joint(self) -> Split:
        """All tasks' training examples."""
        splits = [task.train for task in self.tasks]
        return Split(torch.cat([split.inputs for split in splits]), torch.cat([split.labels for split in splits]))


# -- domains -----------------------------------------------------------------------------------------------------------


def turned(degrees: float) -> Change:
    """Images of 8 × 8, turned about their middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]])

    def change(inputs: Tensor, generator: torch.Generator) -> Tensor:
        images = inputs.reshape(-1, 1, 8, 8)
        grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False).flatten(1)

    return change


def moved(places: int) -> Change:
    """Signals, moved in a circle."""
    return lambda inputs, generator: inputs.roll(places, 1)


def noisy(scale: float) -> Change:
    """Gaussian noise, drawn once an example."""
    return lambda inputs, generator: inputs + scale * torch.randn(inputs.shape, generator=generator)


def _same(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs


DOMAINS: Mapping[str, Mapping[str, Change]] = {
    "digits": {"-40°": turned(-40), "0°": _same, "40°": turned(40), "noise": noisy(0.3)},
    "mnist1d": {"-2 places": moved(-2), "0 places": _same, "2 places": moved(2), "noise": noisy(0.3)},
}
"""The domains of each data set."""


# -- suites ------------------------------------------------------------------------------------------------------------


def digits(seed: int) -> tuple[Split, Split]:
    """scikit-learn's handwritten digits, 8 × 8: four fifths to learn from and the rest."""
    task = tasks.digits(seed)
    # A task's inputs may be a dict of tensors; here they are one tensor.
    train, test = (Split(cast("Tensor", split.inputs), split.labels) for split in (task.train, task.test))
    return train, test


def mnist1d(seed: int) -> tuple[Split, Split]:
    """MNIST-1D with signals that are moved by at most 8 of 48 places, so that a small network can learn them."""
    import numpy as np
    from mnist1d.data import get_dataset_args, make_dataset

    settings = get_dataset_args()
    settings.seed += seed
    settings.num_samples, settings.max_translation = 2500, 8
    with untouched_rng([]):  # the package seeds and uses the global generators
        found = make_dataset(settings)
    train, test = (
        Split(
            torch.as_tensor(np.asarray(found[f"x{suffix}"]), dtype=torch.float32),
            torch.as_tensor(np.asarray(found[f"y{suffix}"]), dtype=torch.long),
        )
        for suffix in ("", "_test")
    )
    return train, test


DATA: Mapping[str, tuple[str, Callable[[int], tuple[Split, Split]]]] = {
    "digits": ("digits, MLP 64-32-32-10", digits),
    "mnist1d": ("mnist1d, MLP 40-32-32-10", mnist1d),
}
"""Title, and the examples to learn from and to test for a seed."""

SUITES = tuple(f"{data}-{kind}" for kind in ("domains", "classes", "halves") for data in DATA)
"""Names of the suites that the defaults of `fk.merging.merge` were tried on."""

MORE = tuple(f"{data}-{kind}" for kind in ("sizes", "deep") for data in DATA)
"""Names of suites that nothing was chosen on: domains of which each has half the last one's examples, and halves of the
classes for a network of four hidden layers."""


def suite(name: str, seed: int) -> Suite:
    """A suite by its name.

    Args:
        name: one of `SUITES` or `MORE`.
        seed: of the split, and of what is random in its domains.
    """
    data, _, kind = name.rpartition("-")
    title, load = DATA[data]
    train, test = load(seed)
    generator = torch.Generator().manual_seed(seed)
    start = Split(train.inputs[:START], train.labels[:START])
    if kind in ("domains", "sizes"):
        found = [
            Task(key, train.changed(change, generator), test.changed(change, generator))
            for key, change in DOMAINS[data].items()
        ]
        text = "domains " + ", ".join(DOMAINS[data])
        if kind == "sizes":
            found = [replace(task, train=task.train.first(len(train) >> place)) for place, task in enumerate(found)]
            text += f" of {', '.join(str(len(task.train)) for task in found)} examples"
    else:
        subsets = SUBSETS["halves" if kind == "deep" else kind]
        found = [Task("+".join(map(str, c)), train.of_classes(c), test.of_classes(c)) for c in subsets]
        text = "classes " + ", ".join(task.name for task in found)
    hidden = 4 if kind == "deep" else 2
    return Suite(name, f"{title.replace('-32-32-', '-32' * hidden + '-')}, {text}", start, tuple(found), hidden)
