"""How a model is trained: optimizer, epochs, batches. Owns the settings and their checks; trains nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherkit.arguments import is_integer
from fisherkit.errors import InvalidArgumentError

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "linear")


@dataclass(frozen=True)
class TrainingRecipe:
    """Minibatch training of the mean loss of a subset.

    Args:
        epochs: passes over the subset.
        learning_rate: of the first step.
        optimizer: "sgd" or "adamw", as in `torch.optim`, with its defaults.
        momentum: of "sgd".
        weight_decay: as in `torch.optim`: with "sgd" it adds ½ · weight_decay · ‖θ‖² to the loss, with "adamw" it is
            decoupled.
        batch_size: examples a step; the last batch of an epoch may be smaller. None: the whole subset.
        schedule: of the learning rate, "constant" or "linear", which falls to 0 at the end.

    Raises:
        InvalidArgumentError: a value outside its range.
    """

    epochs: int
    learning_rate: float
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int | None = None
    schedule: str = "constant"

    def __post_init__(self) -> None:
        checks = {
            "epochs": (_whole(self.epochs), "an integer, 1 or more"),
            "learning_rate": (_number(self.learning_rate) and self.learning_rate > 0, "a positive number"),
            "optimizer": (self.optimizer in OPTIMIZERS, f"one of {list(OPTIMIZERS)}"),
            "momentum": (_number(self.momentum) and self.momentum < 1, "a number from 0 to below 1"),
            "weight_decay": (_number(self.weight_decay), "a number, 0 or more"),
            "batch_size": (self.batch_size is None or _whole(self.batch_size), "an integer, 1 or more, or None"),
            "schedule": (self.schedule in SCHEDULES, f"one of {list(SCHEDULES)}"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise InvalidArgumentError(
                    call="TrainingRecipe", got=f"{name}={getattr(self, name)!r}", expected=expected
                )
        if self.optimizer == "adamw" and self.momentum:
            raise InvalidArgumentError(
                call="TrainingRecipe", got=f"momentum={self.momentum} with adamw", expected="momentum of sgd only"
            )

    def steps(self, examples: int) -> int:
        """Steps an epoch takes over a subset of this size."""
        return 1 if self.batch_size is None else -(-examples // self.batch_size)

    def start(
        self, parameters: Sequence[Tensor], steps: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        """The optimizer and the schedule of a run of so many steps.

        Both work elementwise, so that they treat stacked parameters as each model's own would be treated.
        """
        optimizer: torch.optim.Optimizer
        tensors, rate, decay = list(parameters), self.learning_rate, self.weight_decay
        fused = True if tensors[0].device.type in {"cpu", "cuda"} else None  # one pass over memory where torch has it
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(tensors, rate, self.momentum, weight_decay=decay, fused=fused)
        else:
            optimizer = torch.optim.AdamW(tensors, rate, weight_decay=decay, fused=fused)
        falls = self.schedule == "linear"
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps if falls else 1.0)


def _number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value) and value >= 0


def _whole(value: object) -> bool:
    return is_integer(value) and value >= 1
