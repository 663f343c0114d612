"""From a step's captured rows to a damped direction: what `NaturalGradient` and `Preconditioner` share.

Owns the choice of structure and damping, the schedule of updates and the state that a file must hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherkit import likelihoods
from fisherkit.arguments import check_choice, check_count, check_number, is_number
from fisherkit.arithmetic import (
    all_finite,
    at_least_single,
    finite_by,
    may_overflow,
    norms,
    overflow,
    square_bound,
)
from fisherkit.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    ModelError,
    NonFiniteError,
    SingularMatrixError,
    listed,
)
from fisherkit.likelihoods import Likelihood
from fisherkit.model_state import check_checksum, with_checksum
from fisherkit.operators import Damping, Factorization, FisherOperator, RelativeDamping
from fisherkit.optim.averages import Averages, LayerDamping
from fisherkit.optim.capture import Capture, is_checked
from fisherkit.optim.outputs import check_reduction, explained
from fisherkit.optim.passes import Captured, lifted
from fisherkit.optim.replay import Replay
from fisherkit.optim.sample_space import Direction, damped, gram_direction
from fisherkit.outputs import OutputRule
from fisherkit.processes import Group, Processes, by_all
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import Rows
from fisherkit.rows.generic import dense_gradient
from fisherkit.rows.shared import SharedRows
from fisherkit.space import ParameterSpace, Selection, infinite
from fisherkit.structures import structure_named
from fisherkit.vectors import EmpiricalVectors, rule_of
from fisherkit.wrappers import full, is_fully_sharded, reshard

FIT = 1e-4
"""Below this ‖∂ℓ/∂z‖² an example's factor says nothing."""


class Curvature:
    """The Fisher of recent training steps, and gradients seen through it.

    ``gram`` says whether the damping is the paper's, in the space of examples; all else is `NaturalGradient`'s.
    """

    def __init__(
        self, model: nn.Module, *, params: Selection, rule: OutputRule, likelihood: str | Likelihood | nn.Module,
        structure: str, gram: bool, reduction: str, ema: float, update_every: int, refresh_every: int,
        kfac_positions: str, max_rank: int | None, group: Group, call: str, gradient_momentum: float = 0.0,
    ) -> None:  # fmt: skip
        check_choice(call, "reduction", reduction, ("mean", "sum"))
        check_choice(call, "kfac_positions", kfac_positions, ("expand", "reduce"))
        chosen = structure_named(structure, call)
        if not chosen.in_steps:
            raise InvalidArgumentError(
                call, f"structure={structure!r}", "a LayerStructure or a RowStructure",
                why="steps average the records of layers, or take the rows of a batch",
            )  # fmt: skip
        resolved = likelihoods.resolve(likelihood, model)
        check_reduction(resolved, reduction, call)
        check_count(call, "update_every", update_every)
        check_count(call, "refresh_every", refresh_every)
        check_count(call, "max_rank", max_rank, optional=True)
        for name, value in (("ema", ema), ("gradient_momentum", gradient_momentum)):
            if not is_number(value) or not 0 <= value < 1:
                raise InvalidArgumentError(call, f"{name}={value!r}", "a number from 0 to below 1")
        if chosen.keeps_rows and (ema > 0 or update_every > 1 or gradient_momentum > 0):
            got = f"structure={structure!r} with ema={ema} and update_every={update_every}"
            raise InvalidArgumentError(
                call, got + (f" and gradient_momentum={gradient_momentum}" if gradient_momentum else ""),
                f"ema=0 and update_every=1{' and gradient_momentum=0' if gradient_momentum else ''}",
                why="its rows are those of one batch", try_='structure="kfac" or "ekfac"',
            )  # fmt: skip
        self.call, self.structure, self.gram, self.reduction = call, structure, gram, reduction
        self.update_every, self.gradient_momentum = update_every, gradient_momentum
        self.rule = rule
        self._power = rule.gradient_power if gram and chosen.keeps_rows else None
        self.capture = (Replay if is_fully_sharded(model) else Capture)(
            model, params, EmpiricalVectors() if self._power is not None else rule,
            resolved, reduction, written_out=chosen.keeps_rows, call=call,
        )  # fmt: skip
        self.averages = Averages(
            chosen, ema=ema, refresh_every=refresh_every, reduce=kfac_positions == "reduce", max_rank=max_rank
        )
        self.processes = Processes.of(group, next(model.parameters()).device, call)
        _refuse_other_processes(model, self.processes, call)
        if self.processes is not None:  # labels are drawn for each process by itself
            self.capture.offset = self.processes.rank << 32
        self.steps = self.examples = 0
        self._operator: FisherOperator | None = None
        self._inverse: tuple[Damping | LayerDamping, list[Factorization]] | None = None
        self._momentum: dict[str, Tensor] = {}
        self._large = False
        self._strays: set[str] = set()

    @property
    def due(self) -> bool:
        """Whether the next step updates the Fisher."""
        return self.steps % self.update_every == 0

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

    def finite(
        self, gradients: Mapping[str, Tensor], settings: Callable[[], Mapping[str, Any]]
    ) -> tuple[bool, Mapping[str, Any]]:
        """Whether gradients are finite, with one wait for the device for all that a step needs; and the settings.

        Several processes must have the ``settings``, checked when they are asked for, alike, and all that decides about
        the Fisher.
        """
        call = f"{self.call}.step"
        known, own = by_all(self.processes, call, lambda: (settings(), self._finite(gradients)))
        if self.processes is None:
            return own, known
        told = {name: str(value) for name, value in {**self._settings, **known}.items()}
        everyones = self.processes.gathered((own, told))
        self.processes.refuse_different(call, [told for _, told in everyones])
        return all(own for own, _ in everyones), known

    @property
    def _settings(self) -> dict[str, object]:
        """What decides about the Fisher, and where its schedule stands."""
        averages, rule = self.averages, self.rule
        return {
            "kind": (rule.kind_name, rule.kind_options()), "structure": self.structure, "gram_damping": self.gram,
            "likelihood": self.capture.likelihood.recorded, "reduction": self.reduction, "ema": averages.ema,
            "update_every": self.update_every, "refresh_every": averages.refresh_every,
            "gradient_momentum": self.gradient_momentum,
            "kfac_positions": "reduce" if averages.settings["reduce"] else "expand",
            "max_rank": averages.settings["max_rank"],
            "number of steps": self.steps, "number of updates": averages.updates,
        }  # fmt: skip

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
        captured, space = by_all(processes, call, self._taken)
        if processes is not None:
            space = self._used_anywhere(space, processes)
        if due:
            by_all(processes, call, lambda: self._refuse_strays(own, gradients, space))
        examples = sum(one.counted for one in captured)
        if self.processes is not None:
            everyones = self.processes.gathered((examples, self.capture.examples))
            examples = sum(own for own, _ in everyones)
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
                    self.call, f"{damping} with structure={self.structure!r}", "a number",
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
                    large=self._large or processes is not None,  # in one process, in all
                )  # fmt: skip
            direction = self._averaged(space, self._mean(gradients, space, examples), damping)
        self.steps += 1
        self._expect()
        return space, direction

    def _taken(self) -> tuple[list[Captured], ParameterSpace]:
        """What was captured, and the parameters that take part."""
        captured, due = lifted(self.capture.take()), self.due
        # A summed loss is divided by the number of its own examples, also where no update is due.
        joint = self._joint_space(captured) if due or self.reduction == "sum" else None
        return captured, self.averages.space(self.capture.space) if joint is None or not due else joint

    def _used_anywhere(self, space: ParameterSpace, processes: Processes) -> ParameterSpace:
        """The parameters that take part in any process; in one that has no rows of some, these are zero."""
        everyones = processes.gathered(space.names)
        odd = sorted({name for names in everyones for name in set(names) ^ set(space.names)})
        if odd and self.averages.structure.keeps_rows:
            raise ModelError(
                f"{self.call}.step", f"parameters that some processes' outputs depend on and others' do not: "
                f"{listed(odd, 4)}", "the same in all",
                why=f'structure="{self.structure}" keeps rows over the same parameters in all processes',
                try_='structure="kfac", "ekfac" or "diagonal"',
            )  # fmt: skip
        return self.capture.space.restrict(name for names in everyones for name in names)

    def _expect(self) -> None:
        """Say whether the next step is to be watched."""
        self.capture.wanted = self.due or self.reduction == "sum"

    def _scale(self, one: Captured, passes: int = 0) -> float:
        """What rows of one of so many passes, or of all, lack to the scale of the likelihood's own gradient."""
        missing, power = one.seen.correction(passes or len(self.capture.finished)), self.capture.rule.gradient_power
        return 1.0 if power is None else missing ** (1 - power)

    def _chunks(self, one: Captured, passes: int) -> list[Chunk]:
        """Rows of one of so many passes, on the scale of the likelihood's own gradient."""
        missing = one.seen.correction(passes)
        if missing != 1 and not self.capture.rule.scale_free:
            raise ModelError(
                f"{self.call}.step", f"{passes} passes of a {self.capture.likelihood.name} likelihood in one step",
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
        if self._power is None:
            said = [wrong_reduction(captured, self.reduction, sum(one.counted for one in captured))]
        elif self.processes is None:
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
        if self._power is not None and is_number(damping):
            targets = torch.cat([_targets(one, self._power, len(captured)) for one in captured])
            rows: Rows | SharedRows = Rows.taken_from([chunk.rows for chunk in chunks])
            if processes is not None:
                rows = SharedRows(rows, processes)
                targets = processes.stacked(targets, rows.sizes)
            return gram_direction(rows, structure.groups, targets, damping, self.examples)
        sums = structure.empty().added(chunks)
        operator = structure.operator(sums if processes is None else sums.met(processes), 1 / self.examples)
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
        if mu := self.gradient_momentum:
            old = self._momentum
            new = [g.add(old[n], alpha=mu) if n in old else g for n, g in space.unflatten(gradient).items()]
            buffer = torch.cat([m.flatten() for m in new])
            # Of a layer that no update has met since a state was loaded, as of one without a gradient.
            rest = {n: mu * m for n, m in old.items() if n not in space.slices}
            self._momentum, gradient = rest | space.unflatten(buffer), gradient.add(buffer, alpha=mu)
        return damped(space, self._inverse[1], gradient)

    def _effective(self, damping: Damping) -> Damping:
        """Beside F = (1/N) Σ: the paper's damping is beside the sum."""
        return damping / self.examples if self.gram and is_number(damping) else damping

    def _refuse_strays(
        self, own: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor], space: ParameterSpace
    ) -> None:
        rest = [(n, g) for n, g in gradients.items() if n not in space.slices and own[n].requires_grad]
        strays = [name for name, gradient in rest if bool(gradient.any())]
        if strays:
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
        rest = [name for name in gradients if name not in space.slices and own[name].requires_grad]
        new = [name for name in rest if name not in self._strays and bool(gradients[name].any())]
        if new:
            self._strays.update(new)
            self.capture.warn(
                f"gradients of {listed(map(repr, new), 4)} are left as they are until an update, one in "
                f"{self.update_every} steps, whose batch uses them, which that of the last one did not. Try: "
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
        flat = flat.to(at_least_single(flat.dtype))
        if self.processes is not None:
            self.processes.require_alike(f"{self.call}.step", flat)
            flat = flat * self.processes.size if self.reduction == "sum" else flat  # what was averaged over processes
        return flat / max(examples, 1) if self.reduction == "sum" else flat

    @property
    def _parameters(self) -> dict[str, str]:
        """The dtype of rows and the shape of each parameter."""
        own, space = dict(self.capture.model.named_parameters()), self.capture.space
        dtypes = (str(at_least_single(own[name].dtype)).removeprefix("torch.") for name in space.names)
        return {n: f"{dtype} {list(s)}" for n, dtype, s in zip(space.names, dtypes, space.shapes, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Settings, counters and running averages, with a checksum of them."""
        state = {
            "kind": self.rule.kind_name, "options": self.rule.kind_options(), "structure": self.structure,
            "gram": self.gram, "steps": self.steps, "examples": self.examples, "seen": self.capture.examples,
            "updates": self.averages.updates, "averages": self.averages.state(),
            "parameters": json.dumps(self._parameters), "likelihood": self.capture.likelihood.recorded,
        }  # fmt: skip
        return with_checksum({**state, "momentum": dict(self._momentum)} if self._momentum else state)

    def loading(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """The inverse of `state_dict`, read and checked at once, and put in place by the function that is returned.

        Raises:
            InvalidArgumentError: steps cannot go on from it: it is damaged, or of another kind, likelihood, structure,
                damping or model.
        """
        call = f"{self.call}.load_state_dict"
        check_has(state, ("kind", "structure", "gram", "steps", "examples", "seen", "updates"), self.call)
        state = _with_empty(state)
        check_checksum(state, call)
        for key, value in (
            ("kind", self.rule.kind_name), ("options", self.rule.kind_options()),
            ("structure", self.structure), ("gram", self.gram), ("likelihood", self.capture.likelihood.recorded),
        ):  # fmt: skip
            if key in state and state[key] != value:  # states of before do not name the likelihood
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
            momentum = state.get("momentum", {}) if fits and self.gradient_momentum else {}
            of = {name: parameters[name] for name in momentum}
            kept = {name: m.to(of[name].device, copy=True).view(of[name].shape) for name, m in momentum.items()}
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


def _with_empty(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state with the empty containers that torch.distributed.checkpoint leaves out."""
    return {"options": {}, "averages": [], **state}


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
    targets = (norm**power).masked_fill_(norm == 0, 0.0)
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


# -- what users pass, checked before anything is done ------------------------------------------------------------------


def whole_model(model: nn.Module, params: Any) -> tuple[nn.Module, Any]:
    """The module inside `DistributedDataParallel`, which calls it, and parameters by its own names.

    Of a model that `fully_shard` has sharded, parameters are shards afterwards, which have the gradients.
    """
    if isinstance(model, nn.Module):
        reshard(model)
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return model, params
    names = isinstance(params, Iterable) and not isinstance(params, str)
    inner = [n.removeprefix("module.") if isinstance(n, str) else n for n in params] if names else params
    return model.module, inner


def _refuse_other_processes(model: nn.Module, processes: Processes | None, call: str) -> None:
    """Refuse a group of other processes than those that `fully_shard` has left shards of the model.

    Raises:
        ModelError: their number is another.
    """
    size = 1 if processes is None else processes.size
    sharers = {p.device_mesh.size() for p in model.parameters() if hasattr(p, "device_mesh")}
    if sharers - {size}:
        raise ModelError(
            call, f"a model in shards of {max(sharers)} processes, and a group of {size}",
            "a group of the processes that have the shards",
            why="each writes its shard of the update, which must be the same update",
            try_="group=None in a default group of those processes, or their own group",
        )  # fmt: skip


def checked_rule(
    model: object, kind: Any, options: Mapping[str, Any], damping: object, gram_damping: object, trust_region: Any,
    call: str,
) -> OutputRule:  # fmt: skip
    """The rule of the kind, if the model is a module, dampings and trust region fit, and the options are the kind's."""
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(
            call, f"a {type(model).__name__} as model", "a torch.nn.Module",
            why="per-example gradients come from its forward pass", try_=f"{call}(model, ..., params=names)",
        )  # fmt: skip
    rule = rule_of(kind, call=call, options=options)  # first: a misspelt argument is among its options
    check_damping_choice(damping, gram_damping, call)
    if trust_region is not None and not (is_number(trust_region) and trust_region > 0):
        raise InvalidArgumentError(call, f"trust_region={trust_region!r}", "a positive number")
    return rule


def check_damping_choice(damping: object, gram_damping: object, call: str) -> None:
    """Exactly one of the two dampings, and a fitting one."""
    if (damping is None) == (gram_damping is None):
        raise InvalidArgumentError(
            call, f"damping={damping!r} and gram_damping={gram_damping!r}", "one of them",
            why="F + λI and the Gram matrix + λI are different updates",
            try_="gram_damping=1e-3 for the paper's update, damping=1e-2 for (F + λI)⁻¹ times the mean gradient",
        )  # fmt: skip
    value, name = (damping, "damping") if gram_damping is None else (gram_damping, "gram_damping")
    if isinstance(value, RelativeDamping | LayerDamping) and gram_damping is None:
        return
    check_number(call, name, value)


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
