"""Decide, on two examples of the user's data, how each parameter's rows will be made.

Rules are proposed by watching a forward pass and judged by automatic differentiation: a rule is used only if its rows
equal autograd's per-example gradients on this very model. What no rule reproduces (custom arithmetic, uses that are not
seen) goes the generic way. What two examples cannot show is looked at in every batch (`rows.linearized`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fisherkit.arithmetic import HALF, all_finite, at_least_single
from fisherkit.data import Batch, check_finite
from fisherkit.errors import ModelError, NonFiniteError, listed
from fisherkit.randomness import Draws, rng_places, untouched_rng
from fisherkit.rows.base import RowSelection, UnitRows
from fisherkit.rows.differentiable import differentiable, pulled_back
from fisherkit.rows.generic import dense_gradient, generic_rows, kept_numbers, loop_is_cheaper, recurrent, unreached
from fisherkit.rows.ownership import coarser, codes
from fisherkit.rows.record import Recorder, refuse_train_mode
from fisherkit.rows.recurrent import RecurrentRule
from fisherkit.rows.rules import Use, in_dtype
from fisherkit.rows.trace import Traces
from fisherkit.rows.units import DerivedUnit, Pulled, RuledUnit, SharedUnit, SlicedUnit, Unit, form_of
from fisherkit.rows.watched import Watched, refuse_hidden
from fisherkit.space import ParameterSpace

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative difference that rounding explains between two ways to the same gradient; 5e-2 for half precision."""

OF_GRADIENTS = 'a Fisher of kind "ef" or "ief" in float32 or float64, whose rows are what autograd gives for the loss'
"""What a Fisher can try where gradients are not linear in the outputs'."""

LARGE = 1 << 20
"""Outputs that are not copied as a whole to be compared."""


class Probe:
    """The examples that a plan is verified on, and their forward pass, which all that is found out on them shares.

    Of a plan that is known from before and has yet to be confirmed, by the first pass over the data, there is no pass
    (``assumed``), and ``batch`` only begins with them. ``watched`` has the graph, and is dropped when rows of the data
    are made; ``hooked`` and the outputs ``z`` stay. ``alike`` if these were compared with those in other company.
    """

    def __init__(self, batch: Batch, watched: Watched | None, alone: bool = False, *, alike: bool = False) -> None:
        self._first, self.watched, self._alone, self.alike = batch, watched, alone, alike
        self.hooked, self.assumed = watched is not None and watched.hooked, watched is None
        if watched is not None:
            self.batch, self.z = batch, watched.z.detach()

    @cached_property
    def batch(self) -> Batch:
        """The two examples on which rules are verified."""
        return self._first.take(two_of(self._first, self._alone))


@dataclass
class Tried:
    """What is found out about a model when it is first needed.

    Attributes:
        answers: to "batched" and "matrix-free", yes or no; the "positions" that are examples of their own; inputs of a
            "last layer" that is the only one, or of a "head" above others, whose sums are known, 0 for none.
        vectors: of each kind, how many an example has, and how many positions the outputs have.
        seen: what is not looked for again: "not shown", "silent", and a word with what was met, as "batch" of a size.
    """

    answers: dict[str, int] = field(default_factory=dict)
    vectors: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    seen: set[Hashable] = field(default_factory=set)

    def answer(self, question: str, find: Callable[[], int]) -> int:
        """What is found out when it is first asked."""
        if question not in self.answers:
            self.answers[question] = find()
        return self.answers[question]


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """What is found out about a model: how rows of some of its parameters are made. Holds no tensor and no model.

    Args:
        units: a partition of the names, in their order.
        vectorised: whether ``torch.func`` reproduces the generic units' gradients.
        shared: parameters of layers whose inputs all examples share, as of positions.
        unused: names of parameters that the outputs of the two examples do not depend on at all.
        coarsest: the floating dtype that rounds most on the way, whatever that of parameters and outputs.
        numbers_per_example: entries of all layer outputs for one example.
        largest: entries of the largest layer output for one example.
        alone: whether the model takes one example at a time, so that it was verified on one.
        calls: what its uses on two examples were given, to be compared; None before it is kept.
        custom: names of the autograd functions written in Python in their graph, which may forbid what was tried.
        draws: whether a pass draws random numbers, of which no output was seen to depend.
        nonlinear: parameters whose gradients are not linear in those at the outputs.
        tried: what else is found out later, which all that have these findings share.
        traces: of passes, which they share likewise.
    """

    units: tuple[Unit, ...] = ()
    vectorised: bool = True
    shared: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()
    coarsest: torch.dtype = torch.float64
    numbers_per_example: int = 1
    largest: int = 1
    alone: bool = False
    calls: Hashable = None
    custom: frozenset[str] = frozenset()
    draws: bool = False
    nonlinear: frozenset[str] = frozenset()
    tried: Tried = field(default_factory=Tried)
    traces: Traces = field(default_factory=Traces)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan(Findings):
    """How the rows of a model are made.

    ``versions`` is how often each parameter had been written to, ``key`` what the findings are kept under
    (`rows.verified`), and ``probed`` the examples that it was verified on; both None before.
    """

    model: nn.Module
    space: ParameterSpace
    parameters: dict[str, Tensor]
    versions: dict[str, int]
    key: Hashable = None
    probed: Probe | None = None

    @classmethod
    def of(
        cls, model: nn.Module, space: ParameterSpace, findings: Findings, key: Hashable = None,
        probed: Probe | None = None, own: Mapping[str, nn.Parameter] | None = None,
    ) -> Plan:  # fmt: skip
        """A plan of what was found, which may be nothing, for the model as it is; its units are its own.

        ``own`` are the model's parameters by name, if they are known.
        """
        own = dict(model.named_parameters()) if own is None else own
        parameters: dict[str, Tensor] = {name: own[name] for name in space.names}
        versions = {name: p._version for name, p in parameters.items()}
        units = tuple(unit.copied() for unit in findings.units)
        return cls(
            **{**vars(findings), "units": units}, model=model, space=space, parameters=parameters, versions=versions,
            key=key, probed=probed,
        )  # fmt: skip

    @property
    def probe(self) -> Probe:
        """The examples that the plan was verified on."""
        if self.probed is None:
            raise LookupError("a plan that is being made")
        return self.probed

    @property
    def findings(self) -> Findings:
        """What can be kept of the plan; the units are copies."""
        own = {one.name: getattr(self, one.name) for one in fields(Findings)}
        return Findings(**{**own, "units": tuple(unit.copied() for unit in self.units)})

    def with_units(self, units: Iterable[Unit]) -> Plan:
        """With others, put in the parameters' order."""
        ordered = tuple(sorted(units, key=lambda unit: self.space.names.index(unit.names[0])))
        return replace(self, units=ordered, traces=Traces())

    @contextlib.contextmanager
    def quiet(self) -> Iterator[Draws]:
        """Around the model's own code, never around a yield: between chunks the caller sees an unchanged model."""
        own = list(self.parameters.values())
        with untouched_rng([self.example_parameter.device]) as draws, differentiable(self.model, own):
            yield draws

    def restricted(self, names: Collection[str]) -> Plan:
        """The same for the parameters of some of the units alone, with those that are used beside them."""
        space, tried = self.space.restrict(names), self.tried
        return replace(
            self, space=space, parameters={name: self.parameters[name] for name in space.names},
            versions={name: self.versions[name] for name in space.names}, unused=self.unused.intersection(space.names),
            units=tuple(unit for unit in self.units if unit.names[0] in space.names), traces=Traces(),
            # By rows, as beside other layers.
            tried=Tried({**tried.answers, "last layer": 0}, dict(tried.vectors), set(tried.seen)),
        )  # fmt: skip

    def revised(self, part: Plan) -> Plan:
        """With what a later batch has shown of some units' parameters, as `restricted` made a plan of them."""
        self.tried.answers.update({key: n for key, n in part.tried.answers.items() if key == "positions"})
        self.tried.seen.update(part.tried.seen & {"silent"})
        own = set(part.space.names)
        units = [unit for unit in self.units if unit.names[0] not in own]
        changed = replace(
            self, vectorised=self.vectorised and part.vectorised, unused=(self.unused - own) | part.unused
        )  # fmt: skip
        return changed.with_units([*units, *part.units])

    @property
    def example_parameter(self) -> Tensor:
        """Any of the parameters, for dtype and device."""
        return self.parameters[self.space.names[0]]

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows: the parameters', or float32 where theirs is a half."""
        return at_least_single(self.example_parameter.dtype)

    @cached_property
    def ruled(self) -> list[RuledUnit]:
        """The units that have a rule."""
        return [unit for unit in self.units if isinstance(unit, RuledUnit)]

    @cached_property
    def generic(self) -> list[Unit]:
        """The units without a rule."""
        return [unit for unit in self.units if not isinstance(unit, RuledUnit)]

    def rule_name(self, unit: Unit) -> str:
        """How a unit's rows are made, for `coverage`."""
        if isinstance(unit, RuledUnit):
            return unit.rule_name
        if unit.names[0] in self.unused:
            return "unused"
        return "torch.func" if self.vectorised else "loop"

    @property
    def live_generic(self) -> dict[str, Tensor]:
        """Parameters of generic units that outputs depend on, as far as the two examples tell."""
        names = [name for unit in self.generic for name in unit.names]
        return {name: self.parameters[name] for name in names if name not in self.unused}

    @property
    def looped(self) -> bool:
        """Whether rows take a forward pass for each example, which then brings those of all units."""
        return not self.vectorised and bool(self.live_generic)

    @cached_property
    def modules(self) -> tuple[tuple[str, ...], ...]:
        """The space's blocks, joined where a unit spans two modules."""
        return tuple(self.space.joined_blocks(unit.names for unit in self.units))

    def refuse_nonlinear_here(
        self, seen: Watched, call: str, names: Collection[str] | None = None, try_: str = OF_GRADIENTS,
        batch: Batch | None = None,
    ) -> None:  # fmt: skip
        """As `refuse_nonlinear`, by the examples of a batch, where functions and hooks that are known may do otherwise.

        Cost: none where there are neither functions nor hooks of users, else that of `nonlinear`.
        """
        found = nonlinear(self, seen, batch) if self.may_be_nonlinear(seen) else frozenset()
        plan = replace(self, nonlinear=self.nonlinear | found) if found else self
        plan.refuse_nonlinear(call, names, try_)

    def may_be_nonlinear(self, seen: Watched) -> bool:
        """Whether functions or hooks of users have a hand in a pass's gradients."""
        return seen.users or any(p._backward_hooks for p in self.parameters.values())

    def refuse_nonlinear(self, call: str, names: Collection[str] | None = None, try_: str = OF_GRADIENTS) -> None:
        """Refuse rows of other vectors, or multiples of vectors, than autograd itself is given.

        ``try_`` is what to try beside leaving the function, or the parameters, out.

        Raises:
            ModelError: gradients of some parameters, of these ``names``, are not linear in the outputs' gradients.
        """
        found = sorted(self.nonlinear if names is None else self.nonlinear.intersection(names))
        if found:
            raise ModelError(
                call, f"gradients of {listed(map(repr, found), 4)} that are not linear in the outputs' gradient",
                "a backward pass of derivatives, which doubles with its vector",
                why="an autograd function or a hook of yours changes gradients on the way, as by clipping, signs or "
                "rounding, so that rows depend on the vectors' size and sign: there is no such matrix",
                try_=f"the model without it (handle.remove()), params= without these parameters, or {try_}",
            )  # fmt: skip

    def unruled(self, watched: Watched) -> set[str]:
        """Parameters of units whose rule does not hold in a pass, because they are used in another way there."""
        outside, uses = watched.outside_rules, watched.uses
        found = watched.once("unruled", lambda: {
            name
            for unit in self.ruled
            if (outside and outside.intersection(unit.names)) or any(unit.differs(uses[i]) for i in unit.of(uses))
            for name in unit.names
        })  # fmt: skip
        return set(found)

    def generic_rows(
        self, batch: Batch, v: Float[Tensor, "k B ..."], z: Float[Tensor, "B ..."]
    ) -> Float[Tensor, "k B d"]:
        """Rows of the generic units, side by side in their order; z is what the model says of the batch."""
        if not self.generic:
            return v.new_zeros(*v.shape[:2], 0)
        own = {name: self.parameters[name] for unit in self.generic for name in unit.names}
        idle = unreached(z, {name: p for name, p in own.items() if name in self.unused})
        return generic_rows(
            self.model, own, batch, v, idle=idle, vectorised=self.vectorised, numbers=self.numbers_per_example
        )  # fmt: skip


def make_plan(model: nn.Module, space: ParameterSpace, batch: Batch, *, alone: bool = False) -> Plan:
    """Probe the model on the first two examples of a batch (one is used twice), on its device, and verify every rule.

    With ``alone``, of a model that takes one example at a time, one is used once.

    Raises:
        ModelError: dropout or batch statistics in train mode, or examples of a batch that influence each other.
    """
    refuse_train_mode(model)
    plan = Plan.of(model, space, Findings(alone=alone))
    device = plan.example_parameter.device
    if device.type == "meta":
        raise ModelError(
            "the Fisher of this model", "parameters on the meta device", "parameters with values",
            try_="model.to_empty(device=...) and load its weights",
        )  # fmt: skip
    with plan.quiet():
        probe = batch.take(two_of(batch, alone))
        watched, random = probed(plan, probe)
        z, plan = watched.z, replace(plan, coarsest=watched.coarsest, draws=random)
        _check_outputs(z, probe.place)
        kept, numbers = _refuse_interaction(model, batch, z, tolerance(z.dtype, plan.coarsest))
        if random:
            _refuse_chance(plan, probe, z)
        v = torch.randn(1, *z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(z)
        reference = _Reference(plan, probe, watched, v[0])
        units, mixed = _units(plan, watched, v, reference, reference.at_uses)
        if mixed:
            # Layers of what examples share, as positions: perhaps rules hold for what is made of their outputs.
            other = replace(plan, shared=frozenset(mixed))
            again = forward(other, probe)
            others, _ = _units(other, again, v, reference, _one_by_one(again.z, v[0], again.edges))
            if _numbers_without_rule(others) < _numbers_without_rule(units):
                plan, units, watched = other, others, again
        # Two uses may have one output, as a recurrent layer's linear maps have.
        outputs = {use.edge[:2]: torch.Size(use.output_shape).numel() // probe.size for use in watched.uses}
        generic, idle = _numbers_without_rule(units), [unit for unit in units if unit.without_use]
        if idle:  # what outputs depend on is used, though no function was seen to
            moved = reference.norms.any(0).tolist()
            for unit in idle:
                unit.without_use = not moved[reference.names[unit.names[0]]]
        plan = replace(
            plan.with_units(units), unused=frozenset(reference.unreached), probed=Probe(probe, watched, alike=True),
            custom=watched.custom, nonlinear=nonlinear(plan, watched, probe),
            tried=Tried(seen={("numbers", numbers)} if numbers == watched.numbers else set()),
            numbers_per_example=z.numel() // probe.size + sum(outputs.values()) + generic + (kept if generic else 0),
            largest=max([1, *outputs.values()]),
        )  # fmt: skip
        if plan.generic:
            hooked = any(plan.parameters[name]._backward_hooks for unit in plan.generic for name in unit.names)
            vectorised = not watched.casts and not hooked and _vectorised_agrees(plan, probe, v, z, reference)
            loop = probe.size > 1 and vectorised and loop_is_cheaper(
                model, plan.live_generic, probe, v, batch.size, plan.numbers_per_example
            )  # fmt: skip
            plan = replace(plan, vectorised=vectorised and not loop)
        if plan.looped:
            plan = plan.with_units([one for unit in plan.units for one in _by_kernel(unit, plan)])
        if plan.unused:
            refuse_hidden(model, {name: plan.parameters[name] for name in plan.unused}, probe, z)
    return plan


def _by_kernel(unit: Unit, plan: Plan) -> list[Unit]:
    """A unit; of a recurrent layer its parameters, which the loop's passes bring by torch's own kernel."""
    if not isinstance(unit, RuledUnit) or not isinstance(unit.rule, RecurrentRule):
        return [unit]
    return [
        Unit((name,), "of a recurrent layer beside parameters without a rule", _numbers(plan, (name,)))
        for name in unit.names
    ]


def two_of(batch: Batch, alone: bool = False) -> Int[Tensor, "n"]:
    """The first two examples of a batch; one counts twice, unless the model takes one alone."""
    return torch.tensor([0] if alone else [0, min(1, batch.size - 1)])


def _units(
    plan: Plan, watched: Watched, v: Float[Tensor, "1 B ..."], reference: _Reference, at_uses: OneByOneGradients
) -> tuple[list[Unit], set[str]]:
    """Units that autograd confirms, and the other parameters of layers whose entries do not belong to one example."""
    numbers = codes(watched.batch, v)
    gradients, *multiplied = (_combined(at_uses, row) for row in (torch.ones_like(numbers[0]), *numbers))
    arrangements = watched.arrangements(gradients, [] if watched.regular else multiplied)
    stacked = [None if g is None else g.unsqueeze(0) for g in gradients]
    uses, selection = [in_dtype(use, plan.dtype) for use in watched.uses], RowSelection(1, v.shape[1], v.device)
    pulled = Pulled(uses, stacked, arrangements, v.to(plan.dtype), selection)
    proposed = propose(plan, watched, plan.space.names)
    units = [one for unit in proposed for one in _verified(plan, unit, pulled, reference)]
    confirmed = {name for unit in units if isinstance(unit, RuledUnit) for name in unit.names}
    # What is written to in place, as by an activation, has no gradient to look at.
    unclear = [
        use for use, one, g in zip(watched.uses, arrangements, gradients, strict=True) if one is None or g is None
    ]
    return units, {name for use in unclear for name in use.names} - confirmed


OneByOneGradients = Sequence[Sequence[Tensor | None]]
"""Of each example's outputs alone, at every place that was asked for; None where nothing depends on an output."""


def _one_by_one(z: Float[Tensor, "B ..."], v: Float[Tensor, "B ..."], inputs: Sequence[Any]) -> OneByOneGradients:
    return [pulled_back(z[n], inputs, v[n]) if inputs else () for n in range(len(z))]


def _combined(found: OneByOneGradients, weights: Float[Tensor, "B"]) -> list[Tensor | None]:
    """Gradients of all examples' outputs, each times a number: a backward pass is linear."""
    combined: list[Tensor | None] = []
    for column in zip(*found, strict=True):
        parts = [g * w for g, w in zip(column, weights, strict=True) if g is not None]
        combined.append(torch.stack(parts).sum(0) if parts else None)
    return combined


def _numbers_without_rule(units: Sequence[Unit]) -> int:
    return sum(unit.numbers for unit in units if not isinstance(unit, RuledUnit))


def probed(plan: Plan, two: Batch) -> tuple[Watched, bool]:
    """A forward pass of the probe, and whether it drew random numbers."""
    device = plan.example_parameter.device
    before = rng_places(device)
    return forward(plan, two), rng_places(device) != before


def forward(plan: Plan, batch: Batch, *, positions: bool = False) -> Watched:
    """A forward pass of a batch, watched; ``positions`` to see whether the inputs' positions stay apart, too."""
    names, own = {id(p): name for name, p in plan.parameters.items()}, batch.fresh()
    along = own.batched[0].shape[1] if positions and own.batched[0].ndim > 1 else 0
    traces = None if plan.probed is None else plan.traces  # of a plan that is made
    recorder = Recorder(names, batch.size, own.batched, plan.shared, positions=along, traces=traces)
    return Watched.of(plan.model, recorder, own)


class _Reference:
    """Autograd's gradients of each of the probe's examples, at the uses and the parameters, and what is unreached."""

    def __init__(self, plan: Plan, probe: Batch, watched: Watched, v: Tensor) -> None:
        own, uses = list(plan.parameters.values()), len(watched.uses)
        if any(isinstance(use.rule, RecurrentRule) for use in watched.uses):
            # Judged by torch's own kernel, and not by the steps that were put in its place.
            pairs = _one_by_one(watched.z, v, watched.edges), _one_by_one(probe.call(plan.model), v, own)
            found: OneByOneGradients = [(*at_uses, *rows) for at_uses, rows in zip(*pairs, strict=True)]
        else:
            found = _one_by_one(watched.z, v, [*watched.edges, *own])
        self.at_uses: OneByOneGradients = [row[:uses] for row in found]
        self.unreached = {n for i, n in enumerate(plan.parameters) if all(row[uses + i] is None for row in found)}
        self.rows = [
            [dense_gradient(p, g).to(plan.dtype) for p, g in zip(own, row[uses:], strict=True)] for row in found
        ]
        self.names = {name: i for i, name in enumerate(plan.parameters)}
        self.norms = torch.stack([torch.stack([g.norm() for g in row]) for row in self.rows])
        # A norm is cheap, unlike a mask of finite entries; a large one may overflow where no entry does.
        if not all_finite(self.norms) and not all_finite(*(g for row in self.rows for g in row)):
            bad = [name for name, i in self.names.items() if not all_finite(*(row[i] for row in self.rows))]
            raise NonFiniteError(
                probe.place, f"gradients with NaN or infinite entries of {listed(map(repr, bad))}", "finite gradients",
                try_="look for √, log or division at 0 in the model",
            )  # fmt: skip
        self.scale = self.norms.norm()
        self.tolerance = tolerance(plan.example_parameter.dtype, plan.coarsest)

    def agrees(self, names: Sequence[str], size: int, written_out: Callable[[int], Tensor]) -> bool:
        """Whether rows are right up to rounding; gradients that are nothing but rounding go by the whole's scale."""
        places = [self.names[name] for name in names]
        sizes = [self.rows[0][place].numel() for place in places]
        if size != sum(sizes):
            return False
        errors = []
        for n, row in enumerate(self.rows):
            # One example at a time: beside the gradients, only one row exists.
            parts = written_out(n).split(sizes)
            errors += [part.sub_(row[place].flatten()).norm() for place, part in zip(places, parts, strict=True)]
        own = self.norms[:, places].norm()
        return bool(torch.stack(errors).norm() <= self.tolerance * torch.maximum(own, 1e-3 * self.scale))


def nonlinear(plan: Plan, watched: Watched, batch: Batch | None) -> frozenset[str]:
    """The parameters whose gradients do not follow a sum of multiples of output vectors, as clipped ones do not.

    Of what was watched, or of its ``batch`` in a pass of its own: what that left on the model, hooks may read.

    Cost: none where the graph has neither functions nor hooks of users; else four backward passes, each of a forward
    pass of its own if there is a batch.
    """
    own, z = plan.parameters, watched.z
    if not plan.may_be_nonlinear(watched):
        return frozenset()
    drawn, examples = torch.Generator(z.device).manual_seed(1), torch.arange(len(z), device=z.device)
    v = torch.randn(3, *z.shape, generator=drawn, dtype=at_least_single(z.dtype), device=z.device)
    v[examples % 3, examples] *= 8  # so that what only does something to the largest entry meets others in each
    half = bool({watched.coarsest, z.dtype}.intersection(HALF))  # where small gradients lose their digits
    usual, large, small = (16.0, 64.0, 256.0) if half else (1.0, 2.0**30, 2.0**-30)

    def back(vector: Tensor, scale: float = usual) -> list[Tensor]:
        with plan.quiet():  # functions may draw
            outputs = watched.z if batch is None else batch.call(plan.model)
            grads = pulled_back(outputs, list(own.values()), (vector * scale).to(z))
        found = [dense_gradient(p, g) / scale for p, g in zip(own.values(), grads, strict=True)]
        overflows = abs(scale) > 1 and not all_finite(*found)  # in half precision that no forward pass shows
        return back(vector, scale / 16) if overflows else found

    parts = back(v[0]), back(v[1], small), back(v[2], -large)
    expected = [a + b + c for a, b, c in zip(*parts, strict=True)]
    errors = torch.stack([(a - b).norm() for a, b in zip(expected, back(v.sum(0)), strict=True)])
    norms = torch.stack([a.norm() for a in expected])
    right = errors <= tolerance(z.dtype, plan.coarsest) * torch.maximum(norms, 1e-3 * norms.norm())
    return frozenset(name for name, holds in zip(own, right.tolist(), strict=True) if not holds)


def tolerance(dtype: torch.dtype, coarsest: torch.dtype) -> float:
    """What rounding explains where numbers of a dtype went through a coarser one."""
    return TOLERANCE.get(coarser(dtype, coarsest), 5e-2)


def _refuse_interaction(model: nn.Module, batch: Batch, z: Tensor, tolerance: float) -> tuple[int, int]:
    """Refuse outputs that change with company, its size or order.

    Also how many numbers a graph keeps for one example, and, as of a `Watched`, those that the model has for one alone.
    Some of the batch, the two among them, go forwards and backwards, one of the two beside itself and the other alone.
    """
    some = batch.take(slice(0, 8))
    order = torch.arange(some.size, device=z.device).flip(0)
    same = batch.take(torch.zeros(len(z), dtype=torch.long, device=z.device))
    # With gradients on, as hooks of the model's own on the graph need it.
    whole, backwards = some.call(model).detach(), some.take(order).call(model).detach()
    check_finite(whole, batch.place)
    backwards = backwards.flip(0)
    require_alike(backwards, whole, tolerance * whole.norm())
    del backwards
    require_alike(whole[two_of(batch, len(z) == 1)], z.detach(), tolerance * z.norm())
    del whole
    first, kept = kept_numbers(model, same)
    recorder = Recorder({}, 1)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        recorder.tracker.numbers.clear()
        with recorder:
            return model(*args, **kwargs)

    twice = [first.detach(), *([alone(recorded, batch, min(1, batch.size - 1))] if len(z) > 1 else [])]
    for n, one in enumerate(twice):
        require_alike(one, z.detach()[[n] * len(one)], tolerance * z.norm())
    return kept, hash(tuple(recorder.tracker.numbers))


def alone(model: Callable[..., Any], batch: Batch, n: int) -> Tensor:
    """Outputs of an example by itself; twice beside itself, of a model that takes no batch of one."""
    with contextlib.suppress(Exception):  # models raise what they like
        z = batch.take(slice(n, n + 1)).call(model).detach()
        if len(z) == 1:
            return z
    return batch.take(torch.tensor([n, n])).call(model).detach()


def require_alike(found: Tensor, expected: Tensor, allowed: Tensor, place: str = "") -> None:
    """Refuse outputs of the same examples that differ from pass to pass, in the batch at ``place``."""
    if found.shape == expected.shape:
        # Example by example where the difference would be large, as of a vocabulary.
        pairs = [(found, expected)] if found.numel() <= LARGE else zip(found, expected, strict=True)
        if bool(torch.stack([(a - b).norm() for a, b in pairs]).norm() <= allowed):
            return
    error = influenced(place)
    if found.shape[1:] != expected.shape[1:]:
        error = ModelError(
            place or "the Fisher of this model",
            f"outputs of shape {list(found.shape)} and of {list(expected.shape)} for the same examples, which "
            "changes with the rest of their batch", "outputs of an example that are of one shape in any company",
            why="rows are made of examples by themselves and together",
            try_="positions up to the length of the inputs, not of the batch's longest example: "
            "pad_packed_sequence(..., total_length=x.shape[1]); labels of ignore_index where there is padding",
        )  # fmt: skip
    raise error


def influenced(place: str = "", what: str = "outputs") -> ModelError:
    """The error of examples whose outputs, or gradients, are other ones in other company."""
    here = f"{what} that change with the rest of the batch"
    return ModelError(
        place or "the Fisher of this model",
        here if place else "an output for an example that changes with the rest of its batch",
        "examples that do not influence each other, whatever their places in a batch and however many there "
        "are, and a deterministic forward pass", why="per-example gradients do not exist otherwise",
        try_="model.eval(); batches of one example; remove batch statistics, contrastive terms, noise, a capacity that "
        "experts share, and what depends on an example's place or on len(x), from forward; nodes of a graph are "
        'positions of one example: inputs (1, nodes, ...), example="token"',
    )  # fmt: skip


def _check_outputs(z: Tensor, place: str) -> None:
    call = "the model's forward pass"
    if not z.is_floating_point():
        raise ModelError(call, f"outputs of {z.dtype}", "real floating-point outputs")
    check_finite(z, place)
    if not z.requires_grad:
        raise ModelError(
            call, "outputs without a gradient in the chosen parameters", "outputs that depend on them",
            why="they are detached, or computed under torch.no_grad",
            try_="a forward without .detach(), .data and @torch.no_grad()",
        )  # fmt: skip


def _refuse_chance(plan: Plan, probe: Batch, z: Tensor) -> None:
    """More passes for a model that draws random numbers: stochastic depth changes few examples at a time."""
    for _ in range(32):
        again = probe.call(plan.model)
        if again.shape != z.shape or bool((again - z).norm() > tolerance(z.dtype, plan.coarsest) * z.norm()):
            raise ModelError(
                "the Fisher of this model", "outputs that change from pass to pass", "a deterministic forward pass",
                why="the model draws random numbers", try_="model.eval()",
            )  # fmt: skip


def propose(plan: Plan, watched: Watched, names: Sequence[str]) -> list[Unit]:
    """Units by what was seen: a weight and a bias that only ever occur together, under one rule and nowhere else.

    A parameter that is used in several ways, each of them under a rule, is a unit of its own, and so is what it is used
    with. One with a hook has none: what the hook does to an example's gradient, no two examples tell.
    """
    outside = watched.outside_rules | {name for name in names if plan.parameters[name]._backward_hooks}
    seen: dict[str, list[Use]] = {name: [] for name in plan.space.names}
    for use in watched.uses:
        for name in use.names:
            seen[name].append(use)
    units: list[Unit] = []
    placed: set[str] = set()
    for name in names:
        if name in placed:
            continue
        members = _together(name, seen)
        own = [use for member in members for use in seen[member]]
        slices = [use.slices is not None for use in seen[name]]
        ways = {(use.rule, use.turned) for use in seen[name]}
        if slices and all(slices) and len(ways) == 1 and name not in outside:
            units.append(SlicedUnit((name,), own[0].rule, _numbers(plan, (name,)), turned=own[0].turned))
            continue
        free = all(use.slices is None or use.slices.ndim == 0 for use in own)
        plain = bool(own) and free and all(use.plain for use in own)
        together, free = {form_of(use) for use in own}, free and not outside.intersection(members)
        if plain and free and len(together) == 1:
            chosen = own[0].names
            units.append(RuledUnit(chosen, own[0].rule, _numbers(plan, chosen), turned=own[0].turned))
            placed.update(chosen)
        elif plain and name not in outside:
            forms, size = list(dict.fromkeys(form_of(use) for use in seen[name])), _numbers(plan, (name,))
            shared = len(forms) > 1
            alone = RuledUnit((name,), forms[0][0], size, turned=forms[0][3])
            units.append(SharedUnit(name, forms, size) if shared else alone)
        elif own and free:
            rules = list(dict.fromkeys(use.rule for use in own))
            chosen = tuple(sorted(members, key=plan.space.names.index))
            units.append(DerivedUnit({one: plan.parameters[one].numel() for one in chosen}, rules))
            placed.update(chosen)
        else:
            reason = "no rule knows some of its uses" if own else "no layer rule saw it"
            reason = "a hook on its gradient" if plan.parameters[name]._backward_hooks else reason
            without_use = not own and name not in outside
            units.append(Unit((name,), reason, _numbers(plan, (name,)), without_use=without_use))
    return units


def _together(name: str, seen: Mapping[str, Sequence[Use]]) -> list[str]:
    """The parameters that are used together with one, or with one of those, it first."""
    found = [name]
    for member in found:
        found += [other for other in dict.fromkeys(n for use in seen[member] for n in use.names) if other not in found]
    return found


def _numbers(plan: Plan, names: Sequence[str]) -> int:
    return sum(plan.parameters[name].numel() for name in names)


def _verified(plan: Plan, unit: Unit, pulled: Pulled, reference: _Reference) -> list[Unit]:
    """The unit if autograd confirms its rows, or its parameters as generic units."""
    if not isinstance(unit, RuledUnit):
        return [unit]
    reason = f"autograd does not confirm the {unit.rule_name} rule here"
    try:
        made = unit.made(pulled)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # a rule that does not know this form of use
        made, reason = None, f"the {unit.rule_name} rule fails here: {str(error).splitlines()[0]}"
    if made is not None and reference.agrees(unit.names, made.rows.size, functools.partial(_row, made.rows)):
        return [unit.confirmed(pulled, made.rows, plan.parameters[unit.names[0]].shape)]
    return [Unit((name,), reason, _numbers(plan, (name,))) for name in unit.names]


def _row(rows: UnitRows, n: int) -> Float[Tensor, "d"]:
    return rows.reordered(torch.tensor([n])).dense()[0]


def _vectorised_agrees(
    plan: Plan, probe: Batch, v: Float[Tensor, "1 B ..."], z: Float[Tensor, "B ..."], reference: _Reference
) -> bool:
    names = [name for unit in plan.generic for name in unit.names]
    if recurrent(plan.model) or not plan.live_generic:
        return False
    # torch.func refuses some kernels, data-dependent Python and hooks on the graph; the loop over examples does not.
    # Some kernels are right for one vector and wrong for several at once (cdist's gradient), or right for as many as
    # there are examples (linalg.solve's).
    factors = (1.0, -0.5, 2.0)
    with contextlib.suppress(Exception):
        found = plan.generic_rows(probe, torch.cat([factor * v for factor in factors]), z)
        each = [rows / factor for rows, factor in zip(found, factors, strict=True)]
        return all(reference.agrees(names, rows.shape[1], rows.__getitem__) for rows in each)
    return False
