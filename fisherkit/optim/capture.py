"""Rows from ordinary training steps: what a forward pass saw, joined with what the user's own backward pass brings.

Owns the hooks on a model and the life of a forward pass between its end and the end of its backward pass. Knows no
structure, damping or update. A forward pass is watched by a recorder; hooks on its graph receive the gradients at the
layers' outputs when the user's loss is differentiated. Kinds whose vectors are multiples of the loss gradient need
nothing more; for others, a backward pass of their own runs at the moment the user's reaches the model's outputs.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Variable
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fisherkit.data import Batch, outputs_of
from fisherkit.errors import ModelError
from fisherkit.likelihoods import Likelihood
from fisherkit.optim.outputs import Seen, seen_outputs
from fisherkit.outputs import OutputRule
from fisherkit.randomness import RngState, rng_state, untouched_rng
from fisherkit.rows.base import TILE
from fisherkit.rows.chunks import Chunk, Slots
from fisherkit.rows.collection import Rows
from fisherkit.rows.linearized import Known, Linearized
from fisherkit.rows.plan import Plan, differentiable
from fisherkit.rows.record import Recorder
from fisherkit.rows.rules import Use
from fisherkit.rows.selection import RowSelection
from fisherkit.rows.verified import plan_for
from fisherkit.space import ParameterSpace, Selection

OPEN = 8
"""Forward passes that may wait for their backward pass at once; each holds its graph."""


@dataclass(frozen=True)
class Captured:
    """Rows of one forward and backward pass.

    Args:
        plan: how they were made.
        chunks: the rows.
        seen: outputs, targets and loss gradients.
    """

    plan: Plan
    chunks: list[Chunk]
    seen: Seen

    @property
    def counted(self) -> int:
        """Examples that count."""
        return sum(chunk.counted for chunk in self.chunks)


@dataclass(eq=False)
class _Pass:
    """A forward pass that waits for its backward pass.

    Args:
        plan: how rows are made.
        batch: the arguments of the call; without examples if nothing asks for them again.
        z: the outputs, with their graph.
        uses: of the parameters on the way.
        random: whether dropout was active.
        coupled: modules that couple the examples of a batch.
        rng: where the random generators were before the pass; None if it is not run again.
    """

    plan: Plan
    batch: Batch
    z: Tensor
    uses: list[Use]
    random: bool
    coupled: list[str]
    rng: RngState | None
    gradient: Tensor | None = None
    found: dict[int, Tensor] = field(default_factory=dict)
    chunks: list[Chunk] | None = None
    seen: Seen | None = None
    own: bool = False

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """While a backward pass of our own runs, our hooks take no notice."""
        self.own = True
        try:
            yield
        finally:
            self.own = False


class _Hook:
    """A hook on the model that keeps neither its owner alive nor copies of the model watched."""

    def __init__(self, owner: Capture | None, before: bool) -> None:
        self._owner, self._before = (None if owner is None else weakref.ref(owner)), before

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is None or owner.model is not module:
            return
        if self._before:
            owner._begin(args, kwargs)
        else:
            owner._end(args, kwargs, output[0] if output else None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self._before)  # a copy or a file of the model has hooks that do nothing


class Capture:
    """Watches a model's training steps.

    Args:
        model: the model; its own calls are watched, not those of its parts.
        params: which parameters; those that do not require a gradient at a step are left out of it.
        rule: the kind.
        likelihood: p(y | z).
        reduction: of the user's loss, "mean" or "sum", for likelihoods whose targets do not show in the gradient.
        written_out: whether rows may be written out where that is faster; Kronecker factors need them factored.
        call: the user's class, for errors.

    Attributes:
        space: the parameters that may take part.
        wanted: whether steps are to be watched at all.
        finished: what has been captured since `take`.
        examples: how many there were so far, for random draws.
    """

    def __init__(
        self, model: nn.Module, params: Selection, rule: OutputRule, likelihood: Likelihood, reduction: str,
        *, written_out: bool, call: str,
    ) -> None:  # fmt: skip
        self.model, self.rule, self.likelihood, self.reduction, self.call = model, rule, likelihood, reduction, call
        self._written_out = written_out
        self.space = ParameterSpace.of(model, (lambda _name, _parameter: True) if params is None else params)
        self.wanted = True
        self.finished: list[Captured] = []
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._open: list[_Pass] = []
        self._recorder: tuple[Recorder, Plan, Batch, RngState | None] | None = None
        self._depth = self._frame = self.examples = 0
        self._paused = self._warned = False
        handles = [
            model.register_forward_pre_hook(_Hook(self, True), with_kwargs=True),
            model.register_forward_hook(_Hook(self, False), with_kwargs=True, always_call=True),
        ]
        self.close = weakref.finalize(self, _remove, handles)

    def take(self) -> list[Captured]:
        """What has been captured since the last time; unfinished passes are forgotten."""
        finished, self.finished = self.finished, []
        self._open.clear()
        return finished

    def forget(self) -> None:
        """Drop what has been captured, as when the gradients are set to zero."""
        self.finished.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes in here are not watched."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    # -- the forward pass ----------------------------------------------------------------------------------------------

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._depth > 0 and not _running(self._frame):
            self._abandon()
        self._depth += 1
        if self._depth == 1:
            self._frame = id(sys._getframe(2))
        if self._depth > 1 or self._paused or not self.wanted or not torch.is_grad_enabled():
            return
        names = tuple(n for n, p in self.model.named_parameters() if n in self.space.slices and p.requires_grad)
        if not names:
            return
        batch = Batch.of_call(args, kwargs)
        plan = self._plan(names, batch)
        coupled = self._coupled()
        recorder = Recorder({id(p): n for n, p in plan.parameters.items()}, batch.size, plan.shared, training=True)
        self._recorder = recorder, plan, batch, rng_state() if coupled else None
        recorder.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._depth -= 1
        if self._depth > 0 or self._recorder is None:
            return
        recorder, plan, batch, rng = self._recorder
        self._recorder = None
        recorder.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is None:  # the forward pass raised
            return
        z = outputs_of(output)
        if not z.requires_grad:
            return
        coupled = self._coupled()
        if plan.generic and (recorder.random or coupled):
            raise self._unfit(plan, coupled)
        keep = batch if plan.generic or coupled else Batch((), _masks(batch), None, batch.size)
        one = _Pass(plan, keep, z, recorder.uses, recorder.random, coupled, rng)
        if coupled:
            self._warn(coupled)
        self._open = [*self._open, one][-OPEN:]
        self._watch(one)

    def _abandon(self) -> None:
        """A forward pass was interrupted so that its end was never announced."""
        if self._recorder is not None:
            self._recorder[0].__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._recorder, self._depth = None, 0

    def _plan(self, names: tuple[str, ...], batch: Batch) -> Plan:
        """The plan for the parameters that require a gradient now, verified once, in eval mode."""
        if names not in self._plans:
            training = [module for module in self.model.modules() if module.training]
            device = next(self.model.parameters()).device.type
            self._paused = True
            try:
                self.model.eval()
                with torch.autocast(device, enabled=False):
                    space = ParameterSpace.of(self.model, names)
                    plan = plan_for(self.model, space, batch.to(next(self.model.parameters()).device))
            finally:
                self._paused = False
                for module in training:
                    module.training = True
            plan.probed = torch.empty(0)
            self._plans[names] = plan
        return self._plans[names]

    def _coupled(self) -> list[str]:
        """Modules that use statistics of the batch."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
        ]

    def _warn(self, coupled: list[str]) -> None:
        if not self._warned:
            self._warned = True
            shown = ", ".join(map(repr, coupled[:3])) + (", ..." if len(coupled) > 3 else "")
            warnings.warn(
                f"{self.call}: {shown} in train mode: the batch's statistics are taken as constants for the Fisher's "
                "rows, which costs one more forward and backward pass a step. The gradient is unchanged.",
                UserWarning,
                stacklevel=2,
            )

    def _unfit(self, plan: Plan, coupled: list[str]) -> ModelError:
        names = [name for unit in plan.generic for name in unit.names]
        return ModelError(
            call=f"{self.call}, forward pass in train mode",
            got=f"{coupled[0] if coupled else 'active dropout'!r} beside parameters without a layer rule: {names[:4]}",
            expected="either one of the two",
            why="rows of such parameters come from a pass of their own, which would draw or average anew",
            try_="params= without them, or model.eval()",
        )

    # -- the backward pass ---------------------------------------------------------------------------------------------

    def _watch(self, one: _Pass) -> None:
        """Hooks on the graph, which know the pass weakly: it holds the graph."""
        known, owner = weakref.ref(one), weakref.ref(self)

        def at_outputs(gradients: tuple[Tensor | None, ...]) -> None:
            watched, capture = known(), owner()
            if capture is not None:
                capture._reached(watched, gradients)

        edge = torch.autograd.graph.get_gradient_edge(one.z)
        place = edge.output_nr
        edge.node.register_prehook(lambda gradients: at_outputs((gradients[place],)))
        if one.coupled or not self.rule.along_gradient:
            return
        for use in one.uses:
            use.edge.node.register_prehook(_Receiver(known, id(use.edge), use.edge.output_nr))

    def _reached(self, one: _Pass | None, gradients: tuple[Tensor | None, ...]) -> None:
        """The user's backward pass is at the model's outputs."""
        if one is not None and one.own:
            return
        (gradient,) = gradients
        if gradient is None or self._paused:
            return
        if one is None or one.gradient is not None:
            raise ModelError(
                call=f"{self.call}, backward pass",
                got="a backward pass through a forward pass that was used, or that is no longer known",
                expected="one backward pass for each forward pass, at most 8 of them waiting",
                why="a second one would add the same examples to the Fisher again",
                try_="one loss for each forward pass, or `with optimizer.paused():` around other uses of the model",
            )
        if all(p.grad is None for p in one.plan.parameters.values()):
            self.finished.clear()  # the gradients were set to None since, so those batches are not in them
        one.gradient = gradient.detach()
        if not one.coupled and not self.rule.along_gradient:
            one.chunks = self._own_rows(one, Linearized(one.plan, one.batch, one.z, one.uses))
        Variable._execution_engine.queue_callback(lambda: self._finish(one))

    def _finish(self, one: _Pass) -> None:
        """The user's backward pass is over."""
        if one not in self._open:
            return
        if one.coupled:
            one.chunks = self._again(one)
        elif one.chunks is None:
            one.chunks = self._users_rows(one)
        if one.seen is not None:
            self.finished.append(Captured(one.plan, one.chunks, one.seen))
        self._open.remove(one)

    def _see(self, one: _Pass, z: Tensor) -> Seen:
        if one.seen is None:
            gradient = torch.zeros_like(z) if one.gradient is None else one.gradient
            one.seen = seen_outputs(z, gradient, self.likelihood, self.reduction, self.examples, self.call)
            self.examples += z.shape[0]
        return one.seen

    def _users_rows(self, one: _Pass) -> list[Chunk]:
        """Rows of vectors that are multiples of the loss gradient: the user's backward pass, scaled by example."""
        linearized = Linearized(one.plan, one.batch, one.z.detach(), one.uses)
        seen = self._see(one, one.z)
        slots = Slots.of(seen.outputs, self.rule, False)
        self._choose(one.plan, slots)
        found = [one.found.get(id(edge)) for edge in linearized.edges]
        gradients = [None if g is None else g.unsqueeze(0) for g in found]

        def rows(v: Float[Tensor, "k B P C"], selection: RowSelection) -> Rows:
            return linearized.rows(v.reshape(1, *one.z.shape), selection, Known(gradients, seen.scale_of(v[0])))

        return list(slots.chunks(one.batch, 1, rows))

    def _own_rows(self, one: _Pass, linearized: Linearized) -> list[Chunk]:
        """Rows by a backward pass of our own."""
        slots = Slots.of(self._see(one, linearized.z).outputs, self.rule, False)
        self._choose(one.plan, slots)

        def rows(v: Float[Tensor, "k B P C"], selection: RowSelection) -> Rows:
            with one.deaf():
                return linearized.rows(v.reshape(v.shape[0], *linearized.z.shape), selection)

        return list(slots.chunks(one.batch, max(1, TILE // linearized.numbers_per_vector), rows))

    def _choose(self, plan: Plan, slots: Slots) -> None:
        if self._written_out:
            for unit in plan.ruled:
                unit.choose(slots.number, lean=False)

    def _again(self, one: _Pass) -> list[Chunk]:
        """Rows by one more forward pass, with the same random numbers, in which statistics are constants."""
        plan = one.plan
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        recorder = Recorder(
            {id(p): n for n, p in plan.parameters.items()},
            one.batch.size, plan.shared, training=True, constant_statistics=True,
        )  # fmt: skip
        devices = [plan.example_parameter.device]
        with self.paused(), untouched_rng(devices, one.rng), differentiable(list(plan.parameters.values())):
            with recorder:
                z = one.batch.call(lambda *args, **kwargs: functional_call(self.model, buffers, args, kwargs))
            return self._own_rows(one, Linearized(plan, one.batch, z, recorder.uses))


class _Receiver:
    """Keeps the gradient at one use's output."""

    def __init__(self, known: weakref.ref[_Pass], edge: int, place: int) -> None:
        self.known, self.edge, self.place = known, edge, place

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        one = self.known()
        if one is None or one.own:
            return
        gradient = gradients[self.place]
        if gradient is not None:
            one.found[self.edge] = gradient.detach()


def _running(frame: int) -> bool:
    """Whether a frame is among the callers."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None:
        if id(caller) == frame:
            return True
        caller = caller.f_back
    return False


def _masks(batch: Batch) -> dict[str, Any]:
    """The padding mask, all that is needed of a batch once it went through the model."""
    mask = batch.kwargs.get("attention_mask")
    return {} if mask is None else {"attention_mask": mask}


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
