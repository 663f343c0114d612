"""The ways to merge: `merge`, `regmean` and `merge_layers` by Fishers, `average` and `task_arithmetic` without any.

Owns the arguments, the two formulas that need no Fisher, and the order of the work: open, decide on every name,
measure, then solve block by block and put everything in its place; or layer after layer, each by Fishers measured where
the earlier ones are merged already. What a Fisher is, and how a block is solved, are others'.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherkit.arguments import check_number, check_type, is_number
from fisherkit.arithmetic import without_autocast
from fisherkit.data import Data
from fisherkit.errors import FisherkitError, InvalidArgumentError, InvalidTypeError, NonFiniteError, listed
from fisherkit.kinds import ImprovedEmpiricalFisher
from fisherkit.merging.assembly import Job, MergeInfo
from fisherkit.merging.blocks import DEFAULT_OUTPUT_DAMPING, BlockwiseMerge, measure
from fisherkit.merging.fishers import (
    Fisher,
    FisherSource,
    Names,
    activations,
    check_fits,
    check_measured,
    joined_blocks,
    open_fishers,
)
from fisherkit.merging.models import (
    Model,
    ModelSource,
    check_weights,
    open_model,
    open_models,
    read_double,
    weighted_average,
)
from fisherkit.merging.policy import Decision, Entries, MergePolicy, check_center, checked
from fisherkit.operators import Damping, FisherOperator, RelativeDamping
from fisherkit.progress import bar
from fisherkit.space import ParameterSpace
from fisherkit.wrappers import unwrapped

DEFAULT_DAMPING = RelativeDamping(0.03)
"""Of the mean eigenvalue: directions that no Fisher measured stay at the average."""

REGMEAN_DAMPING = RelativeDamping(1e-6)


def merge(
    models: Sequence[Model],
    fishers: Sequence[Fisher],
    weights: Sequence[float] | str | None = None,
    *,
    damping: Damping = DEFAULT_DAMPING,
    center: str | Model = "average",
    normalize: str | None = "block",
    output_damping: float | None = None,
    policy: MergePolicy | None = None,
    out: str | Path | None = None,
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
        damping: λ, or `fisherkit.RelativeDamping`: that multiple of the mean eigenvalue of Σ w_t F_t over all blocks.
        center: where damping pulls to: "average" of the models with the same weights, or a model.
        normalize: "block": the mean eigenvalue of each block of each Fisher becomes 1; "trace": that of each whole
            Fisher; "norm": its root mean square eigenvalue; "output": the mean eigenvalue of each Kronecker product's
            gradient factor; None: as they are, for Fishers of one kind on one scale.
        output_damping: ρ; F_t becomes (F_t + ρR_t) / (1 + ρ), R_t the average of F_t over each layer's outputs. For
            Kronecker products that damps the gradient factor alone; it is what kfac needs to be as good as RegMean. 0
            for none: then rows stay rows, and diagonals are merged entry by entry. None: for G ⊗ A with O outputs
            O tr(G²) / tr(G)², so that what is added to G is tr(G²) / tr(G), its mean eigenvalue in the directions
            that gradients have, however many outputs there are; 3 for everything else.
        policy: what is allowed where models or Fishers leave a choice, and how blocks are solved: see `MergePolicy`. By
            default whatever cannot be merged is refused by name.
        out: write safetensors there instead of returning tensors: a folder (``model.safetensors``), or a file's name.
        overwrite: replace a model that is there.
        return_info: also return a `MergeInfo`: how every block was solved, what became of every name.
        progress: show progress bars.

    Returns:
        A state dict in the models' dtype, tensors on the first model's device; with ``out`` the path of the file or
        index; with ``return_info`` a pair with the `MergeInfo`. A block that missed its tolerance is warned of.

    Raises:
        InvalidArgumentError, InvalidTypeError: an argument, models that do not fit together or to their Fishers; a
            refusal lists the names and the policy that allows them.
        SingularMatrixError: no damping where a block needs some.
        NonFiniteError: NaN or infinity in a model or a Fisher.
        FileFormatError: a missing or damaged file.

    Cost: two readings of every Fisher, and three of every model: to know it as its Fisher's, for the average, and to
        merge it; a block of d parameters takes O(d) for diagonals, R²d for R rows, d³/3
        for small sums, and T (O + I) d a step of conjugate gradients for Kronecker products of T layers O × I.
    """
    call = "merge"
    if output_damping is not None:
        output_damping = check_number(call, "output_damping", output_damping)
    given = open_models(models, call)
    sources = open_fishers(fishers, given, call)
    job = Job(
        call, given, _weights(weights, sources, normalize, call), _center(center, call),
        checked(policy, call, "refuse"), out, overwrite, return_info, progress, damping, normalize, output_damping,
    )  # fmt: skip
    return _merged(job, sources, sources)


def regmean(
    models: Sequence[Model],
    fishers: Sequence[Fisher],
    weights: Sequence[float] | str | None = None,
    *,
    shrink: float = 0.9,
    damping: Damping = REGMEAN_DAMPING,
    policy: MergePolicy | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    return_info: bool = False,
    progress: bool = False,
) -> Any:
    """The model whose linear layers reproduce the models' outputs on their own inputs, in the least squares sense.

    W = (Σ_t w_t A_t)⁻¹ Σ_t w_t A_t W_t for a layer's weight and bias together, A_t the second moment of its inputs on
    task t: the merge with the Fishers I ⊗ A_t. Jin, Ren, Preotiuc-Pietro and Cheng, "Dataless knowledge fusion by
    merging weights of language models" (arXiv 2212.09849).

    Layers that all Fishers have as a Kronecker product are merged with A_t, of which only the share ``shrink`` of the
    entries off the diagonal is kept; everything else is averaged. Convolutions count, with A_t over their patches.

    Args:
        models: modules, state dicts, or paths of safetensors, as in `merge`.
        fishers: of the structure "kfac", whatever the kind, one for each model: their activation factors are the A_t.
        weights: w_t; None for 1 / T; "examples" for the number of examples that each Fisher was measured on.
        shrink: α of A_t ← α A_t + (1 − α) diag(A_t); 1 for none, 0.9 the paper's usual choice.
        damping: λ, or `fisherkit.RelativeDamping`, towards the average. By default so little that it only decides what
            no input reaches.
        policy: what is allowed where models or Fishers leave a choice: see `MergePolicy`.
        out: write safetensors there instead of returning tensors: a folder (``model.safetensors``), or a file's name.
        overwrite: replace a model that is there.
        return_info: also return a `MergeInfo`.
        progress: show progress bars.

    Returns:
        As `merge`: a state dict, or the path of what was written; with ``return_info`` a pair with the `MergeInfo`.

    Raises:
        InvalidArgumentError: what `merge` refuses; or a Fisher has no Kronecker products.
        FisherkitError: whatever `merge` raises.

    Cost: as `merge` with Kronecker products, of which these converge in a step or two, and one more reading of every
        Fisher, to know which blocks are such products.
    """
    call = "regmean"
    shrink = check_number(call, "shrink", shrink, most=1)
    given = open_models(models, call)
    sources = open_fishers(fishers, given, call)
    job = Job(
        call, given, _weights(weights, sources, None, call), None, checked(policy, call, "average"),
        out, overwrite, return_info, progress, damping,
    )  # fmt: skip
    return _merged(job, sources, [activations(source, shrink) for source in sources])


@without_autocast()
def _merged(job: Job, measured: Sequence[FisherSource], sources: Sequence[FisherSource]) -> Any:
    """The result, of Fishers that were measured at the models and are merged as other matrices."""
    call = job.call
    unverified = check_measured(job.models, measured, job.policy.other_weights, call)
    covered = [name for name in sources[0].space.names if all(name in source.space.slices for source in sources)]
    entries = Decision(job.models, set(covered), job.center, job.policy, call).entries()
    blocks = _blocks(entries, job, sources, [name for name in covered if entries[name].action == "merged"])
    scales = measure(job, sources, blocks)
    problem = BlockwiseMerge(job, sources, scales)
    return job.result(entries, problem.solutions(), damping=scales.damping, blocks=problem.infos, unverified=unverified)


def _weights(
    weights: Sequence[float] | str | None, sources: Sequence[FisherSource], normalize: str | None, call: str
) -> tuple[float, ...]:
    """w_t as numbers; "examples" is refused of Fishers that do not say how many, or are sums over them already."""
    if weights != "examples":
        return check_weights(weights, len(sources), call)
    counts = [source.metadata.get("examples") for source in sources]
    if None in counts:
        numbers = ", ".join(str(number) for number, count in enumerate(counts, 1) if count is None)
        raise InvalidArgumentError(
            f'{call}(weights="examples")',
            f"Fishers that do not say on how many examples they were measured: {numbers}",
            "Fishers as they were built or saved", try_="weights=[N_1, N_2, ...]",
        )  # fmt: skip
    if normalize is None and any(source.metadata.get("normalization") == "sum" for source in sources):
        raise InvalidArgumentError(
            f'{call}(weights="examples", normalize=None)', 'Fishers with normalization="sum"', 'normalization="mean"',
            why="sums over examples have their number in them already",
            try_=f"weights={[1.0] * len(sources)}, which is the same but for the center",
        )  # fmt: skip
    return check_weights([float(count or 0) for count in counts], len(sources), call)


def _center(center: str | Model, call: str) -> ModelSource | None:
    """The state that damping pulls to; None for the average."""
    if isinstance(center, str) and center == "average":
        return None
    check_type(call, "center", center, (nn.Module, Mapping, str, Path), '"average", or a model in any form')
    return open_model(center, "center", call)


def _blocks(entries: Entries, job: Job, sources: Sequence[FisherSource], merged: Sequence[str]) -> list[Names]:
    """The joined partition of the names that are merged, once Fishers and center are known to fit the models."""
    for number, (model, source) in enumerate(zip(job.models, sources, strict=True), 1):
        check_fits(source, model, f"Fisher {number}", job.call)
    _check_some(merged, job.call)
    if job.center is not None:
        check_center(job.center, {name: entries[name].shape for name in merged}, job.call)
    return joined_blocks(sources, merged, job.call)


def _check_some(merged: Sequence[object], call: str) -> None:
    if not merged:
        raise InvalidArgumentError(
            call, "no parameter that all models and Fishers share", "at least one to merge",
            try_="their plain average, which needs no Fisher",
        )  # fmt: skip


# -- without Fishers ---------------------------------------------------------------------------------------------------


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
    return averaged("average", models, weights, policy, out, overwrite, return_info, progress)


def averaged(
    call: str, models: Sequence[Model], weights: Sequence[float] | None, policy: MergePolicy | None,
    out: str | Path | None = None, overwrite: bool = False, return_info: bool = False, progress: bool = False,
) -> Any:  # fmt: skip
    """As `average`, in the name of another public call, for its errors."""
    allowed, sources = checked(policy, call, "average"), open_models(models, call)
    job = Job(
        call, sources, check_weights(weights, len(sources), call), None, allowed, out, overwrite, return_info, progress
    )
    return job.result(Decision(sources, (), None, allowed, call).entries(), ())


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
    scale = check_number(call, "scale", scale, least=-math.inf)
    allowed, sources = checked(policy, call, "average"), open_models(models, call)
    start = open_model(base, "base", call)
    everything = [*sources, start]
    parameters = [
        name for name in sources[0].shapes
        if all(name not in m.buffers and m.dtypes.get(name, torch.float32).is_floating_point for m in everything)
        and any(name in m.shapes and name not in m.aliases for m in everything)  # else it is tied
    ]  # fmt: skip
    entries = Decision(everything, set(parameters), start, allowed, call).entries()

    def merged() -> Iterator[tuple[str, Tensor]]:
        for name in (name for name, entry in entries.items() if entry.action == "merged"):
            origin = read_double(start, name)
            total = torch.zeros_like(origin)
            for model in sources:
                total += read_double(model, name, origin.device) - origin
            yield name, origin + scale * total

    equal = (1.0,) * len(sources)
    job = Job(call, sources, equal, start, allowed, out, overwrite, return_info, progress)
    return job.result(entries, merged(), weights=(scale,) * len(sources))


# -- layer after layer -------------------------------------------------------------------------------------------------


IEF_KFAC = partial(ImprovedEmpiricalFisher, structure="kfac")
"""What layers are measured by, here and in ``fisherkit merge``: docs/results/merging.md has it beside other kinds."""
LAYER_DAMPING = RelativeDamping(0.01)
"""Less than `merge` has: it pulls to an average that was made for no merged layer."""


def merge_layers(
    models: Sequence[nn.Module],
    data: Sequence[Data],
    weights: Sequence[float] | None = None,
    *,
    fisher: Callable[..., FisherOperator] = IEF_KFAC,
    stages: Sequence[Sequence[str]] | None = None,
    damping: Damping = LAYER_DAMPING,
    normalize: str | None = "block",
    output_damping: float = DEFAULT_OUTPUT_DAMPING,
    policy: MergePolicy | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    return_info: bool = False,
    progress: bool = False,
) -> Any:
    """`merge`, layer after layer, each by Fishers of models whose earlier layers are the merged ones.

    Fishers of the models as they are do not know what inputs a layer will have once the layers before it are merged.
    Here model t is taken with all earlier stages merged and the later ones its own, and is measured on its own data for
    the parameters of one stage, which is then merged. With activation factors alone (``normalize="output",
    output_damping=1e9, damping=fk.RelativeDamping(1e-6)``) it is RegMean++ (Nguyen et al., arXiv 2508.03121).

    Args:
        models: modules of one architecture, in eval mode. Copies of them are measured; they are never changed.
        data: of each model, in their order: whatever a Fisher takes.
        weights: w_t; None for 1 / T.
        fisher: called as ``fisher(model, data, params=names)``: a kind with its options, such as
            ``functools.partial(fk.EmpiricalFisher, structure="diagonal", likelihood=nn.MSELoss())``. By default iEF in
            kfac, which needs labels; `fisherkit.ExactFisher` needs none.
        stages: names of parameters that are merged together, from the inputs on; those in none are treated as the
            policy's ``uncovered`` says. None for a stage a module, in the order of the model's trained parameters.
        damping: as in `merge`, of each stage.
        normalize: as in `merge`.
        output_damping: as in `merge`.
        policy: as in `merge`.
        out: as in `merge`.
        overwrite: as in `merge`.
        return_info: also return a `MergeInfo`, whose damping is the largest of any stage.
        progress: show a bar of the stages, with the time that is left.

    Returns:
        As `merge`.

    Raises:
        InvalidTypeError: models that are no modules.
        InvalidArgumentError: as many data as models are needed; a stage names what is no parameter, or names it twice.
        FisherkitError: whatever `merge` and the Fisher raise.

    Cost: a Fisher of each model for each stage, over the stage's parameters alone; a copy of every model.
    """
    call = "merge_layers"
    if not isinstance(models, Sequence) or not all(isinstance(model, nn.Module) for model in models):
        raise InvalidTypeError(
            call, "models that are no modules", "a list of nn.Module",
            why="each is run with layers that are merged already", try_="fk.merging.merge for files and state dicts",
        )  # fmt: skip
    if not isinstance(data, Sequence) or len(data) != len(models):
        number = len(data) if isinstance(data, Sequence) else f"a {type(data).__name__} as"
        raise InvalidArgumentError(
            call, f"{len(models)} models and {number} data", "the data of each model",
            why="each model is measured on its own task's data", try_="[data_a, data_b], in the models' order",
        )  # fmt: skip
    if not callable(fisher):
        raise InvalidTypeError(
            call, f"fisher={fisher!r}", "a function of a model, its data and params=",
            try_='lambda model, data, params: fk.ExactFisher(model, data, structure="kfac", params=params)',
        )  # fmt: skip
    output_damping = check_number(call, "output_damping", output_damping)
    sources = open_models(models, call)
    space = ParameterSpace.of(unwrapped(models[0]), None)
    order = list(map(tuple, space.blocks.values() if stages is None else stages))
    _check_stages(order, space, call)
    own = check_weights(weights, len(sources), call)
    allowed = checked(policy, call, "refuse")
    job = Job(
        call, sources, own, None, allowed, out, overwrite, return_info, progress, damping, normalize, output_damping
    )
    entries = Decision(sources, {name for names in order for name in names}, None, allowed, call).entries()
    order = [names for stage in order if (names := tuple(n for n in stage if entries[n].action == "merged"))]
    _check_some(order, call)
    infos: list[MergeInfo] = []
    found = job.result(entries, _stages(job, models, data, fisher, order, entries, infos))
    if not return_info:
        return found
    blocks = tuple(block for info in infos for block in info.blocks)
    return found[0], replace(found[1], blocks=blocks, damping=max(info.damping for info in infos))


def _stages(
    job: Job, models: Sequence[nn.Module], data: Sequence[Data], fisher: Callable[..., FisherOperator],
    order: Sequence[tuple[str, ...]], entries: Entries, infos: list[MergeInfo],
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Every staged name and its merged values; ``infos`` gets what each stage's merge did."""
    between = [copy.deepcopy(unwrapped(model)) for model in models]
    for name, entry in entries.items():
        if entry.action == "averaged":
            _put(between, name, weighted_average(job.models, job.weights, name))
        elif entry.action == "first":
            _put(between, name, job.models[0].read(name))
    with bar(len(order), "merge_layers", "stages", shown=job.progress) as shown:
        for names in order:
            fishers = [_measured(fisher, model, own, names) for model, own in zip(between, data, strict=True)]
            own = [
                open_model({name: model.get_parameter(name) for name in names}, source.label, job.call)
                for model, source in zip(between, job.models, strict=True)
            ]
            sources = open_fishers(fishers, own, job.call)
            stage = replace(job, models=own, out=None, return_info=True, progress=False)
            merged, info = _merged(stage, sources, sources)
            infos.append(info)
            for name, tensor in merged.items():
                _put(between, name, tensor)
            shown.update(1)
            yield from merged.items()


def _measured(fisher: Callable[..., FisherOperator], model: nn.Module, data: Data, names: Names) -> FisherOperator:
    """The Fisher of a stage; `merge_layers` has none of the keywords that the default one's errors advise."""
    try:
        return fisher(model, data, params=list(names))
    except FisherkitError as error:
        if fisher is not IEF_KFAC or "likelihood=" not in error.try_:
            raise
        default = 'fisher=functools.partial(fk.ImprovedEmpiricalFisher, structure="kfac", likelihood=...)'
        advice = f"{default}, with {error.try_}"
        raise type(error)(error.call, error.got, error.expected, why=error.why, try_=advice) from error


def _put(models: Sequence[nn.Module], name: str, tensor: Tensor) -> None:
    """Give models' parameter or buffer new values, where its shape is theirs."""
    with torch.no_grad():
        for model in models:
            own = model.state_dict(keep_vars=True).get(name)
            if own is not None and own.shape == tensor.shape:
                own.copy_(tensor)


def _check_stages(order: Sequence[tuple[str, ...]], space: ParameterSpace, call: str) -> None:
    names = [name for stage in order for name in stage]
    odd = [repr(name) for name in names if name not in space.names or names.count(name) > 1]
    if odd or not names:
        raise InvalidArgumentError(
            f"{call}(stages=...)", f"names that are no trained parameter, or twice: {listed(odd)}",
            "names of model.named_parameters(), each once", why="each parameter is merged once",
            try_="stages=None, for a stage a module",
        )  # fmt: skip


# -- checked against the average, where examples are at hand -----------------------------------------------------------


Loss = Callable[[dict[str, Tensor]], float | Tensor]


def line_search(
    start: Model,
    end: Model,
    loss: Loss,
    *,
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    policy: MergePolicy | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    return_info: bool = False,
) -> Any:
    """The model of least loss among θ_start + s (θ_end − θ_start), such as between the models' average and a merge.

    What `merge` minimises are quadratic forms around each model, which need not hold where the merged model is. A few
    examples of each task say whether they do, and how far to go: by this loss the result is no worse than either end.

    Args:
        start: a module, state dict or path, such as the models' `average`.
        end: the same of a merged model.
        loss: takes a state dict and returns its loss on examples of all tasks, best of all held-out ones. Losses that
            are not finite count as larger than all others.
        shares: s that are tried, from 0 to 1; of equal losses the first counts.
        policy: what is allowed where the two leave a choice besides parameters, as in `average`.
        out: write safetensors there instead of returning tensors: a folder (``model.safetensors``), or a file's name.
        overwrite: replace a model that is there.
        return_info: also return a `MergeInfo`, whose ``losses`` are of all shares and whose ``share`` is the s taken.

    Returns:
        A state dict, or the path of what was written; with ``return_info`` a pair with the `MergeInfo`.

    Raises:
        InvalidTypeError: a loss that is no function, or returns no number; shares that are none; as in `average`.
        InvalidArgumentError: no share, or one below 0 or above 1; as in `average`.
        NonFiniteError: no loss is finite; as in `average`.

    Cost: a reading of both models and an evaluation of the loss for each share; a copy of what is no path.
    """
    call = "line_search"
    if not callable(loss):
        raise InvalidTypeError(
            call, f"loss of type {type(loss).__name__}", "a function of a state dict",
            try_="lambda state: cross_entropy(functional_call(model, state, x), y)",
        )  # fmt: skip
    check_type(call, "shares", shares, Sequence, "a sequence of numbers from 0 to 1", try_="shares=(0, 0.5, 1)")
    tried = [check_number(call, "shares", share, most=1) for share in shares]
    if not tried:
        raise InvalidArgumentError(call, "shares=()", "at least one", try_="shares=(0, 0.5, 1)")
    # The loss may load states into the very modules whose tensors these are.
    ends = [model if isinstance(model, (str, Path)) else copy.deepcopy(model) for model in (start, end)]
    losses = tuple((share, _loss_of(loss, averaged(call, ends, [1 - share, share], policy))) for share in tried)
    best, least = min(losses, key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf)
    if not math.isfinite(least):
        raise NonFiniteError(
            call, f"losses {[value for _, value in losses]}", "a finite one",
            why="neither model has a loss that can be compared", try_="look at the loss of each model",
        )  # fmt: skip
    found, info = averaged(call, ends, [1 - best, best], policy, out, overwrite, return_info=True)
    return (found, replace(info, losses=losses, share=best)) if return_info else found


def _loss_of(loss: Loss, state: dict[str, Tensor]) -> float:
    found = loss(state)
    if isinstance(found, np.generic) or (isinstance(found, Tensor) and found.numel() == 1):
        found = found.item()
    if not is_number(found):
        raise InvalidTypeError(
            "line_search", f"a loss that returns {found!r:.80}", "a number, or a tensor of one",
            try_="its mean over examples",
        )  # fmt: skip
    return float(found)
