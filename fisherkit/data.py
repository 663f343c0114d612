"""Batches: what users pass as data, made uniform, and nothing about Fisher matrices.

A batch is a pair (inputs, targets) or a mapping with "labels"; data is one batch or anything that can be iterated again
and again. A `Batch` can be cut by example and moved, and knows how to call a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from fisherkit.arithmetic import all_finite
from fisherkit.errors import DataError, InvalidTypeError, ModelError, NonFiniteError
from fisherkit.randomness import rng_state, untouched_rng

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
        axes: which of the inputs' tensors have the batch axis, by their place; the first batch decides for all.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Tensor | None
    size: int
    axes: dict[int, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: Any, call: str, axes: dict[int, bool] | None = None) -> Batch:
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
                try_="[(x, y)] for a list of batches, (x, y) for one; torch.as_tensor for arrays",
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
        size = targets.shape[0] if targets is not None and targets.ndim > 0 and targets.shape[0] in sizes else sizes[0]
        if axes is not None and axes:
            own = [leaf.shape[0] for i, leaf in enumerate(_leaves((args, kwargs))) if axes.get(i)]
            size = own[0] if own else size
        if size == 0:
            raise DataError(call=call, got="a batch with no example", expected="at least one")
        if targets is not None and (targets.ndim == 0 or targets.shape[0] != size):
            raise DataError(
                call=call,
                got=f"inputs with {size} examples and targets of shape {list(targets.shape)}",
                expected=f"{size} targets",
                why="both have the examples along axis 0",
            )
        if not axes:
            axes = {i: leaf.ndim > 0 and leaf.shape[0] == size for i, leaf in enumerate(_leaves((args, kwargs)))}
        return cls(args, kwargs, targets, size, axes)

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """From the arguments of a model's call, which may have labels among them.

        Raises:
            DataError: no tensor, or no examples.
        """
        call = "the model's forward pass"
        leaves = list(_leaves((args, kwargs)))
        sizes = [leaf.shape[0] for leaf in leaves if leaf.ndim > 0]
        if not sizes or sizes[0] == 0:
            raise DataError(call=call, got="no example", expected="tensors with the examples along axis 0")
        axes = {i: leaf.ndim > 0 and leaf.shape[0] == sizes[0] for i, leaf in enumerate(leaves)}
        return cls(args, kwargs, None, sizes[0], axes)

    def _map_batched(self, function: Callable[[Tensor], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        number = itertools.count()

        def one(leaf: Tensor) -> Tensor:
            return function(leaf) if self.axes[next(number)] else leaf

        return _map(self.args, one), _map(self.kwargs, one)

    @property
    def raw(self) -> tuple[Any, Tensor | None]:
        """As a pair that a user could have passed."""
        return (self.kwargs if self.kwargs else self.args), self.targets

    def take(self, index: Tensor | slice) -> Batch:
        """Some of the examples; tensors without the batch's leading size are passed as they are."""
        count = index.shape[0] if isinstance(index, Tensor) else len(range(*index.indices(self.size)))
        targets = None if self.targets is None else self.targets[index]
        return Batch(*self._map_batched(lambda tensor: tensor[index]), targets, count, self.axes)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        targets = None if self.targets is None else move(self.targets)
        return Batch(_map(self.args, move), _map(self.kwargs, move), targets, self.size, self.axes)

    def shifted(self, ignore_index: int) -> Batch:
        """Labels moved one position to the left, as a causal language model's loss pairs them with its outputs."""
        if self.targets is None:
            return self
        if self.targets.ndim < 2:
            raise DataError(
                call="data",
                got=f"labels of shape {list(self.targets.shape)} to be shifted",
                expected="[B, T]",
                why="shift_labels pairs every position with the next label",
                try_="shift_labels=False",
            )
        last = torch.full_like(self.targets[:, :1], ignore_index)
        return Batch(self.args, self.kwargs, torch.cat([self.targets[:, 1:], last], 1), self.size, self.axes)

    def leaves(self) -> tuple[list[Tensor], Callable[[list[Tensor]], Batch]]:
        """The tensors that have the batch axis, and the function that puts others in their place."""
        batched = [leaf for i, leaf in enumerate(_leaves((self.args, self.kwargs))) if self.axes[i]]

        def rebuild(replacements: list[Tensor]) -> Batch:
            pending = iter(replacements)

            return Batch(*self._map_batched(lambda _: next(pending)), None, replacements[0].shape[0], self.axes)

        return batched, rebuild

    def call(self, model: Callable[..., Any]) -> Tensor:
        """The model's outputs for this batch.

        Raises:
            ModelError: as in `outputs_of`.
        """

        def fresh(leaf: Tensor) -> Tensor:
            # Layers that work in place must not reach the caller's tensors, and rows, which keep layers' inputs, must
            # not change when the caller refills them.
            return leaf.clone()

        return outputs_of(model(*_map(self.args, fresh), **_map(self.kwargs, fresh)))


def outputs_of(output: Any) -> Tensor:
    """The outputs z in what a model returns.

    Raises:
        ModelError: it is neither a tensor nor something with ``logits``.
    """
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
                try_="DataLoader(data, batch_size=...) for a data set",
            )
        if not is_batch and isinstance(data, Iterator):
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
        self._rng_state = rng_state()
        self._generators = _generators(data) if isinstance(data, DataLoader) else []
        self._own_states = [generator.get_state() for generator in self._generators]
        self._axes: dict[int, bool] | None = None

    def __iter__(self) -> Iterator[Batch]:
        """One pass over the batches; the random generators are the caller's own whenever a batch is handed over."""
        state, own_states = self._rng_state, self._own_states
        iterator: Iterator[Any] | None = None
        for number in itertools.count():
            with torch.inference_mode(False), untouched_rng([], state), self._own(own_states):
                iterator = iter(self.batches) if iterator is None else iterator
                try:
                    raw = next(iterator)
                except StopIteration:
                    return
                state = rng_state()
                own_states = [generator.get_state() for generator in self._generators]
            batch = Batch.of(raw, f"data, batch {number}", self._axes)
            self._axes = batch.axes
            yield batch

    @contextmanager
    def _own(self, states: list[Tensor]) -> Iterator[None]:
        """The loader's own generators at our place in their streams, and back to the caller's afterwards."""
        before = [generator.get_state() for generator in self._generators]
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
        try:
            yield
        finally:
            for generator, state in zip(self._generators, before, strict=True):
                generator.set_state(state)

    def numbered(self) -> Iterator[tuple[int, Batch]]:
        """One pass over the batches, each with its place among those that the user's data yields, for errors."""
        return enumerate(self)

    def first(self) -> Batch:
        """The first batch.

        Raises:
            DataError: there is none.
        """
        if self._first is None:
            # Two examples are needed to see whether examples interact.
            for batch in self:
                if self._first is None or batch.size > 1:
                    self._first = batch
                if batch.size > 1:
                    break
        if self._first is not None:
            return self._first
        raise DataError(call="data", got="no batch", expected="at least one example")

    def count(self) -> int:
        """Number of examples, read off the data's length where it has one, else by a pass over it."""
        loader = self.batches
        if isinstance(loader, DataLoader) and loader.batch_sampler is not None and isinstance(loader.dataset, Sized):
            return len(loader.dataset)
        return sum(batch.size for batch in self)

    def steps(self) -> int | None:
        """Number of batches if it is known, for progress bars."""
        try:
            return len(self.batches) if isinstance(self.batches, Sized) else None
        except TypeError:  # a loader of a stream has a length that raises
            return None


def _generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The loader's own generators: its own, its sampler's, its batch sampler's."""
    batch_sampler = loader.batch_sampler
    owners = [loader, loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}
    return list(found.values())


def refuse_shuffling(data: Data, call: str, role: str = "") -> None:
    """Refuse a loader that shuffles, where results are in the order of the data.

    Args:
        data: as users pass it.
        call: for errors.
        role: what the data are for, where the call has several.

    Raises:
        DataError: it shuffles.
    """
    if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
        raise DataError(
            call=call,
            got=f"a DataLoader that shuffles{role and f' as {role}'}",
            expected="one in a fixed order",
            why="an example is known by its place",
            try_="DataLoader(data, batch_size=..., shuffle=False)",
        )


def check_finite(z: Tensor, call: str) -> None:
    """Refuse outputs with NaN or infinity.

    Raises:
        NonFiniteError: naming the batch.
    """
    if not all_finite(z):
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
    # torch.compile, data parallelism and PEFT's adapters wrap the model; users subclass it.
    unwrap = getattr(model, "get_base_model", None)
    inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None) or (callable(unwrap) and unwrap())
    if isinstance(inner, nn.Module) and is_causal(inner):
        return True
    named = any(cls.__name__.endswith(("ForCausalLM", "LMHeadModel")) for cls in type(model).__mro__)
    return named or getattr(model, "loss_type", None) == "ForCausalLM"
