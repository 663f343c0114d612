"""What a forward pass did, function by function, so that one that does the same need not be followed again.

All that a `Recorder` notes comes of the functions that it sees: which they are, what they are given and what they give
back, but for the numbers in tensors. A pass that calls the same functions in the same order, each with the same ones of
the inputs, the parameters and what was made before, and with the same settings, has the same findings; they are taken
over step by step, and a pass that leaves the known way is followed as any other from there on. Passes in which numbers
may decide something leave no trace. Holds no tensor and no model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from fisherkit.rows.batch_axis import Mark, Status
from fisherkit.rows.differentiable import version_of
from fisherkit.rows.rules import Use

if TYPE_CHECKING:
    from fisherkit.rows.record import Recorder

MOST = 32
"""Traces kept of one plan; batches that change their form all the time start over."""

_KEPT = (int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(...))
"""Arguments that are told from others by their value; a float or bool also by its type."""


class Step(NamedTuple):
    """A function call, as `Reader.told` says it, and what was found.

    ``made`` are the output's shape and dtype and whether it has a gradient, ``uses`` those that were noted, ``numbers``
    how many the tracker had then, and ``coarsest`` as of a `Recorder`.
    """

    told: tuple[Any, ...]
    made: tuple[Any, ...]
    status: Status | None
    uses: tuple[Use, ...]
    numbers: int
    coarsest: torch.dtype


@dataclass
class Trace:
    """The steps of a pass, the place of its outputs among what was made, and what was decided of such passes."""

    steps: Sequence[Step]
    numbers: Sequence[float]
    outputs: int
    decided: dict[Any, Any] = field(default_factory=dict)


class Traces(dict[Any, Trace | None]):
    """Those of one plan by the form of a batch; None where a pass has left none."""

    def begun(self, names: Mapping[int, str], batch: int, inputs: Sequence[Tensor], *other: object) -> Reader | None:
        """A pass over a batch begins; None where there is nothing to be known of it."""
        if not all(type(x) is Tensor and x.layout == torch.strided and not x.is_nested for x in inputs):
            return None
        key = batch, other, tuple((x.shape, x.dtype, x.requires_grad) for x in inputs)
        if key in self and self[key] is None:
            return None
        if len(self) >= MOST:
            self.clear()
        return Reader(self, key, names, inputs)


class Reader:
    """One pass: it follows the steps of a trace, or leaves one.

    Attributes:
        trace: the one that it follows; None for one that it leaves.
    """

    def __init__(self, traces: Traces, key: Any, names: Mapping[int, str], inputs: Sequence[Tensor]) -> None:
        self._traces, self._key, self._names = traces, key, names
        self.trace = traces.get(key)
        self.at, self._inputs, self._unknown = 0, len(inputs), False
        self._steps: list[Step] = []
        self._places: dict[int, tuple[weakref.ref[Tensor], int | None, tuple[str, int]]] = {}
        self._made: list[weakref.ref[Tensor]] = []
        for x in inputs:
            self._put(x)

    def _put(self, tensor: Tensor) -> None:
        reference = weakref.ref(tensor)
        self._places[id(tensor)] = reference, version_of(tensor), ("made", len(self._made))
        self._made.append(reference)

    def told(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """A call in a form that can be compared, with places instead of tensors; of what is not known never the same."""
        self._unknown = False
        named = tuple((name, self._told(value)) for name, value in kwargs.items())
        return function, torch.is_grad_enabled(), tuple(map(self._told, args)), named

    def _told(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            found = self._places.get(id(value))
            if found is not None and found[0]() is value:
                return found[2] if found[1] == version_of(value) else self._nothing()  # written to where nobody saw it
            name = self._names.get(id(value))
            if name is not None:
                return name, Tensor
            plain = type(value) in (Tensor, nn.Parameter) and value.grad_fn is None and value.numel() != 1
            return (value.shape, value.dtype, value.requires_grad) if plain else self._nothing()
        if isinstance(value, (list, tuple)):
            return type(value), *map(self._told, value)
        if isinstance(value, slice):
            return slice, self._told(value.start), self._told(value.stop), self._told(value.step)
        if type(value) in (float, bool):
            return type(value), value
        return value if type(value) in _KEPT else self._nothing()

    def _nothing(self) -> object:
        self._unknown = True
        return object()

    def step(self, told: tuple[Any, ...]) -> Step | None:
        """The next one of the trace, if it is this call."""
        trace = self.trace
        found = trace.steps[self.at] if trace is not None and self.at < len(trace.steps) else None
        return found if found is not None and found.told == told else None

    def takes(
        self, step: Step, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, recorder: Recorder
    ) -> bool:
        """Take over what was found of a step, if it has made the same."""
        if _form(output) != step.made:
            return False
        self.at += 1
        self._put(output)
        for use in step.uses:
            arguments = use.rule.bind(args, kwargs)
            found = object.__new__(Use)
            version = version_of(arguments[use.rule.input_name])
            vars(found).update(vars(use), arguments=arguments, edge=get_gradient_edge(output), version=version)
            recorder.uses.append(found)
        recorder.coarsest = step.coarsest
        return True

    def note(
        self, told: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, recorder: Recorder,
        uses: int,
    ) -> bool:  # fmt: skip
        """Note a call of a pass that leaves a trace; whether it still does. ``uses`` there were before."""
        known, new = self._places.get(id(output)), recorder.uses[uses:]
        fits = type(output) is Tensor and not (known is not None and known[0]() is output) and not self._unknown
        if not fits or not all(_is_of(use, args, kwargs, output) for use in new):
            self._traces[self._key] = None
            return False
        self._put(output)
        status, numbers = recorder.tracker.noted(output), len(recorder.tracker.numbers)
        bare = [_without_tensors(use) for use in new]
        self._steps.append(Step(told, _form(output), status, tuple(bare), numbers, recorder.coarsest))
        return True

    def give_up(self, recorder: Recorder) -> None:
        """Have the recorder follow the rest of a pass, from what is known of its beginning."""
        trace, tracker = self.trace, recorder.tracker
        if trace is None or not self.at:
            return
        for step, reference in zip(trace.steps, self._made[self._inputs :], strict=False):
            made = reference()
            if made is not None and step.status is not None:
                tracker.mark(made, step.status)
                tracker.lost = tracker.lost or self._places[id(made)][1] != version_of(made)
        tracker.numbers = list(trace.numbers[: trace.steps[self.at - 1].numbers])
        self._traces.pop(self._key, None)

    def ended(self, recorder: Recorder, z: Tensor) -> dict[Any, Any] | None:
        """The pass is over: what was decided of such passes, if it is one of these; its trace is kept."""
        reference, version, (_, place) = self._places.get(id(z), (None, None, ("", -1)))
        place = -1 if reference is None or reference() is not z or version != version_of(z) else place
        if (trace := self.trace) is None:
            plain = place >= self._inputs and recorder.plain
            self._traces[self._key] = Trace(self._steps, recorder.tracker.numbers, place) if plain else None
            return None
        if self.at < len(trace.steps) or place != trace.outputs:
            self.give_up(recorder)
            return None
        recorder.tracker.numbers = list(trace.numbers)
        recorder.tracker.mark(z, trace.steps[place - self._inputs].status or Mark.FREE)
        return trace.decided


def _is_of(use: Use, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> bool:
    """Whether a use is the call itself, of parameters as they are."""
    bound = use.rule.bind(args, kwargs)
    same = bound.keys() == use.arguments.keys() and all(use.arguments[name] is bound[name] for name in bound)
    plain = same and use.plain and use.slices is None and use.position is None
    return plain and use.output_shape == output.shape and use.edge == get_gradient_edge(output)


def _form(output: Any) -> tuple[Any, ...]:
    return (output.shape, output.dtype, output.requires_grad) if type(output) is Tensor else ()


def _without_tensors(use: Use) -> Use:
    """A use as passes that do the same have it, but for the tensors and the graph."""
    found = object.__new__(Use)
    _ = use.names, use.lead  # which are kept
    vars(found).update(vars(use), arguments={}, edge=None)
    return found
