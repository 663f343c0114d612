"""Training many models in lockstep, each on its own subset of the data.

Owns the order of the examples and the step. Its promise: every model ends where it would if it were trained alone, up
to rounding. Knows no file, query or score.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fisherkit.data import Batch
from fisherkit.influence.evaluation.losses import PerExample
from fisherkit.influence.evaluation.recipe import TrainingRecipe
from fisherkit.influence.evaluation.stacked_models import Stack, StackedModels


def epoch_orders(seed: int, epochs: int, examples: int) -> Int[Tensor, "E N"]:
    """The order of the examples in every epoch, a subset keeping its own in that order.

    It depends on nothing but the seed: models on subsets that differ in one example see the others in the same order,
    which takes noise out of their difference.

    Args:
        seed: of the run.
        epochs: E.
        examples: N, of the whole training data.
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
    """Train M models, each on its own subset, all subsets taking equally many steps an epoch.

    Args:
        models: where they start.
        which: each model's place among the seeds.
        data: all training examples.
        targets: theirs.
        masks: each model's subset.
        orders: of the examples, of each seed in each epoch.
        recipe: how.
        loss: ℓ for each example.
        tick: called after every epoch with M.
    """
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
