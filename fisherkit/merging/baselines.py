"""Ways to merge that need no Fisher, by the same policies: the average and task arithmetic.

Owns their two formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkit.arguments import is_number
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.merging.assembly import (
    Target,
    assemble,
    check_weights,
    open_models,
    read_double,
)
from fisherkit.merging.checkpoints import Checkpoint, Model, open_checkpoint
from fisherkit.merging.info import MergeInfo
from fisherkit.merging.policies import Policies, make_plan


def average(
    models: Sequence[Model],
    weights: Sequence[float] | None = None,
    *,
    buffers: str = "refuse",
    integers: str = "refuse",
    mismatched: str = "refuse",
    dtype: torch.dtype | None = None,
    out: str | Path | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    return_info: bool = False,
    progress: bool = False,
) -> Any:
    """Σ_t w_t θ_t / Σ_t w_t of every parameter.

    Args:
        models: as in `merge`.
        weights: w_t; None for equal ones.
        buffers: as in `merge`, and so are all others.
        integers: as there.
        mismatched: as there.
        dtype: as there.
        out: as there.
        max_shard_size: as there.
        overwrite: as there.
        return_info: as there.
        progress: as there.

    Returns:
        A state dict, or the path of what was written; with ``return_info`` a pair with the `MergeInfo`.

    Raises:
        InvalidArgumentError, InvalidTypeError, NonFiniteError, FileFormatError: as in `merge`.

    Cost: one reading of every model; one tensor of each in memory.
    """
    call = "average"
    policies = Policies("average", buffers, integers, mismatched, dtype)
    policies.check(call)
    checkpoints = open_models(models, call)
    resolved = (1 / len(checkpoints),) * len(checkpoints)
    if weights is not None:
        resolved = check_weights(weights, len(checkpoints), call)
    plan = make_plan(checkpoints, (), None, policies, call)
    target = Target(out, max_shard_size, overwrite)
    result = assemble(plan, (), checkpoints, resolved, None, target, call, progress=progress)
    names = {name: str(entry) for name, entry in plan.items()}
    return (result, MergeInfo(call, resolved, None, 0.0, 0.0, (), names)) if return_info else result


def task_arithmetic(
    models: Sequence[Model],
    base: Model,
    scale: float,
    *,
    buffers: str = "refuse",
    integers: str = "refuse",
    mismatched: str = "refuse",
    dtype: torch.dtype | None = None,
    out: str | Path | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    return_info: bool = False,
    progress: bool = False,
) -> Any:
    """θ_base + scale · Σ_t (θ_t − θ_base) of every parameter.

    Ilharco et al., "Editing models with task arithmetic" (arXiv 2212.04089). With ``scale`` 1 / T it is the average.

    Args:
        models: as in `merge`.
        base: the model that all of them were fine-tuned from.
        scale: of the sum of task vectors.
        buffers: as in `merge`, "center" being the base, and so are all others.
        integers: as there.
        mismatched: as there; what the base lacks or has in another shape is refused.
        dtype: as there.
        out: as there.
        max_shard_size: as there.
        overwrite: as there.
        return_info: as there; its damping and weights are those of no Fisher, the scale stands as weights.
        progress: as there.

    Returns:
        A state dict, or the path of what was written; with ``return_info`` a pair with the `MergeInfo`.

    Raises:
        InvalidTypeError: as in `merge`; scale is no number.
        InvalidArgumentError: as in `merge`; scale is not finite.
        NonFiniteError, FileFormatError: as in `merge`.

    Cost: one reading of every model; one tensor of each in memory.
    """
    call = "task_arithmetic"
    if not is_number(scale):
        raise InvalidTypeError(call=call, got=f"scale={scale!r}", expected="a number")
    if not math.isfinite(scale):
        raise InvalidArgumentError(call=call, got=f"scale={scale}", expected="a finite number")
    policies = Policies("average", buffers, integers, mismatched, dtype)
    policies.check(call)
    checkpoints, start = open_models(models, call), open_checkpoint(base, "base")
    everything = [*checkpoints, start]
    parameters = [name for name in checkpoints[0].names if _is_parameter(everything, name)]
    plan = make_plan(everything, parameters, start, policies, call)
    moved = [name for name, entry in plan.items() if entry.action == "merged"]
    weights = (float(scale),) * len(checkpoints)

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name in moved:
            origin = read_double(start, name)
            total = torch.zeros_like(origin)
            for model in checkpoints:
                total += read_double(model, name, origin.device) - origin
            yield name, origin + scale * total

    target = Target(out, max_shard_size, overwrite)
    equal = (1.0,) * len(checkpoints)
    result = assemble(plan, merged(), checkpoints, equal, start, target, call, progress=progress)
    names = {name: str(entry) for name, entry in plan.items()}
    return (result, MergeInfo(call, weights, None, 0.0, 0.0, (), names)) if return_info else result


def _is_parameter(models: Sequence[Checkpoint], name: str) -> bool:
    return all(
        name not in model.buffers and model.dtypes.get(name, torch.float32).is_floating_point for model in models
    )
