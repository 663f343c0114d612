"""Which axis of a tensor is the batch's, followed through a forward pass: a proof without a number computed.

An entry of a layer's output belongs to example n if no other example's outputs depend on it. Where every function on
the way keeps the batch's axis apart (elementwise ones, linear maps of other axes, reshapes, attention within an example
…), the axis itself says whose each entry is. This file knows for each function of PyTorch what becomes of that axis.
A function that it does not know, or that may mix examples (indexing by content, products over the batch), ends the
proof and nothing else: `rows.ownership` then asks automatic differentiation.

Only what is differentiated matters here: indices, masks and constants never carry a gradient from one example to
another, so a tensor without one is free, whatever it was computed from. It is noted beside this where numbers of
several examples come to what is differentiated by such tensors, or to Python, and where constants differ by place.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from string import ascii_letters
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Axis(NamedTuple):
    """Where the batch lies in a tensor: its axis ``dim`` has ``outer × batch × inner`` entries, in this order."""

    dim: int
    outer: int = 1
    inner: int = 1


class Mark(Enum):
    """What a tensor without a batch axis is."""

    FREE = "free"
    """It depends on no layer output that belongs to an example."""
    MIXED = "mixed"
    """It has no gradient, and may have been computed from several examples' numbers."""
    STATISTIC = "statistic"
    """It is mixed, and real numbers of several examples may have been put together in it, as in a mean."""
    UNKNOWN = "unknown"
    """It may mix examples."""


Status = Axis | Mark


class Call(NamedTuple):
    """A function call as the rules of this file see it, with what is known of each tensor among its arguments.

    ``first`` says whether the output is the first that it returned. ``constants`` are operands with an entry for each
    example that do not depend on one, as rules find them, and the axis of these entries.
    """

    batch: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[tuple[Tensor, Status], ...]
    output: Tensor
    function: Callable[..., Any]
    first: bool
    constants: list[tuple[Tensor, int]]

    @property
    def tagged(self) -> list[tuple[Tensor, Axis]]:
        """The operands that have a batch axis, indices and masks among them."""
        return [(tensor, status) for tensor, status in self.operands if isinstance(status, Axis)]

    def only(self) -> tuple[Tensor, Axis] | None:
        """The first argument, if it is the only operand with a batch axis."""
        tagged = self.tagged
        return tagged[0] if len(tagged) == 1 and self.args and tagged[0][0] is self.args[0] else None

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by its place or name, as PyTorch or NumPy spells it."""
        if name == "dim" and "axis" in self.kwargs:
            return self.kwargs["axis"]
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    def status(self, tensor: Any) -> Status:
        """What is known of an operand."""
        return next((status for known, status in self.operands if known is tensor), Mark.FREE)

    def size(self, axis: Axis) -> int:
        """Entries along a batch axis."""
        return axis.outer * self.batch * axis.inner

    def meets(self, axis: Axis, place: int | None = None, operands: Sequence[Any] | None = None) -> None:
        """Note the constants among operands that have entries along an axis; ``place`` counts from their last one."""
        for tensor, status in self.operands:
            if status is Mark.FREE and (operands is None or any(tensor is one for one in operands)):
                dim = axis.dim if place is None else tensor.ndim + place
                if 0 <= dim < tensor.ndim and tensor.shape[dim] == self.size(axis):
                    self.constants.append((tensor, dim))

    def differs(self, axis: Axis) -> bool:
        """Whether one of these constants has other entries for one example than for another."""
        for tensor, dim in self.constants:
            if tensor.stride(dim) != 0 or axis.outer > 1:
                entries = tensor.detach().unflatten(dim, (axis.outer, self.batch, axis.inner)).movedim(dim + 1, 0)
                if not torch.equal(entries, entries[:1].expand_as(entries)):
                    return True
        return False


Becomes = Callable[[Call], Axis | None]
"""What becomes of the batch axis: that of the output, None where this is not known."""


class Tracker:
    """Follows the batch axis through the functions of one forward pass.

    Args:
        batch: number of examples.

    Attributes:
        lost: whether something differentiable was written to unseen.
        met: whether numbers without a gradient that may be of several examples, as their order or statistics, came to
            what is differentiated or to where nothing follows them.
        drawn: whether random numbers were drawn.
        read: what Python was told of several examples, in yes, no and whole numbers, as whether any is padded.
        decided: whether a statistic of real numbers came to what is differentiated or to Python, so that it may decide
            for a batch and for parts of it alike, and otherwise for some example alone.
        reduced: whether something differentiable was summed up over examples, or the like.
        placed: whether something differentiable met a constant that differs from place to place in the batch.
        numbers: that functions were given, Python's or a constant's only entry, which may depend on how many examples
            there are.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.lost = self.met = self.drawn = self.placed = self.decided = self.reduced = self._valued = False
        self.read: list[int] = []
        self.numbers: list[float] = []
        self._known: dict[int, tuple[weakref.ref[Tensor], int, bool, Status]] = {}
        self._real: dict[int, tuple[weakref.ref[Tensor], bool]] = {}
        self._answers: dict[int, tuple[weakref.ref[Tensor], bool]] = {}
        self._ragged: dict[int, weakref.ref[Tensor]] = {}

    def mark(self, tensor: Tensor, status: Status) -> None:
        """Note what is known of a tensor."""
        self._known[id(tensor)] = weakref.ref(tensor), _version(tensor), tensor.grad_fn is not None, status

    def status(self, tensor: Tensor) -> Status:
        """What is known of a tensor; one without a gradient and without an axis is free."""
        found = self._status(tensor)
        return Mark.FREE if found in _MIXED else found

    def _status(self, tensor: Tensor) -> Status:
        reference, version, had_graph, status = self._known.get(id(tensor), (None, 0, False, Mark.FREE))
        if reference is None or reference() is not tensor:
            # What no function was seen to make may mix whatever it likes, if a gradient goes through it.
            return Mark.FREE if tensor.grad_fn is None else Mark.UNKNOWN
        if tensor.grad_fn is not None and not had_graph:
            return Mark.UNKNOWN  # made without gradients inside of a function that has a gradient of its own
        if version != _version(tensor) and tensor.requires_grad:
            # Written to by what was not seen; other views of the same memory do not learn of it.
            self.lost = True
            return Mark.UNKNOWN
        return status

    def _before(self, tensor: Tensor) -> Status:
        """The same of a tensor that the function just seen has written to, before it did."""
        reference, version, _, status = self._known.get(id(tensor), (None, 0, False, Mark.FREE))
        seen = reference is not None and reference() is tensor and _version(tensor) - version in (0, 1)
        return status if seen else self._status(tensor)

    def noted(self, tensor: Tensor) -> Status | None:
        """What is noted of a tensor; None where nothing is."""
        reference, _, _, status = self._known.get(id(tensor), (None, 0, False, None))
        return None if reference is None or reference() is not tensor else status

    @property
    def plain(self) -> bool:
        """Whether all that was noted came of shapes and settings alone, and not of what is in tensors."""
        numbers = self._valued or self._real or self._answers or self._ragged or self.read or self.drawn
        return not (numbers or self.lost or self.met or self.placed or self.decided or self.reduced)

    def proves(self, z: Tensor) -> bool:
        """Whether outputs ``[B, ...]`` keep examples apart, so that all batch axes on the way say whose entries are."""
        return not self.lost and self.status(z) == Axis(0)

    def see(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any,
        given: Sequence[Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Note what a function call does to the batch axis; ``given`` are the tensors among its arguments, if known."""
        given = tensors(args, kwargs) if given is None else given
        if function is torch.Tensor.__setitem__ or "out" in kwargs:
            self.lost = self.lost or any(t.requires_grad for t in given)
            if function is torch.Tensor.__setitem__ and self._filled(*args):
                self.mark(args[0], Axis(0))
            else:
                self._meet([self._status(t) for t in given])
                self.decided = self.decided or ("out" in kwargs and self._tells(given))  # which is a constant after
            return
        outputs = [output] if isinstance(output, Tensor) else tensors(output)
        self.drawn = self.drawn or function in DRAWS
        if function in READS or (self._ragged and function in SIZES):
            self._hear(function, args, output)
        elementwise = BECOMES.get(function) is _elementwise
        self.numbers += [
            one for one in (*args, *kwargs.values()) if type(one) is float or (elementwise and type(one) is int)
        ]
        if elementwise:
            with contextlib.suppress(RuntimeError):  # a tensor of someone's transform tells none
                constants = [
                    t.item()
                    for t in given
                    if t.numel() == 1 and not t.requires_grad and self._status(t) is Mark.FREE  # one constant
                ]
                self.numbers += constants
                self._valued = self._valued or bool(constants)
        if not outputs or (function in CONSTANTS and not self._of_examples((args[1:], kwargs))):
            return
        ids = set(map(id, outputs))
        operands = tuple((t, self._before(t) if id(t) in ids else self._status(t)) for t in given)
        for made in outputs:
            status = self._becomes(Call(self.batch, args, kwargs, operands, made, function, made is outputs[0], []))
            if status is not Mark.FREE and (self._ragged or function in RAGGED):
                self._note_length(function, args, given, made)
            if status is not Mark.FREE and not made.requires_grad:
                self._note(function, operands, made, chosen=len(args) > 1 or "dim" in kwargs)
            before = [known for tensor, known in operands if tensor is made]
            if before:
                # Written in place: other views of the same memory do not learn of it.
                changed = status is Mark.UNKNOWN or status != before[0]
                self.lost = self.lost or (made.requires_grad and changed)
                self.mark(made, status)
            elif status is not Mark.FREE or made.grad_fn is not None:
                self.mark(made, status)

    def _tells(self, given: Sequence[Tensor]) -> bool:
        """Whether there are real numbers of examples among tensors."""
        return any(self._status(t) is not Mark.FREE and self._is_real(t) for t in given)

    def _is_ragged(self, tensor: Any) -> bool:
        reference = self._ragged.get(id(tensor))
        return reference is not None and reference() is tensor

    def _note_length(
        self, function: Callable[..., Any], args: tuple[Any, ...], given: Sequence[Tensor], made: Tensor
    ) -> None:
        """Note whether real numbers of examples, as where they are positive, decide how long a result is."""
        masks = [t for t in given if t.dtype == torch.bool]
        deciding = masks if masks or function is torch.Tensor.__getitem__ else given[:1]
        own = function in RAGGED and not (function in _WHERE and len(args) > 1)
        if (own and self._tells(deciding)) or any(map(self._is_ragged, given)):
            self._ragged[id(made)] = weakref.ref(made)

    def _hear(self, function: Callable[..., Any], args: tuple[Any, ...], output: Any) -> None:
        """Note what Python is told."""
        if function in SIZES:
            self.decided = self.decided or (self._is_ragged(args[0]) and args[0].numel() > 0)
            return
        marked = [t for t in tensors(args) if self._status(t) is not Mark.FREE]
        if not marked:
            return
        if isinstance(output, int):
            self.read.append(output)
        else:
            self.met = True
        decides = any(map(self._is_real, marked)) and not self._holds_for_parts(marked[0], output)
        self.decided = self.decided or decides

    def _of_examples(self, arguments: Any) -> bool:
        """Whether numbers of examples are among them."""
        found = (self._status(t) for t in tensors(arguments))
        return any(status in _MIXED or isinstance(status, Axis) for status in found)

    def _meet(self, statuses: Sequence[Status]) -> None:
        """Numbers of several examples come to what is differentiated, or to where nothing follows them."""
        self.met = self.met or any(status in _MIXED or isinstance(status, Axis) for status in statuses)
        self.decided = self.decided or Mark.STATISTIC in statuses

    def _is_real(self, tensor: Tensor) -> bool:
        """Whether it has real numbers, or comes of some: as where they are positive; a mask as numbers has none."""
        reference, real = self._real.get(id(tensor), (None, False))
        if reference is not None and reference() is tensor:
            return real
        return tensor.dtype.is_floating_point or tensor.is_complex()

    def _note(
        self, function: Callable[..., Any], operands: Sequence[tuple[Tensor, Status]], made: Tensor, *, chosen: bool
    ) -> None:
        """Note whether something without a gradient comes of real numbers, and what answers for all parts of a batch.

        Which entries along an axis are ``chosen``, as experts by a router, does not count as a real number.
        """
        choice = function in CHOICES and chosen and not made.dtype.is_floating_point
        if function in PACKS and not made.dtype.is_floating_point:
            operands = operands[1:]
        real = not choice and any(self._is_real(t) for t, s in operands if s is not Mark.FREE or t.numel() > 1)
        if real != made.dtype.is_floating_point or id(made) in self._real:
            self._real[id(made)] = weakref.ref(made), real
        if function in ANSWERS and all(isinstance(status, Axis) for _, status in operands):
            self._answers[id(made)] = weakref.ref(made), ANSWERS[function]

    def _holds_for_parts(self, tensor: Tensor, answer: Any) -> bool:
        """Whether an answer about all examples is that about each alone: all of them, or not any."""
        reference, sure = self._answers.get(id(tensor), (None, None))
        return reference is not None and reference() is tensor and answer is sure

    def _mixed(self, call: Call) -> Mark:
        """What a function without a gradient makes of several examples' numbers."""
        statuses = [status for _, status in call.operands]
        apart = call.function in REARRANGES or BECOMES.get(call.function) is _elementwise
        if Mark.STATISTIC not in statuses and call.function in CHOICES and not call.output.dtype.is_floating_point:
            apart = apart or len(call.args) > 1 or "dim" in call.kwargs
        real = any(self._is_real(tensor) for tensor, status in call.operands if status is not Mark.FREE)
        chosen = call.function in CHOICES and not call.output.dtype.is_floating_point
        apart = apart and (chosen or not self.reduced or Mark.UNKNOWN not in statuses)
        return Mark.STATISTIC if Mark.STATISTIC in statuses or (real and not apart) else Mark.MIXED

    def _filled(self, x: Tensor, index: Any, value: Any) -> bool:
        """Whether each example's entries are written to its own place of a constant, as labels moved by one are."""
        if not isinstance(value, Tensor) or self.status(value) != Axis(0) or self.status(x) is not Mark.FREE:
            return False
        taken = index if isinstance(index, tuple) else (index,)
        whole = _all_of(taken[0]) or (taken[0] is Ellipsis and len(taken) <= x.ndim)
        plain = all(entry is Ellipsis or isinstance(entry, (int, slice)) for entry in taken)
        return whole and plain and len(x) == len(value) and x[index].shape == value.shape

    def _becomes(self, call: Call) -> Status:
        statuses = [status for _, status in call.operands if status is not Mark.FREE]
        if not statuses:
            return Mark.FREE
        mixed, differentiable, whole = [s for s in statuses if s in _MIXED], call.output.requires_grad, call
        if mixed:
            free = tuple((t, Mark.FREE if status in _MIXED else status) for t, status in call.operands)
            call, statuses = call._replace(operands=free), [status for status in statuses if status not in _MIXED]
            if differentiable:
                self._meet(mixed)
            if not statuses:
                return Mark.FREE if differentiable else self._mixed(whole)
        rule = None if Mark.UNKNOWN in statuses else BECOMES.get(call.function)
        try:
            found = None if rule is None else rule(call)
        except (TypeError, ValueError, IndexError, AttributeError):  # arguments in a form that the rule does not know
            found = None
        if found is not None:
            if mixed:
                self._meet(mixed)
            if mixed and BECOMES.get(call.function) is _elementwise:  # one example's with another's
                self.decided = self.decided or self._tells([t for t, s in whole.operands if s is Mark.MIXED])
            self._valued = self._valued or bool(call.constants)
            if call.constants and not (self.placed or (self.met and not differentiable)) and call.differs(found):
                self.placed = self.placed or differentiable
                self.met = True
            return found
        if differentiable and call.function in REDUCES:
            self.reduced = self.reduced or any(isinstance(s, Axis) for s in statuses) or len(call.args) == 1
        if differentiable and Mark.UNKNOWN not in statuses and any(t.requires_grad for t, _ in call.tagged):
            self._meet([axis for tensor, axis in call.tagged if not tensor.requires_grad])  # as a mask of another axis
        return Mark.UNKNOWN if differentiable else self._mixed(whole)


_MIXED = (Mark.MIXED, Mark.STATISTIC)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to, as far as it is counted."""
    return 0 if tensor.is_inference() else tensor._version


def tensors(*trees: Any) -> list[Tensor]:
    """The tensors among arguments or results, lists and dictionaries of them included."""
    found: list[Tensor] = []
    for tree in trees:
        if isinstance(tree, Tensor):
            found.append(tree)
        elif isinstance(tree, (tuple, list)):
            if tree:
                found += tensors(*tree)
        elif tree is not None and type(tree) not in _NUMBERS and isinstance(tree, Mapping):
            found += tensors(*tree.values())
    return found


_NUMBERS = {bool, int, float, str}


# -- what becomes of the axis ------------------------------------------------------------------------------------------


def _elementwise(call: Call) -> Axis | None:
    """Operands are broadcast from the right; all batch axes must meet."""
    places = {(axis.dim - tensor.ndim, axis.outer, axis.inner) for tensor, axis in call.tagged}
    if len(places) != 1:
        return None
    place, outer, inner = places.pop()
    dim = call.output.ndim + place
    fits = dim >= 0 and call.output.shape[dim] == outer * call.batch * inner
    if fits:
        call.meets(Axis(dim, outer, inner), place)
    return Axis(dim, outer, inner) if fits else None


def _along(dims: Callable[[Call, Tensor], Sequence[int] | None]) -> Becomes:
    """A function of one operand along some axes of it, which stay or go (None for not known): the others are kept."""

    def becomes(call: Call) -> Axis | None:
        found = call.only()
        mixed = None if found is None else dims(call, found[0])
        if found is None or mixed is None or found[1].dim in mixed:
            return None
        x, axis = found
        gone = max(0, x.ndim - call.output.ndim)
        if gone and gone != len(set(mixed)):
            return None
        dim = axis.dim - sum(d < axis.dim for d in set(mixed)) if gone else axis.dim
        fits = call.output.shape[dim] == axis.outer * call.batch * axis.inner
        return axis._replace(dim=dim) if fits else None

    return becomes


def _said(place: int, name: str, default: Any) -> Becomes:
    """The same along axes that an argument says."""
    return _along(lambda call, x: _dims(call.argument(place, name, default), x.ndim))


def _behind_first(*ndims: int) -> Becomes:
    """The same along all axes but the first, of tensors with so many axes: convolutions, pooling, norms by channel."""
    return _along(lambda _, x: range(1, x.ndim) if x.ndim in ndims else None)


def _reduced(place: int) -> Becomes:
    """Sums, means and extremes over other axes, which are said at a place; or the larger of two."""
    along = _said(place, "dim", None)
    return lambda call: (
        _elementwise(call)
        if any(isinstance(call.argument(1, name), Tensor) for name in ("other", "dim"))
        else along(call)
    )


def _one_axis(call: Call) -> Axis | None:
    """Of all operands that have one."""
    axes = {axis for _, axis in call.tagged}
    return axes.pop() if len(axes) == 1 else None


def _gathered(call: Call) -> Axis | None:
    """Entries along another axis at places of each example's own, of what it has or of a constant."""
    axis, dims = _one_axis(call), _dims(call.argument(1, "dim"), call.output.ndim)
    if axis is None or dims is None or axis.dim in dims or any(t.ndim != call.output.ndim for t, _ in call.operands):
        return None
    call.meets(axis)
    kept = all(t.shape[axis.dim] == call.size(axis) for t in (*(t for t, _ in call.operands), call.output))
    return axis if kept else None


def _reshaped(call: Call) -> Axis | None:
    """Axes are split and merged; the batch stays where it is in memory's order."""
    found = call.only()
    if found is None or found[0].numel() != call.output.numel() or found[0].dtype != call.output.dtype:
        return None
    x, axis = found
    stride, below = axis.inner * x.shape[axis.dim + 1 :].numel(), 1
    for dim in reversed(range(call.output.ndim)):
        size = call.output.shape[dim]
        if below <= stride and stride * call.batch <= below * size:
            inner = stride // below
            fits = stride % below == 0 and size % (inner * call.batch) == 0
            return Axis(dim, size // (inner * call.batch), inner) if fits else None
        below *= size
    return None


def _permuted(call: Call) -> Axis | None:
    """Axes in another order, tried on a tensor without values whose axes all have different sizes."""
    found = call.only()
    if found is None:
        return None
    x, axis = found
    tried = call.function(torch.empty(tuple(range(1, x.ndim + 1)), device="meta"), *call.args[1:], **call.kwargs)
    return axis._replace(dim=tuple(tried.shape).index(axis.dim + 1))


def _expanded(call: Call) -> Axis | None:
    """New axes in front, and axes of one entry repeated."""
    found = call.only()
    if found is None:
        return None
    dim = call.output.ndim + found[1].dim - found[0].ndim
    return found[1]._replace(dim=dim) if call.output.shape[dim] == call.size(found[1]) else None


def _repeated(call: Call) -> Axis | None:
    """Each entry some times in a row; along the batch's axis the copies are one more inner axis."""
    found, times = call.only(), call.argument(1, "repeats")
    dim = None if found is None else _dims(call.argument(2, "dim"), found[0].ndim)
    if found is None or not isinstance(times, int) or dim is None:
        return None
    axis = found[1]
    return axis._replace(inner=axis.inner * times) if axis.dim in dim else axis


def _joined(call: Call, new: int = 0) -> Axis | None:
    """Tensors one after the other along another axis, or along a ``new`` one."""
    axis, dims = _one_axis(call), _dims(call.argument(1, "dim", 0), call.output.ndim)
    if axis is None or dims is None or (axis.dim in dims and not new):
        return None
    call.meets(axis)
    return axis._replace(dim=axis.dim + new * (dims[0] <= axis.dim))


def _indexed(call: Call) -> Axis | None:
    """Plain indexing: numbers, slices and new axes; one tensor of indices along another axis; one place an example."""
    x, axis = call.args[0], call.status(call.args[0])
    if not isinstance(axis, Axis):
        return None
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    taken = [entry for entry in index if entry is not None and entry is not Ellipsis]
    if not all(type(entry) in (int, slice) or isinstance(entry, Tensor) for entry in taken):
        return None
    indices = [entry for entry in taken if isinstance(entry, Tensor)]
    if any(entry.dtype in (torch.bool, torch.uint8) for entry in indices):
        return None
    place = next((i for i, entry in enumerate(index) if entry is Ellipsis), None)
    if place is not None:
        index = (*index[:place], *[slice(None)] * (x.ndim - len(taken)), *index[place + 1 :])
    if len(indices) > 1:
        return _own_places(call, axis, index)
    if len(call.tagged) > 1:
        return None  # another axis, at places of all examples
    source = target = 0
    for entry in (*index, *[slice(None)] * x.ndim):
        if entry is None:
            target += 1
            continue
        if source == axis.dim:
            # A slice that says where it ends is all of some batches, and a part of others.
            return axis._replace(dim=target) if _all_of(entry) else None
        source += 1
        target += entry.ndim if isinstance(entry, Tensor) else int(isinstance(entry, slice))
    return None


def _own_places(call: Call, axis: Axis, index: tuple[Any, ...]) -> Axis | None:
    """``x[arange(B), places]``: entries of each example at places of its own, with axes behind the batch's or none."""
    count = next((i for i, entry in enumerate(index) if not isinstance(entry, Tensor)), len(index))
    first, others = index[0], index[1:count]
    if axis != Axis(0) or not others or not all(_all_of(entry) for entry in index[count:]):
        return None
    shape = torch.broadcast_shapes(*(entry.shape for entry in index[:count]))
    own = torch.arange(call.batch, device=first.device, dtype=first.dtype)
    if first.shape != (call.batch, *[1] * (len(shape) - 1)) or not torch.equal(first.flatten(), own):
        return None
    tagged = [entry for entry in others if isinstance(call.status(entry), Axis)]
    if any(call.status(entry) != axis or entry.ndim != len(shape) for entry in tagged):
        return None
    call.meets(axis, -len(shape), others)
    return axis


def _all_of(entry: Any) -> bool:
    return isinstance(entry, slice) and entry == slice(None)


def product_terms(left: int, right: int) -> tuple[str, str, str]:
    """The axes of a matrix product of operands with so many axes, as einsum says them; leading ones are broadcast."""
    batch = ascii_letters[: max(left, right, 2) - 2]
    first, second = batch[len(batch) - max(0, left - 2) :], batch[len(batch) - max(0, right - 2) :]
    rows, columns = "X" if left > 1 else "", "Z" if right > 1 else ""
    return f"{first}{rows}Y", f"{second}Y{columns}", f"{batch}{rows}{columns}"


def _lettered(call: Call, operands: Sequence[Any], terms: Sequence[str], out: str) -> Axis | None:
    """Sums over axes that have letters: the batch's is the same in all operands, and in the result."""
    own = list(zip(operands, terms, strict=True))
    axes = [(term, axis) for x, term in own if isinstance(axis := call.status(x), Axis)]
    found = {(term[axis.dim], axis.outer, axis.inner) for term, axis in axes}
    if len(found) != 1:
        return None
    letter, outer, inner = found.pop()
    if out.count(letter) != 1 or any(term.count(letter) > 1 for term in terms):
        return None
    for x, term in own:
        if letter in term:
            call.meets(Axis(term.index(letter), outer, inner), None, [x])
    return Axis(out.index(letter), outer, inner)


def _product(call: Call) -> Axis | None:
    """Matrix products."""
    a, b = call.argument(0, "input"), call.argument(1, "other" if len(call.args) > 1 else "mat2")
    *terms, out = product_terms(a.ndim, b.ndim)
    return _lettered(call, (a, b), terms, out)


def _added_product(call: Call) -> Axis | None:
    """Input + a product, whose batch axes meet."""
    addend, by = call.args[0], "mat" if call.output.ndim == 2 else "batch"
    pair = call.argument(1, f"{by}1"), call.argument(2, f"{by}2")
    found = _product(call._replace(args=pair, kwargs={}))
    if found is None:
        return None
    place, own = found.dim - call.output.ndim, call.status(addend)
    if isinstance(own, Axis):
        return found if own._replace(dim=own.dim - addend.ndim) == found._replace(dim=place) else None
    call.meets(found, place, [addend])
    return found


def _einsum(call: Call) -> Axis | None:
    """What an equation without an ellipsis says."""
    equation, operands = call.args[0], call.args[1:]
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    if not isinstance(equation, str) or "." in equation or "->" not in equation:
        return None
    left, right = equation.replace(" ", "").split("->")
    return _lettered(call, operands, left.split(","), right)


def _attention(call: Call) -> Axis | None:
    """Attention within each entry of the leading axes; a mask that is learned has them too, or is the same for all."""
    found = _elementwise(call)
    return found if found is not None and found.dim < call.output.ndim - 2 else None


def _recurrent(call: Call) -> Axis | None:
    """Sequences first or second; of packed ones nothing is known."""
    if len(call.args) != 9 or not isinstance(call.args[3], bool) or call.args[0].ndim != 3:
        return None
    axis = Axis(0 if call.args[8] else 1)
    if call.status(call.args[0]) not in (axis, Mark.FREE):
        return None
    states = [call.args[1]] if isinstance(call.args[1], Tensor) else call.args[1]
    if any(call.status(state) not in (Axis(1), Mark.FREE) for state in states):
        return None
    call.meets(Axis(1), None, states)
    return axis if call.first else Axis(1)  # the outputs, and the last states


def _dims(value: Any, ndim: int) -> tuple[int, ...] | None:
    """Axes as numbers from 0 on; None where they are not said, which is all of them."""
    if value is None or isinstance(value, (bool, str, Tensor)) or (isinstance(value, Sequence) and not value):
        return None
    try:
        return tuple(int(d) % ndim for d in (value if isinstance(value, Sequence) else (value,)))
    except (TypeError, ZeroDivisionError):
        return None


_ELEMENTWISE = """
    abs neg negative positive exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sin cos tan tanh sinh
    cosh asin acos atan atan2 arctan sigmoid erf erfc erfinv floor ceil round trunc frac sign sgn clamp clamp_min
    clamp_max clip minimum maximum fmax fmin add sub subtract rsub mul multiply div divide true_divide floor_divide
    remainder fmod pow float_power where masked_fill lerp addcmul addcdiv nan_to_num logaddexp logit xlogy hypot
    copysign relu relu6 gelu silu mish elu selu celu leaky_relu softplus hardswish hardsigmoid hardtanh logsigmoid
    log_sigmoid softsign tanhshrink softshrink hardshrink threshold prelu rrelu dropout alpha_dropout
    feature_alpha_dropout dropout1d dropout2d dropout3d feature_dropout logical_and logical_or logical_not
    logical_xor bitwise_and bitwise_or bitwise_not eq ne lt le gt ge isnan isinf isfinite and or xor invert truediv
    floordiv mod clone detach contiguous to float double half bfloat16 int long bool type type_as alias
    requires_grad_ cuda cpu
"""
_WINDOWS = """
    conv{0}d conv_transpose{0}d max_pool{0}d avg_pool{0}d lp_pool{0}d adaptive_avg_pool{0}d adaptive_max_pool{0}d
"""
_MORE: tuple[tuple[str, Becomes], ...] = (
    *((_WINDOWS.format(n), _behind_first(n + 2)) for n in (1, 2, 3)),
    ("pixel_shuffle pixel_unshuffle", _behind_first(4)),
    ("group_norm instance_norm local_response_norm interpolate channel_shuffle", _behind_first(2, 3, 4, 5)),
    ("batch_norm", _along(lambda call, _: None if call.argument(5, "training", False) else (1,))),
    ("linear", _along(lambda _, x: (x.ndim - 1,))),
    ("layer_norm rms_norm", _along(lambda call, x: range(x.ndim - len(call.argument(1, "normalized_shape")), x.ndim))),
    ("addmm baddbmm", _added_product),
    ("embedding one_hot", _along(lambda *_: ())),
    ("glu sort argsort", _said(1, "dim", -1)),
    ("softmax log_softmax softmin cumsum cumprod logcumsumexp narrow index_select", _said(1, "dim", None)),
    ("split chunk tensor_split split_with_sizes unsafe_chunk unsafe_split", _said(2, "dim", 0)),
    ("normalize", _said(2, "dim", 1)),
    ("topk", _said(2, "dim", -1)),
    ("gather", _gathered),
    ("take_along_dim", _said(2, "dim", None)),
    ("roll", _said(2, "dims", None)),
    ("flip", _along(lambda call, x: _dims(call.args[1:] if call.args[2:] else call.argument(1, "dims"), x.ndim))),
    ("sum mean prod amax amin max min var std logsumexp argmax argmin any all median", _reduced(1)),
    ("norm", _reduced(2)),
    ("view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel", _reshaped),
    ("transpose permute movedim moveaxis swapaxes swapdims t", _permuted),
    ("expand expand_as broadcast_to repeat tile", _expanded),
    ("repeat_interleave", _repeated),
    ("pad", _along(lambda call, x: range(x.ndim - len(call.argument(1, "pad")) // 2, x.ndim))),
    ("cat concat concatenate", _joined),
    ("stack", lambda call: _joined(call, new=1)),
    ("select unbind", _said(1, "dim", 0)),
    ("__getitem__", _indexed),
    ("matmul bmm mm mv __matmul__", _product),
    ("einsum", _einsum),
    ("scaled_dot_product_attention", _attention),
    ("lstm gru rnn_tanh rnn_relu", _recurrent),
)


def _functions(names: str, *forms: str) -> Iterator[Callable[..., Any]]:
    """All that PyTorch has under some names, as function modes see it."""
    for name in names.split():
        for owner in (torch, torch.Tensor, F, torch.special, torch._VF):
            for form in ("{}", *forms):
                found = getattr(owner, form.format(name), None)
                if callable(found) and not isinstance(found, type):
                    yield found


BECOMES: dict[Callable[..., Any], Becomes] = {
    **dict.fromkeys(_functions(_ELEMENTWISE, "{}_", "__{}__", "__r{}__", "__i{}__"), _elementwise),
    **{function: rule for names, rule in _MORE for function in _functions(names)},
    **{getattr(torch.Tensor, name).__get__: _permuted for name in ("T", "mT")},
}
"""What becomes of the batch axis in each function of PyTorch that keeps it apart."""


READS = set(
    _functions(
        "item tolist numpy equal allclose is_nonzero __bool__ __float__ __int__ __index__ __array__ __contains__"
    )
)
"""Functions that hand numbers to Python, which may do with them what it likes."""

REARRANGES = {f for f, rule in BECOMES.items() if rule in (_reshaped, _permuted, _expanded, _joined, _indexed)} | set(
    _functions(
        "repeat_interleave pad flip stack select unbind embedding one_hot gather index_select masked_select take "
        "take_along_dim narrow split chunk tensor_split split_with_sizes roll _pack_padded_sequence "
        "_pad_packed_sequence"
    )
)
"""Functions whose entries are their operands', of which none is computed from several."""

CHOICES = set(_functions("topk argmax argmin sort argsort max min"))
"""Functions that say, beside or instead of numbers, which entries along an axis are the largest."""

PACKS = set(_functions("_pack_padded_sequence"))
"""Functions that say, beside numbers, how many sequences have each step, which comes of their lengths alone."""

ANSWERS = {**dict.fromkeys(_functions("all"), True), **dict.fromkeys(_functions("any"), False)}
"""Functions that ask something of all entries, and what they say then holds for any part of these."""

REDUCES = set(_functions("sum mean prod amax amin max min var std logsumexp median norm"))
"""Functions that make one number of many."""

_WHERE = set(_functions("where"))
RAGGED = _WHERE | set(_functions("nonzero argwhere masked_select unique unique_consecutive __getitem__"))
"""Functions whose result is as long as numbers say, if they are given a mask, or always."""

SIZES = set(_functions("size numel nelement __len__")) | {torch.Tensor.shape.__get__}  # type: ignore[attr-defined]
"""Functions that tell Python how long something is."""

CONSTANTS = set(_functions("zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty"))
"""Functions that make constants in the shape of something."""

DRAWS = set(
    _functions(
        "rand randn randint randperm rand_like randn_like randint_like bernoulli normal poisson multinomial "
        "normal_ uniform_ bernoulli_ random_ exponential_ geometric_ cauchy_ log_normal_"
    )
)
"""Functions that draw random numbers, from whatever generator."""


def is_elementwise(function: Callable[..., Any]) -> bool:
    """Whether a function broadcasts its operands against each other, all of them from the right."""
    return BECOMES.get(function) is _elementwise and getattr(function, "__name__", "") not in ("prelu", "masked_fill")


def is_permutation(function: Callable[..., Any]) -> bool:
    """Whether a function puts axes in another order."""
    return BECOMES.get(function) is _permuted


def is_expansion(function: Callable[..., Any]) -> bool:
    """Whether a function repeats a tensor along axes."""
    return BECOMES.get(function) is _expanded
