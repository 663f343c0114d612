"""Seven examples, a small model for them, and ways to cut them into batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

F64 = torch.float64
N = 7


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, Y = normal(N, 4), torch.tensor([0, 2, 1, 1, 0, 2, 1])


def mlp() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def cut(*sizes: int, batch: Callable[[Tensor, Tensor], Any] = lambda x, y: (x, y)) -> list[Any]:
    """The data in batches of the given sizes."""
    assert sum(sizes) == N
    return [batch(x, y) for x, y in zip(X.split(sizes), Y.split(sizes), strict=True)]


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DATASET = TensorDataset(X, Y)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
