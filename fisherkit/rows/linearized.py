"""One batch linearised: a forward pass whose graph answers, for any output vectors, with the rows of every unit.

Only gradients with respect to the layers' outputs are asked for; weight gradients of rule-covered units are never
formed. Whose each position is, is looked at in every batch; what the rules cannot say of this one goes the slow exact
way, and `newly_ruled` says so to whoever can start again with a better plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arithmetic import HALF, all_finite
from fisherkit.data import Batch
from fisherkit.errors import ModelError
from fisherkit.rows.base import RowSelection, StoredRows
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.rows.differentiable import scales
from fisherkit.rows.generic import looped_rows, unreached
from fisherkit.rows.ownership import Arrangement
from fisherkit.rows.plan import Plan, forward, propose, tolerance
from fisherkit.rows.rules import in_dtype
from fisherkit.rows.units import Pulled, RuledUnit, Unit
from fisherkit.rows.watched import Watched


@dataclass(frozen=True)
class Known:
    """Gradients of another backward pass, of which the wanted rows are multiples.

    Args:
        gradients: ``[k, *output]`` at each of the `Watched.edges`; None where nothing depends on an output.
        scale: by example, what turns them into those of the wanted vectors.
        multiplied: of the same pass, as `Watched.multiplied` makes them; None to make them from the graph.
    """

    gradients: Sequence[Tensor | None]
    scale: Float[Tensor, "B"]
    multiplied: Sequence[Sequence[Tensor | None]] | None = None


class Linearized:
    """The model at one batch.

    Args:
        plan: how rows are made.
        batch: the examples.
        watched: the forward pass.
        shown: whether its graph has shown that parameters are used as they were when the plan was verified.

    Attributes:
        z: the outputs, ``[B, ...]``.
        unruled: parameters of units whose rule does not hold in this batch.
        untold: whether some are only there because the graph was let go that would have told.
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
        own, gradients, generic, scale = self._pulled(v, known, last)
        arrangements = self._arrangements(own, gradients, known, counting, alone=alone)
        if known is None:
            self._unrule_silent(gradients)
        factor = scale if known is None else known.scale
        factor = None if factor is None else factor.to(dtype).reshape(-1, self.batch.size, 1, 1)
        pulled = Pulled(
            self.watched.uses, gradients, arrangements, own.to(dtype), selection, factor, self._activations
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
            self.plan.tried["silent"], self.untold = 1, True
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
            allowed = self._tolerance(expected.dtype) * expected.norm()
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
                call="the model's forward pass in train mode",
                got=f"active dropout beside parameters whose rule does not hold in this batch: {list(own)[:4]}",
                expected="either one of the two",
                why="their rows come from a pass of their own, which would draw anew",
                try_="params= without them, dropout of 0 in the model's configuration, or model.eval()",
            )
        with self.plan.quiet():
            self._refuse_coupled(list(own))
            return looped_rows(self.plan.model, own, self.batch, v)

    def _refuse_coupled(self, names: list[str]) -> None:
        """Raise unless each example alone has the outputs that it has in this batch."""
        allowed = self._tolerance(self.z.dtype)
        alone = [self.batch.take(slice(n, n + 1)).call(self.plan.model).detach() for n in range(self.batch.size)]
        pairs = [(one[0], z) for one, z in zip(alone, self.z.detach(), strict=True)]
        usual = self.z.detach().norm() / self.batch.size**0.5
        if all(a.shape == z.shape and bool((a - z).norm() <= allowed * z.norm().maximum(usual)) for a, z in pairs):
            return
        raise ModelError(
            call="the model's forward pass",
            got=f"outputs that change with the rest of the batch, through {names[:2]}",
            expected="examples that do not influence each other",
            why="per-example gradients do not exist otherwise",
            try_="model.eval(); batches of one example; remove what joins the examples of a batch from forward, as a "
            "capacity that experts share",
        )

    def _tolerance(self, dtype: torch.dtype) -> float:
        return tolerance(dtype, self.watched.coarsest)

    def _pulled(
        self, v: Float[Tensor, "k B ..."], known: Known | None, last: bool
    ) -> tuple[
        Float[Tensor, "k B ..."], Sequence[Tensor | None], Float[Tensor, "k B d"] | None, Float[Tensor, "k B"] | None
    ]:  # fmt: skip
        """The vectors that went back, gradients at the uses, rows without a rule, and what to multiply both by."""
        half = self.watched.coarsest in HALF or self.z.dtype in HALF
        # Of half precision and of units without a rule more may be asked; and once a layer was silent, whether it is.
        self._spent = last and not (half or self.plan.generic or "silent" in self.plan.tried) and self.watched.regular
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
        if "batched" not in self.plan.tried:
            self.plan.tried["batched"] = self._batched_agrees()
        return bool(self.plan.tried["batched"])

    def _batched_agrees(self) -> bool:
        """Tried with two, checked with one."""
        edges = self.watched.edges
        if not edges:
            return True
        last = torch.randn(self.z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(self.z)
        v = torch.stack([-0.5 * last, last])
        try:
            both = torch.autograd.grad(self.z, edges, v, retain_graph=True, allow_unused=True, is_grads_batched=True)
        except RuntimeError:  # an operation without a batching rule
            return False
        one = torch.autograd.grad(self.z, edges, last, retain_graph=True, allow_unused=True)
        allowed = self._tolerance(self.z.dtype)
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
