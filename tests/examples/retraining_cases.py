"""Small data, models and recipes that the tests of retraining share."""

from typing import Any

import torch
from torch import Tensor, nn

from examples.influence.evaluation import TrainingRecipe
from tests.small_data import normal as random

F64 = torch.float64


def mlp(seed: int) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3)).double()


N, Q = 13, 4
X, Y = random(N + Q, 5), torch.arange(N + Q) % 3
TOKENS = torch.randint(6, (N + Q, 7), generator=torch.Generator().manual_seed(0))
SIZES = torch.tensor([6, 9, 13, 6, 5])
MASKS = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i)) < n for i, n in enumerate(SIZES)])
SGD = TrainingRecipe(epochs=3, learning_rate=0.1, momentum=0.9, weight_decay=1e-2, batch_size=4, schedule="linear")
ADAMW = TrainingRecipe(epochs=3, learning_rate=0.02, optimizer="adamw", weight_decay=0.1, batch_size=4)
WHOLE = TrainingRecipe(epochs=4, learning_rate=0.1)


def halves(inputs: Any, y: Tensor) -> tuple[Any, Any]:
    def part(index: slice) -> Any:
        return {k: v[index] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[index]

    return (part(slice(N)), y[:N]), (part(slice(N, None)), y[N:])


TRAIN, QUERIES = halves(X, Y)
