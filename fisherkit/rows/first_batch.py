"""The first batch that a model meets: how its rows are made, and which inputs all examples share.

An input whose axis 0 is as long as the batch may hold one row an example or be shared by all. It is read as the former;
where the model fails at that, as the latter, if two batches have the same. Puts into words what else goes wrong at a
first forward pass.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from fisherkit.data import SHARED, Batch, Source, model_device
from fisherkit.errors import DataError, FisherkitError, ModelError, listed
from fisherkit.model_inputs import DECODER_INPUTS, is_encoder_decoder
from fisherkit.processes import Processes
from fisherkit.randomness import untouched_rng
from fisherkit.rows.differentiable import kept_whole
from fisherkit.rows.plan import Plan
from fisherkit.rows.verified import plan_for
from fisherkit.space import ParameterSpace


def plan_of(
    model: nn.Module, space: ParameterSpace, source: Source, *, assume: bool = False,
    own: Mapping[str, nn.Parameter] | None = None,
) -> Plan:  # fmt: skip
    """How the rows of a model on these data are made.

    Args:
        model: the model.
        space: the chosen parameters.
        source: the data.
        assume: as of `plan_for`.
        own: likewise.

    Raises:
        DataError: the model fails over its inputs, and what is wrong with them can be told.
        ModelError: it fails over other dtypes.
        Exception: what the model raises otherwise.

    Cost: as `plan_for`.
    """
    device, _ = model_device(model, space.names, own)
    first = source.first()
    try:
        return plan_for(model, space, first.to(device), assume=assume, own=own if source.listed else None)
    except Exception as error:
        other = _another(source, first)
        found = None if other is None else _shared(model, space, first, other)
        if found is not None:
            _, reading, plan = found
            source.shared(reading)
            return plan
        _tell(error, model, space, first, single=other is None)
        raise


def joint_plan(model: nn.Module, space: ParameterSpace, source: Source, processes: Processes) -> Plan:
    """The same in all processes, of the first batch of the first rank that has more than one example."""
    first = processes.each("reading the data", source.beginning)
    sizes = processes.gathered(0 if first is None else first.size)
    if not any(sizes):
        raise DataError(call="data", got="no batch in any process", expected="at least one example")
    owner = next((rank for rank, size in enumerate(sizes) if size > 1), sizes.index(1) if 1 in sizes else 0)
    own = processes.rank == owner
    plan = processes.each("a first pass of the model", lambda: plan_of(model, space, source) if own else None)
    probe = processes.sent_by(owner, None if plan is None else plan.probe.batch)
    if plan is None:
        source.shared(probe)
    return processes.each("a first pass of the model", lambda: plan or plan_of(model, space, source))


def plan_of_call(model: nn.Module, space: ParameterSpace, batch: Batch) -> Plan:
    """The same for a single batch, on the model's device."""
    try:
        return plan_for(model, space, batch)
    except Exception as error:
        _tell(error, model, space, batch, single=True)
        raise


def _shared(
    model: nn.Module, space: ParameterSpace, first: Batch, other: Batch | None
) -> tuple[str, Batch, Plan] | None:
    """The first reading that the model works with, the name of an input that all examples then share, and the plan."""
    for name, reading in _readings(first, other):
        with contextlib.suppress(Exception):  # models raise what they like
            return name, reading, plan_for(model, space, reading.to(model_device(model, space.names)[0]))
    return None


def _another(source: Source, first: Batch) -> Batch | None:
    """The batch after the first one."""
    own = (batch for batch in source.once(settled=False) if batch.size > 1 and len(batch.axes) == len(first.axes))
    return next(itertools.islice(own, 1, None), None) if sum(first.axes.values()) > 1 else None


def _readings(first: Batch, other: Batch | None) -> Iterator[tuple[str, Batch]]:
    """The batch with an input, or several, shared by all examples, and its name: such as another batch has too."""
    own, names = first.inputs, first.names
    batched = [i for i, has in first.axes.items() if has]
    same = [i for i in batched if other is None or _equal(own[i], other.inputs[i])]
    choices = [(i,) for i in same] + ([tuple(same)] if len(same) > 1 and other is not None else [])
    for chosen in choices:
        if len(chosen) < len(batched):
            axes = {i: has and i not in chosen for i, has in first.axes.items()}
            yield names[chosen[0]], replace(first, axes=axes)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())


def _works(model: nn.Module, batch: Batch) -> bool:
    places = untouched_rng([next(model.parameters()).device]), kept_whole(model)
    with torch.no_grad(), places[0], places[1], contextlib.suppress(Exception):
        return batch.call(model).shape[:1] == (batch.size,)
    return False


def _kept(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that modules have beside their parameters, by name."""
    own = {id(p) for p in model.parameters()}
    return {
        f"{name}.{key}".strip("."): value
        for name, module in model.named_modules()
        for key, value in (*module._buffers.items(), *vars(module).items())
        if isinstance(value, torch.Tensor) and id(value) not in own
    }


def _rewrites(model: nn.Module, batch: Batch) -> bool:
    """Whether a pass over a batch changes such tensors, or fails, so that nothing tells."""
    places = untouched_rng([next(model.parameters()).device]), kept_whole(model)
    with torch.no_grad(), places[0], places[1], contextlib.suppress(Exception):
        before = {name: (id(tensor), tensor._version) for name, tensor in _kept(model).items()}
        batch.call(model)
        return before != {name: (id(tensor), tensor._version) for name, tensor in _kept(model).items()}
    return True


def _refuse_state(error: Exception, model: nn.Module, first: Batch, *, fails: bool) -> None:
    """Raise what a failure of tensors that a model keeps from one batch for the next means.

    Raises:
        ModelError: it keeps some, by the sizes that the error names, or fails in one pass after another alone.
    """
    if not isinstance(error, RuntimeError) or "inplace operation" in str(error):
        return
    sizes = set(map(int, re.findall(r"\d+", re.sub(r"dimension \d+", "", str(error)))))
    sizes = sizes if sizes & {1, 2, 8, first.size} else set()
    tensors = _kept(model)
    named = [f"{n} of shape {list(t.shape)}" for n, t in tensors.items() if sizes.intersection(t.shape[:2]) - {1}]
    if fails and (not named or not _rewrites(model, first)):
        return
    if not fails and not _works(model, first):
        return
    raise ModelError(
        call="the model's forward pass",
        got=f"a model that keeps {listed(named, 3) if named else 'something of the shape of a batch'} for the next",
        expected="one that begins anew with every batch, whatever its size",
        why=f"examples are also looked at by themselves and in twos: {str(error).splitlines()[0]}",
        try_="a state that forward makes for its batch, as x.new_zeros(len(x), ...), or of one row for all examples",
    ) from error


def _tell(error: Exception, model: nn.Module, space: ParameterSpace, first: Batch, *, single: bool) -> None:
    """Raise what a model's error means, if it does not say enough itself."""
    alike = single and _shared(model, space, first, None)
    if alike:
        raise DataError(
            call=first.place,
            got=f"input {alike[0]!r} with {first.size} rows in a batch of {first.size} examples, for which the model "
            "fails with one row an example and works with all of them",
            expected="batches that tell which is meant",
            why="without a second batch, nothing tells an input that all examples share from examples that meet in the "
            "model (batch statistics, contrastive terms)",
            try_=f"{SHARED}; or two batches",
        ) from error
    if isinstance(error, FisherkitError):
        return
    device, dtype = model_device(model, space.names)
    fails = not _works(model, first.take(slice(0, 2)).to(device))  # else it is the gradient that does
    _refuse_state(error, model, first.to(device), fails=fails)
    if fails and first.size > 2 and _works(model, first.to(device)):
        raise DataError(
            call=first.place,
            got=f"a batch of {first.size} examples that the model takes together and not two at a time",
            expected="examples along axis 0 that need no others",
            why=f"for the first two it fails with: {(str(error) or type(error).__name__).splitlines()[0]}",
            try_="a graph as one element of the batch, inputs (1, nodes, ...) and labels (1, nodes), with "
            'example="token", if they are the nodes of a graph',
        ) from error
    reason = f"the model's forward pass fails: {(str(error) or type(error).__name__).splitlines()[0]}"
    if first.targets is None and is_encoder_decoder(model) and not first.kwargs.keys() & {"labels", *DECODER_INPUTS}:
        raise DataError(
            call=first.place, got="neither labels nor decoder inputs for an encoder-decoder",
            expected=f"labels, or one of {', '.join(DECODER_INPUTS)}", why=reason,
        ) from error  # fmt: skip
    usual = type(error).__module__ == "builtins"  # a user's own errors are meant for the user
    if usual and fails and first.size > 1 and _works(model, first.take(slice(0, 1)).to(device)):
        raise DataError(
            call=first.place, got=f"a batch of {first.size} examples for a model that works with the first alone",
            expected="a model of batches, or one example a batch", why=reason,
            try_="batches of one example each, DataLoader(..., batch_size=1)",
        ) from error  # fmt: skip
    sizes = sorted({len(leaf) for leaf in first.inputs if leaf.ndim})
    if isinstance(error, RuntimeError) and "must match" in str(error) and len(sizes) > 1 and fails:
        raise DataError(
            call=first.place, got=f"inputs of {listed(map(str, sizes))} rows, with which the model fails",
            expected=f"a row for each of the {first.size} examples, or an input that all of them share", why=reason,
        ) from error  # fmt: skip
    if isinstance(error, RuntimeError) and "inplace operation" in str(error):
        raise ModelError(
            call="the model's forward pass", got="a tensor that is written to in place after a layer has kept it",
            expected="tensors that stay as they are until the gradient is known",
            why=f"the backward pass fails: {str(error).splitlines()[0]}",
            try_="x = x + y instead of x += y, or a layer that reads x.clone()",
        ) from error  # fmt: skip
    real = [f"{n} of {x.dtype}" for n, x in zip(first.names, first.inputs, strict=True) if x.is_floating_point()]
    if isinstance(error, RuntimeError) and "'indices' to have one of" in str(error) and real:
        raise DataError(
            call=first.place, got=f"{listed(real)} where a table of embeddings is asked for rows",
            expected="ids of torch.int64 or int32", why=reason, try_="x.long(), or ids that were never made floats",
        ) from error  # fmt: skip
    # Models may well cast their inputs: only what torch itself says of types is put into our words.
    if not isinstance(error, RuntimeError) or "type" not in str(error):
        return
    others = sorted({str(leaf.dtype) for leaf in first.inputs if leaf.is_floating_point() and leaf.dtype != dtype})
    inside = "torch.autocast inside forward, since a caller's is off here"
    if others:
        raise DataError(
            call=first.place, got=f"inputs of {', '.join(others)}", expected=f"{dtype}, the parameters' dtype",
            why=reason, try_=f"x.to({dtype}), the model in the inputs' dtype, or {inside}",
        ) from error  # fmt: skip
    raise ModelError(
        call="the model's forward pass", got="tensors of dtypes that do not go together",
        expected=f"a forward pass of {dtype} parameters", why=reason, try_=inside,
    ) from error  # fmt: skip
