"""`merge`: one model that stays close to several, as their Fishers measure closeness.

Owns the arguments and the order of the work: open, plan, measure, then solve block by block and put everything in its
place. `regmean` goes the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fisherkit.arithmetic import without_autocast
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.merging.assembly import Target, assemble, check_weights, open_models
from fisherkit.merging.blockwise import BlockwiseMerge
from fisherkit.merging.checkpoints import Checkpoint, Model, open_checkpoint
from fisherkit.merging.info import MergeInfo
from fisherkit.merging.policies import Plan, Policies, make_plan
from fisherkit.merging.scales import measure
from fisherkit.merging.sources import Fisher, FisherSource, joined_blocks, named_as, open_fisher
from fisherkit.merging.systems import Solver
from fisherkit.model_state import tensors_hash
from fisherkit.operators import Damping, RelativeDamping
from fisherkit.operators.outputs_average import mix_with_average

DEFAULT_DAMPING = RelativeDamping(0.03)
"""Of the mean eigenvalue: directions that no Fisher measured stay at the average."""

DEFAULT_OUTPUT_DAMPING = 3.0
"""One constant for all: between 1 and 30 the merged models were equally good (docs/results/merging.md)."""


def merge(
    models: Sequence[Model],
    fishers: Sequence[Fisher],
    weights: Sequence[float] | str | None = None,
    *,
    method: str = "auto",
    damping: Damping = DEFAULT_DAMPING,
    center: str | Model = "average",
    normalize: str | None = "block",
    output_damping: float = DEFAULT_OUTPUT_DAMPING,
    uncovered: str = "refuse",
    buffers: str = "refuse",
    integers: str = "refuse",
    mismatched: str = "refuse",
    other_weights: str = "warn",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    tolerance: float = 1e-12,
    max_steps: int = 2000,
    out: str | Path | None = None,
    max_shard_size: int | None = None,
    overwrite: bool = False,
    return_info: bool = False,
    progress: bool = False,
) -> Any:
    """The model that minimises Σ_t w_t (θ − θ_t)ᵀF_t(θ − θ_t) + λ‖θ − θ_center‖².

    Models are read and never changed. Every block of parameters that no Fisher connects to others is a problem of its
    own: only one block of every model and Fisher is in memory at a time, computed in float64 and rounded once to the
    models' dtype. Matena and Raffel, "Merging models with Fisher-weighted averaging" (arXiv 2111.09832), is the
    diagonal case without damping.

    Args:
        models: modules, state dicts, or paths of safetensors: a file, an index, or a folder with ``model.safetensors``.
        fishers: one for each model, in its order: operators, or paths of Fisher files, of which blocks are read as they
            are needed.
        weights: w_t; None for 1 / T; "examples" for the number of examples that each Fisher was measured on.
        method: "auto" takes closed forms where the Fishers' sum has one, a Cholesky factorization for sums of up to
            3,000 parameters a block, conjugate gradients beyond; "direct" writes every block out; "cg" iterates always.
        damping: λ, or `fisherkit.RelativeDamping`: that multiple of the mean eigenvalue of Σ w_t F_t over all blocks.
        center: where damping pulls to: "average" of the models with the same weights, or a model.
        normalize: "block": the mean eigenvalue of each block of each Fisher becomes 1; "trace": that of each whole
            Fisher; "norm": its root mean square eigenvalue; "output": the mean eigenvalue of each Kronecker product's
            gradient factor; None: as they are, for Fishers of one kind on one scale.
        output_damping: ρ; F_t becomes (F_t + ρR_t) / (1 + ρ), R_t the average of F_t over each layer's outputs. For
            Kronecker products that damps the gradient factor alone; it is what kfac needs to be as good as RegMean. 0
            for none: then rows stay rows, and diagonals are merged entry by entry.
        uncovered: what becomes of float parameters that differ and that not every Fisher covers: "refuse", "average",
            "first" or "center".
        buffers: likewise for float buffers, such as statistics of batch norm.
        integers: what becomes of other tensors that differ: "refuse" or "first".
        mismatched: what becomes of names that a model lacks or has in another shape: "refuse", "skip" or "first".
        other_weights: what becomes of a Fisher that was measured at other weights than its model has: "warn", or
            "refuse", as the command does. Fishers that do not say at which are listed in `MergeInfo.unverified`.
        dtype: of the result's floating-point tensors; None for the models', which must agree.
        device: where blocks are solved; None for where the first Fisher's lie.
        tolerance: largest relative residual of a block that counts as converged. Far above the default, directions
            whose curvature is near λ are not solved for: at relative damping 1e-8 a residual of 1e-8 may leave them
            wrong altogether.
        max_steps: of conjugate gradients in each block.
        out: write safetensors there instead of returning tensors: a folder (``model.safetensors``), or a file's name.
        max_shard_size: bytes of tensors in one file; with more there is an index. None for a single file.
        overwrite: replace a model that is there.
        return_info: also return a `MergeInfo`: how every block was solved, what became of every name.
        progress: show progress bars.

    Returns:
        A state dict in the models' dtype, tensors on the first model's device; with ``out`` the path of the file or
        index; with ``return_info`` a pair with the `MergeInfo`. A block that missed its tolerance is warned of.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument, models that do not fit together or to their Fishers; a
            refusal lists the names and the flag that allows them.
        SingularMatrixError: no damping where a block needs some.
        NonFiniteError: NaN or infinity in a model or a Fisher.
        FileFormatError: a missing or damaged file.

    Cost: two readings of every Fisher, and three of every model: to know it as its Fisher's, for the average, and to
        merge it; a block of d parameters takes O(d) for diagonals, R²d for R rows, d³/3
        for small sums, and T (O + I) d a step of conjugate gradients for Kronecker products of T layers O × I.
    """
    return merge_by(
        models, fishers, weights, Policies(uncovered, buffers, integers, mismatched, dtype, other_weights),
        Solver(method, tolerance, max_steps), Target(out, max_shard_size, overwrite), center=center,
        normalize=normalize, damping=damping, output_damping=output_damping, device=device, return_info=return_info,
        progress=progress, call="merge",
    )  # fmt: skip


@without_autocast()
def merge_by(
    models: Sequence[Model],
    fishers: Sequence[Fisher],
    weights: Sequence[float] | str | None,
    policies: Policies,
    solver: Solver,
    target: Target,
    *,
    damping: Damping,
    device: torch.device | str | None,
    return_info: bool,
    progress: bool,
    call: str,
    center: str | Model = "average",
    normalize: str | None = None,
    output_damping: float = 0.0,
    seen_as: Callable[[FisherSource], FisherSource] = lambda source: source,
) -> Any:
    """What `merge` and `regmean` share: all of `merge`, of Fishers that may be seen as other matrices.

    Args:
        models: as there, like all that is not listed here.
        fishers: as there.
        weights: as there.
        policies: what becomes of names that are not merged.
        solver: of a block.
        target: where the result goes.
        damping: as there.
        device: as there.
        return_info: as there.
        progress: as there.
        call: the public call, for errors.
        center: as there.
        normalize: as there.
        output_damping: as there.
        seen_as: what a Fisher is merged as.

    Raises:
        FisherkitError: as there.
    """
    policies.check(call)
    solver.check(call)
    checkpoints = open_models(models, call)
    opened = [
        named_as(source, model.names)
        for source, model in zip(open_fishers(fishers, len(checkpoints), call), checkpoints, strict=True)
    ]
    sources = [seen_as(source) for source in opened]
    resolved = resolve_weights(weights, sources, normalize, call)
    pull = open_center(center, call)
    unverified = unverified_models(checkpoints, opened, policies.other_weights, call)
    plan = make_plan(checkpoints, covered_by_all(sources), pull, policies, call)
    blocks = blocks_of_plan(plan, checkpoints, sources, pull, call)
    scales = measure(sources, blocks, resolved, normalize, damping, progress=progress)
    problem = BlockwiseMerge(
        checkpoints, sources, resolved, pull, scales, lambda f: mix_with_average(f, output_damping), solver,
        None if device is None else torch.device(device),
    )  # fmt: skip
    result = assemble(
        plan, problem.solutions(), checkpoints, resolved, pull, target, call, progress=progress, work=problem.work()
    )
    info = MergeInfo(
        call, resolved, normalize, scales.damping, output_damping, tuple(problem.infos),
        {name: str(entry) for name, entry in plan.items()}, unverified,
    )  # fmt: skip
    return (result, info) if return_info else result


def open_fishers(fishers: Sequence[Fisher], count: int, call: str) -> list[FisherSource]:
    """One source of blocks for each model.

    Raises:
        InvalidTypeError: not a sequence of Fishers.
        InvalidArgumentError: too few or too many.
    """
    if isinstance(fishers, (str, Path)) or not isinstance(fishers, Sequence):
        raise InvalidTypeError(
            call=call, got=f"fishers of type {type(fishers).__name__}", expected="a list of Fishers, one for each model"
        )
    if len(fishers) != count:
        raise InvalidArgumentError(
            call=call, got=f"{count} models and {len(fishers)} Fishers", expected="one Fisher for each model"
        )
    return [open_fisher(fisher, f"Fisher {number}") for number, fisher in enumerate(fishers, 1)]


def resolve_weights(
    weights: Sequence[float] | str | None, sources: Sequence[FisherSource], normalize: str | None, call: str
) -> tuple[float, ...]:
    """w_t as numbers.

    Raises:
        InvalidArgumentError: "examples" of Fishers that do not say how many, or that are sums over them already.
        InvalidTypeError: not numbers.
    """
    if weights is None:
        return (1 / len(sources),) * len(sources)
    if weights != "examples":
        return check_weights(weights, len(sources), call)
    counts = [source.metadata.get("examples") for source in sources]
    if None in counts:
        raise InvalidArgumentError(
            call=f'{call}(weights="examples")',
            got=f"Fishers that do not say on how many examples they were measured: {_numbers(counts)}",
            expected="Fishers as they were built or saved", try_="weights=[N_1, N_2, ...]",
        )  # fmt: skip
    sums = [source.metadata.get("normalization") == "sum" for source in sources]
    if any(sums) and normalize is None:
        raise InvalidArgumentError(
            call=f'{call}(weights="examples", normalize=None)',
            got='Fishers with normalization="sum"', expected='normalization="mean"',
            why="sums over examples have their number in them already",
            try_=f"weights={[1.0] * len(sources)}, which is the same but for the center",
        )  # fmt: skip
    return check_weights([float(count or 0) for count in counts], len(sources), call)


def open_center(center: str | Model, call: str) -> Checkpoint | None:
    """The state that damping pulls to; None for the average.

    Raises:
        InvalidTypeError: neither "average" nor a model.
    """
    if isinstance(center, str) and center == "average":
        return None
    if not isinstance(center, (nn.Module, Mapping, str, Path)):
        raise InvalidTypeError(
            call=call, got=f"center of type {type(center).__name__}", expected='"average", or a model in any form'
        )
    return open_checkpoint(center, "center")


def unverified_models(
    models: Sequence[Checkpoint], sources: Sequence[FisherSource], other_weights: str, call: str
) -> tuple[int, ...]:
    """Models, from 1, that cannot be told to be those that were measured.

    Args:
        models: the models.
        sources: the Fisher of each.
        other_weights: what becomes of a Fisher that was measured at another: "warn" or "refuse".
        call: the public call, for errors.

    Raises:
        InvalidArgumentError: there is one, and it is refused.

    Cost: reads each model's covered parameters once, one at a time.
    """
    unverified, others = [], []
    for number, (model, source) in enumerate(zip(models, sources, strict=True), 1):
        same = _measured_at(model, source)
        if same is None:
            unverified.append(number)
        elif not same:
            right = [other for other, found in enumerate(models, 1) if other != number and _measured_at(found, source)]
            others.append(
                f"Fisher {number} was measured at other parameters than those of model {number}"
                + (f" (at those of model {right[0]})" if right else "")
            )
    if others and other_weights == "refuse":
        raise InvalidArgumentError(
            call=f'{call}(other_weights="refuse")', got="Fishers of other weights: " + "; ".join(others),
            expected="the Fisher of each very model",
            why="a Fisher says what matters near the weights that it was measured at",
            try_='another order of fishers, the Fisher measured again, or other_weights="warn", which merges them',
        )  # fmt: skip
    for text in others:
        warnings.warn(
            f"{call}: {text}. Expected: the Fisher of this very model. Try: measure it again, or another order of "
            f"fishers.", UserWarning, stacklevel=4,
        )  # fmt: skip
    return tuple(unverified)


def _measured_at(model: Checkpoint, source: FisherSource) -> bool | None:
    """Whether a model has the parameters that a Fisher was measured at; None where that cannot be told."""
    names, (dtype, _, known) = source.space.names, source.metadata.get("covered_hash", "").partition(":")
    if any(str(model.dtypes.get(name)).removeprefix("torch.") != dtype for name in names):
        return None
    then = {source.recorded.get(name, name): name for name in names}  # the hash is of the names of its time, too
    forms = {old: torch.empty(model.shapes[new], dtype=model.dtypes[new], device="meta") for old, new in then.items()}
    return tensors_hash(forms, lambda old: model.read(then[old])) == known


def covered_by_all(sources: Sequence[FisherSource]) -> list[str]:
    """Names that every Fisher covers, in the first one's order."""
    return [name for name in sources[0].space.names if all(name in source.space.slices for source in sources)]


def blocks_of_plan(
    plan: Plan, models: Sequence[Checkpoint], sources: Sequence[FisherSource], center: Checkpoint | None, call: str
) -> list[tuple[str, ...]]:
    """The joined partition of the names that are merged.

    Raises:
        InvalidArgumentError: a Fisher covers what the models lack, shapes differ, nothing is left to merge, or the
            center lacks something.
    """
    for number, (model, source) in enumerate(zip(models, sources, strict=True), 1):
        strangers = [name for name in source.space.names if name not in model.shapes]
        odd = [
            f"{name!r} ({list(shape)} and {list(model.shapes[name])})"
            for name, shape in zip(source.space.names, source.space.shapes, strict=True)
            if name in model.shapes and model.shapes[name] != shape
        ]
        if strangers or odd:
            raise InvalidArgumentError(
                call=call,
                got=f"Fisher {number} over parameters that model {number} "
                + " and ".join(
                    [f"lacks: {strangers}"] * bool(strangers) + [f"has in another shape: {', '.join(odd)}"] * bool(odd)
                ),
                expected="the Fisher of this model",
                why="a tied parameter has only the name of the first module that holds it",
                try_="another order of fishers, or the Fisher measured again",
            )
    merged = [name for name in covered_by_all(sources) if plan[name].action == "merged"]
    if not merged:
        raise InvalidArgumentError(
            call=call, got="no parameter that all models and Fishers share", expected="at least one to merge",
            try_="fk.merging.average(models)",
        )  # fmt: skip
    if center is not None:
        lost = [name for name in merged if center.shapes.get(name) != plan[name].shape]
        if lost:
            raise InvalidArgumentError(
                call=f"{call}(center=...)", got=f"a center without {lost[:8]} in the models' shapes",
                expected="all merged parameters", try_='center="average"',
            )  # fmt: skip
    return joined_blocks(sources, merged)


def _numbers(found: Sequence[object]) -> str:
    return ", ".join(str(number) for number, value in enumerate(found, 1) if value is None)
