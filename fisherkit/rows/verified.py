"""The plan of a model on its data: as verified before, or verified now on the first batch that the model meets.

What was verified of a model is kept for as long as the model lives, so that the next Fisher on it starts at once.

Rules are verified on two examples (`rows.plan`), which costs a few passes over the weights. What they say holds for a
model and not for its parameters' values, so it is used again while nothing else about the model has changed, its
modules, their plain attributes, hooks and modes, its parameters' identities and shapes, the form of a batch, and the
layer rules that there are. What no such comparison sees is looked for by a forward pass of two examples: its graph must
lead to chosen parameters through the uses that were verified and in no other way; where it does not show that, a
backward pass must bring weight gradients that are the sum of rows. Only findings are kept here, no tensor and no model.

An input whose axis 0 is as long as the batch may hold one row an example or be shared by all. It is read as the former;
where the model fails at that, as the latter, if two batches have the same. What else goes wrong at a first forward pass
is put into words.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import re
import traceback
import weakref
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fisherkit.data import SHARED, Batch, Source, model_device, no_batch
from fisherkit.errors import DataError, FisherkitError, InvalidTypeError, ModelError, listed
from fisherkit.model_inputs import DECODER_INPUTS, is_encoder_decoder
from fisherkit.processes import Processes
from fisherkit.randomness import untouched_rng
from fisherkit.rows.base import RowSelection
from fisherkit.rows.differentiable import differentiable, kept_whole, pulled_back
from fisherkit.rows.generic import dense_gradient
from fisherkit.rows.linearized import Known, Linearized
from fisherkit.rows.plan import Findings, Plan, Probe, forward, make_plan, probed, tolerance, two_of
from fisherkit.rows.record import refuse_train_mode
from fisherkit.rows.recurrent import RecurrentRule
from fisherkit.rows.rules import RULES, Use
from fisherkit.rows.units import RuledUnit, SharedUnit
from fisherkit.rows.watched import UNBATCHED, Watched, custom_functions, graph_of, uses_are_all
from fisherkit.space import ParameterSpace

MOST = 32
"""Findings kept of one model; a model that changes all the time starts over."""


_KNOWN: WeakKeyDictionary[nn.Module, dict[Hashable, Findings]] = WeakKeyDictionary()


def plan_for(
    model: nn.Module, space: ParameterSpace, batch: Batch, *, assume: bool = False,
    own: Mapping[str, nn.Parameter] | None = None,
) -> Plan:  # fmt: skip
    """How rows are made: as verified before, or verified now, of a first batch on the model's device.

    With ``assume``, what is known may be confirmed later, by the graph of the first pass over the data. ``own`` are the
    model's parameters by name, if they are known.

    Raises:
        ModelError: as `make_plan`.
    """
    refuse_train_mode(model)
    own = dict(model.named_parameters()) if own is None else own
    key, known = _key(model, space, batch, own), _KNOWN.setdefault(model, {})
    if key in known and known[key].alone and batch.size > 1:
        del known[key]  # of one example nothing was learnt about two
    if key in known:
        old = known[key]
        if assume and _is_simple(old) and "not shown" not in old.tried.seen:
            return Plan.of(model, space, old, key, Probe(batch, None, old.alone), own)
        plan = _confirmed(Plan.of(model, space, old, key, own=own), batch)
        if plan is not None:
            return plan
        del known[key]
    plan = replace(_made(model, space, batch), key=key)
    if (seen := plan.probe.watched) is not None:
        plan = replace(plan, calls=_calls(seen.uses))
        if not is_shown(plan, seen):
            plan.tried.seen.add("not shown")  # a pass over the data would be made in vain
    remember(plan)
    return plan


def plan_again(plan: Plan, batch: Batch) -> Plan | None:
    """A plan of the same model that was made a moment ago, for a batch of other data; None if it has another form.

    Cost: a forward pass of two examples.
    """
    if plan.alone or _key(plan.model, plan.space, batch, dict(plan.model.named_parameters())) != plan.key:
        return None
    again = replace(plan, units=plan.findings.units)
    with plan.quiet():
        two = batch.take(two_of(batch, plan.alone))
        return replace(again, probed=Probe(two, forward(again, two)))


def remember(plan: Plan) -> None:
    """Keep what a plan found in place of what was known before."""
    known = _KNOWN.setdefault(plan.model, {})
    if plan.key not in known and len(known) >= MOST:
        known.clear()
    known[plan.key] = plan.findings


def forget(plan: Plan) -> None:
    """Have the next plan verified anew, as a pass by this one has failed."""
    _KNOWN.get(plan.model, {}).pop(plan.key, None)


def _made(model: nn.Module, space: ParameterSpace, batch: Batch) -> Plan:
    """A new plan; on one example alone if there is but one and the model fails for it twice."""
    try:
        return make_plan(model, space, batch)
    except Exception:  # models raise what they like
        if batch.size == 1:
            with contextlib.suppress(Exception):
                return make_plan(model, space, batch, alone=True)
        raise


def _confirmed(plan: Plan, batch: Batch) -> Plan | None:
    """The plan with its probe, if it holds for the model as it is now; None if not.

    The graph must show the same uses and no other; where it cannot, rows of two examples must add up to autograd's
    gradients for both.
    """
    parameters, two = list(plan.parameters.values()), batch.take(two_of(batch, plan.alone))
    with plan.quiet():
        try:
            seen, random = probed(plan, two)
        except ModelError:  # used in another way: what is wrong, if anything, is for a new plan to say
            return None
        linearized = Linearized(plan, two, seen)
        watched = linearized.watched
        if random > plan.draws or not watched.z.requires_grad or linearized.unruled:
            return None
        if watched.custom != plan.custom:
            return None
        plan = replace(plan, probed=Probe(two, watched), coarsest=watched.coarsest)
        if is_shown(plan, seen):
            return plan
        v = torch.randn(watched.z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(watched.z)
        inputs: list[Any] = [*watched.edges, *parameters]
        found = pulled_back(watched.z, inputs, v)
        at_uses = [None if g is None else g.unsqueeze(0) for g in found[: len(watched.edges)]]
        selection = RowSelection(1, two.size, v.device)
        rows = linearized.rows(v.unsqueeze(0), selection, Known(at_uses, v.new_ones(two.size)))
        if linearized.unruled:
            return None
    sizes = dict(zip(plan.space.names, plan.space.sizes, strict=True))
    if any(slot.rows.size != sum(sizes[name] for name in slot.names) for slot in rows.slots):
        return None  # parameters are used in another way
    total = plan.space.unflatten(rows.rmatmul(torch.ones(rows.count, 1, dtype=rows.dtype, device=v.device))[:, 0])
    pairs = [
        (own, dense_gradient(own, g).to(own.dtype))
        for own, g in zip(total.values(), found[len(watched.edges) :], strict=True)
    ]
    norms, errors = (torch.stack(x) for x in ([g.norm() for _, g in pairs], [(own - g).norm() for own, g in pairs]))
    allowed = tolerance(parameters[0].dtype, plan.coarsest)
    return plan if bool((errors <= allowed * torch.maximum(norms, 1e-2 * norms.norm())).all()) else None


def is_shown(plan: Plan, watched: Watched) -> bool:
    """Whether a pass's own graph tells that uses are those that were verified, and that there are no others."""
    if not _is_simple(plan) or watched.hooked or watched.coarsest != plan.coarsest or not watched.z.requires_grad:
        return False
    if any(p._backward_hooks for p in plan.parameters.values()):
        return False  # what a hook does to a gradient is no part of the graph
    alike = watched.once("calls", lambda: _calls(watched.uses)) == plan.calls and watched.custom == plan.custom
    return alike and uses_are_all(watched.z, watched.graph, watched.uses, plan.parameters)


def _is_simple(plan: Findings) -> bool:
    """Whether a graph can tell that a plan holds: functions of parameters themselves that met data."""
    return plan.calls is not None and all(type(unit) in (RuledUnit, SharedUnit) for unit in plan.units)


def _calls(uses: Sequence[Use]) -> Hashable:
    """What rules depend on of uses, but for sizes and numbers of tensors; None if a graph does not tell all of them."""
    if not all(use.plain and use.slices is None and not isinstance(use.rule, RecurrentRule) for use in uses):
        return None
    return tuple((id(use.rule), use.sources, use.turned, use.axis, *_form(use.arguments, sizes=False)) for use in uses)


def _key(model: nn.Module, space: ParameterSpace, batch: Batch, own: Mapping[str, nn.Parameter]) -> Hashable:
    """All that the findings may depend on and that can be compared; ``own`` are the model's parameters by name."""
    inputs = _form(batch.args), _form(batch.kwargs), tuple(batch.axes.items())
    return space.names, space.shapes, inputs, fingerprint(model, own)


def fingerprint(model: nn.Module, own: Mapping[str, nn.Parameter] | None = None) -> Hashable:
    """What can be compared of a model, and the layer rules that there are; ``own`` as in `_key`, if they are known."""
    own = dict(model.named_parameters()) if own is None else own
    parameters = tuple((name, id(p), p.shape, tuple(p._backward_hooks or ())) for name, p in own.items())
    seen: set[int] = set()
    modules = tuple((name, *_described(module, seen)) for name, module in model.named_modules())
    rules = tuple(map(id, (*RULES, *RULES.values())))  # users add their own
    return parameters, modules, rules


def _described(module: nn.Module, seen: set[int]) -> Iterator[Any]:
    """A module's class, mode, hooks, plain attributes, and functions put in the place of its own."""
    yield type(module)
    for name, value in module.__dict__.items():
        if type(value) in _TYPES:
            yield name, value
        elif name in _OWN:
            if value and name.endswith("_hooks"):
                yield name, "hooks", tuple(value)
        elif (found := _plain(value, seen)) is not None:
            yield name, found
        elif callable(value):
            yield name, "function", _identity(value)


def _identity(value: Any) -> Hashable:
    """What is equal for the same object alone, and not for a later one that lies in its place of memory."""
    try:
        hash(found := weakref.ref(value))
    except TypeError:  # of a kind that cannot be followed
        return id(value)
    return found


def _plain(value: Any, seen: set[int], depth: int = 5) -> Hashable:
    """Numbers, strings and the like in an attribute, or in containers and settings there; None of anything else.

    What modules share, as a configuration, is described where it is ``seen`` first.
    """
    cls = type(value)
    if cls in _PLAIN or isinstance(value, _SIMPLE):
        return (value,)
    record = dataclasses.is_dataclass(cls) or cls in _RECORDS or hasattr(cls, "to_dict")
    if not record and not isinstance(value, _CONTAINERS):
        return None
    if not depth or id(value) in seen:
        return ()
    seen.add(id(value))
    entries: Any = getattr(value, "__dict__", {}) if record else value
    if isinstance(entries, Mapping):
        pairs = ((k, _plain(v, seen, depth - 1)) for k, v in itertools.islice(entries.items(), LONGEST))
        return tuple((k, found) for k, found in pairs if found is not None and isinstance(k, _SIMPLE))
    if isinstance(entries, (set, frozenset)):
        return frozenset(v for v in itertools.islice(entries, LONGEST) if isinstance(v, _SIMPLE))
    found = (_plain(v, seen, depth - 1) for v in itertools.islice(entries, LONGEST))
    return tuple(one for one in found if one is not None)


_PLAIN = (bool, int, float, str, type(None))
_TYPES = frozenset(_PLAIN)
_SIMPLE = (*_PLAIN, complex, Enum, torch.dtype, torch.device)
_CONTAINERS = (dict, Mapping, list, tuple, deque, set, frozenset)
_RECORDS = (SimpleNamespace, argparse.Namespace)
_OWN = frozenset(vars(nn.Module()))
"""What `torch.nn.Module` keeps."""
LONGEST = 256
"""Entries of a container that are looked at."""


def changed_attributes(before: Hashable, now: Hashable) -> set[str]:
    """Names of the plain attributes that two fingerprints of a model both have and say different things of."""
    old, new = _attributes(before), _attributes(now)
    differing = (key for key, value in old.items() if key in new and (new[key],) != (value,))  # which NaN equals
    return {".".join(filter(None, key)) for key in differing}


def _attributes(described: Any) -> dict[tuple[str, str], Hashable]:
    """Of a fingerprint, plain attributes by module and name; modes and hooks are another matter."""
    found = ((module, one) for module, _, *entries in described[1] for one in entries)
    return {(module, one[0]): one[1] for module, one in found if len(one) == 2 and one[0] != "training"}


def _form(tree: Any, *, sizes: bool = True) -> tuple[Hashable, ...]:
    """Shapes behind the batch axis, or how many axes there are, dtypes, names and plain values."""
    if isinstance(tree, torch.Tensor):
        return ((tree.shape[1:] if sizes else tree.ndim, tree.dtype),)
    if isinstance(tree, (list, tuple)):
        return ((type(tree).__name__, *(entry for value in tree for entry in _form(value, sizes=sizes))),)
    if isinstance(tree, Mapping):
        return tuple((name, *_form(value, sizes=sizes)) for name, value in tree.items())
    return (repr(tree),)


# -- the first batch ---------------------------------------------------------------------------------------------------


def plan_of(
    model: nn.Module, space: ParameterSpace, source: Source, *, assume: bool = False,
    own: Mapping[str, nn.Parameter] | None = None,
) -> Plan:  # fmt: skip
    """How the rows of a model on these data are made; ``assume`` and ``own`` as of `plan_for`, which is what it costs.

    Raises:
        DataError: the model fails over its inputs, and what is wrong with them can be told.
        ModelError: it fails over other dtypes.
        Exception: what the model raises otherwise.
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
        _explain(error, model, space, first, single=other is None)
        raise


def joint_plan(model: nn.Module, space: ParameterSpace, source: Source, processes: Processes) -> Plan:
    """The same in all processes, of the first batch of the first rank that has more than one example."""
    first = processes.each("reading the data", source.beginning)
    sizes = processes.gathered(0 if first is None else first.size)
    if not any(sizes):
        raise no_batch(" in any process")
    owner = next((rank for rank, size in enumerate(sizes) if size > 1), sizes.index(1) if 1 in sizes else 0)
    own = processes.rank == owner
    plan = processes.each("a first pass of the model", lambda: plan_of(model, space, source) if own else None)
    probe = processes.sent_by(owner, None if plan is None else plan.probe.batch)
    if plan is None:
        source.shared(probe)
    return processes.each("a first pass of the model", lambda: plan or plan_of(model, space, source))


def plan_of_call(model: nn.Module, space: ParameterSpace, batch: Batch) -> Plan:
    """The same for a single batch, on the model's device."""
    with explained_errors(model, space, batch, single=True):
        return plan_for(model, space, batch)


@contextlib.contextmanager
def explained_errors(model: nn.Module, space: ParameterSpace, batch: Batch, *, single: bool = False) -> Iterator[None]:
    """What a model's error in here means for a batch, perhaps the only one, if it does not say enough itself."""
    try:
        yield
    except Exception as error:
        _explain(error, model, space, batch, single=single)
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
    then = own if other is None else other.inputs
    same = [i for i in batched if own[i].dtype == then[i].dtype and (own is then or torch.equal(own[i], then[i]))]
    choices = [(i,) for i in same] + ([tuple(same)] if len(same) > 1 and other is not None else [])
    for chosen in choices:
        if len(chosen) < len(batched):
            axes = {i: has and i not in chosen for i, has in first.axes.items()}
            yield names[chosen[0]], replace(first, axes=axes)


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
    """Raise what a failure of tensors that a model keeps from one batch for the next means, if it is one.

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
        "the model's forward pass",
        f"a model that keeps {listed(named, 3) if named else 'something of the shape of a batch'} for the next",
        "one that begins anew with every batch, whatever its size",
        why=f"examples are also looked at by themselves and in twos: {str(error).splitlines()[0]}",
        try_="a state that forward makes for its batch, as x.new_zeros(len(x), ...), or of one row for all examples",
    ) from error  # fmt: skip


def _refuse_single_use(error: Exception, model: nn.Module, batch: Batch, *, fails: bool) -> None:
    """Raise what a failure means of functions of users that throw away in a backward pass what the next would need."""
    if fails:
        return
    own = list(model.parameters())
    with untouched_rng([own[0].device]), differentiable(model, own):
        z = batch.call(model)
        names, done = custom_functions(graph_of(z.grad_fn)), 0
        with contextlib.suppress(Exception):  # they raise what they like
            while names and done < 2:
                pulled_back(z, own, torch.ones_like(z))
                done += 1
    if done == 1:
        raise ModelError(
            "the model's backward pass", f"an error in the second one through the same graph "
            f"({(str(error) or type(error).__name__).splitlines()[0]})", "a graph that can be gone through again",
            why="rows take several backward passes of one forward pass, and a function of yours "
            f"({listed(sorted(names))}) throws away what the first one has used",
            try_="a backward that leaves ctx as it is: ctx.save_for_backward and ctx.saved_tensors, nothing popped, "
            "deleted or written to",
        ) from error  # fmt: skip


def _refuse_inputs(error: Exception, first: Batch, reason: str, *, fails: bool) -> None:
    """Raise what torch or Python says of a call of the model, with its inputs; not what the model raises itself."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    usual = frame.f_globals.get("__name__", "").partition(".")[0] in ("fisherkit", "torch")
    if fails and usual and type(error) in (RuntimeError, TypeError):
        shapes = (f"{n} of shape {list(x.shape)}" for n, x in zip(first.names, first.inputs, strict=True))
        raise (ModelError if isinstance(error, RuntimeError) else InvalidTypeError)(
            f"{first.place}, the model's forward pass",
            f"an error of the model for {listed(shapes)}",
            "inputs that the model takes, also two of its examples at a time",
            why=reason,
            try_="model(*inputs) by itself; ((a, b), y) for inputs by place, ({name: a, ...}, y) by name",
        ) from error


def _explain(error: Exception, model: nn.Module, space: ParameterSpace, first: Batch, *, single: bool) -> None:
    """Raise what a model's error means, if it does not say enough itself."""
    alike = single and _shared(model, space, first, None)
    if alike:
        raise DataError(
            first.place,
            f"input {alike[0]!r} with {first.size} rows in a batch of {first.size} examples, for which the model "
            "fails with one row an example and works with all of them", "batches that tell which is meant",
            why="without a second batch, nothing tells an input that all examples share from examples that meet in the "
            "model (batch statistics, contrastive terms)", try_=f"{SHARED}; or two batches",
        ) from error  # fmt: skip
    if isinstance(error, FisherkitError):
        return
    device, dtype = model_device(model, space.names)
    two = first.take(slice(0, 2)).to(device)
    fails = not _works(model, two)  # else it is the gradient that does
    _refuse_single_use(error, model, two, fails=fails)
    _refuse_state(error, model, first.to(device), fails=fails)
    if fails and first.size > 2 and _works(model, first.to(device)):
        raise DataError(
            first.place, f"a batch of {first.size} examples that the model takes together and not two at a time",
            "examples along axis 0 that need no others",
            why=f"for the first two it fails with: {(str(error) or type(error).__name__).splitlines()[0]}",
            try_="a graph as one element of the batch, inputs (1, nodes, ...) and labels (1, nodes), with "
            f'example="token"; {UNBATCHED}',
        ) from error  # fmt: skip
    reason = f"the model's forward pass fails: {(str(error) or type(error).__name__).splitlines()[0]}"
    if first.targets is None and is_encoder_decoder(model) and not first.kwargs.keys() & {"labels", *DECODER_INPUTS}:
        raise DataError(
            first.place, "neither labels nor decoder inputs for an encoder-decoder",
            f"labels, or one of {', '.join(DECODER_INPUTS)}", why=reason,
        ) from error  # fmt: skip
    if fails and _works(model, replace(first._mapped(lambda x: x.unsqueeze(0)), size=1).to(device)):
        raise DataError(
            first.place, f"inputs of shape {listed(str(list(x.shape)) for x in first.inputs)}, of which the model "
            "fails with the first two along axis 0 and works with one more axis in front", "examples along axis 0",
            why=reason, try_=UNBATCHED,
        ) from error  # fmt: skip
    usual = type(error).__module__ == "builtins"  # a user's own errors are meant for the user
    if usual and fails and first.size > 1 and _works(model, first.take(slice(0, 1)).to(device)):
        raise DataError(
            first.place, f"a batch of {first.size} examples for a model that works with the first alone",
            "a model of batches, or one example a batch", why=reason,
            try_="batches of one example each, DataLoader(..., batch_size=1)",
        ) from error  # fmt: skip
    sizes = sorted({len(leaf) for leaf in first.inputs if leaf.ndim})
    if isinstance(error, RuntimeError) and "must match" in str(error) and len(sizes) > 1 and fails:
        raise DataError(
            first.place, f"inputs of {listed(map(str, sizes))} rows, with which the model fails",
            f"a row for each of the {first.size} examples, or an input that all of them share", why=reason,
        ) from error  # fmt: skip
    if isinstance(error, RuntimeError) and "inplace operation" in str(error):
        raise ModelError(
            "the model's forward pass", "a tensor that is written to in place after a layer has kept it",
            "tensors that stay as they are until the gradient is known",
            why=f"the backward pass fails: {str(error).splitlines()[0]}",
            try_="x = x + y instead of x += y, or a layer that reads x.clone()",
        ) from error  # fmt: skip
    real = [f"{n} of {x.dtype}" for n, x in zip(first.names, first.inputs, strict=True) if x.is_floating_point()]
    if isinstance(error, RuntimeError) and "'indices' to have one of" in str(error) and real:
        raise DataError(
            first.place, f"{listed(real)} where a table of embeddings is asked for rows", "ids of torch.int64 or int32",
            why=reason, try_="x.long(), or ids that were never made floats",
        ) from error  # fmt: skip
    # Models may well cast their inputs: only what torch itself says of types is put into our words.
    if not isinstance(error, RuntimeError) or "type" not in str(error):
        _refuse_inputs(error, first, reason, fails=fails)
        return
    others = sorted({str(leaf.dtype) for leaf in first.inputs if leaf.is_floating_point() and leaf.dtype != dtype})
    inside = "torch.autocast inside forward, since a caller's is off here"
    if others:
        raise DataError(
            first.place, f"inputs of {', '.join(others)}", f"{dtype}, the parameters' dtype", why=reason,
            try_=f"x.to({dtype}), the model in the inputs' dtype, or {inside}",
        ) from error  # fmt: skip
    raise ModelError(
        "the model's forward pass", "tensors of dtypes that do not go together",
        f"a forward pass of {dtype} parameters", why=reason, try_=inside,
    ) from error  # fmt: skip
