"""From a plan to a result: every name gets its tensor and goes where the result goes, one after the other.

Owns the parts that all ways of merging share: opening models, weights, averages, names that are not merged, and the
choice between a state dict and files. Knows no Fisher.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkit.arguments import is_number
from fisherkit.arithmetic import all_finite
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError
from fisherkit.merging.checkpoints import Checkpoint, Model, open_checkpoint
from fisherkit.merging.policies import Plan
from fisherkit.merging.writing import MemorySink, Sink, targets, written
from fisherkit.progress import bar

Merged = Iterable[tuple[str, Tensor]]
"""Names and float64 tensors that a way of merging computes."""


@dataclass(frozen=True)
class Target:
    """Where the result goes.

    Args:
        out: a folder or file; None for a state dict.
        max_shard_size: bytes of one file.
        overwrite: whether a model that is there may be replaced.
    """

    out: str | Path | None = None
    max_shard_size: int | None = None
    overwrite: bool = False


def open_models(models: Sequence[Model], call: str) -> list[Checkpoint]:
    """The sources of a list of models.

    Raises:
        InvalidTypeError: not a sequence of models.
        InvalidArgumentError: an empty one.
        FileFormatError: a path without complete files.
    """
    if isinstance(models, (str, Path)) or not isinstance(models, Sequence):
        raise InvalidTypeError(
            call=call, got=f"models of type {type(models).__name__}", expected="a list of models",
            try_=f"{call}([model_a, model_b], ...)",
        )  # fmt: skip
    if not models:
        raise InvalidArgumentError(call=call, got="no models", expected="at least one")
    return [open_checkpoint(model, f"model {number}") for number, model in enumerate(models, 1)]


def check_weights(weights: Sequence[float] | Tensor | str, count: int, call: str) -> tuple[float, ...]:
    """One number for each model.

    Raises:
        InvalidTypeError: not numbers.
        InvalidArgumentError: too few or too many, negative or not finite, or all 0.
    """
    if isinstance(weights, str) or not isinstance(weights, (Sequence, Tensor)):
        raise InvalidTypeError(call=call, got=f"weights={weights!r}", expected="one number for each model, or None")
    values: list[Any] = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    if any(not is_number(w) for w in values):
        raise InvalidTypeError(call=call, got=f"weights={values!r}", expected="numbers")
    if len(values) != count:
        raise InvalidArgumentError(call=call, got=f"{len(values)} weights", expected=f"{count}, one for each model")
    if not all(math.isfinite(w) and w >= 0 for w in values) or not any(values):
        raise InvalidArgumentError(
            call=call, got=f"weights={values!r}", expected="finite numbers, 0 or more, not all 0",
            why="a negative multiple of a Fisher is not positive semi-definite",
        )  # fmt: skip
    return tuple(float(w) for w in values)


def weighted_average(models: Sequence[Checkpoint], weights: Sequence[float], name: str) -> Tensor:
    """Σ w_t θ_t / Σ w_t, float64; exactly θ_1 where all models are equal."""
    first = read_double(models[0], name)
    total, mean = sum(weights), torch.zeros_like(first)
    for model, weight in zip(models[1:], weights[1:], strict=True):
        mean.add_(read_double(model, name, first.device) - first, alpha=weight / total)
    return mean.add_(first)


def read_double(model: Checkpoint, name: str, device: torch.device | None = None) -> Tensor:
    """One tensor in float64.

    Raises:
        NonFiniteError: NaN or infinite entries.
    """
    tensor = model.read(name)
    found = tensor.to(tensor.device if device is None else device, torch.float64)
    if not all_finite(found):
        raise NonFiniteError(
            call=f"merge, {model.label}", got=f"NaN or infinite entries in {name!r}", expected="finite numbers",
            try_="check the training run that it came from",
        )  # fmt: skip
    return found


def assemble(
    plan: Plan,
    merged: Merged,
    models: Sequence[Checkpoint],
    weights: Sequence[float],
    center: Checkpoint | None,
    target: Target,
    call: str,
    *,
    progress: bool = False,
    work: Mapping[str, float] | None = None,
) -> dict[str, Tensor] | Path:
    """The result: a state dict, or the path of the files.

    Args:
        plan: what becomes of every name.
        merged: the tensors of the merged names, in any order; computed when they are asked for.
        models: the models.
        weights: of averages.
        center: for names that take its value.
        target: where the result goes.
        call: the public call, for errors.
        progress: show a progress bar.
        work: what a name's tensor costs; by default the numbers that it has.

    Raises:
        InvalidArgumentError: the target cannot be written to.
        InvalidTypeError: a target that is no path.
    """
    names = [name for name, entry in plan.items() if entry.action != "skipped"]
    ties = {name: entry.owner for name, entry in plan.items() if entry.action == "tied"}
    with ExitStack() as stack:
        if target.out is None:
            memory = MemorySink(names)
            sink: Sink = memory
        else:
            out = _path(target.out, models, center, call)
            forms = {name: (plan[name].shape, plan[name].dtype) for name in names if name not in ties}
            most, overwrite = target.max_shard_size, target.overwrite
            sink = stack.enter_context(written(out, forms, ties, most, overwrite=overwrite, call=call))
        costs = {name: (work or {}).get(name, math.prod(plan[name].shape)) for name in names if name not in ties}
        size = sum(math.prod(plan[name].shape) for name in costs)
        with bar(sum(costs.values()), f"{call}, {size:,} numbers", "", shown=progress, steps=False) as shown:
            for name, tensor in _all(plan, merged, models, weights, center):
                entry = plan[name]
                device = models[0].device(name) if name in models[0].shapes else tensor.device
                sink.put(name, tensor.reshape(entry.shape).to(device, entry.dtype))
                shown.update(costs[name])
        for name, owner in ties.items():
            sink.tie(name, owner)
    return memory.state_dict() if target.out is None else _written(out)


def _all(
    plan: Plan, merged: Merged, models: Sequence[Checkpoint], weights: Sequence[float], center: Checkpoint | None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result, none of which shares memory with a model."""
    yield from merged
    for name, entry in plan.items():
        if entry.action == "averaged":
            yield name, weighted_average(models, weights, name)
        elif entry.action in ("equal", "first"):
            yield name, models[0].read(name).clone()
        elif entry.action == "center" and center is not None:
            yield name, center.read(name).clone()


def _path(out: str | Path, models: Sequence[Checkpoint], center: Checkpoint | None, call: str) -> Path:
    """The target's path, which must not be a model's."""
    if not isinstance(out, (str, Path)):
        raise InvalidTypeError(call=call, got=f"out of type {type(out).__name__}", expected="a path or None")
    path = Path(out)
    ours = {place.resolve() for place in targets(path)}
    for model in [*models, *([center] if center is not None else [])]:
        if ours & {file.resolve() for file in model.files}:
            raise InvalidArgumentError(
                call=call, got=f"out={str(out)!r}, which is the place of {model.label}", expected="another place",
                why="it would be overwritten while it is read",
            )  # fmt: skip
    return path


def _written(out: Path) -> Path:
    single, index = targets(out)
    return single if single.exists() else index
