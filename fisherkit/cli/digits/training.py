"""The demo's data and network: scikit-learn's handwritten digits and a small multilayer perceptron.

Owns training by plain stochastic gradient descent and the checkpoints along it. Knows nothing of Fishers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fisherkit.cli.text import progress
from fisherkit.randomness import untouched_rng

CHECKPOINTS = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40)
"""Epochs that are kept, of those that a run has; its last one is kept too."""

TRAINING_EXAMPLES = 1437
"""Four fifths of 1,797."""

_BATCH, _LEARNING_RATE = 64, 0.2


@dataclass(frozen=True)
class Digits:
    """Training and held-out examples in a shuffled order; pixels from 0 to 1."""

    inputs: Float[Tensor, "n 64"]
    targets: Int[Tensor, "n"]
    test_inputs: Float[Tensor, "m 64"]
    test_targets: Int[Tensor, "m"]

    @classmethod
    def load(cls, generator: torch.Generator) -> Digits:
        """Scikit-learn's copy, which needs no download."""
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=generator)
        inputs = (torch.as_tensor(digits.data, dtype=torch.float32) / 16)[order]
        targets = torch.as_tensor(digits.target, dtype=torch.long)[order]
        return cls(
            inputs[:TRAINING_EXAMPLES],
            targets[:TRAINING_EXAMPLES],
            inputs[TRAINING_EXAMPLES:],
            targets[TRAINING_EXAMPLES:],
        )

    def batch(self, size: int, generator: torch.Generator) -> tuple[Float[Tensor, "b 64"], Int[Tensor, "b"]]:
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
        model = _network(0)
        model.load_state_dict(self.state)
        return model.to(dtype).eval()


def train(digits: Digits, *, epochs: int, seed: int, generator: torch.Generator) -> list[Checkpoint]:
    """Train a network and keep checkpoints.

    Args:
        digits: the data.
        epochs: passes over the training examples.
        seed: of the initialization.
        generator: of the order of the examples.
    """
    model = _network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE)
    checkpoints = [_checkpoint(model, digits, 0)]
    for epoch in progress(range(1, epochs + 1)):
        for chosen in torch.randperm(len(digits.targets), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(digits.inputs[chosen]), digits.targets[chosen]).backward()
            optimizer.step()
        if epoch in CHECKPOINTS or epoch == epochs:
            checkpoints.append(_checkpoint(model, digits, epoch))
    return checkpoints


def _network(seed: int) -> nn.Module:
    with untouched_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


@torch.no_grad()
def _checkpoint(model: nn.Module, digits: Digits, epoch: int) -> Checkpoint:
    loss = F.cross_entropy(model(digits.inputs), digits.targets)
    right = model(digits.test_inputs).argmax(1) == digits.test_targets
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return Checkpoint(epoch, loss.item(), right.float().mean().item(), state)
