"""Plain training loops with the optimizers, and where they come to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from tests.bad_input import X, Y, mlp
from tests.by_hand import weights as flat

SETTINGS: dict[str, dict[str, Any]] = {
    "ief-gram": {"kind": "ief", "gram_damping": 1e-2},
    "ef": {"kind": "ef", "damping": 1e-2},
    "sf": {"kind": "sf", "damping": 1e-2},
    "exact-block": {"kind": "exact", "damping": 1e-2, "structure": "block"},
    "ief-kfac": {"kind": "ief", "damping": 1e-2, "structure": "kfac", "ema": 0.9},
}
each_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


def natural(model: nn.Module, lr: float = 0.1, **options: Any) -> fk.optim.NaturalGradient:
    return fk.optim.NaturalGradient(model, lr, **({"gram_damping": 1e-2} | options))


def backward(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Any, steps: int = 2, before: Callable[[], object] = lambda: None) -> Tensor:
    """A plain loop; the parameters at its end."""
    for _ in range(steps):
        optimizer.zero_grad()
        before()
        backward(model)
        optimizer.step()
    return flat(model)


def expected(setting: dict[str, Any] = SETTINGS["ief-gram"], model: nn.Module | None = None) -> Tensor:
    """What a plain loop comes to."""
    model = mlp() if model is None else model
    return train(model, natural(model, **({"gram_damping": None} | setting)))


def made(setting: dict[str, Any], model: nn.Module) -> fk.optim.NaturalGradient:
    return natural(model, **({"gram_damping": None} | setting))
