"""From a step's captured rows to a damped direction: what `NaturalGradient` and `Preconditioner` share.

Owns the choice of structure and damping, the schedule of updates and the state that a file must hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherkit.arguments import check_number, is_number
from fisherkit.arithmetic import all_finite, at_least_single, finite_by, may_overflow, norms, overflow, square_bound
from fisherkit.errors import InvalidArgumentError, ModelError, NonFiniteError, SingularMatrixError, listed
from fisherkit.model_state import check_checksum, with_checksum
from fisherkit.operators import Damping, Factorization, FisherOperator
from fisherkit.optim.averages import Averages, LayerDamping, require_finite
from fisherkit.optim.capture import Capture, is_checked
from fisherkit.optim.outputs import explained
from fisherkit.optim.passes import Captured, lifted
from fisherkit.optim.replay import Replay
from fisherkit.optim.sample_space import Direction, damped, gram_direction
from fisherkit.optim.settings import StepSettings
from fisherkit.processes import Group, Processes
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import Rows
from fisherkit.rows.generic import dense_gradient
from fisherkit.rows.shared import SharedRows
from fisherkit.space import ParameterSpace, Selection, infinite
from fisherkit.wrappers import full, is_fully_sharded

FIT = 1e-4
"""Below this ‖∂ℓ/∂z‖² an example's factor says nothing."""


class Curvature:
    """The Fisher of recent training steps, and gradients seen through it."""

    def __init__(self, model: nn.Module, params: Selection, settings: StepSettings, group: Group) -> None:
        self.settings, self.call = settings, settings.call
        self.capture = (Replay if is_fully_sharded(model) else Capture)(model, params, settings)
        self.averages = Averages(
            settings.structure, ema=settings.ema, refresh_every=settings.refresh_every,
            reduce=settings.kfac_positions == "reduce", max_rank=settings.max_rank,
        )  # fmt: skip
        self.processes = Processes.of(group, self.call, next(model.parameters()).device)
        _refuse_other_processes(model, self.processes, self.call)
        self.capture.offset = self.processes.rank << 32  # labels are drawn for each process by itself
        self.steps = self.examples = 0
        self._operator: FisherOperator | None = None
        self._inverse: tuple[Damping | LayerDamping, list[Factorization]] | None = None
        self._momentum: dict[str, Tensor] = {}
        self._large = False
        self._strays: set[str] = set()

    @property
    def due(self) -> bool:
        """Whether the next step updates the Fisher."""
        return self.steps % self.settings.update_every == 0

    def gradients(self, own: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Those that are there, dense and whole, of parameters that may take part; the step's rows are at hand then.

        A forgotten backward pass is warned of.
        """
        held = {n: p.grad for n, p in own.items() if p.grad is not None}
        if not held:
            self.capture.say_if_forgotten()
            return {}
        self.capture.catch_up(self.processes)
        return {n: dense_gradient(own[n], full(gradient)) for n, gradient in held.items()}

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Errors over numbers in here say so if the loss has diverged."""
        outputs = [one.seen.outputs.z for one in self.capture.finished]
        try:
            yield
        except (NonFiniteError, SingularMatrixError) as error:
            raise explained(error, outputs, self.capture.first) from error

    def say_if_diverged(self, own: Mapping[str, nn.Parameter]) -> None:
        """Warn once, beside gradients that are not finite, of parameters that are not: no scaler's doing."""
        if not all_finite(*own.values()):
            self.capture.warn(
                "the loss has diverged: parameters with NaN or infinite entries. Gradients are left as they are. "
                "Try: a smaller learning rate, a larger damping, or trust_region=."
            )

    def agreed(
        self, gradients: Mapping[str, Tensor], settings: Callable[[], Mapping[str, Any]]
    ) -> Mapping[str, Any] | None:
        """The settings; None where gradients are not finite, with one wait for the device for all that a step needs.

        Several processes must have the ``settings``, checked when they are asked for, alike, and all that decides about
        the Fisher.
        """
        call = f"{self.call}.step"
        schedule = {"number of steps": self.steps, "number of updates": self.averages.updates}
        known, own = self.processes.each(call, lambda: (settings(), self._finite(gradients)))
        everyones = self.processes.require_same(call, lambda: {**self.settings.compared, **schedule, **known}, own)
        return known if all(everyones) else None

    def _finite(self, gradients: Mapping[str, Tensor]) -> bool:
        chunks = [(i, chunk) for i, one in enumerate(self.capture.finished) for chunk in one.chunks] if self.due else []
        numbers = list({id(tensor): tensor for _, chunk in chunks for tensor in chunk.rows.numbers}.values())
        tensors = [*gradients.values(), *numbers]
        found = norms(tensors)
        if finite_by(found, tensors):
            largest = max(map(self._scale, self.capture.finished), default=1.0)
            squares = largest**2 * square_bound(found[len(gradients) :], numbers)
            totals: dict[ParameterSpace, Tensor] = {}
            for number, rows in ((i, chunk.rows) for i, chunk in chunks if may_overflow(squares, chunk.rows.dtype)):
                own = self._scale(self.capture.finished[number]) ** 2 * rows.squared_sum()
                totals[rows.space] = totals.get(rows.space, 0.0) + own
                if not all_finite(totals[rows.space].sum()):
                    where = infinite(rows.space, totals[rows.space]) or "all parameters together"
                    raise overflow(f"{self.call}.step", where, rows.dtype)
            self._large = bool(totals)
            return True
        if all_finite(*gradients.values()):
            for number, chunk in chunks:
                chunk.rows.finite(f"{self.call}.step, forward pass {number}")
        return False

    def direction(
        self, own: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], damping: Damping | LayerDamping
    ) -> tuple[ParameterSpace, Direction]:
        """Δ for the mean gradient, after an update if one is due.

        Args:
            own: the parameters that may take part.
            gradients: by name, finite with all that was captured; those that are missing are zero.
            damping: λ.

        Returns:
            The parameters that take part, and Δ in their flat order.

        Raises:
            ModelError: no forward and backward pass was seen, or passes that do not fit together.
            SingularMatrixError: the damping is too small; another try needs no other backward pass in the full and
                block structures.
            InvalidArgumentError: a `LayerDamping` of a structure that keeps rows.
        """
        due, processes, call = self.due, self.processes, f"{self.call}.step"
        captured, space = processes.each(call, self._taken)
        space = self._used_anywhere(space)
        if due:
            processes.each(call, lambda: self._refuse_strays(own, gradients, space))
        everyones = processes.gathered((sum(one.counted for one in captured), self.capture.examples))
        examples = sum(counted for counted, _ in everyones)
        # The same in all, as what a state dict holds must be: of a checkpoint, each process writes some entries.
        self.capture.examples = max(seen for _, seen in everyones)
        if due and examples == 0:  # every label is ignored
            nothing = torch.zeros_like(self._mean(gradients, space, 1))
            return space, Direction(nothing, lambda: nothing.new_zeros((), dtype=torch.float64))
        if due:
            self.examples, self._operator, self._inverse = examples, None, None
            self._warn_of_ignored(captured, gradients, space)
        else:
            self._warn_of_strays(own, gradients, space)
        if self.averages.structure.keeps_rows:
            if isinstance(damping, LayerDamping):
                raise InvalidArgumentError(
                    self.call, f"{damping} with structure={self.settings.structure.name!r}", "a number",
                    why="a structure that keeps rows is no product of layers",
                    try_=f"damping=fk.RelativeDamping({damping.scale:g}), a multiple of this batch's mean eigenvalue",
                )  # fmt: skip
            try:
                direction = self._of_batch(captured, gradients, damping)
            except SingularMatrixError:
                self.capture.finished = captured  # for another try with more damping
                raise
        else:
            if due:
                chunks = [chunk for one in captured for chunk in self._chunks(one, len(captured))]
                self.averages.update(
                    captured[0].plan, space, chunks, examples, processes, call=call,
                    large=self._large or processes.size > 1,  # in one process, in all
                )  # fmt: skip
            direction = self._averaged(space, self._mean(gradients, space, examples), damping)
        self.steps += 1
        self._expect()
        return space, direction

    def _taken(self) -> tuple[list[Captured], ParameterSpace]:
        """What was captured, and the parameters that take part."""
        captured, due = lifted(self.capture.take()), self.due
        # A summed loss is divided by the number of its own examples, also where no update is due.
        joint = self._joint_space(captured) if due or self.settings.reduction == "sum" else None
        return captured, self.averages.space(self.capture.space) if joint is None or not due else joint

    def _used_anywhere(self, space: ParameterSpace) -> ParameterSpace:
        """The parameters that take part in any process; in one that has no rows of some, these are zero."""
        everyones = self.processes.gathered(space.names)
        if all(names == space.names for names in everyones):
            return space
        odd = sorted({name for names in everyones for name in set(names) ^ set(space.names)})
        if odd and self.averages.structure.keeps_rows:
            raise ModelError(
                f"{self.call}.step", f"parameters that some processes' outputs depend on and others' do not: "
                f"{listed(odd, 4)}", "the same in all",
                why=f'structure="{self.settings.structure.name}" keeps rows over the same parameters in all processes',
                try_='structure="kfac", "ekfac" or "diagonal"',
            )  # fmt: skip
        return self.capture.space.restrict(name for names in everyones for name in names)

    def _expect(self) -> None:
        """Say whether the next step is to be watched."""
        self.capture.wanted = self.due or self.settings.reduction == "sum"

    def _scale(self, one: Captured, passes: int = 0) -> float:
        """What rows of one of so many passes, or of all, lack to the scale of the likelihood's own gradient."""
        missing, power = one.seen.correction(passes or len(self.capture.finished)), self.capture.rule.gradient_power
        return 1.0 if power is None else missing ** (1 - power)

    def _chunks(self, one: Captured, passes: int) -> list[Chunk]:
        """Rows of one of so many passes, on the scale of the likelihood's own gradient."""
        missing = one.seen.correction(passes)
        if missing != 1 and not self.capture.rule.scale_free:
            raise ModelError(
                f"{self.call}.step", f"{passes} passes of a {self.settings.likelihood.name} likelihood in one step",
                "one", why="the loss gradients' scale is known afterwards, and this kind's vectors depend on it",
                try_="one forward pass a step, or another kind",
            )  # fmt: skip
        scale = self._scale(one, passes)
        return one.chunks if scale == 1 else [replace(chunk, rows=chunk.rows.scaled(scale)) for chunk in one.chunks]

    def _warn_of_ignored(
        self, captured: list[Captured], gradients: Mapping[str, Tensor], space: ParameterSpace
    ) -> None:
        if not is_checked(self.steps + 1) or not all(one.seen.calibrated for one in captured):
            return
        if self.settings.power is None:
            said = [wrong_reduction(captured, self.settings.reduction, sum(one.counted for one in captured))]
        elif self.processes.size == 1:
            mean = self._mean(gradients, space, self.examples)
            said = [ignored_weights(captured), ignored_terms(captured, mean)]
        else:  # the gradient is made of other processes' examples too
            said = [ignored_weights(captured)]
        for text in filter(None, said):
            self.capture.warn(text)

    def _of_batch(self, captured: list[Captured], gradients: Mapping[str, Tensor], damping: Damping) -> Direction:
        plan = captured[0].plan
        processes = self.processes
        structure = self.averages.structure.of(plan, processes=processes)
        chunks = (chunk for one in captured for chunk in self._chunks(one, len(captured)))
        if (power := self.settings.power) is not None and is_number(damping):
            asked = [_targets(one, power, len(captured)) for one in captured]
            targets = asked[0] if len(asked) == 1 else torch.cat(asked)
            parts = [chunk.rows for chunk in chunks]
            rows: Rows | SharedRows = parts[0] if len(parts) == 1 else Rows.taken_from(parts)
            if processes.size > 1:
                rows = SharedRows(rows, processes)
                targets = processes.stacked(targets, rows.sizes)
            return gram_direction(rows, structure.groups, targets, damping, self.examples)
        sums = structure.empty().added(chunks)
        operator = structure.operator(processes.all_reduced(sums), 1 / self.examples)
        inverse = operator.factorize(self._effective(damping))
        return damped(plan.space, [inverse], self._mean(gradients, plan.space, self.examples))

    def _averaged(
        self, space: ParameterSpace, gradient: Float[Tensor, "D"], damping: Damping | LayerDamping
    ) -> Direction:  # fmt: skip
        if self._operator is None:
            self._operator, self._inverse = self.averages.operator(space, gradient), None
        effective = damping if isinstance(damping, LayerDamping) else self._effective(damping)
        if self._inverse is None or self._inverse[0] != effective:
            if isinstance(effective, LayerDamping):
                self._inverse = effective, effective.factorize(self._operator)
            else:
                self._inverse = effective, [self._operator.factorize(effective)]
        if mu := self.settings.gradient_momentum:
            old = self._momentum
            new = [g.add(old[n], alpha=mu) if n in old else g for n, g in space.unflatten(gradient).items()]
            buffer = torch.cat([m.flatten() for m in new])
            # Of a layer that no update has met since a state was loaded, as of one without a gradient.
            rest = {n: mu * m for n, m in old.items() if n not in space.slices}
            self._momentum, gradient = rest | space.unflatten(buffer), gradient.add(buffer, alpha=mu)
        return damped(space, self._inverse[1], gradient)

    def _effective(self, damping: Damping) -> Damping:
        """Beside F = (1/N) Σ: the paper's damping is beside the sum."""
        return damping / self.examples if self.settings.gram and is_number(damping) else damping

    def _refuse_strays(
        self, own: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], space: ParameterSpace
    ) -> None:
        if strays := _outside(own, gradients, space, set()):
            raise ModelError(
                f"{self.call}.step",
                f"a gradient for parameters that the outputs did not depend on in the first batch: {strays[:4]}",
                "the same layers for every batch, and a loss of the outputs alone", why="there are no rows for them",
                try_="params= without them, and a second optimizer; weight_decay= instead of penalties in the loss",
            )  # fmt: skip

    def _warn_of_strays(
        self, own: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], space: ParameterSpace
    ) -> None:
        """Say of which layers F knows nothing yet, whose gradients come in a step without an update."""
        if new := _outside(own, gradients, space, self._strays):
            self._strays.update(new)
            self.capture.warn(
                f"gradients of {listed(map(repr, new), 4)} are left as they are until an update, one in "
                f"{self.settings.update_every} steps, whose batch uses them, which that of the last one did not. Try: "
                "update_every=1, or params= without them and a second optimizer."
            )

    def _joint_space(self, captured: list[Captured]) -> ParameterSpace:
        if self.capture.closed:
            raise ModelError(
                f"{self.call}.step", "a closed optimizer", "one that watches its model", try_=f"a new {self.call}"
            )
        if not captured:
            raise ModelError(
                f"{self.call}.step", "gradients, but no forward and backward pass of the model since the last step",
                "loss(model(x), y).backward() before each step",
                why="rows are captured there; calls of the model's parts or of a compiled or replicated copy, or "
                "under no_grad or paused(), have none, nor has torch.autograd.grad",
                try_="loss.backward() on outputs of the very module that the optimizer was made for",
            )  # fmt: skip
        spaces = {one.plan.space for one in captured}
        if len(spaces) > 1:
            raise ModelError(
                f"{self.call}.step", "forward passes with different trainable parameters in one step",
                "the same for all", try_="freezing and unfreezing right after step()",
            )  # fmt: skip
        return spaces.pop()

    def _mean(self, gradients: Mapping[str, Tensor], space: ParameterSpace, examples: int) -> Float[Tensor, "D"]:
        """The mean gradient, whatever the reduction of the loss."""
        like = next(iter(gradients.values()))
        pairs = zip(space.names, space.sizes, strict=True)
        flat = torch.cat([gradients[n].reshape(-1) if n in gradients else like.new_zeros(size) for n, size in pairs])
        flat, summed = flat.to(at_least_single(flat.dtype)), self.settings.reduction == "sum"
        self.processes.require_alike(f"{self.call}.step", flat)
        # What was averaged over processes is a sum again.
        return flat / (max(examples, 1) / self.processes.size) if summed else flat

    @property
    def _parameters(self) -> dict[str, str]:
        """The dtype of rows and the shape of each parameter."""
        own, space = dict(self.capture.model.named_parameters()), self.capture.space
        dtypes = (str(at_least_single(own[name].dtype)).removeprefix("torch.") for name in space.names)
        return {n: f"{dtype} {list(s)}" for n, dtype, s in zip(space.names, dtypes, space.shapes, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Settings, counters and running averages, with a checksum of them."""
        state = {
            **self.settings.recorded, "steps": self.steps, "examples": self.examples, "seen": self.capture.examples,
            "updates": self.averages.updates, "averages": self.averages.state(),
            "parameters": json.dumps(self._parameters),
        }  # fmt: skip
        return with_checksum({**state, "momentum": dict(self._momentum)} if self._momentum else state)

    def loading(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """The inverse of `state_dict`, read and checked at once, and put in place by the function that is returned.

        Raises:
            InvalidArgumentError: steps cannot go on from it: it is damaged, or of another kind, likelihood, structure,
                damping or model.
        """
        call = f"{self.call}.load_state_dict"
        counts = ("steps", "examples", "seen", "updates")
        check_has(state, ("kind", "structure", "gram", *counts), self.call)
        state = {"options": {}, "averages": [], **state}  # torch.distributed.checkpoint leaves out what is empty
        check_checksum(state, call)
        for name in counts:
            check_number(call, name, state[name], integer=True)
        for key, value in self.settings.recorded.items():
            if key in state and state[key] != value:  # states of before do not name all
                raise InvalidArgumentError(
                    call, f"a state with {key} = {state[key]!r}", repr(value),
                    why="a step would go on in another direction", try_="an optimizer made with the same arguments",
                )  # fmt: skip
        parameters, own = dict(self.capture.model.named_parameters()), self._parameters
        try:
            # States of before do not say of which parameters they are, nor have they momentum.
            known = dict(json.loads(state["parameters"])) if "parameters" in state else own
            fits = known == own
            records = self.averages.read(state["averages"] if fits else [], parameters, state["updates"])
            momentum = state.get("momentum", {}) if fits and self.settings.gradient_momentum else {}
            of = {name: parameters[name] for name in momentum}
            kept = {name: m.to(of[name].device, copy=True).view(of[name].shape) for name, m in momentum.items()}
            require_finite("momentum", kept.values())
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # without a checksum
            raise InvalidArgumentError(
                call, f"a state whose averages cannot be read ({error!r})",
                f"one that {self.call}.state_dict() made for this model",
            ) from error  # fmt: skip
        if names := [name for name in {**known, **own} if known.get(name) != own.get(name)]:
            odd = (f"{name!r}: {known.get(name, 'none')} and not {own.get(name, 'none')}" for name in names)
            raise InvalidArgumentError(
                call, f"a state of other parameters ({listed(odd, 4, '; ')})",
                "those of the model that the optimizer was made for",
                why="averages of other layers say nothing of these", try_="the model of then, or a fresh optimizer",
            )  # fmt: skip

        def finish() -> None:
            self.averages.put(records, state["updates"])
            self._momentum = kept
            self.steps, self.examples, self.capture.examples = state["steps"], state["examples"], state["seen"]
            self._operator = self._inverse = None
            self._expect()

        return finish


def _outside(
    own: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], space: ParameterSpace, known: Container[str]
) -> list[str]:
    """Trainable parameters outside of the space, but for those that are known, with gradients that are not 0."""
    rest = [name for name in gradients if name not in space.slices and own[name].requires_grad and name not in known]
    return [name for name in rest if bool(gradients[name].any())]


_MAKERS = {"curvature": "NaturalGradient", "gram": "Preconditioner"}
"""Whose state it is, by a key that no other has."""


def check_has(state: Any, keys: Iterable[str], call: str) -> None:
    """Refuse what is no state of the class ``call``, or lacks one of its parts ``keys``."""
    if isinstance(state, Mapping) and not (missing := set(keys) - set(state)):
        return
    if isinstance(state, Mapping):
        maker = next((f" of {cls}," for key, cls in _MAKERS.items() if key in state), "")
        got = f"a state{maker} without {sorted(missing)}"
    else:
        got = f"a {type(state).__name__}"
    raise InvalidArgumentError(f"{call}.load_state_dict", got, f"one that {call}.state_dict() made")


def _targets(one: Captured, power: float, passes: int) -> Float[Tensor, "R"]:
    """What the paper's update asks of each example: ‖∂ℓ/∂z‖^2p."""
    norm, missing = one.seen.squared_norm, one.seen.correction(passes)
    norm = norm if missing == 1 else norm * missing**2
    targets = norm if power == 1 else (norm**power).masked_fill_(norm == 0, 0.0)
    (chunk,) = one.chunks  # one vector an example
    return targets if chunk.regular else targets[chunk.owner]


class Watching:
    """What watches its model by a `Curvature`."""

    _curvature: Curvature

    def paused(self) -> AbstractContextManager[None]:
        """Forward passes in here are not captured: for uses of the model with gradients that do not lead to a step."""
        return self._curvature.capture.paused()

    def close(self) -> None:
        """Take the hooks off the model; no step can be made after that."""
        self._curvature.capture.close()


def _refuse_other_processes(model: nn.Module, processes: Processes, call: str) -> None:
    """Refuse a group of other processes than those that `fully_shard` has left shards of the model.

    Raises:
        ModelError: their number is another.
    """
    sharers = {p.device_mesh.size() for p in model.parameters() if hasattr(p, "device_mesh")}
    if sharers - {processes.size}:
        raise ModelError(
            call, f"a model in shards of {max(sharers)} processes, and a group of {processes.size}",
            "a group of the processes that have the shards",
            why="each writes its shard of the update, which must be the same update",
            try_="group=None in a default group of those processes, or their own group",
        )  # fmt: skip


# -- losses whose meaning a step would lose without a word -------------------------------------------------------------


def wrong_reduction(captured: Sequence[Captured], reduction: str, examples: int) -> str:
    """What to say where the gradient is not that of the mean that a damped step takes it for; "" for nothing.

    The factors of all examples add up to 1 for a mean and to N for a sum; anything else is a scaler's, or weights.
    """
    total = float(torch.cat([one.seen.multiple for one in captured]).sum())
    expected, passes = (1 if reduction == "mean" else examples), len(captured)
    if examples == 1 or _close(total, expected):
        return ""
    if reduction == "mean" and _close(total, passes):
        advice = f"divide the loss of each of the {passes} passes by {passes}"
    elif _close(total, examples):
        advice = 'the loss is a sum: reduction="sum"'
    elif _close(total, 1):
        advice = 'the loss is a mean: reduction="mean"'
    else:
        return ""
    return (
        f"with reduction={reduction!r} the gradients' factors add up to {total:.4g} instead of {expected}, and the "
        f"step is as much too long. Try: {advice}."
    )


def ignored_weights(captured: Sequence[Captured]) -> str:
    """What to say where examples of one pass have different factors, which the Gram-space update does not see."""
    for one in captured:
        # The factor of an example that is fit is all rounding.
        counting = one.seen.multiple[(one.seen.multiple > 0) & (one.seen.squared_norm > FIT)]
        if len(counting) and bool(counting.max() > 1.01 * counting.min()):
            return "weights of examples in the loss have no effect on the update of gram_damping=. Try: damping=."
    return ""


def ignored_terms(captured: Sequence[Captured], gradient: Float[Tensor, "D"]) -> str:
    """What to say where the gradient is not the examples' alone, which the Gram-space update does not see."""
    if any(one.coupled for one in captured):
        return ""
    total = torch.zeros_like(gradient)
    for one in captured:
        for chunk in one.chunks:
            total += chunk.rows.rmatmul(one.seen.multiple[chunk.owner].unsqueeze(1).to(gradient.dtype))[:, 0]
    a, b = total.double(), gradient.double()
    if bool(a @ b >= 0.999 * a.norm() * b.norm()):
        return ""
    return (
        "the gradient is not the examples' alone (a penalty, an auxiliary loss, a change of .grad): the rest has no "
        "effect on the update of gram_damping=. Try: damping=, or weight_decay= for a penalty."
    )


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 0.01 * b
