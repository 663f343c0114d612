"""Rows from ordinary training steps: what a forward pass saw, joined with what the user's own backward pass brings.

Kinds whose vectors are multiples of the loss gradient need nothing but the user's backward pass; for others, one of
their own runs at the moment the user's reaches the model's outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from fisherkit.arithmetic import all_finite, without_autocast
from fisherkit.data import Batch, model_device, outputs_of
from fisherkit.errors import ModelError, listed, warn
from fisherkit.optim.outputs import Seen, explained, seen_outputs
from fisherkit.optim.passes import Captured, Pass, with_own_inputs
from fisherkit.optim.settings import StepSettings
from fisherkit.optim.watch import Watch
from fisherkit.processes import Processes
from fisherkit.randomness import RngState, device_generators, rng_state, untouched_rng
from fisherkit.rows.base import TILE, RowSelection
from fisherkit.rows.batch_checks import BatchChecks
from fisherkit.rows.chunks import Chunk, Slots
from fisherkit.rows.collection import Rows
from fisherkit.rows.differentiable import differentiable
from fisherkit.rows.linearized import Known, Linearized
from fisherkit.rows.plan import Plan, forward, influenced
from fisherkit.rows.record import Recorder, WithoutChance
from fisherkit.rows.verified import explained_errors, fingerprint, plan_of_call
from fisherkit.rows.watched import Watched, refuse_reentrant
from fisherkit.space import ParameterSpace, Selection
from fisherkit.wrappers import full

OPEN = 8
"""Forward passes that may wait for their backward pass at once; each holds its graph."""


class Capture:
    """Watches a model's own training steps, not those of its parts.

    Args:
        model: the model.
        params: which parameters; those that do not require a gradient at a step are left out of it.
        settings: whose kind, likelihood and reduction count here.

    Attributes:
        owner: the user's model, which has the gradients.
        offset: where numbers of examples begin, by which random labels are drawn.
    """

    def __init__(self, model: nn.Module, params: Selection, settings: StepSettings) -> None:
        self.model = self.owner = model
        self.settings, self.rule, self.call = settings, settings.captured, settings.call
        # Rows are written out where that is faster; Kronecker factors need them factored.
        self._written_out = settings.structure.keeps_rows
        self.space = ParameterSpace.of(model, params)
        self.wanted = True
        self.finished: list[Captured] = []
        self.first: Tensor | None = None  # the largest output of the first pass
        self.examples = self.offset = self._passes = 0
        self._checks, self._self = BatchChecks(), weakref.ref(self)
        self._plans: dict[Hashable, Plan] = {}
        self._chosen: set[Plan] = set()
        self._used: set[str] = set()
        self._seen: set[Plan] = set()
        self._through: dict[Plan, bool] = {}
        self._open: list[object] = []
        self._begun: tuple[Recorder, Plan, Batch, list[str], RngState | None] | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._gradients: dict[str, tuple[int, int]] = {}
        self._warned: set[str] = set()
        self._watch = Watch(model, self.begin, self.end)

    def __getstate__(self) -> NoReturn:
        """Refuse to be copied or pickled."""
        raise ModelError(
            f"a copy or pickle of {self.call}", "hooks on one model", "its state_dict()",
            try_=f"a new {self.call} for the copied model, and load_state_dict",
        )  # fmt: skip

    def parameters(self) -> dict[str, nn.Parameter]:
        """The user's model's, of those that may take part."""
        return self._own(dict(self.owner.named_parameters()))

    def _own(self, known: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        slices = self.space.slices
        return {n: p for n, p in known.items() if n in slices}

    def catch_up(self, processes: Processes) -> None:
        """Before a step, capture what is not yet; every process must come here."""

    def take(self) -> list[Captured]:
        """What has been captured since the last time; unfinished passes are forgotten."""
        self._watch.tidy()
        finished, self.finished = self.finished, []
        self._open.clear()
        return finished

    def say_if_forgotten(self) -> None:
        """Warn once of a step without gradients after a forward pass that could have brought some."""
        if self._open:
            self.warn(
                "step() without a gradient, after a forward pass of the model: nothing was changed. "
                "Try: loss.backward() before step()."
            )

    def forget(self) -> None:
        """Drop what has been captured, as when the gradients are set to zero."""
        self._watch.tidy()
        self.finished.clear()

    def paused(self) -> AbstractContextManager[None]:
        """Forward passes in here are not watched."""
        return self._watch.paused()

    def close(self) -> None:
        """Take the hooks off the model."""
        self._watch.close()
        self.finished.clear()
        self._open.clear()

    @property
    def closed(self) -> bool:
        """Whether the hooks are off."""
        return not self._watch.close.alive

    # -- the forward pass ----------------------------------------------------------------------------------------------

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorder | None:
        """A call of the model begins."""
        if not self.wanted:
            return None
        known = dict(self.model.named_parameters())
        self._parameters = self._own(known)
        own = {id(p): n for n, p in self._parameters.items() if p.requires_grad}
        if not own:
            return None
        batch = Batch.of_call(args, kwargs)
        plan, coupled = self._plan(tuple(own.values()), batch, known), self._training(_BatchNorm)
        recorder = Recorder(own, batch.size, batch.batched, plan.shared, training=True, traces=plan.traces)
        rng = rng_state(device_generators(plan.example_parameter.device)) if coupled else None
        self._begun = recorder, plan, batch, coupled, rng
        return recorder

    def end(self, output: Any) -> None:
        """It has ended; None if it raised."""
        begun, self._begun = self._begun, None
        if begun is None or output is None:
            return
        recorder, plan, batch, coupled, rng = begun
        z = outputs_of(output)
        if not z.requires_grad:
            return
        watched = Watched.seen(recorder, z)
        if self._new(watched, plan):
            plan = self._plan(tuple(n for n in self.space.names if n in set(recorder.names.values())), batch, anew=True)
            watched = replace(watched)  # of which nothing has been decided by this plan
        hidden = watched.once("hidden", lambda: [unit.names[0] for unit in plan.ruled if not unit.of(watched.uses)])
        cut = [name for name in hidden if name in recorder.without_graph]
        if cut or plan not in self._seen:
            self._seen.add(plan)
            nodes = [use.edge.node for use in watched.uses]
            refuse_reentrant(z, nodes, cut or hidden, f"{self.call}, forward pass", cut=bool(cut))
        with explained_errors(self.model, plan.space, batch):
            self._refuse_influence(plan, batch, watched, coupled)
        self._refuse_nonlinear(plan, watched, coupled)
        if plan.generic:
            self._refuse_unfit(plan, coupled, random=recorder.random)
        again = bool(plan.generic or coupled or not watched.regular or plan.unruled(watched))
        masks = {name: x for name, x in batch.kwargs.items() if name == "attention_mask"}
        keep = batch if again else Batch((), masks, None, batch.size)  # all that is asked of it later
        watched = replace(watched, by_owner=True) if self._by_owner(plan, batch, watched) else watched
        own = [use for use in watched.uses if any(name in plan.space.slices for name in use.names)]
        uses = with_own_inputs(own, batch.batched)
        watched = watched.replaced(uses=uses) if len(own) == len(watched.uses) else replace(watched, uses=uses)
        one = Pass(plan, keep, watched, coupled, again, rng, frozenset(recorder.names.values()))
        if coupled:
            self.warn(
                f"{listed(map(repr, coupled), 3)} in train mode: the batch's statistics are taken as constants for "
                "the Fisher's rows, which costs one more forward and backward pass a step. The gradient is unchanged."
            )
        self._open = [*self._open, one][-OPEN:]
        watch, owner = self._watch, weakref.ref(self)

        def reached(known: Pass | None, gradient: Tensor | None) -> None:
            capture = owner()
            if capture is not None:
                capture._reached(known, gradient)

        one.listen(reached, lambda: watch.silent)

    def _new(self, watched: Watched, plan: Plan) -> bool:
        """Whether a pass has used parameters that the plan has no rows or no rule for, as another expert."""
        idle = {name for unit in plan.generic if unit.without_use for name in unit.names}
        new = {name for name in _used(watched) if name not in plan.space.slices or name in idle} - self._used
        self._used |= new
        return bool(new)

    def _plan(
        self, names: tuple[str, ...], batch: Batch, known: Mapping[str, nn.Parameter] | None = None, *,
        anew: bool = False,
    ) -> Plan:  # fmt: skip
        """The plan for parameters that require a gradient now, verified in eval mode once, or ``anew``."""
        key = names, fingerprint(self.model, known)
        # What was verified on an example alone says nothing of two.
        if anew or key not in self._plans or (self._plans[key].alone and batch.size > 1):
            device, _ = model_device(self.model, names)
            with self._in_eval():
                plan = self._verified(names, batch.to(device))
            plan.probe.watched = None  # a graph that nothing asks any more
            self._plans[key] = _with_rules(plan, self._plans[key]) if anew and key in self._plans else plan
        return self._plans[key]

    @contextmanager
    def _in_eval(self) -> Iterator[None]:
        """Passes of our own, in which nothing is drawn."""
        training = [module for module in self.model.modules() if module.training]
        try:
            for module in training:
                module.training = False
            with self._watch.quiet(), without_autocast():
                yield
        finally:
            for module in training:
                module.training = True

    def _refuse_influence(self, plan: Plan, batch: Batch, seen: Watched, coupled: list[str]) -> None:
        """Refuse a batch whose examples have other outputs or gradients than in other company, as builds do.

        Passes of our own are in the model's own mode, `WithoutChance` where that one draws numbers or couples examples;
        in eval mode where it draws numbers of a kind that nothing sees.

        Raises:
            ModelError: they have.

        Cost: as of `BatchChecks`, and a forward pass of the batch where the user's does not serve.
        """
        chance = seen.random or seen.drawn
        known = seen.replaced(drawn=False, numbers=batch.size) if seen.drawn else seen
        bare = seen.decided_before if seen.bare else {}  # of the same pass, once compared, nothing is asked again
        if bare.get("compared") == self._self or not self._checks.is_due(plan, batch.size, known):
            bare["compared"] = self._self
            return
        batch = batch.to(device := plan.example_parameter.device)
        alike = not (chance or coupled or torch.is_autocast_enabled(device.type))
        with self._watch.quiet(), without_autocast(), nullcontext() if alike else WithoutChance(device):
            try:
                with plan.quiet():
                    known = known if alike else known.replaced(z=batch.call(self.model))
                self._compare(plan, batch, known)
                return
            except ModelError:
                with plan.quiet() as draws:
                    again = batch.call(self.model).detach()
                if not self.model.training or (torch.equal(again, known.z.detach()) and not draws.happened):
                    raise  # else it draws numbers that were not seen
        with self._in_eval():
            with plan.quiet():
                known = known.replaced(z=forward(plan, batch).z)
            self._compare(plan, batch, known)

    def _refuse_nonlinear(self, plan: Plan, seen: Watched, coupled: list[str]) -> None:
        """Refuse rows that a backward pass which is not linear would not have."""
        if not (plan.nonlinear or plan.may_be_nonlinear(seen)):
            return
        # Rows along the gradient are multiples of the user's, but for those without a rule.
        ruled = {name for unit in plan.ruled for name in unit.names}
        multiples = self.rule.along_gradient and not coupled
        advice = "gradients that are changed between backward() and step(), as by clip_grad_norm_, with damping="
        with self._watch.quiet():
            plan.refuse_nonlinear_here(seen, f"{self.call}, forward pass", ruled if multiples else None, advice)

    def _by_owner(self, plan: Plan, batch: Batch, seen: Watched) -> bool:
        """Whether Kronecker factors count the positions of one example that outputs depend on, as those of several."""
        if batch.size > 1 or self._written_out or seen.followed or plan.alone:
            return False
        with self._in_eval():
            return not Linearized(plan, batch.to(plan.example_parameter.device), seen).followed

    def _compare(self, plan: Plan, batch: Batch, seen: Watched) -> None:
        probe = copy(plan.probe)
        probe.alike = False  # its outputs are those of weights before a step
        plan = replace(plan, probed=probe)
        call = f"{self.call}, forward pass"
        self._checks.refuse_influence(plan, batch, None, seen, call)
        if not self._checks.has_own_gradients(plan, batch, None, seen):
            raise influenced(call, "gradients")

    def _verified(self, names: tuple[str, ...], batch: Batch) -> Plan:
        """A plan for the parameters that the outputs depend on, with what the whole batch shows beside two examples."""
        plan = plan_of_call(self.model, ParameterSpace.of(self.model, names), batch)
        if plan.unused or any(unit.without_use for unit in plan.generic):
            with plan.quiet():
                linearized = Linearized(plan, batch, forward(plan, batch))
                self._used |= _used(linearized.watched)
                plan = linearized.replanned() if linearized.newly_ruled else plan
        # As in torch, a parameter that the loss does not depend on is left alone.
        used = [name for name in names if name not in plan.unused or name in self._used]
        if len(used) == len(names):
            return plan
        return self._verified(tuple(used), batch)

    def _training(self, kind: type[_NormBase]) -> list[str]:
        """Norms of a kind that are in train mode: batch norms couple examples, and others' running statistics move."""
        own = ((name, m) for name, m in self.model.named_modules() if m.training and isinstance(m, kind))
        return [name for name, m in own if kind is _BatchNorm or m.track_running_stats]

    def warn(self, text: str) -> None:
        """Say something once."""
        if text not in self._warned:
            self._warned.add(text)
            warn(f"{self.call}: {text}")

    def _refuse_unfit(self, plan: Plan, coupled: list[str], *, random: bool) -> None:
        averaging = [*coupled, *self._training(_InstanceNorm)]
        if not random and not averaging:
            return
        names = [name for unit in plan.generic for name in unit.names]
        raise ModelError(
            f"{self.call}, forward pass in train mode",
            f"{[*averaging, 'active dropout'][0]!r} beside parameters without a layer rule: {names[:4]}",
            "either one of the two",
            why="rows of such parameters come from a pass of their own, which would draw or average anew",
            try_="params= without them, dropout of 0 in the model's configuration, or model.eval()",
        )  # fmt: skip

    # -- the backward pass ---------------------------------------------------------------------------------------------

    @without_autocast()
    def _reached(self, one: Pass | None, gradient: Tensor | None) -> None:
        """The user's backward pass is at the model's outputs."""
        if self.closed or gradient is None or self._watch.silent:
            return
        if not runs(get_gradient_edge(p).node for p in self._parameters.values() if p.requires_grad):
            return  # what torch.autograd.grad finds leads to no step
        if one is None or one.gradient is not None:
            raise used_again(self.call)
        one.refuse_rewritten(self.call)
        if self.finished and zeroed(self._parameters, self._gradients):
            self.finished.clear()
        one.gradient = gradient.detach() if gradient.requires_grad else gradient
        if not one.coupled and self.rule.along_gradient and not one.watched.regular:
            with self._watch.quiet():
                one.multiplied = one.watched.multiplied(one.gradient)
            if not all_finite(one.gradient, *(g for found in one.multiplied for g in found if g is not None)):
                self._open.remove(one)  # nothing tells whose positions are; the step is refused, or a scaler's to skip
                return
        if not one.coupled and not self.rule.along_gradient:
            one.chunks = self._own_rows(one, Linearized(one.plan, one.batch, one.watched))
        elif not one.coupled:
            self._passes += 1
            if is_checked(self._passes) or not self._through.get(one.plan, False):  # for ways around the outputs
                edges, options = one.watched.edges, {"retain_graph": True, "allow_unused": True}
                with self._watch.quiet():
                    one.expected = torch.autograd.grad(one.z, edges, one.gradient, **options) if edges else ()
        Variable._execution_engine.queue_callback(lambda: self._finish(one))

    @without_autocast()
    def _finish(self, one: Pass) -> None:
        """The user's backward pass is over."""
        if one not in self._open:
            return
        self._open.remove(one)
        if one.coupled:
            one.chunks = self._by_another_pass(one)
        elif one.chunks is None:
            self._judge(one)
            one.chunks = self._users_rows(one)
        if one.seen is not None:
            self.finished.append(Captured(one.plan, one.chunks, one.seen, bool(one.coupled), one.names))
        self._gradients = versions(self._parameters)

    def _judge(self, one: Pass) -> None:
        """Gradients at layers that come by other ways than the outputs, as of auxiliary losses, are no rows' parts."""
        if one.expected is None:
            return
        if self._through.get(one.plan, True):
            through = one.through_outputs()
            if through is not None:
                self._through[one.plan] = through
            if through is False:
                self.warn(
                    "the loss reaches layers in other ways than through the model's outputs (an auxiliary loss): rows "
                    "are those of the outputs, which costs one more backward pass a step. The gradient is unchanged."
                )
        if not self._through.get(one.plan, True):  # what came through the outputs takes the place of what arrived
            pairs = zip(one.uses, one.expected, strict=True)
            one.found = {id(use.edge): gradient for use, gradient in pairs if gradient is not None}
        one.expected = None

    def _slots(self, one: Pass, z: Tensor) -> tuple[Seen, Slots]:
        """What the gradient at a pass's outputs says of its targets, and the output vectors."""
        if self.first is None:
            self.first = z.detach().abs().max()
        try:
            one.seen = seen_outputs(z, one.gradient, self.settings, self.offset + self.examples)  # type: ignore[arg-type]
        except ModelError as error:
            raise explained(error, [z], self.first) from None
        self.examples += z.shape[0]
        slots = Slots.of(one.seen.outputs, self.rule, False, one.seen.counts, traced=False)
        if self._written_out and one.plan not in self._chosen:
            self._chosen.add(one.plan)  # once: rows of the passes of a step are joined, so all are kept in one way
            for unit in one.plan.ruled:
                unit.choose(slots.number, lean=False)
        return one.seen, slots

    def _users_rows(self, one: Pass) -> list[Chunk]:
        """Rows of vectors that are multiples of the loss gradient: the user's backward pass, scaled by example."""
        # Of a pass that needs no other, it is known that its uses are the plan's.
        linearized = Linearized(one.plan, one.batch, one.watched.replaced(z=one.z.detach()), shown=not one.again)
        seen, slots = self._slots(one, one.z)
        found = [one.found.get(id(edge)) for edge in linearized.watched.edges]
        gradients = [None if g is None else g.unsqueeze(0) for g in found]

        def rows(v: Float[Tensor, "k B P C"], selection: RowSelection) -> Rows:
            known = Known(gradients, seen.scale_of(v[0]), one.multiplied)
            shaped = self.settings.likelihood.as_outputs(v, one.z.shape)
            if not one.again:
                return linearized.rows(shaped, selection, known)
            # The engine switches gradients off in callbacks; rows of parameters without a rule need them.
            with self._watch.quiet(), differentiable(self.model, ()):
                return linearized.rows(shaped, selection, known)

        return list(slots.chunks(one.batch, 1, rows))

    def _own_rows(self, one: Pass, linearized: Linearized) -> list[Chunk]:
        """Rows by a backward pass of our own."""
        seen, slots = self._slots(one, linearized.z)
        bare = one.bare and linearized.z is one.z
        alone, counting = slots.number == 1, None
        if not (alone or linearized.watched.regular):
            counting = seen.outputs.counting(linearized.z.shape)

        def rows(v: Float[Tensor, "k B P C"], selection: RowSelection) -> Rows:
            with self._watch.quiet(), torch.enable_grad() if bare else differentiable(self.model, ()):
                shaped = self.settings.likelihood.as_outputs(v, linearized.z.shape)
                return linearized.rows(shaped, selection, alone=alone, counting=counting)

        return list(slots.chunks(one.batch, max(1, TILE // linearized.numbers_per_vector), rows))

    def _by_another_pass(self, one: Pass) -> list[Chunk]:
        """Rows by one more forward pass, with the same random numbers, in which statistics are constants."""
        plan = one.plan
        recorder = Recorder(
            {id(p): n for n, p in plan.parameters.items()}, one.batch.size, one.batch.batched, plan.shared,
            training=True, constant_statistics=True,
        )  # fmt: skip
        parameters, others = list(plan.parameters.values()), device_generators(plan.example_parameter.device)
        with self._watch.quiet(), untouched_rng([], one.rng, others), differentiable(self.model, parameters):
            with recorder:
                z = one.batch.call(self.model)
            seen = replace(Watched.seen(recorder, z), by_owner=one.watched.by_owner)
            return self._own_rows(one, Linearized(plan, one.batch, seen))


def runs(leaves: Iterable[Any]) -> bool:
    """Whether the backward pass that runs adds to the ``.grad`` of a parameter whose node is among these."""
    try:
        return any(map(torch._C._will_engine_execute_node, leaves))
    except RuntimeError:  # asked about a leaf, torch says in this way that autograd.grad runs
        return False


def used_again(call: str) -> ModelError:
    """Of a backward pass through a forward pass whose gradient is known, or that had to be forgotten."""
    return ModelError(
        f"{call}, backward pass", "a backward pass through a forward pass that was used, or that is no longer known",
        f"one backward pass for each forward pass, at most {OPEN} of them waiting",
        why="a second one would add the same examples to the Fisher again",
        try_="one loss for each forward pass, or `with optimizer.paused():` around other uses of the model",
    )  # fmt: skip


def versions(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, int]]:
    """What shows that gradients were replaced or written to, of those that exist."""
    return {n: (id(p.grad), p.grad._version) for n, p in parameters.items() if p.grad is not None}


def zeroed(parameters: Mapping[str, nn.Parameter], known: Mapping[str, tuple[int, int]]) -> bool:
    """Whether gradients were set to zero since they had the `versions` known: their batches are no part of a step."""
    if not known or known == versions(parameters):
        return False
    now = {name: parameters[name].grad for name in known}
    # Set to None since, and perhaps filled by another backward pass; or set to zero where they were.
    replaced = any(g is None or id(g) != known[name][0] for name, g in now.items())
    return replaced or not any(g is not None and bool(full(g).to_dense().any()) for g in now.values())


def is_checked(step: int) -> bool:
    """Whether losses are checked in a step, counted from 1: ever more rarely, but at least in every 64th."""
    return step % 64 == 0 or step & (step - 1) == 0


def _with_rules(plan: Plan, old: Plan) -> Plan:
    """With an old plan's rules of parameters that the new one's batch has not used, as of an expert."""
    idle = {unit.names[0] for unit in plan.generic if unit.without_use}
    kept = [unit for unit in old.ruled if idle.issuperset(unit.names)]
    known = {name for unit in kept for name in unit.names}
    return plan.with_units([*(unit for unit in plan.units if not known.intersection(unit.names)), *kept])


def _used(watched: Watched) -> set[str]:
    """The parameters that functions of a pass were given."""
    return {name for use in watched.uses for name in use.names} | watched.outside_rules
