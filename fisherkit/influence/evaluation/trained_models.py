"""Models to be scored, trained exactly as those that scores are judged by.

Owns how trained parameters become modules again. Knows no subset but one, and no measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from tqdm import tqdm

from fisherkit.influence.evaluation.arguments import check_mask
from fisherkit.influence.evaluation.losses import Loss, loss_of
from fisherkit.influence.evaluation.recipe import TrainingRecipe
from fisherkit.influence.evaluation.retraining import batch_of, check_training, chunk_of
from fisherkit.influence.evaluation.stacked_models import Build, StackedModels
from fisherkit.influence.evaluation.training import epoch_orders, train_stack


def train_models(
    build: Build,
    train: tuple[Any, Tensor],
    recipe: TrainingRecipe,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    mask: Bool[Tensor, " N"] | None = None,
    likelihood: Loss = "categorical",
    memory_budget: int | None = None,
    progress: bool = False,
) -> list[nn.Module]:
    """One trained model for each seed, as `retrain` trains them.

    Args:
        build: a seed to a model, as in `retrain`.
        train: inputs and targets of all N training examples, in memory.
        recipe: how to train.
        seeds: one model each.
        mask: which examples to train on; None is all of them.
        likelihood: as in `retrain`.
        memory_budget: bytes; None is a quarter of what is free.
        progress: show a progress bar.

    Raises:
        InvalidTypeError: arguments of a wrong type.
        InvalidArgumentError: a mask or seeds that do not fit.
        DataError: no targets, or targets that do not fit the outputs.
        ModelError: as in `retrain`.
        MemoryBudgetError: not even one model fits.
    """
    call = "train_models"
    data, targets = batch_of(train, f"{call}, train")
    check_training(recipe, seeds, None, memory_budget, call)
    kept = torch.ones(1, data.size, dtype=torch.bool) if mask is None else check_mask(mask, call, data.size)
    loss = loss_of(likelihood, call)
    models = StackedModels(build, seeds, call)
    data, targets = data.to(models.device), targets.to(models.device)
    at_once = chunk_of(models, data, recipe, None, memory_budget, call)
    orders = torch.stack([epoch_orders(seed, recipe.epochs, data.size) for seed in seeds])
    found = []
    with tqdm(total=len(seeds) * recipe.epochs, desc=call, unit="epoch", disable=not progress) as bar:
        for which in torch.arange(len(seeds)).split(at_once):
            masks = kept.cpu().expand(len(which), -1)
            stack = train_stack(models, which, data, targets, masks, orders, recipe, loss, bar.update)
            found += [models.module(build, seeds[int(i)], stack, place, call) for place, i in enumerate(which)]
    return found
