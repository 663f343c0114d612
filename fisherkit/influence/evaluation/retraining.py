"""Training one architecture on many subsets of the data, many models at once.

Owns the list of models still to be trained, how many at a time, and what is measured of them. Knows neither scores nor
what the subsets mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm import tqdm

from fisherkit.arguments import check_count, is_integer
from fisherkit.data import Batch
from fisherkit.errors import DataError, InvalidArgumentError, InvalidTypeError, MemoryBudgetError, NonFiniteError
from fisherkit.influence.evaluation.arguments import check_masks
from fisherkit.influence.evaluation.losses import (
    Loss,
    Measurements,
    PerExample,
    loss_of,
    measurements_of,
    resolved_loss,
)
from fisherkit.influence.evaluation.recipe import TrainingRecipe
from fisherkit.influence.evaluation.runs_file import Retraining, RunsFile, fingerprint
from fisherkit.influence.evaluation.stacked_models import Build, Stack, StackedModels
from fisherkit.influence.evaluation.training import epoch_orders, example_losses, train_stack
from fisherkit.memory import available_memory, readable

Labelled = tuple[Batch, Tensor]
"""Examples and their targets, of which a batch by itself may have none."""

_AT_ONCE = 128
"""More models than this no longer make one cheaper, and leave the caches of a processor."""
_EVALUATED = 128
"""Examples that are measured at once, if batches are smaller."""


def retrain(
    build: Build,
    train: tuple[Any, Tensor],
    queries: tuple[Any, Tensor],
    masks: Bool[Tensor, "S N"],
    recipe: TrainingRecipe,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    likelihood: Loss = "categorical",
    measurements: Measurements = ("loss",),
    path: str | Path | None = None,
    save_every: float = 30.0,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
) -> Retraining:
    """Train a model on every subset from every seed, and measure each on the queries.

    Models train in lockstep, their parameters stacked (`torch.func.vmap`), each as it would alone up to rounding: from
    ``build(seed)``, on its own subset's examples in the order of `epoch_orders`, on the mean loss of each batch. The
    order depends on the seed alone, so that two subsets' models differ by nothing else.

    Args:
        build: a seed to a model. It is called with torch's generators seeded by that seed; they are put back
            afterwards. Parameters that do not require grad, and buffers, are constants.
        train: inputs and targets of all N training examples, in memory; inputs may be a dict of the model's keywords.
        queries: inputs and targets to measure on.
        masks: which training examples each subset has.
        recipe: how to train.
        seeds: R distinct integers.
        likelihood: what is trained on: "categorical", "gaussian", "bernoulli" or an object of these classes (as
            everywhere in the package), or a function of outputs and targets that returns a loss for each example.
        measurements: what is recorded, larger = better: "loss" is −ℓ, "margin" is log(p_y / (1 − p_y)) of the labels
            (Park et al. 2023, §3.3), summed over an example's positions or outputs; or a dict of functions of outputs
            and targets. A function returns a number for each example and is read like a loss: its negative is
            recorded.
        path: a file that results are added to as they come in. If it exists and was written with the same arguments,
            the run goes on from it; functions are told apart by their names only.
        save_every: seconds between writes of the file, at least; 0 writes after every chunk of models.
        chunk_size: models trained at once; None chooses by the memory budget, and 128 at most.
        memory_budget: bytes; None is a quarter of what is free.
        progress: show a progress bar.

    Returns:
        Outputs, subsets and seeds.

    Raises:
        InvalidTypeError: arguments of a wrong type.
        InvalidArgumentError: masks, seeds, names or sizes that do not fit; a path whose file belongs to another run.
        DataError: batches without targets, or targets that do not fit the outputs.
        ModelError: a model with dropout or batch norm in train mode, or one that vmap cannot take.
        MemoryBudgetError: not even one model fits.
        NonFiniteError: a model diverged; the message names its subset and seed.
        FileFormatError: the file is damaged or of another kind.

    Cost: S · R trainings. Memory: that of one chunk of models.
    """
    call = "retrain"
    data, targets = batch_of(train, f"{call}, train")
    asked, wanted = batch_of(queries, f"{call}, queries")
    check_masks(masks, call, data.size)
    check_training(recipe, seeds, chunk_size, memory_budget, call)
    loss = loss_of(likelihood, call)
    measured = measurements_of(measurements, likelihood, call)
    models = StackedModels(build, seeds, call)
    masks = masks.cpu()
    settings = {
        "recipe": asdict(recipe),
        "seeds": list(seeds),
        "likelihood": _recorded(likelihood),
        "measurements": {name: _name(function) for name, function in measured.items()},
        "data": fingerprint([*data.leaves()[0], targets, *asked.leaves()[0], wanted]),
        "subsets": fingerprint([masks]),
        "models": fingerprint([*models.initial.values(), *models.shared.values(), *models.frozen.values()]),
    }
    data, asked = data.to(models.device), asked.to(models.device)
    targets, wanted = targets.to(models.device), wanted.to(models.device)
    file = RunsFile(path, settings, masks, measured, (len(masks), len(seeds), asked.size), save_every, call)
    at_once = chunk_of(models, data, recipe, chunk_size, memory_budget, call)
    orders = torch.stack([epoch_orders(seed, recipe.epochs, data.size) for seed in seeds])
    bar = tqdm(
        total=file.done.numel() * recipe.epochs, initial=int(file.done.sum()) * recipe.epochs, desc=call,
        unit="epoch", disable=not progress,
    )  # fmt: skip
    with file, bar:
        for subset, seed in _chunks(masks, file.done, recipe, at_once):
            stack = train_stack(models, seed, data, targets, masks[subset], orders, recipe, loss, bar.update)
            outputs, own = _measure(
                models, stack, (data, targets), (asked, wanted), masks[subset], recipe, loss, measured
            )
            _check_finite({**outputs, "training loss": own}, subset, [seeds[int(i)] for i in seed], call)
            file.put(subset, seed, outputs, own)
    return file.result()


def _chunks(
    masks: Bool[Tensor, "S N"], done: Bool[Tensor, "S R"], recipe: TrainingRecipe, at_once: int
) -> Iterator[tuple[Int[Tensor, " M"], Int[Tensor, " M"]]]:
    """Subsets and seeds to be trained together: not done, and of equally many steps an epoch; seed by seed."""
    subset, seed = (~done).mT.nonzero().flip(1).unbind(1)
    steps = torch.tensor([recipe.steps(int(size)) for size in masks.sum(1)])[subset]
    for count in steps.unique():
        chosen = (steps == count).nonzero()[:, 0]
        for part in chosen.split(at_once):
            yield subset[part], seed[part]


@torch.no_grad()
def _measure(
    models: StackedModels,
    stack: Stack,
    data: Labelled,
    queries: Labelled,
    masks: Bool[Tensor, "M N"],
    recipe: TrainingRecipe,
    loss: PerExample,
    measured: dict[str, PerExample],
) -> tuple[dict[str, Tensor], Tensor]:
    """Every measurement on the queries, ``[M, Q]``, and the mean loss on each model's own subset, ``[M]``."""
    width = max(recipe.batch_size or 0, _EVALUATED)

    def on(labelled: Labelled, functions: dict[str, PerExample]) -> dict[str, Tensor]:
        batch, targets = labelled
        parts: dict[str, list[Tensor]] = {name: [] for name in functions}
        for start in range(0, batch.size, width):
            part = slice(start, start + width)
            z, y = models.outputs(stack, batch.take(part), shared=True), targets[part]
            for name, function in functions.items():
                parts[name].append(example_losses(z, y.expand(len(z), *y.shape), function))
        return {name: torch.cat(part, 1) for name, part in parts.items()}

    own = masks.to(models.device)
    losses = on(data, {"loss": loss})["loss"]
    return on(queries, measured), (losses * own).sum(1) / own.sum(1)


def chunk_of(
    models: StackedModels, data: Batch, recipe: TrainingRecipe, asked: int | None, budget: int | None, call: str
) -> int:
    """How many models to train at once.

    Raises:
        MemoryBudgetError: not even one fits.
    """
    width = min(data.size, max(recipe.batch_size or data.size, _EVALUATED))
    each = models.bytes_per_model(data.take(slice(0, width)), call)
    if asked is not None:
        return asked
    budget = available_memory(models.device) // 4 if budget is None else budget
    if each > budget:
        raise MemoryBudgetError(
            call=call, got=f"a model that takes {readable(each)} to train", expected=f"at most {readable(budget)}",
            try_="a larger memory_budget=, or a smaller batch_size",
        )  # fmt: skip
    return min(_AT_ONCE, budget // each)


def batch_of(raw: Any, call: str) -> Labelled:
    """Inputs and targets as users pass them.

    Raises:
        DataError: no targets.
    """
    batch = Batch.of(raw, call)
    if batch.targets is None:
        raise DataError(call=call, got="no targets", expected="a pair (inputs, targets)")
    return batch, batch.targets


def check_training(
    recipe: object, seeds: Sequence[int], chunk_size: int | None, memory_budget: int | None, call: str
) -> None:
    """Refuse what no training can use.

    Raises:
        InvalidTypeError: recipe is not one.
        InvalidArgumentError: seeds that are not distinct integers, or sizes below 1.
    """
    if not isinstance(recipe, TrainingRecipe):
        raise InvalidTypeError(call=call, got=f"a {type(recipe).__name__} as recipe", expected="a TrainingRecipe")
    whole = all(is_integer(seed) and seed >= 0 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise InvalidArgumentError(call=call, got=f"seeds={list(seeds)}", expected="distinct integers, 0 or more")
    for name, value in {"chunk_size": chunk_size, "memory_budget": memory_budget}.items():
        check_count(call, name, value, optional=True)


def _check_finite(values: dict[str, Tensor], subset: Tensor, seeds: Sequence[int], call: str) -> None:
    for name, tensor in values.items():
        fine = torch.isfinite(tensor).reshape(len(tensor), -1).all(1).cpu()
        if not bool(fine.all()):
            place = int((~fine).nonzero()[0])
            raise NonFiniteError(
                call=call, got=f"NaN or infinity as {name} of subset {int(subset[place])} from seed {seeds[place]}",
                expected="finite numbers", why="training diverged, or the measurement is not finite",
                try_="a smaller learning rate",
            )  # fmt: skip


def _recorded(likelihood: Loss) -> str:
    """As the file of a run has it."""
    known = resolved_loss(likelihood)
    return f"function {_name(likelihood)}" if known is None else known.recorded


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
