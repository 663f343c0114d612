"""A forward pass between its end and the end of its backward pass: what is kept of it, and its hooks on the graph."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fisherkit.data import Batch
from fisherkit.errors import ModelError
from fisherkit.optim.outputs import Seen
from fisherkit.randomness import RngState
from fisherkit.rows.base import StoredRows, UnitRows
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.rows.plan import Plan
from fisherkit.rows.rules import Use
from fisherkit.rows.units import RuledUnit
from fisherkit.rows.watched import Watched

SAME = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative difference of the same gradient computed twice; 1e-2 for half precision."""


@dataclass(frozen=True)
class Captured:
    """Rows of one forward and backward pass.

    ``coupled`` says that the examples of the batch were coupled, so that rows are not parts of the gradient; ``names``
    are the parameters that took part, whether or not the outputs depended on them.
    """

    plan: Plan
    chunks: list[Chunk]
    seen: Seen
    coupled: bool
    names: frozenset[str] = frozenset()

    @property
    def counted(self) -> int:
        """Examples that count."""
        return sum(chunk.counted for chunk in self.chunks)


def lifted(captured: Sequence[Captured]) -> list[Captured]:
    """Passes of one step over the parameters that any of them used: rows of zeros where one did not use some.

    Passes that lack parameters for another reason, as that they were frozen, are left as they are.
    """
    plans = [one.plan for one in captured]
    plan = max(plans, key=lambda plan: (plan.space.size, sum(len(u.names) for u in plan.ruled)), default=None)
    return [one if plan is None or one.plan is plan else _over(one, plan) for one in captured]


def _over(one: Captured, plan: Plan) -> Captured:
    # Those without a rule, which the other plan may have, as long as nothing used them.
    unused = {unit.names for unit in one.plan.units if unit.without_use}
    if any(s.names in unused and bool(s.rows.floating.any()) for chunk in one.chunks for s in chunk.rows.slots):
        return one
    own = {slot.names for slot in one.chunks[0].rows.slots} - unused
    new = {unit.names for unit in plan.units} - own
    idle, used = ({name for names in some for name in names} for some in (new, own))
    if not own <= {unit.names for unit in plan.units} or not idle <= one.names or idle & used or not new - unused:
        return one
    chunks = []
    for chunk in one.chunks:
        known = {slot.names: slot for slot in chunk.rows.slots}
        batch, like = len(chunk.counted_positions[0]), chunk.rows.slots[0].rows.floating
        for unit in plan.units:
            if unit.names in new:
                count = len(chunk.owner)
                rows: UnitRows = StoredRows(like.new_zeros(count, unit.numbers))
                if isinstance(unit, RuledUnit):
                    rows = unit.zeros(count, batch, chunk.owner, like)
                nothing = torch.zeros(batch, 1, dtype=torch.bool, device=like.device)
                known[unit.names] = UnitSlot(unit.names, rows, nothing)
        slots = [known[unit.names] for unit in plan.units]
        chunks.append(replace(chunk, rows=Rows(plan.space, slots)))
    return replace(one, plan=plan, chunks=chunks)


@dataclass(eq=False)
class Pass:
    """A forward pass that waits for its backward pass.

    Args:
        plan: how rows are made.
        batch: the arguments of the call; without examples if nothing asks for them again.
        watched: the pass, with its graph.
        coupled: modules that couple the examples of a batch.
        again: whether rows may need more passes of the model.
        rng: where the random generators were before the pass; None if it is not run again.
        names: as in `Captured`.
        gradient: of the user's loss at the outputs.
        found: the gradients at uses' outputs, by the edge's ``id``.
        multiplied: what they are where each example's vector is times numbers of its own; none where not needed.
        expected: what they should be if all of the loss goes through the outputs; None where that is not checked.
        chunks: rows that a backward pass of our own has brought.
        seen: what the gradient says of the targets.
    """

    plan: Plan
    batch: Batch
    watched: Watched
    coupled: list[str]
    again: bool
    rng: RngState | None
    names: frozenset[str] = frozenset()
    gradient: Tensor | None = None
    found: dict[int, Tensor] = field(default_factory=dict)
    multiplied: Sequence[Sequence[Tensor | None]] = ()
    expected: Sequence[Tensor | None] | None = None
    chunks: list[Chunk] | None = None
    seen: Seen | None = None

    def __post_init__(self) -> None:
        """Note what would show that the outputs are written to."""
        self._version = self.z._version

    @property
    def z(self) -> Tensor:
        """The outputs."""
        return self.watched.z

    @property
    def uses(self) -> Sequence[Use]:
        """Of the parameters on the way."""
        return self.watched.uses

    def listen(self, reached: Callable[[Pass | None, Tensor | None], None], silent: Callable[[], bool]) -> None:
        """Put hooks on the graph, which know the pass weakly because it holds the graph.

        ``reached`` is called with the pass and the gradient when a backward pass is at the outputs; while ``silent``
        is true, gradients at the uses' outputs are ignored.
        """
        known = weakref.ref(self)
        edge = torch.autograd.graph.get_gradient_edge(self.z)
        place = edge.output_nr
        edge.node.register_prehook(lambda gradients: reached(known(), gradients[place]))

        def received(edge: int, place: int, gradients: tuple[Tensor | None, ...]) -> None:
            one, gradient = known(), gradients[place]
            if one is not None and gradient is not None and not silent():
                one.found[edge] = gradient.detach() if gradient.requires_grad else gradient

        for use in self.uses:  # whose edges a hook must not hold: they hold the node
            use.edge.node.register_prehook(functools.partial(received, id(use.edge), use.edge.output_nr))
        self._hooks = RemovableHandle.next_id

    @property
    def bare(self) -> bool:
        """Whether a backward pass runs torch's own code alone; not where anyone has registered a hook since."""
        return self.watched.bare and not self.plan.generic and RemovableHandle.next_id == self._hooks

    def refuse_rewritten(self, call: str) -> None:
        """Refuse outputs that were changed in place."""
        if self.z._version != self._version:
            raise ModelError(
                f"{call}, backward pass", "outputs that were changed in place after the forward pass",
                "outputs as the model returned them", why="the likelihood is read at their values",
                try_="logits / temperature instead of logits.div_(temperature), or the change inside forward",
            )  # fmt: skip

    def through_outputs(self) -> bool | None:
        """Whether all of the loss went through the outputs; None if infinite gradients, as of a scaler, do not tell."""
        differences, sizes = [], []
        for use, own in zip(self.uses, self.expected or (), strict=True):
            got = self.found.get(id(use.edge))
            parts = [g.detach().double() for g in (got, own) if g is not None]
            if parts:
                differences.append((parts[0] - parts[1]).norm() if len(parts) == 2 else parts[0].norm())
                sizes.append(SAME.get(parts[0].dtype if got is None else got.dtype, 1e-2) * parts[0].norm())
        if not differences:
            return True
        errors, allowed = torch.stack(differences), torch.stack(sizes)
        return bool((errors <= allowed).all()) if bool(torch.isfinite(errors).all()) else None


def with_own_inputs(uses: Sequence[Use], arguments: Sequence[Tensor]) -> list[Use]:
    """The uses with copies of inputs that lie in the caller's memory, which may be refilled before the step."""
    theirs = {tensor.untyped_storage().data_ptr() for tensor in arguments}

    def own(use: Use) -> Use:
        x: Any = use.arguments[use.rule.input_name]
        try:
            if not isinstance(x, Tensor) or x.untyped_storage().data_ptr() not in theirs:
                return use
        except NotImplementedError:  # inside of torch.func, where no rule holds
            return use
        copied = (x.detach() if x.requires_grad else x).clone()
        return replace(use, arguments={**use.arguments, use.rule.input_name: copied})

    return [own(use) for use in uses]
