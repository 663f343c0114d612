"""Training many models of one architecture in lockstep, each on its own subset of the data.

Parameters are stacked and outputs come of one vectorised call. Every model ends where it would if it were trained
alone, up to rounding. Knows no file, query or score.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import vmap

from fisherkit.arguments import is_integer, is_number
from fisherkit.data import Batch
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, MemoryBudgetError, ModelError
from fisherkit.influence.evaluation.losses import PerExample
from fisherkit.memory import available_memory, readable
from fisherkit.randomness import untouched_rng
from fisherkit.rows.whole import functional_call, kept_whole

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("constant", "linear")

Build = Callable[[int], nn.Module]
Named = dict[str, Tensor]

_COUPLED = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
_AT_ONCE = 128
"""More models than this no longer make one cheaper, and leave the caches of a processor."""
EVALUATED = 128
"""Examples that are measured at once, if batches are smaller."""


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
        """The optimizer and the schedule of so many steps; elementwise, so that stacked models do not meet in them."""
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


@dataclass(frozen=True)
class Stack:
    """M models: their parameters stacked, ``[M, …]``, and what is not trained and differs from seed to seed."""

    trained: Named
    frozen: Named


class StackedModels:
    """The models that a function builds, one for each seed, to be stacked as often as asked for.

    Args:
        build: a seed to a model; called with torch's global generators seeded by it and put back afterwards.
        seeds: one model each.
        call: for errors.
    """

    def __init__(self, build: Build, seeds: Sequence[int], call: str) -> None:
        self.build, self.call = build, call
        models = [_built(build, seed, call) for seed in seeds]
        self.template = models[0]
        named = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in models]
        rest = [
            dict(m.named_buffers()) | {n: p for n, p in m.named_parameters() if not p.requires_grad} for m in models
        ]
        if not named[0]:
            raise InvalidArgumentError(call=call, got="a model without parameters that require grad", expected="some")
        for kind in (named, rest):
            shapes = [{n: (t.shape, t.dtype, t.device) for n, t in tensors.items()} for tensors in kind]
            if any(s != shapes[0] for s in shapes):
                raise InvalidArgumentError(
                    call=call, got="models that differ in names, shapes or dtypes from seed to seed",
                    expected="one architecture for all seeds", why="their parameters are stacked",
                )  # fmt: skip
        self.initial = {n: torch.stack([t[n].detach() for t in named]) for n in named[0]}
        same = {n for n in rest[0] if all(torch.equal(t[n], rest[0][n]) for t in rest)}
        self.shared = {n: t.detach() for n, t in rest[0].items() if n in same}
        self.frozen = {n: torch.stack([t[n].detach() for t in rest]) for n in rest[0] if n not in same}
        self.device = next(iter(self.initial.values())).device

    def start(self, which: Int[Tensor, " M"]) -> Stack:
        """Untrained models, each from the seed at its place among the seeds."""
        which = which.to(self.device)
        return Stack(
            {n: t[which].requires_grad_() for n, t in self.initial.items()},
            {n: t[which] for n, t in self.frozen.items()},
        )

    def outputs(self, stack: Stack, batch: Batch, *, shared: bool) -> Tensor:
        """Of every model, ``[M, B, …]``, for inputs ``[M, B, …]``, or ``[B, …]`` that all models share."""
        leaves, rebuild = batch.leaves()

        def one(trained: Named, frozen: Named, *own: Tensor) -> Tensor:
            def model(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self.template, {**trained, **frozen, **self.shared}, args, kwargs)

            return rebuild(list(own)).call(model)

        axes = (0, 0 if stack.frozen else None, *([None if shared else 0] * len(leaves)))
        with kept_whole(self.template):
            return vmap(one, in_dims=axes)(stack.trained, stack.frozen, *leaves)

    def module(self, seed: int, stack: Stack, place: int) -> nn.Module:
        """One of the models by itself, of this seed and at this place in the stack."""
        model = copy.deepcopy(_built(self.build, seed, self.call))  # what a function returns may be the caller's own
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in stack.trained:
                    parameter.copy_(stack.trained[name][place])
        return model

    def at_once(self, data: Batch, recipe: TrainingRecipe, asked: int | None, budget: int | None) -> int:
        """How many models to train at once.

        Raises:
            MemoryBudgetError: not even one fits.
        """
        width = min(data.size, max(recipe.batch_size or data.size, EVALUATED))
        each = self._bytes_per_model(data.take(slice(0, width)))
        if asked is not None:
            return asked
        budget = available_memory(self.device) // 4 if budget is None else budget
        if each > budget:
            raise MemoryBudgetError(
                call=self.call, got=f"a model that takes {readable(each)} to train",
                expected=f"at most {readable(budget)}", try_="a larger memory_budget=, or a smaller batch_size",
            )  # fmt: skip
        return min(_AT_ONCE, budget // each)

    def _bytes_per_model(self, batch: Batch) -> int:
        """Memory that training one more model takes: parameters, gradients, moments, and what autograd keeps."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        try:
            with saved_tensors_hooks(note, lambda tensor: tensor):
                self.outputs(self.start(torch.zeros(2, dtype=torch.long)), batch, shared=True)
        except RuntimeError as error:
            if isinstance(error, ModelError):
                raise error.at(self.call) from error
            raise ModelError(
                call=self.call, got=f"a model that torch.func.vmap cannot take ({str(error).splitlines()[0]})",
                expected="one whose forward pass has no data-dependent control flow, random numbers or changed buffers",
                try_="model.eval(), or train one model at a time and pass the outputs to the score",
            ) from error  # fmt: skip
        own = sum(t[0].nbytes for t in (*self.initial.values(), *self.frozen.values()))
        # Value, gradient, two moments, and the optimizer's temporaries; activations once more for their gradients.
        return 6 * own + sum(kept.values()) + sum(leaf.nbytes for leaf in batch.leaves()[0])


def _built(build: Build, seed: int, call: str) -> nn.Module:
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    with untouched_rng(devices):
        torch.manual_seed(seed)
        model = build(seed)
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(
            call=call, got=f"build({seed}) that returns a {type(model).__name__}", expected="a torch.nn.Module",
            try_="lambda seed: nn.Sequential(...)",
        )  # fmt: skip
    for name, module in model.named_modules():
        if module.training and isinstance(module, _COUPLED) and getattr(module, "p", 1.0) > 0:
            raise ModelError(
                call=call, got=f"{name or 'the model'}, a {type(module).__name__}, in train mode",
                expected="eval mode", why="random masks or batch statistics do not vectorise over models",
                try_="build(seed).eval(); dropout and running statistics are then constants",
            )  # fmt: skip
    return model


def epoch_orders(seed: int, epochs: int, examples: int) -> Int[Tensor, "E N"]:
    """The order of the examples in every epoch; it depends on the seed alone, and a subset keeps its own in that order.

    Models on subsets that differ in one example see the others in the same order, which takes noise out of their
    difference.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(examples, generator=generator) for _ in range(epochs)])


def train_stack(
    models: StackedModels,
    which: Int[Tensor, " M"],
    data: Batch,
    targets: Tensor,
    masks: Bool[Tensor, "M N"],
    orders: Int[Tensor, "R E N"],
    recipe: TrainingRecipe,
    loss: PerExample,
    tick: Callable[[int], object],
) -> Stack:
    """Train M models from the seeds at these places, each on its own subset, all of equally many steps an epoch."""
    sizes = masks.sum(1)
    steps = recipe.steps(int(sizes.max()))
    width = int(sizes.max()) if recipe.batch_size is None else recipe.batch_size
    stack = models.start(which)
    parameters = list(stack.trained.values())
    optimizer, schedule = recipe.start(parameters, recipe.epochs * steps)
    # A smaller subset's last batch is filled up with examples of weight zero.
    real = torch.arange(steps * width) < sizes.unsqueeze(1)
    weights = real.view(len(sizes), steps, width).to(parameters[0])
    weights /= weights.sum(2, keepdim=True)
    places = torch.zeros(real.shape, dtype=torch.long)
    for epoch in range(recipe.epochs):
        order = orders[which, epoch]
        places[real] = order[masks.gather(1, order)]
        index = places.view(len(sizes), steps, width).to(models.device)
        for step in range(steps):
            optimizer.zero_grad()
            chosen = index[:, step]
            losses = example_losses(models.outputs(stack, data.take(chosen), shared=False), targets[chosen], loss)
            # The sum's gradient with respect to a model's parameters is that of its own mean.
            (weights[:, step] * losses).sum().backward()
            optimizer.step()
            schedule.step()
        tick(len(sizes))
    return stack


def example_losses(z: Tensor, targets: Tensor, loss: PerExample) -> Tensor:
    """A function of outputs ``[M, B, …]`` and targets ``[M, B, …]``, ``[M, B]``."""
    return loss(z.flatten(0, 1), targets.flatten(0, 1)).view(z.shape[:2])
