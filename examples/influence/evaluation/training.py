"""How a model is trained on a subset of the data: optimizer, epochs, batches, and the order of the examples.

The same seed, subset and recipe give the same model. Knows no file, query or score.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from examples.influence.evaluation.losses import PerExample
from fisherkit.arguments import is_integer, is_number
from fisherkit.data import Batch
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.randomness import untouched_rng

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "linear")

Build = Callable[[int], nn.Module]


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
        """The optimizer and the schedule of so many steps."""
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
    return is_number(value) and math.isfinite(value) and value >= 0


def _whole(value: object) -> bool:
    return is_integer(value) and value >= 1


def built(build: Build, seed: int, call: str) -> nn.Module:
    """An untrained model, made with torch's global generators seeded, which are put back afterwards."""
    with untouched_rng(_devices()):
        torch.manual_seed(seed)
        model = build(seed)
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(
            call=call, got=f"build({seed}) that returns a {type(model).__name__}", expected="a torch.nn.Module",
            try_="lambda seed: nn.Sequential(...)",
        )  # fmt: skip
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InvalidArgumentError(call=call, got="a model without parameters that require grad", expected="some")
    return copy.deepcopy(model)  # what a function returns may be the caller's own


def epoch_orders(seed: int, epochs: int, examples: int) -> Int[Tensor, "E N"]:
    """The order of the examples in every epoch; it depends on the seed alone, and a subset keeps its own in that order.

    Models on subsets that differ in one example see the others in the same order, which takes noise out of their
    difference.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(examples, generator=generator) for _ in range(epochs)])


def train_model(
    model: nn.Module,
    seed: int,
    data: Batch,
    targets: Tensor,
    mask: Bool[Tensor, " N"],
    recipe: TrainingRecipe,
    loss: PerExample,
    tick: Callable[[int], object],
) -> None:
    """Train a model in place on a subset of the data; ``tick`` is called after every epoch with 1."""
    size = int(mask.sum())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, schedule = recipe.start(parameters, recipe.epochs * recipe.steps(size))
    with untouched_rng(_devices()), torch.enable_grad():
        torch.manual_seed(seed)  # of dropout
        for order in epoch_orders(seed, recipe.epochs, data.size):
            for index in order[mask[order]].to(targets.device).split(recipe.batch_size or size):
                optimizer.zero_grad()
                loss(data.take(index).call(model), targets[index]).mean().backward()
                optimizer.step()
                schedule.step()
            tick(1)


def _devices() -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
