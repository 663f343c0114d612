"""Tensors that are made of chosen parameters and constants alone, as ``1 + w``, ``-exp(w)``, ``W.T`` or a bias table.

The rows of such a tensor come from wherever it meets data, by the rule of that function; the parameters' rows are their
pull-back through the tensor's own graph. That graph is a second one, on leaves of our own: it outlives the model's, and
no hook or checkpoint of the model's pass sees it. Knows no rule and no data.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit.arithmetic import HALF
from fisherkit.data import map_tensors
from fisherkit.rows.base import spans
from fisherkit.rows.batch_axis import is_permutation, tensors
from fisherkit.rows.differentiable import scales

SAME, TURNED = "same", "turned"


class Derived:
    """A tensor that is made of ``names``, chosen parameters for which ``leaves`` stand.

    Its ``layout`` is `SAME` if it has its only parameter's entries in their order, `TURNED` if it is that matrix
    transposed. ``slices`` of its only parameter: which one each entry of the leading axes is, and whether the last two
    axes have changed places. ``lookup`` of rows of a table: the rule and the arguments of the function that looked them
    up.
    """

    def __init__(
        self, names: tuple[str, ...], leaves: Mapping[str, Tensor], make: Callable[[], Tensor],
        layout: str | None = None, slices: tuple[Int[Tensor, "..."], bool] | None = None,
    ) -> None:  # fmt: skip
        self.names, self.layout, self.slices = names, layout, slices
        self._leaves, self._make = leaves, make
        self.lookup: tuple[Any, Mapping[str, Any]] | None = None

    @cached_property
    def tensor(self) -> Tensor:
        """The tensor with the graph of our own."""
        # Hooks of a checkpoint must not see what the model itself does not compute.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            return self._make()

    def sliced(self, tensor: Tensor, trailing: int) -> tuple[Int[Tensor, "..."] | None, bool] | None:
        """Which slice of so many axes each entry of the others is, None for the whole, and whether it is turned."""
        if self.layout == TURNED and trailing == tensor.ndim == 2:
            return None, True
        if self.layout == SAME and tensor.ndim >= trailing and tensor.shape[: tensor.ndim - trailing].numel() == 1:
            return None, False
        known = self.slices if self.layout is None else (torch.zeros((), dtype=torch.long, device=tensor.device), False)
        if known is None or self.layout == TURNED or known[0].ndim > tensor.ndim - trailing:
            return None
        index, turned = known
        more = tensor.shape[index.ndim : tensor.ndim - trailing]
        within = torch.arange(more.numel(), device=index.device)
        return (index.unsqueeze(-1) * len(within) + within).reshape(tensor.shape[: tensor.ndim - trailing]), turned

    def pulled(self, rows: Float[Tensor, "R d"]) -> dict[str, Float[Tensor, "R n"]]:
        """Rows over the tensor as rows over each of its parameters."""
        if self.layout == SAME:
            return {self.names[0]: rows}
        like = self.tensor  # makes the leaves
        leaves = [self._leaves[name] for name in self.names]
        found = {name: rows.new_zeros(len(rows), leaf.numel()) for name, leaf in zip(self.names, leaves, strict=True)}
        scale = rows.new_ones(len(rows), 1)
        if like.dtype in HALF and len(rows):
            # In half precision small rows would lose their digits, and large ones overflow.
            scale = next(scales(rows.unsqueeze(0))).mT.to(rows.dtype)
        # A vectorised pass holds some tensors of the derived one's size a row.
        for span in spans(len(rows), 4 * like.numel()) if len(rows) else ():
            vectors = (rows[span] / scale[span]).to(like.dtype).reshape(-1, *like.shape)
            for name, gradient in zip(self.names, self._gradients(leaves, vectors), strict=True):
                if gradient is not None:
                    found[name][span] = gradient.reshape(len(vectors), -1).to(rows.dtype) * scale[span]
        return found

    def _gradients(self, leaves: list[Tensor], vectors: Float[Tensor, "R ..."]) -> list[Tensor | None]:
        def backward(v: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(
                self.tensor, leaves, v, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )

        try:
            return list(backward(vectors, True))
        except RuntimeError:  # an operation without a batching rule
            each = [backward(v, False) for v in vectors]
            return [None if one[0] is None else torch.stack(one) for one in zip(*each, strict=True)]


class Derivations:
    """Which tensors of one forward pass are made of chosen parameters, whose ``id`` tells their names."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self._leaves: dict[str, Tensor] = {}
        self._known: dict[int, tuple[Tensor, Derived]] = {}

    def of(self, tensor: Any) -> Derived | None:
        """What a tensor is made of, if of chosen parameters alone."""
        if not isinstance(tensor, Tensor):
            return None
        known = self._known.get(id(tensor))
        if known is not None and known[0] is tensor:
            return known[1]
        name = self._names.get(id(tensor))
        if name is None:
            return None
        made = Derived((name,), self._leaves, functools.partial(self._leaf, name, tensor), SAME)
        self._known[id(tensor)] = tensor, made
        return made

    @property
    def bare(self) -> bool:
        """Whether nothing but parameters themselves is known."""
        return self._known.keys() <= self._names.keys()

    def _leaf(self, name: str, parameter: Tensor) -> Tensor:
        """What stands for a parameter, made when it is first asked for."""
        if name not in self._leaves:
            self._leaves[name] = parameter.detach().requires_grad_()
        return self._leaves[name]

    def among(self, given: Sequence[Tensor]) -> list[tuple[Tensor, Derived]]:
        """Those of some tensors that are."""
        return [(t, made) for t in given if (made := self.of(t)) is not None]

    def add(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any,
        *, written: bool = False,
    ) -> None:  # fmt: skip
        """Note the outputs of a function of such tensors and constants; ``written`` if it wrote to the first."""
        given = tensors(args, kwargs)
        own = self.among(given)
        names = tuple(dict.fromkeys(name for _, made in own for name in made.names))
        kept = Tensor.clone if is_gather(function, args) else _as_it_is
        standing = {id(t): self.of(t) or (t.detach() if t.requires_grad else kept(t)) for t in given}

        def stand_in(tensor: Tensor) -> Tensor:
            one = standing[id(tensor)]
            return one.tensor if isinstance(one, Derived) else one

        @functools.cache
        def call() -> list[Tensor]:
            leading, named = map_tensors((args, kwargs), stand_in)
            leading = (leading[0].clone(), *leading[1:]) if written else leading
            return tensors(function(*leading, **named))

        if written:
            del self._known[id(output)]
        for place, tensor in enumerate(tensors(output)):
            if tensor.requires_grad and self.of(tensor) is None:
                layout = _layout(function, args, own, tensor) if isinstance(output, Tensor) else None
                slices = None if layout else _slices(function, args, kwargs, own, place, tensor)
                make = functools.partial(lambda place: call()[place], place)
                made = Derived(names, self._leaves, make, layout, slices)
                if layout is None and not (slices is not None and is_gather(function, args)):
                    _ = made.tensor  # now, before anything that it is made of may change in place
                self._known[id(tensor)] = tensor, made


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


_UNMOVED = {
    "to", "float", "double", "half", "bfloat16", "type", "contiguous", "clone", "view", "reshape", "flatten",
    "squeeze", "unsqueeze", "cuda", "cpu",
}  # fmt: skip


def _layout(
    function: Callable[..., Any], args: tuple[Any, ...], own: list[tuple[Tensor, Derived]], output: Tensor
) -> str | None:
    """How the entries of a view or a cast of one parameter lie."""
    if len(own) != 1 or not args or own[0][0] is not args[0] or not own[0][1].layout:
        return None
    (tensor, made), = own  # fmt: skip
    index = args[1] if function is Tensor.__getitem__ and isinstance(args[1], tuple) else (0,)
    whole = all(e is None or (isinstance(e, slice) and e == slice(None)) for e in index)
    if (whole or getattr(function, "__name__", "") in _UNMOVED) and output.numel() == tensor.numel():
        return made.layout if made.layout == SAME or output.shape == tensor.shape else None
    if is_permutation(function) and tensor.ndim == output.ndim == 2:
        turned = function(torch.empty(2, 3, device="meta"), *args[1:]).shape == (3, 2)
        return (TURNED if made.layout == SAME else SAME) if turned else made.layout
    return None


def is_gather(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a function looks slices up, not rows of a table one by one: what was chosen carries no gradient."""
    name = getattr(function, "__name__", "")
    index = args[1:2] if name == "__getitem__" else args[2:3] if name == "index_select" else ()
    integers = any(isinstance(one, Tensor) and one.dtype in (torch.int32, torch.int64) for one in index)
    return integers and (args[0].ndim > 2 or index[0].ndim == 0)


_CHOOSE = {"__getitem__": None, "unbind": 1, "select": 1, "index_select": 1, "chunk": 2, "split": 2}
"""Functions that choose along an axis, and the place of that axis among their arguments."""


def _slices(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], own: list[tuple[Tensor, Derived]],
    place: int, output: Tensor,
) -> tuple[Int[Tensor, "..."], bool] | None:  # fmt: skip
    """What slices along the leading axes of one parameter an output is."""
    if len(own) != 1 or not args or own[0][0] is not args[0]:
        return None
    (tensor, made), = own  # fmt: skip
    known, name = made.slices, getattr(function, "__name__", "")
    if made.layout == SAME and tensor.ndim > 1:
        known = torch.arange(len(tensor), device=tensor.device), False
    if known is None:
        return None
    index, turned = known
    tail = tensor.shape[index.ndim :]
    if is_permutation(function) and len(tail) == 2:
        tried = function(torch.empty(tuple(range(2, tensor.ndim + 2)), device="meta"), *args[1:], **kwargs).shape
        turned, tail = not turned, torch.Size(tail[::-1])
        fits = tried == (*range(2, tensor.ndim), tensor.ndim + 1, tensor.ndim)
    elif name in _UNMOVED and output.numel() == tensor.numel():
        fits = output.shape[output.ndim - len(tail) :] == tail
        index = index.reshape(output.shape[: output.ndim - len(tail)]) if fits else index
    else:
        at = _CHOOSE.get(name, -1)
        first = at is None or (at > 0 and kwargs.get("dim", args[at] if len(args) > at else 0) == 0)
        fits = first and index.ndim > 0 and (at is not None or not isinstance(args[1], (tuple, list)))
        try:
            index = tensors(function(index, *args[1:], **kwargs))[place] if fits else index
        except (IndexError, RuntimeError, TypeError):  # a mask, say, of more axes
            return None
    return (index, turned) if fits and output.shape == (*index.shape, *tail) else None
