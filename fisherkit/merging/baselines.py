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
from fisherkit.merging.assembly import Job
from fisherkit.merging.models import Model, check_weights, open_model, open_models, read_double
from fisherkit.merging.policy import MergePolicy, checked, decide


def average(
    models: Sequence[Model],
    weights: Sequence[float] | None = None,
    *,
    policy: MergePolicy | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    return_info: bool = False,
    progress: bool = False,
) -> Any:
    """Σ_t w_t θ_t / Σ_t w_t of every parameter.

    Args:
        models: modules, state dicts, or paths of safetensors, as in `merge`.
        weights: w_t; None for equal ones.
        policy: what is allowed where models leave a choice: see `MergePolicy`.
        out: write safetensors there instead of returning tensors: a folder (``model.safetensors``), or a file's name.
        overwrite: replace a model that is there.
        return_info: also return a `MergeInfo`.
        progress: show a progress bar.

    Returns:
        A state dict, or the path of what was written; with ``return_info`` a pair with the `MergeInfo`.

    Raises:
        InvalidArgumentError, InvalidTypeError, NonFiniteError, FileFormatError: as in `merge`.

    Cost: one reading of every model; one tensor of each in memory.
    """
    call = "average"
    allowed, sources = checked(policy, call, "average"), open_models(models, call)
    job = Job(
        call, sources, check_weights(weights, len(sources), call), None, allowed, out, overwrite, return_info, progress
    )
    return job.result(decide(sources, (), None, allowed, call), ())


def task_arithmetic(
    models: Sequence[Model],
    base: Model,
    scale: float,
    *,
    policy: MergePolicy | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    return_info: bool = False,
    progress: bool = False,
) -> Any:
    """θ_base + scale · Σ_t (θ_t − θ_base) of every parameter.

    Ilharco et al., "Editing models with task arithmetic" (arXiv 2212.04089). With ``scale`` 1 / T it is the average.

    Args:
        models: modules, state dicts, or paths of safetensors, as in `merge`.
        base: the model that all of them were fine-tuned from.
        scale: of the sum of task vectors.
        policy: what is allowed where models leave a choice: see `MergePolicy`; "center" is the base, and what the base
            lacks or has in another shape is mismatched.
        out: write safetensors there instead of returning tensors: a folder (``model.safetensors``), or a file's name.
        overwrite: replace a model that is there.
        return_info: also return a `MergeInfo`, with the scale as its weights.
        progress: show a progress bar.

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
    allowed, sources = checked(policy, call, "average"), open_models(models, call)
    start = open_model(base, "base", call)
    everything = [*sources, start]
    parameters = [
        name for name in sources[0].shapes
        if all(name not in m.buffers and m.dtypes.get(name, torch.float32).is_floating_point for m in everything)
    ]  # fmt: skip
    entries = decide(everything, parameters, start, allowed, call)

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name in (name for name, entry in entries.items() if entry.action == "merged"):
            origin = read_double(start, name)
            total = torch.zeros_like(origin)
            for model in sources:
                total += read_double(model, name, origin.device) - origin
            yield name, origin + scale * total

    equal = (1.0,) * len(sources)
    job = Job(call, sources, equal, start, allowed, out, overwrite, return_info, progress)
    return job.result(entries, merged(), weights=(float(scale),) * len(sources))
