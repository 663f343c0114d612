"""A batch linearised example by example: the loop, for models that nothing vectorises or that it would slow down.

One forward pass an example, whose graph has the layers' outputs and the parameters without a rule alike, so that rows
take what a loop written by hand takes. Layers' inputs and gradients are put together before anything is made of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fisherkit.data import Batch
from fisherkit.rows.base import RowSelection
from fisherkit.rows.batch_axis import tensors
from fisherkit.rows.collection import Rows
from fisherkit.rows.contractions import ContractionRule
from fisherkit.rows.differentiable import pulled_back
from fisherkit.rows.generic import dense_gradient, unreached
from fisherkit.rows.linearized import Known, Linearized
from fisherkit.rows.ownership import Arrangement, Regular, coarser
from fisherkit.rows.plan import Plan, forward
from fisherkit.rows.record import DROPOUTS, Recorder
from fisherkit.rows.rules import ElementwiseRule
from fisherkit.rows.units import RuledUnit
from fisherkit.rows.watched import Watched

MOST = 32
"""Examples whose graphs are held at once: what each group costs beside its passes no longer counts."""


class OneByOne:
    """The model at one batch, as `Linearized`.

    Args:
        plan: how rows are made.
        batch: the examples.
        follow: whether it will be asked whether the passes are `followed`.
    """

    def __init__(self, plan: Plan, batch: Batch, *, follow: bool = False) -> None:
        watched = _by_example(plan, batch, follow)
        groups = [list(group) for _, group in itertools.groupby(range(batch.size), key=lambda n: _form(watched[n]))]
        self.parts = [
            _Alike(plan, batch.take(slice(g[0], g[-1] + 1)), [watched[n] for n in g]) for g in groups
        ]  # fmt: skip
        self.z = torch.cat([part.z for part in self.parts])

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


class _Alike(Linearized):
    """Neighbouring examples whose passes, one an example, use parameters in the same way."""

    def __init__(self, plan: Plan, batch: Batch, passes: Sequence[Watched]) -> None:
        super().__init__(plan, batch, _together(passes))
        self.passes = passes

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

    Args:
        names: ``id`` of each parameter that is looked for to its name.
        coarsest: as the plan knows it.
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
