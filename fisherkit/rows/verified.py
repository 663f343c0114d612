"""What was verified of a model, kept for as long as the model lives: the next Fisher on it starts at once.

Rules are verified on two examples (`rows.plan`), which costs a few passes over the weights. What they say holds for a
model and not for its parameters' values, so it is used again while nothing else about the model has changed, its
modules, their plain attributes, hooks and modes, its parameters' identities and shapes, the form of a batch, and the
layer rules that there are. What no such comparison sees is looked for by a forward pass of two examples: its graph must
lead to chosen parameters through the uses that were verified and in no other way; where it does not show that, a
backward pass must bring weight gradients that are the sum of rows. Only findings are kept here, no tensor and no model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fisherkit.data import Batch
from fisherkit.errors import ModelError
from fisherkit.rows.base import RowSelection
from fisherkit.rows.differentiable import pulled_back
from fisherkit.rows.generic import dense_gradient
from fisherkit.rows.hidden import uses_are_all
from fisherkit.rows.linearized import Known, Linearized
from fisherkit.rows.plan import Findings, Plan, Probe, forward, make_plan, probed, tolerance, two_of
from fisherkit.rows.record import refuse_train_mode
from fisherkit.rows.recurrent import RecurrentRule
from fisherkit.rows.rules import RULES, Use
from fisherkit.rows.units import RuledUnit, SharedUnit
from fisherkit.rows.watched import Watched
from fisherkit.space import ParameterSpace

MOST = 32
"""Findings kept of one model; a model that changes all the time starts over."""


_KNOWN: WeakKeyDictionary[nn.Module, dict[Hashable, Findings]] = WeakKeyDictionary()


def plan_for(
    model: nn.Module, space: ParameterSpace, batch: Batch, *, assume: bool = False,
    own: Mapping[str, nn.Parameter] | None = None,
) -> Plan:  # fmt: skip
    """How rows are made: as verified before, or verified now.

    Args:
        model: the model.
        space: the chosen parameters.
        batch: a first batch on the model's device.
        assume: whether what is known may be confirmed later, by the graph of the first pass over the data.
        own: the model's parameters by name, if they are known.

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
        if assume and _is_simple(old) and "not shown" not in old.tried:
            return Plan.of(model, space, old, key, Probe(batch, None, old.alone), own)
        plan = _confirmed(Plan.of(model, space, old, key, own=own), batch)
        if plan is not None:
            return plan
        del known[key]
    plan = replace(_made(model, space, batch), key=key)
    if (seen := plan.probe.watched) is not None:
        plan = replace(plan, calls=_calls(seen.uses))
        if not is_shown(plan, seen):
            plan.tried["not shown"] = 1  # a pass over the data would be made in vain
    remember(plan)
    return plan


def plan_again(plan: Plan, batch: Batch) -> Plan | None:
    """A plan that was made a moment ago, for a batch of other data; None if it has another form.

    Args:
        plan: made of data of the same model in the same call.
        batch: a first batch on the model's device.

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
    alike = _calls(watched.uses) == plan.calls and watched.custom == plan.custom
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
    yield id(type(module))
    for name, value in module.__dict__.items():
        if type(value) in _PLAIN:
            yield name, value
        elif name in _OWN:
            if value and name.endswith("_hooks"):
                yield name, "hooks", tuple(value)
        elif (found := _plain(value, seen)) is not None:
            yield name, found
        elif callable(value):
            yield name, "function", id(value)


def _plain(value: Any, seen: set[int], depth: int = 5) -> Hashable:
    """Numbers, strings and the like in an attribute, or in containers and settings there; None of anything else.

    What modules share, as a configuration, is described where it is ``seen`` first.
    """
    kind = type(value)
    if kind in _PLAIN or isinstance(value, _SIMPLE):
        return (value,)
    record = dataclasses.is_dataclass(kind) or kind in _RECORDS or hasattr(kind, "to_dict")
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
