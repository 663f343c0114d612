"""Batches: what users pass as data, made uniform, and nothing about Fisher matrices.

A batch is a pair (inputs, targets) or a mapping with "labels"; data is one batch or anything that can be iterated again
and again. A `Batch` can be cut by example and moved, and knows how to call a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fisherkit.errors import DataError, InvalidTypeError, ModelError, NonFiniteError
from fisherkit.randomness import untouched_rng

Data = Any
"""One batch, or a re-iterable of batches; documented at `FisherApproximation`."""


def _map(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: _map(value, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return tuple(_map(value, function) for value in tree)
    return tree


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _leaves(value)


@dataclass(frozen=True)
class Batch:
    """Arguments for the model and the targets, examples along axis 0.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        targets: labels or values; None for unlabelled data.
        size: B.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Tensor | None
    size: int

    @classmethod
    def of(cls, raw: Any, call: str) -> Batch:
        """From what the user's data yields.

        Raises:
            InvalidTypeError: neither a pair nor a mapping.
            DataError: no tensors, no labels, no examples, or sizes that differ.
        """
        if isinstance(raw, Mapping):
            if "labels" not in raw:
                raise DataError(
                    call=call,
                    got=f"a mapping with keys {sorted(map(str, raw))}",
                    expected='one with "labels"',
                    try_='a pair (inputs, targets), or rename the key to "labels"',
                )
            inputs: Any = {key: value for key, value in raw.items() if key != "labels"}
            targets = raw["labels"]
        elif isinstance(raw, (tuple, list)) and len(raw) == 2:
            inputs, targets = raw
        else:
            raise InvalidTypeError(
                call=call,
                got=f"a batch of type {type(raw).__name__}",
                expected='a pair (inputs, targets) or a mapping with "labels"',
                try_="[(x, y)] for a list of batches, (x, y) for one",
            )
        if targets is not None and not isinstance(targets, Tensor):
            raise InvalidTypeError(
                call=call,
                got=f"targets of type {type(targets).__name__}",
                expected="a tensor",
                try_="torch.as_tensor(targets)",
            )
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
        if isinstance(inputs, (tuple, list)):
            args = tuple(inputs)
        sizes = [leaf.shape[0] for leaf in _leaves((args, kwargs)) if leaf.ndim > 0]
        if not sizes:
            raise DataError(call=call, got="inputs without a tensor", expected="tensors with the examples along axis 0")
        size = sizes[0]
        if size == 0:
            raise DataError(call=call, got="a batch with no example", expected="at least one")
        if targets is not None and (targets.ndim == 0 or targets.shape[0] != size):
            raise DataError(
                call=call,
                got=f"inputs with {size} examples and targets of shape {list(targets.shape)}",
                expected=f"{size} targets",
                why="both have the examples along axis 0",
            )
        return cls(args, kwargs, targets, size)

    @property
    def raw(self) -> tuple[Any, Tensor | None]:
        """As a pair that a user could have passed."""
        return (self.kwargs if self.kwargs else self.args), self.targets

    def take(self, index: Tensor | slice) -> Batch:
        """Some of the examples; tensors without the batch's leading size are passed as they are."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[index] if tensor.ndim > 0 and tensor.shape[0] == self.size else tensor

        count = index.shape[0] if isinstance(index, Tensor) else len(range(*index.indices(self.size)))
        targets = None if self.targets is None else self.targets[index]
        return Batch(_map(self.args, cut), _map(self.kwargs, cut), targets, count)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        targets = None if self.targets is None else move(self.targets)
        return Batch(_map(self.args, move), _map(self.kwargs, move), targets, self.size)

    def shifted(self, ignore_index: int) -> Batch:
        """Labels moved one position to the left, as a causal language model's loss pairs them with its outputs."""
        if self.targets is None:
            return self
        last = torch.full_like(self.targets[:, :1], ignore_index)
        return Batch(self.args, self.kwargs, torch.cat([self.targets[:, 1:], last], 1), self.size)

    def leaves(self) -> tuple[list[Tensor], Callable[[list[Tensor]], Batch]]:
        """The tensors that have the batch axis, and the function that puts others in their place."""
        batched = [leaf for leaf in _leaves((self.args, self.kwargs)) if leaf.ndim > 0 and leaf.shape[0] == self.size]

        def rebuild(replacements: list[Tensor]) -> Batch:
            pending = iter(replacements)

            def swap(leaf: Tensor) -> Tensor:
                return next(pending) if leaf.ndim > 0 and leaf.shape[0] == self.size else leaf

            return Batch(_map(self.args, swap), _map(self.kwargs, swap), None, replacements[0].shape[0])

        return batched, rebuild

    def call(self, model: Callable[..., Any]) -> Tensor:
        """The model's outputs for this batch.

        Raises:
            ModelError: the model returns neither a tensor nor something with ``logits``.
        """
        output = model(*self.args, **self.kwargs)
        if isinstance(output, Tensor):
            return output
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            return logits
        raise ModelError(
            call="the model's forward pass",
            got=f"a {type(output).__name__}",
            expected="a tensor of outputs, or an object with .logits",
            try_="a small nn.Module around the model whose forward returns the logits",
        )


class Source:
    """Data that can be read again and again in the same order without touching the global random generators.

    Args:
        data: one batch or a re-iterable of batches.
    """

    def __init__(self, data: Data) -> None:
        is_pair = (
            isinstance(data, (tuple, list)) and len(data) == 2 and (data[1] is None or isinstance(data[1], Tensor))
        )
        is_batch = is_pair or isinstance(data, Mapping)
        if not is_batch and not isinstance(data, Iterable):
            raise InvalidTypeError(
                call="data",
                got=f"a {type(data).__name__}",
                expected="one batch (inputs, targets), or a list or DataLoader of batches",
            )
        if not is_batch and iter(data) is data:
            raise DataError(
                call="data",
                got=f"a {type(data).__name__}, which can be read only once",
                expected="something that can be iterated again and again",
                why="streamed products and EKFAC read the data more than once",
                try_="list(data), or a DataLoader",
            )
        self._first: Batch | None = None
        self.batches: Iterable[Any] = [data] if is_batch else data
        # A shuffling loader draws its order from the global generator: every pass starts from the same state.
        self._rng_state = torch.get_rng_state()
        own = getattr(data, "generator", None) if isinstance(data, DataLoader) else None
        self._own_generator: torch.Generator | None = own
        self._own_state = own.get_state() if own is not None else None

    def __iter__(self) -> Iterator[Batch]:
        """One pass over the batches; the random generators are the caller's own whenever a batch is handed over."""
        state, own_state = self._rng_state, self._own_state
        iterator: Iterator[Any] | None = None
        for number in itertools.count():
            with untouched_rng([], state), self._own(own_state):
                iterator = iter(self.batches) if iterator is None else iterator
                try:
                    raw = next(iterator)
                except StopIteration:
                    return
                state = torch.get_rng_state()
                own_state = None if self._own_generator is None else self._own_generator.get_state()
            yield Batch.of(raw, f"data, batch {number}")

    @contextmanager
    def _own(self, state: Tensor | None) -> Iterator[None]:
        """The loader's own generator at our place in its stream, and back to the caller's afterwards."""
        if self._own_generator is None or state is None:
            yield
            return
        before = self._own_generator.get_state()
        self._own_generator.set_state(state)
        try:
            yield
        finally:
            self._own_generator.set_state(before)

    def first(self) -> Batch:
        """The first batch.

        Raises:
            DataError: there is none.
        """
        if self._first is None:
            self._first = next(iter(self), None)
        if self._first is not None:
            return self._first
        raise DataError(call="data", got="no batch", expected="at least one example")

    def count(self) -> int:
        """Number of examples, read off the data's length where it has one, else by a pass over it."""
        if isinstance(self.batches, DataLoader) and isinstance(self.batches.dataset, Sized):
            return len(self.batches.dataset)
        return sum(batch.size for batch in self)

    def steps(self) -> int | None:
        """Number of batches if it is known, for progress bars."""
        return len(self.batches) if isinstance(self.batches, Sized) else None


def check_finite(z: Tensor, call: str) -> None:
    """Refuse outputs with NaN or infinity.

    Raises:
        NonFiniteError: naming the batch.
    """
    if not bool(torch.isfinite(z).all()):
        raise NonFiniteError(
            call=call,
            got="model outputs with NaN or infinite entries",
            expected="finite outputs",
            try_="check the inputs of this batch and the model's weights",
        )


def model_device(model: nn.Module, names: tuple[str, ...]) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the chosen parameters.

    Raises:
        ModelError: they are on several devices or of several dtypes.
    """
    parameters = dict(model.named_parameters())
    found = {(parameters[name].device, parameters[name].dtype) for name in names}
    if len(found) > 1:
        raise ModelError(
            call="params",
            got=f"parameters of {sorted(f'{d} {t}' for d, t in found)}",
            expected="one device and one dtype",
            why="a Fisher is one operator over all of them",
            try_="params= to choose the parameters of one device and dtype, or model.to(...)",
        )
    return found.pop()


def is_causal(model: nn.Module) -> bool:
    """Whether a Hugging Face model computes its loss on labels shifted by one, by what it says of itself."""
    named = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    return named or getattr(model, "loss_type", None) == "ForCausalLM"
