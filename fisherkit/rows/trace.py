"""What a forward pass did, function by function, so that one that does the same need not be followed again.

Of the functions in `KNOWN` all that a `Recorder` notes comes of shapes and settings, and never of numbers in tensors. A
pass that calls the same ones in the same order, each with the same ones of the inputs, the parameters and what was made
before, has the same findings; they are taken over step by step, and a pass that leaves the known way is followed as any
other from there on. Passes that call any other function, or give one any other tensor, leave no trace. Holds no tensor
and no model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fisherkit.rows.batch_axis import Mark, Status, tensors
from fisherkit.rows.differentiable import version_of
from fisherkit.rows.rules import Use

if TYPE_CHECKING:
    from fisherkit.rows.record import Recorder

MOST = 32
"""Traces kept of one plan; batches that change their form all the time start over."""

_KEPT = (int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(...))
"""Arguments that are told from others by their value; a float or bool also by its type."""


_OF_TENSORS = """
    abs add cat chunk contiguous cos div exp expand expand_as flatten log matmul bmm mm mean movedim mul neg permute pow
    relu reshape rsqrt sigmoid silu sin softmax log_softmax split sqrt square squeeze stack sub sum tanh transpose t
    unbind unflatten unsqueeze view __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __neg__ __matmul__
    __getitem__ size dim
"""
_OF_LAYERS = """
    adaptive_avg_pool1d adaptive_avg_pool2d avg_pool1d avg_pool2d celu conv1d conv2d conv3d dropout elu gelu
    group_norm hardsigmoid hardswish hardtanh layer_norm leaky_relu linear log_softmax max_pool1d max_pool2d mish relu
    rms_norm scaled_dot_product_attention selu sigmoid silu softmax softplus tanh
"""
_OF_FORM = "T mT device dtype is_cuda is_nested layout ndim requires_grad shape"
KNOWN = {
    getattr(place, name)
    for places, names in (((torch, Tensor), _OF_TENSORS), ((F,), _OF_LAYERS))
    for place in places
    for name in names.split()
    if hasattr(place, name)
} | {getattr(Tensor, name).__get__ for name in _OF_FORM.split()}
"""Functions that read no numbers, write nowhere and know of nothing but their arguments, grad mode and autocast."""


class Step(NamedTuple):
    """A function call and what it gave back, as `Reader.told` and `Reader.form` say them, and what was found.

    ``uses`` are those that were noted, ``numbers`` how many the tracker had then; others are a `Recorder`'s.
    """

    told: tuple[Any, ...]
    made: Any
    uses: tuple[Use, ...]
    numbers: int
    coarsest: torch.dtype
    random: bool


@dataclass
class Trace:
    """The steps of a pass, what is known of all that was made, the place of the outputs, and what was decided of it."""

    steps: Sequence[Step]
    statuses: Sequence[Status | None]
    numbers: Sequence[float]
    outputs: int
    decided: dict[Any, Any] = field(default_factory=dict)


class Traces(dict[Any, Trace | None]):
    """Those of one plan by the form of a batch; None where a pass has left none."""

    def begun(self, names: Mapping[int, str], batch: int, inputs: Sequence[Tensor], *other: object) -> Reader | None:
        """A pass over a batch begins; None where there is nothing to be known of it."""
        if not inputs or not all(type(x) is Tensor and x.layout == torch.strided and not x.is_nested for x in inputs):
            return None
        key = batch, other, tuple((x.shape, x.dtype, x.requires_grad, x.stride()) for x in inputs)
        if key in self and self[key] is None:
            return None
        if key not in self and len(self) >= MOST:
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
        self._device = inputs[0].device.type
        self._steps: list[Step] = []
        self._statuses: list[Status | None] = []
        self._places: dict[int, tuple[weakref.ref[Tensor], tuple[int | None, bool], tuple[str, int]]] = {}
        self._made: list[weakref.ref[Tensor]] = []
        for x in inputs:
            self._put(x)

    def _put(self, tensor: Tensor) -> None:
        reference = weakref.ref(tensor)
        graph = tensor.grad_fn is not None
        self._places[id(tensor)] = reference, (version_of(tensor), graph), ("made", len(self._made))
        self._made.append(reference)

    def told(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """A call in a form that can be compared, with places for tensors; never the same where one is unknown."""
        self._unknown = False
        named = tuple((name, self._told(value)) for name, value in kwargs.items())
        if function not in KNOWN or "out" in kwargs or (function is Tensor.__getitem__ and tensors(args[1:])):
            self._unknown = True  # places that come first may be read
        cast = torch.is_autocast_enabled(self._device) and torch.get_autocast_dtype(self._device)
        return function, torch.is_grad_enabled(), cast, tuple(map(self._told, args)), named

    def _told(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            place = self._place(value)
            if place is not None:
                return place
            name = self._names.get(id(value))
            if name is None:
                return self._nothing()
            return name, value.shape, value.dtype, value.stride(), value.requires_grad
        if isinstance(value, (list, tuple)):
            return type(value), *map(self._told, value)
        if isinstance(value, slice):
            return slice, self._told(value.start), self._told(value.stop), self._told(value.step)
        if type(value) in (float, bool):
            return type(value), value
        return value if type(value) in _KEPT else self._nothing()

    def _place(self, tensor: Tensor) -> tuple[str, int] | object | None:
        """Of what was made before, or of an input; never the same where it was written to and nobody saw it."""
        found = self._places.get(id(tensor))
        if found is None or found[0]() is not tensor:
            return None
        return found[2] if found[1] == (version_of(tensor), tensor.grad_fn is not None) else self._nothing()

    def form(self, output: Any) -> Any:
        """What a call gave back, likewise."""
        if isinstance(output, Tensor):
            place = self._place(output)
            if place is not None or type(output) is not Tensor or output.is_nested:
                return place or self._nothing()
            return output.shape, output.dtype, output.requires_grad
        if isinstance(output, (list, tuple)):
            return type(output), *map(self.form, output)
        return self._told(output)

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
        if self.form(output) != step.made:
            return False
        self.at += 1
        for made in tensors(output):
            self._put(made)
        for use in step.uses:
            arguments = use.rule.bind(args, kwargs)
            found = object.__new__(Use)
            version = version_of(arguments[use.rule.input_name])
            vars(found).update(vars(use), arguments=arguments, edge=get_gradient_edge(output), version=version)
            recorder.uses.append(found)
        recorder.coarsest, recorder.random = step.coarsest, step.random
        return True

    def note(
        self, told: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any, recorder: Recorder,
        uses: int,
    ) -> bool:  # fmt: skip
        """Note a call of a pass that leaves a trace; whether it still does. ``uses`` there were before."""
        form, new = self.form(output), recorder.uses[uses:]
        if self._unknown or not all(_is_of(use, args, kwargs, output) for use in new):
            self._traces[self._key] = None
            return False
        for made in tensors(output):
            self._put(made)
            self._statuses.append(recorder.tracker.noted(made))
        bare = tuple(map(_without_tensors, new))
        number = len(recorder.tracker.numbers)
        self._steps.append(Step(told, form, bare, number, recorder.coarsest, recorder.random))
        return True

    def give_up(self, recorder: Recorder) -> None:
        """Have the recorder follow the rest of a pass, from what is known of its beginning."""
        trace, tracker = self.trace, recorder.tracker
        self._traces.pop(self._key, None)
        if trace is None or not self.at:
            return
        for status, reference in zip(trace.statuses, self._made[self._inputs :], strict=False):
            made = reference()
            if made is not None and status is not None:
                tracker.mark(made, status)
                now = version_of(made), made.grad_fn is not None
                tracker.lost = tracker.lost or self._places[id(made)][1] != now
        tracker.numbers = list(trace.numbers[: trace.steps[self.at - 1].numbers])

    def ended(self, recorder: Recorder, z: Tensor) -> dict[Any, Any] | None:
        """The pass is over: what was decided of such passes, if it is one of these; its trace is kept."""
        found = self._place(z)
        place = found[1] if isinstance(found, tuple) else -1
        if (trace := self.trace) is None:
            plain = place >= self._inputs and recorder.plain
            kept = Trace(self._steps, self._statuses, recorder.tracker.numbers, place)
            self._traces[self._key] = kept if plain else None
            return None
        if self.at < len(trace.steps) or place != trace.outputs:
            self.give_up(recorder)
            return None
        recorder.tracker.numbers = list(trace.numbers)
        recorder.tracker.mark(z, trace.statuses[place - self._inputs] or Mark.FREE)
        return trace.decided


def _is_of(use: Use, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> bool:
    """Whether a use is the call itself, of parameters as they are."""
    if not isinstance(output, Tensor) or not use.plain or use.slices is not None or use.position is not None:
        return False
    bound = use.rule.bind(args, kwargs)
    same = bound.keys() == use.arguments.keys() and all(use.arguments[name] is bound[name] for name in bound)
    return same and use.output_shape == output.shape and use.edge == get_gradient_edge(output)


def _without_tensors(use: Use) -> Use:
    """A use as passes that do the same have it, but for the tensors and the graph."""
    found = object.__new__(Use)
    _ = use.names, use.lead  # which are kept
    vars(found).update(vars(use), arguments={}, edge=None)
    return found
