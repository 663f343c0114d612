"""The demo's data and network: scikit-learn's handwritten digits and a small multilayer perceptron.

`quality` and `scores` give both to the commands of these names, from a checkout:

    fisherkit quality examples.demo.digits:quality
    fisherkit scores examples.demo.digits:scores --worst 8 --self 12 --out scores
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fisherkit.cli.text import progress
from examples.influence.evaluation import flip_labels
from fisherkit.randomness import untouched_rng

Batch = tuple[Tensor, Tensor]
"""Inputs and labels."""

CHECKPOINTS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40)
"""Epochs that are kept, of those that a run has; its last one is kept too."""

TRAINING_EXAMPLES = 1437
"""Four fifths of 1,797."""

BATCH = 160
"""Examples of a batch whose update is judged; the iEF paper's number."""

MISLABELLED = 0.03
"""Share of the training examples that `scores` gives a wrong label."""


@dataclass(frozen=True)
class Digits:
    """Training and held-out examples in a shuffled order; pixels from 0 to 1."""

    inputs: Tensor
    targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor

    @classmethod
    def load(cls, generator: torch.Generator) -> Digits:
        """Scikit-learn's copy, which needs no download."""
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=generator)
        inputs = (torch.as_tensor(digits.data, dtype=torch.float32) / 16)[order].split(TRAINING_EXAMPLES)
        targets = torch.as_tensor(digits.target, dtype=torch.long)[order].split(TRAINING_EXAMPLES)
        return cls(inputs[0], targets[0], inputs[1], targets[1])

    @property
    def training(self) -> Batch:
        """All training examples."""
        return self.inputs, self.targets

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """Random training examples without repetition."""
        chosen = torch.randperm(len(self.targets), generator=generator)[:size]
        return self.inputs[chosen], self.targets[chosen]


@dataclass(frozen=True)
class Checkpoint:
    """The network after some epochs.

    Args:
        epoch: how many; 0 is the initialization.
        loss: mean cross-entropy of the training examples.
        accuracy: share of the held-out examples that are classified correctly.
        state: the parameters.
    """

    epoch: int
    loss: float
    accuracy: float
    state: dict[str, Tensor]

    def network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A network of its own at this checkpoint."""
        model = network(0)
        model.load_state_dict(self.state)
        return model.to(dtype).eval()


def train(digits: Digits, *, epochs: int, seed: int, generator: torch.Generator) -> list[Checkpoint]:
    """Train a network by plain stochastic gradient descent and keep checkpoints.

    Args:
        digits: the data.
        epochs: passes over the training examples.
        seed: of the initialization.
        generator: of the order of the examples.
    """
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    checkpoints = [_checkpoint(model, digits, 0)]
    for epoch in progress(range(1, epochs + 1)):
        for chosen in torch.randperm(len(digits.targets), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.inputs[chosen]), digits.targets[chosen]).backward()
            optimizer.step()
        if epoch in CHECKPOINTS or epoch == epochs:
            checkpoints.append(_checkpoint(model, digits, epoch))
    return checkpoints


def quality(epochs: int = 10, batches: int = 10) -> tuple[nn.Module, list[Batch]]:
    """For ``fisherkit quality``: a network that has been trained for some epochs, and random batches."""
    generator = torch.Generator().manual_seed(0)
    digits = Digits.load(generator)
    model = train(digits, epochs=epochs, seed=0, generator=generator)[-1].network(torch.float64)
    drawn = (digits.batch(BATCH, generator) for _ in range(batches))
    return model, [(x.double(), y) for x, y in drawn]


def scores(epochs: int = 40) -> tuple[nn.Module, Batch, Batch, Callable[[str, int], Any]]:
    """For ``fisherkit scores``: a network, its training digits, some with a wrong label, and the held-out digits."""
    generator = torch.Generator().manual_seed(0)
    digits = Digits.load(generator)
    targets, wrong = flip_labels(digits.targets, MISLABELLED, classes=10, seed=0)
    checkpoints = train(replace(digits, targets=targets), epochs=epochs, seed=0, generator=generator)
    training, queries = (digits.inputs.double(), targets), (digits.test_inputs.double(), digits.test_targets)

    def show(split: str, index: int) -> Any:
        picture = (digits.inputs if split == "train" else digits.test_inputs)[index].reshape(8, 8)
        text = f"wrong label on purpose, in truth {int(digits.targets[index])}"
        return picture, text if split == "train" and wrong[index] else None

    return checkpoints[-1].network(torch.float64), training, queries, show


def network(seed: int) -> nn.Module:
    """The network, untrained."""
    with untouched_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


@torch.no_grad()
def _checkpoint(model: nn.Module, digits: Digits, epoch: int) -> Checkpoint:
    loss = F.cross_entropy(model(digits.inputs), digits.targets)
    right = model(digits.test_inputs).argmax(1) == digits.test_targets
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Checkpoint(epoch, loss.item(), right.float().mean().item(), state)
