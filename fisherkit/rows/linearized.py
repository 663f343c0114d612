"""One batch linearised: a forward pass whose graph answers, for any output vectors, with the rows of every unit.

Only gradients with respect to the layers' outputs are asked for; weight gradients of rule-covered units are never
formed. Whose each position is, is looked at in every batch; what the rules cannot say of this one goes the slow exact
way, and `newly_ruled` says so to whoever can start again with a better plan.

Models that nothing vectorises, or that it would slow down, are linearised example by example: one forward pass each,
whose graph has the layers' outputs and the parameters without a rule alike, so that rows take what a loop written by
hand takes. Layers' inputs and gradients are put together before anything is made of them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fisherkit.arithmetic import HALF, all_finite
from fisherkit.data import Batch
from fisherkit.errors import ModelError
from fisherkit.rows.base import RowSelection, StoredRows
from fisherkit.rows.batch_axis import tensors
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.rows.differentiable import pulled_back, scales
from fisherkit.rows.generic import dense_gradient, looped_rows, unreached
from fisherkit.rows.ownership import Arrangement, Regular, coarser
from fisherkit.rows.plan import Plan, forward, influenced, propose, tolerance
from fisherkit.rows.record import DROPOUTS, Recorder
from fisherkit.rows.rules import ContractionRule, ElementwiseRule, in_dtype
from fisherkit.rows.units import Pulled, RuledUnit, Unit
from fisherkit.rows.watched import Watched


@dataclass(frozen=True)
class Known:
    """Gradients ``[k, *output]`` of another backward pass at each of the `Watched.edges`, of which rows are multiples.

    ``scale`` turns them, by example, into those of the wanted vectors; ``multiplied`` are of the same pass, as
    `Watched.multiplied` makes them, or None to make them from the graph.
    """

    gradients: Sequence[Tensor | None]
    scale: Float[Tensor, "B"]
    multiplied: Sequence[Sequence[Tensor | None]] | None = None


class Linearized:
    """The model at one batch, with outputs ``z`` ``[B, ...]``.

    ``shown`` if the graph has shown that parameters are used as they were when the plan was verified. ``unruled`` are
    parameters of units whose rule does not hold in this batch; ``untold`` if some of them are only there because the
    graph was let go that would have told.
    """

    def __init__(self, plan: Plan, batch: Batch, watched: Watched, *, shown: bool = False) -> None:
        dtype = plan.dtype
        self.plan, self.batch = plan, batch
        known = plan.probed is not None and plan.probed.hooked
        uses, exchanging = [in_dtype(use, dtype) for use in watched.uses], watched.exchanging and not known
        same = exchanging == watched.exchanging and all(a is b for a, b in zip(uses, watched.uses, strict=True))
        self.watched, self.z = watched if same else replace(watched, uses=uses, exchanging=exchanging), watched.z
        self.unruled, self.untold, self._spent = set() if shown else plan.unruled(self.watched), False, False
        self._activations: dict[tuple[str, ...], Any] = {}
        self._arranged: Sequence[Arrangement | None] | None = None

    @classmethod
    def probe(cls, plan: Plan) -> Linearized:
        """The model at the examples that the plan was verified on, by the pass that did it if that is still there."""
        watched, batch = plan.probe.watched, plan.probe.batch
        return cls(plan, batch, forward(plan, batch) if watched is None else watched)

    def by_owner(self) -> None:
        """Look at which entries outputs depend on, whatever the forward pass shows."""
        self.watched = replace(self.watched, by_owner=True)

    @property
    def followed(self) -> bool:
        """Whether the forward pass shows whose all entries are, or would of two examples."""
        if self.watched.followed or self.batch.size > 1 or self.plan.alone:
            return self.watched.followed
        with self.plan.quiet():
            return forward(self.plan, self.batch.take(torch.tensor([0, 0]))).followed

    @property
    def newly_ruled(self) -> set[str]:
        """Parameters without a rule that this batch uses under one, which the plan's two examples had not used."""
        idle = {name for unit in self.plan.generic if unit.without_use for name in unit.names}
        return {name for use in self.watched.uses for name in use.names if name in idle}

    @property
    def numbers_per_vector(self) -> int:
        """Entries of all layer-output gradients for one output vector, what a backward pass must hold."""
        layers = sum(torch.Size(use.output_shape).numel() for use in self.watched.uses)
        return self.z.numel() + layers + sum(unit.numbers for unit in self.plan.generic) * self.batch.size

    def rows(
        self, v: Float[Tensor, "k B ..."], selection: RowSelection, known: Known | None = None, *, alone: bool = False,
        counting: Float[Tensor, "B ..."] | None = None, last: bool = False,
    ) -> Rows:  # fmt: skip
        """The rows Jᵀ v.

        Args:
            v: k vectors for each example, ``[k, *outputs]``.
            selection: which of them are rows.
            known: what a backward pass has brought already.
            alone: whether these are all vectors that there will be of this batch.
            counting: 1 at outputs that count, else 0, where the entries that they depend on are wanted, whatever v is.
            last: whether they are one vector an example, after which nothing is asked of this pass, so that the
                backward pass may let its graph go on the way.
        """
        dtype = self.plan.dtype
        if self.watched.users and all(self.unruled.intersection(unit.names) for unit in self.plan.ruled):
            parts = selection.take(self._slow(v.to(self.z.dtype), self.plan.units).to(dtype))
            slots = zip(self.plan.units, parts.split([unit.numbers for unit in self.plan.units], 1), strict=True)
            return Rows(self.plan.space, [UnitSlot(unit.names, StoredRows(p)) for unit, p in slots])
        own, gradients, generic, scale = self._pulled(v, known, last)
        arrangements = self._arrangements(own, gradients, known, counting, alone=alone)
        if known is None:
            self._unrule_silent(gradients)
        factor = scale if known is None else known.scale
        factor = None if factor is None else factor.to(dtype).reshape(-1, self.batch.size, 1, 1)
        pulled = Pulled(
            self.watched.uses, gradients, arrangements, own.to(dtype), selection, factor, self._activations,
            self.watched.decided_before if self.watched.regular else {},
        )  # fmt: skip
        found: dict[tuple[str, ...], UnitSlot] = {}
        for unit in self.plan.ruled:
            made = None if self.unruled.intersection(unit.names) else unit.made(pulled)
            if made is None:
                self.unruled.update(unit.names)
            else:
                found[unit.names] = made
        slow = [unit for unit in self.plan.ruled if unit.names not in found]
        rest: list[tuple[Sequence[Unit], Tensor]] = [] if generic is None else [(self.plan.generic, generic)]
        for units, values in [*rest, (slow, self._slow(own, slow))] if slow else rest:
            whole = values.to(dtype) if scale is None else values.to(dtype) * scale.unsqueeze(2)
            parts = selection.take(whole).split([unit.numbers for unit in units], 1)
            found.update({u.names: UnitSlot(u.names, StoredRows(p)) for u, p in zip(units, parts, strict=True)})
        return Rows(self.plan.space, [found[unit.names] for unit in self.plan.units])

    def _unrule_silent(self, gradients: Sequence[Tensor | None]) -> None:
        """Uses without a gradient whose parameters have one: what came out of the layer was written to in place.

        Where the graph was let go, which would tell, they count as if they had one, and the next time it is kept.
        """
        pairs = list(zip(self.watched.uses, gradients, strict=True))
        silent = {name for use, g in pairs if g is None for name in use.names}
        if not silent:
            return
        heard = {name for use, g in pairs if g is not None for name in use.names}
        asked = silent - heard - self.unruled
        if asked and self._spent:
            self.untold = True
            self.plan.tried.seen.add("silent")
        reached = asked if self.untold else self._reached({name: self.plan.parameters[name] for name in asked})
        self.unruled.update(name for unit in self.plan.ruled if reached.intersection(unit.names) for name in unit.names)

    def _reached(self, parameters: dict[str, Tensor]) -> set[str]:
        """Which of some parameters the outputs depend on."""
        return set(parameters) - unreached(self.z, parameters)

    def replanned(self) -> Plan:
        """A plan that knows what this batch has shown.

        Units whose rule does not hold here lose it; parameters that are used for the first time get a rule, if the sum
        of their rows is what autograd finds. The same plan where the graph was let go: the next pass keeps it.
        """
        if self.untold:
            return self.plan
        plan, newly_ruled = self.plan, self.newly_ruled
        units = [unit for unit in plan.units if not {*self.unruled, *newly_ruled}.intersection(unit.names)]
        names = [name for name in plan.space.names if name in self.unruled]
        why = "in some batch its positions belong to several examples, or it is used in another way"
        units += [Unit((name,), why, plan.parameters[name].numel()) for name in names]
        if newly_ruled:
            v = torch.randn(self.z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(self.z)
            with plan.quiet():
                gradients = self.watched.backward(v.unsqueeze(0))
                arrangements = self.watched.arrangements_by(v, [None if g is None else g[0] for g in gradients])
                selection, wide = RowSelection(1, self.batch.size, v.device), v.to(plan.dtype).unsqueeze(0)
                pulled = Pulled(self.watched.uses, gradients, arrangements, wide, selection)
                for unit in propose(plan, self.watched, [name for name in plan.space.names if name in newly_ruled]):
                    units.append(self._adopted(unit, pulled, v))
        plan = replace(plan, vectorised=plan.vectorised and not names, unused=plan.unused - newly_ruled)
        return plan.with_units(unit.copied() for unit in units)

    def _adopted(self, unit: Unit, pulled: Pulled, v: Float[Tensor, "B ..."]) -> Unit:
        """The unit, if the sum of its rows is the gradient that autograd finds; without a rule if not."""
        made = unit.made(pulled) if isinstance(unit, RuledUnit) else None
        parameters = [self.plan.parameters[name] for name in unit.names]
        if isinstance(unit, RuledUnit) and made is not None:
            own = torch.autograd.grad(self.z, parameters, v, retain_graph=True)
            expected = torch.cat([g.flatten() for g in own]).to(pulled.v.dtype)
            total = made.rows.rmatmul(expected.new_ones(made.rows.count, 1))[:, 0]
            allowed = tolerance(expected.dtype, self.watched.coarsest) * expected.norm()
            if total.shape == expected.shape and bool((total - expected).norm() <= allowed):
                return unit.confirmed(pulled, made.rows, parameters[0].shape)
        return Unit(unit.names, f"autograd does not confirm a rule for {unit.names[0]}", unit.numbers)

    def _arrangements(
        self, v: Float[Tensor, "k B ..."], gradients: Sequence[Tensor | None], known: Known | None,
        counting: Float[Tensor, "B ..."] | None, *, alone: bool,
    ) -> Sequence[Arrangement | None]:  # fmt: skip
        """How the entries of each use lie, found once a pass, from vectors that reach what any of its vectors reach."""
        if self._arranged is None and self.watched.regular:  # no gradient is asked
            self._arranged = self.watched.shown
        elif self._arranged is None:
            first = [None if g is None else g[0] for g in gradients]
            if known is not None and known.multiplied is not None:
                self._arranged = self.watched.arrangements(first, known.multiplied)
            elif alone and len(v) == 1 and counting is None:
                self._arranged = self.watched.arrangements_by(v[0], first)
            else:
                self._arranged = self.watched.arrangements_by(self._drawn(counting))
        return self._arranged

    def _drawn(self, counting: Float[Tensor, "B ..."] | None) -> Float[Tensor, "B ..."]:
        """Output vectors on which all depends that any others depend on, but for outputs that do not count."""
        drawn = torch.randn(self.z.shape, generator=torch.Generator().manual_seed(0)).to(self.z)
        return drawn if counting is None else drawn * counting.to(drawn)

    def _slow(self, v: Float[Tensor, "k B ..."], units: Sequence[Unit]) -> Float[Tensor, "k B d"]:
        """Rows of units whose rule does not hold in this batch, example by example."""
        own = {name: self.plan.parameters[name] for unit in units for name in unit.names}
        if self.watched.random:
            raise ModelError(
                "the model's forward pass in train mode",
                f"active dropout beside parameters whose rule does not hold in this batch: {list(own)[:4]}",
                "either one of the two", why="their rows come from a pass of their own, which would draw anew",
                try_="params= without them, dropout of 0 in the model's configuration, or model.eval()",
            )  # fmt: skip
        with self.plan.quiet():
            self._refuse_coupled(list(own))
            return looped_rows(self.plan.model, own, self.batch, v)

    def _refuse_coupled(self, names: list[str]) -> None:
        """Raise unless each example alone has the outputs that it has in this batch."""
        allowed = tolerance(self.z.dtype, self.watched.coarsest)
        usual = self.z.detach().norm() / self.batch.size**0.5
        with contextlib.suppress(ValueError):  # of a batch norm in train mode, which takes no example alone
            alone = [self.batch.take(slice(n, n + 1)).call(self.plan.model).detach() for n in range(self.batch.size)]
            pairs = [(one[0], z) for one, z in zip(alone, self.z.detach(), strict=True)]
            if all(a.shape == z.shape and bool((a - z).norm() <= allowed * z.norm().maximum(usual)) for a, z in pairs):
                return
        raise influenced("the model's forward pass", f"outputs, through {names[:2]},")

    def _pulled(self, v: Float[Tensor, "k B ..."], known: Known | None, last: bool) -> tuple[
        Float[Tensor, "k B ..."], Sequence[Tensor | None], Float[Tensor, "k B d"] | None, Float[Tensor, "k B"] | None
    ]:  # fmt: skip
        """The vectors that went back, gradients at the uses, rows without a rule, and what to multiply both by."""
        half = self.watched.coarsest in HALF or self.z.dtype in HALF
        # Of half precision and of units without a rule more may be asked; and once a layer was silent, whether it is.
        more = half or bool(self.plan.generic) or "silent" in self.plan.tried.seen
        self._spent = last and not more and self.watched.regular
        for scale in scales(v) if half else (None,):
            own = (v if scale is None else v / scale.reshape(*v.shape[:2], *[1] * (v.ndim - 2))).to(self.z.dtype)
            arrived, generic = self._back(own) if known is None else (known.gradients, self._generic(own))
            made = [*(arrived if known is None else ()), generic]
            if scale is None or all_finite(*(g for g in made if g is not None)):
                break  # else something overflowed in half precision that a smaller multiple may leave finite
        return own, arrived, generic, scale

    @property
    def batched(self) -> bool:
        """Whether several vectors can go through one vectorised backward pass; tried once a plan."""
        return bool(self.plan.tried.answer("batched", self._batched_agrees))

    def _batched_agrees(self) -> bool:
        """Tried with two, checked with one."""
        edges = self.watched.edges
        if not edges:
            return True
        last = torch.randn(self.z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(self.z)
        v = torch.stack([-0.5 * last, last])
        try:
            both = torch.autograd.grad(self.z, edges, v, retain_graph=True, allow_unused=True, is_grads_batched=True)
        except Exception as error:  # an operation without a batching rule, or a hook's own
            if not (isinstance(error, RuntimeError) or self.watched.users):
                raise
            return False
        one = torch.autograd.grad(self.z, edges, last, retain_graph=True, allow_unused=True)
        allowed = tolerance(self.z.dtype, self.watched.coarsest)
        return all(
            (a is None) == (b is None)
            and (
                a is None or b is None or bool((a - torch.stack([-0.5 * b, b])).norm() <= allowed * (b.norm() + 1e-30))
            )
            for a, b in zip(both, one, strict=True)
        )

    def _back(self, v: Float[Tensor, "k B ..."]) -> tuple[Sequence[Tensor | None], Float[Tensor, "k B d"] | None]:
        """Gradients at the uses, and the generic units' rows, if there are any."""
        batched = len(v) > 1 and self.batched
        return self.watched.backward(v, batched=batched, keep=not self._spent), self._generic(v)

    def _generic(self, v: Float[Tensor, "k B ..."]) -> Float[Tensor, "k B d"] | None:
        if not self.plan.generic:
            return None
        try:
            return self.plan.generic_rows(self.batch, v, self.z)
        except RuntimeError:  # a kernel that fails for so many, or a branch of the model; the loop takes both
            return replace(self.plan, vectorised=False).generic_rows(self.batch, v, self.z)


MOST = 32
"""Examples whose graphs are held at once: what each group costs beside its passes no longer counts."""


class OneByOne:
    """The model at one batch, as `Linearized`; to ``follow`` if it will be asked whether the passes are `followed`."""

    def __init__(self, plan: Plan, batch: Batch, *, follow: bool = False) -> None:
        watched = _by_example(plan, batch, follow)
        groups = [list(group) for _, group in itertools.groupby(range(batch.size), key=lambda n: _form(watched[n]))]
        self.parts = [_Group(plan, batch.take(slice(g[0], g[-1] + 1)), [watched[n] for n in g], follow) for g in groups]
        self.passes, self.z = watched, torch.cat([part.z for part in self.parts])

    @property
    def numbers_per_vector(self) -> int:
        """What a backward pass of one output vector an example must hold."""
        return sum(part.numbers_per_vector for part in self.parts)

    @property
    def newly_ruled(self) -> set[str]:
        """Parameters without a rule that this batch uses under one."""
        return set().union(*(part.newly_ruled for part in self.parts))

    @property
    def followed(self) -> bool:
        """Whether forward passes show whose all entries are, or would of two examples."""
        return all(part.followed for part in self.parts)

    def by_owner(self) -> None:
        """Look at which entries outputs depend on, whatever the forward passes show."""
        for part in self.parts:
            part.by_owner()

    @property
    def unruled(self) -> set[str]:
        """Parameters of units whose rule does not hold in this batch."""
        return set().union(*(part.unruled for part in self.parts))

    def replanned(self) -> Plan:
        """A plan that knows what the first example has shown that shows something."""
        return next(part for part in self.parts if part.newly_ruled or part.unruled).replanned()

    def rows(
        self, v: Float[Tensor, "k B ..."], selection: RowSelection, *, alone: bool = False,
        counting: Float[Tensor, "B ..."] | None = None, last: bool = False,
    ) -> Rows:  # fmt: skip
        """As of `Linearized`, by example and then by vector; ``alone`` and ``last`` are of no consequence here."""
        sizes = [part.batch.size for part in self.parts]
        keeps = [None] * len(sizes) if selection.keep is None else list(selection.keep.split(sizes))
        counts = [None] * len(sizes) if counting is None else list(counting.split(sizes))
        found = [
            part.rows(own, RowSelection(selection.vectors, size, selection.device, keep), counting=counted)
            for part, own, size, keep, counted in zip(self.parts, v.split(sizes, 1), sizes, keeps, counts, strict=True)
        ]
        if len(found) == 1:
            return found[0]
        whole = Rows.cat(found)
        exist = [[slot.exists for slot in slots] for slots in zip(*(part.slots for part in found), strict=True)]
        slots = [replace(slot, exists=_stacked(own)) for slot, own in zip(whole.slots, exist, strict=True)]
        return Rows(whole.space, slots)


def _stacked(parts: Sequence[Bool[Tensor, "b t"] | None]) -> Bool[Tensor, "B T"] | None:
    """Of examples with different numbers of positions, which those that have fewer lack."""
    known = [part for part in parts if part is not None]
    most = max((part.shape[1] for part in known), default=0)
    return torch.cat([F.pad(part, (0, most - part.shape[1])) for part in known]) if len(known) == len(parts) else None


class _Group(Linearized):
    """Neighbouring examples whose passes, one an example, use parameters in the same way."""

    def __init__(self, plan: Plan, batch: Batch, passes: Sequence[Watched], follow: bool) -> None:
        super().__init__(plan, batch, _together(passes))
        self.passes, self.follow = passes, follow

    def replanned(self) -> Plan:
        found = Linearized(self.plan, self.batch.take(slice(0, 1)), self.passes[0])
        found.unruled.update(self.unruled)
        return found.replanned()

    @property
    def followed(self) -> bool:
        """As of `Linearized`, of every example by itself."""
        ones = (Linearized(self.plan, self.batch.take(slice(n, n + 1)), one) for n, one in enumerate(self.passes))
        return all(one.followed for one in ones)

    def _arrangements(
        self, v: Float[Tensor, "k B ..."], gradients: Sequence[Tensor | None], known: Known | None,
        counting: Float[Tensor, "B ..."] | None, *, alone: bool,
    ) -> Sequence[Arrangement | None]:  # fmt: skip
        if self._arranged is None:
            size, uses = self.batch.size, self.watched.uses
            entries = [use.lead.numel() for use in uses]
            alive: list[Tensor | None] = [None] * len(uses)
            if self.watched.by_owner:
                found, _ = self._back(self._drawn(counting).unsqueeze(0))
                alive = [
                    torch.zeros(n, dtype=torch.bool, device=self.z.device)
                    if g is None
                    else g.reshape(n, -1).ne(0).any(1)
                    for g, n in zip(found, entries, strict=True)
                ]
            self._arranged = [Regular(size, n // size, one) for n, one in zip(entries, alive, strict=True)]
        return self._arranged

    def _reached(self, parameters: dict[str, Tensor]) -> set[str]:
        return set().union(*(set(parameters) - unreached(one.z, parameters) for one in self.passes))

    def _back(self, v: Float[Tensor, "k B ..."]) -> tuple[Sequence[Tensor | None], Float[Tensor, "k B d"]]:
        generic = [self.plan.parameters[name] for unit in self.plan.generic for name in unit.names]
        rows = v.new_empty(*v.shape[:2], sum(p.numel() for p in generic), dtype=self.plan.example_parameter.dtype)
        arrived: list[list[tuple[Tensor | None, ...]]] = []
        for k, n in itertools.product(range(len(v)), range(len(self.passes))):
            one = self.passes[n]
            if one.users:  # whose functions may read what this example's pass, the last one then, left on the model
                (one,) = _by_example(self.plan, self.batch.take(slice(n, n + 1)), self.follow)
            found = pulled_back(one.z, [*one.edges, *generic], v[k, n : n + 1])
            own = [dense_gradient(p, g).flatten() for p, g in zip(generic, found[len(one.uses) :], strict=True)]
            torch.cat(own, out=rows[k, n])
            arrived += [[]] if n == 0 else []
            arrived[k].append(found[: len(one.uses)])
        return [self._gathered(i, [[row[i] for row in rows] for rows in arrived]) for i in range(len(one.uses))], rows

    def _gathered(self, place: int, found: Sequence[Sequence[Tensor | None]]) -> Tensor | None:
        """A use's gradients ``[k, *output]``."""
        like = next((g for row in found for g in row if g is not None), None)
        if like is None:
            return None
        whole = [torch.cat([torch.zeros_like(like) if g is None else g for g in row]) for row in found]
        return whole[0].unsqueeze(0) if len(whole) == 1 else torch.stack(whole)


class _SeenOnce(Recorder):
    """A recorder of an example by itself, for a plan whose rules ask nothing of what has no parameter.

    Whose a position is, is no question then: functions that are given no parameter under a rule run as they are, until
    something is made of one that was not verified.
    """

    def __init__(self, names: Mapping[int, str], coarsest: torch.dtype) -> None:
        super().__init__(names, 1)
        self.coarsest, self._all = coarsest, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not (self._all or func in _LOOKED_AT or self._given(args) or (kwargs and self._given(kwargs.values()))):
            return func(*args, **kwargs) if kwargs else func(*args)
        seen = len(self.uses)
        output = super().__torch_function__(func, types, args, kwargs)
        if len(self.uses) == seen and any(made.requires_grad for made in tensors(output)):
            self._all = True
        return output

    def _given(self, arguments: Iterable[Any]) -> bool:
        """Whether one of the parameters is among the arguments of a function; called for every one, so no more."""
        names = self.names
        for one in arguments:
            if id(one) in names:
                return True
            if type(one) in _SEQUENCES:
                for part in one:
                    if id(part) in names:
                        return True
        return False


_SEQUENCES = (list, tuple)
_LOOKED_AT = {*DROPOUTS, F.scaled_dot_product_attention, F.multi_head_attention_forward}


def _by_example(plan: Plan, batch: Batch, follow: bool) -> list[Watched]:
    """A forward pass of each example; of all functions, if it is to be followed."""
    examples = [batch.take(slice(n, n + 1)) for n in range(batch.size)]
    asking = ElementwiseRule, ContractionRule
    if (
        follow
        or plan.shared
        or any(type(unit) is not RuledUnit or unit.form or isinstance(unit.rule, asking) for unit in plan.ruled)
    ):
        return [forward(plan, one) for one in examples]
    wanted = {name for unit in plan.units if isinstance(unit, RuledUnit) or unit.without_use for name in unit.names}
    names = {id(plan.parameters[name]): name for name in wanted}
    return [Watched.of(plan.model, _SeenOnce(names, plan.coarsest), one.fresh()) for one in examples]


def _form(watched: Watched) -> tuple[Any, ...]:
    """What two examples must agree in to be put together."""
    uses = ((use.rule, *use.sources, use.turned, use.output_shape, use.input.shape) for use in watched.uses)
    first = all(use.lead[:1] == use.input.shape[:1] != () and use.slices is None for use in watched.uses)
    return *uses, watched.outside_rules, watched.random, None if first else id(watched)


def _together(passes: Sequence[Watched]) -> Watched:
    """Passes of one form as one pass without a graph: entries of an example are neighbours."""
    if len(passes) == 1:
        return replace(passes[0], z=passes[0].z.detach())
    first, size = passes[0], len(passes)
    uses = [
        replace(
            same[0],
            arguments={**same[0].arguments, same[0].rule.input_name: torch.cat([use.input.detach() for use in same])},
            output_shape=(size * same[0].output_shape[0], *same[0].output_shape[1:]),
        )
        for same in zip(*(one.uses for one in passes), strict=True)
    ]
    z = torch.cat([one.z.detach() for one in passes])
    coarsest = functools.reduce(coarser, (one.coarsest for one in passes))
    return replace(first, batch=size, z=z, uses=uses, coarsest=coarsest, proven=True)
