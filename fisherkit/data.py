"""Batches: what users pass as data, made uniform, and nothing about Fisher matrices.

A batch is a pair (inputs, targets) or a mapping with "labels"; data is one batch or anything that can be iterated again
and again. A `Batch` can be cut by example and moved, and knows how to call a model. A `Source` reads the data again and
again and compares every pass with the first.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import random
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    default_convert,
)

from fisherkit.arithmetic import all_finite
from fisherkit.errors import DataError, InvalidTypeError, ModelError, NonFiniteError, listed, warn
from fisherkit.model_inputs import DECODER_INPUTS, ModelInputs, virtual_tokens
from fisherkit.model_state import tensors_hash
from fisherkit.randomness import RngState, rng_state, untouched_rng

Data = Any
"""One batch, or a re-iterable of batches; documented at `FisherApproximation`."""

LABELS = ("labels", "label", "label_ids")
"""Names of the targets in a mapping, as Hugging Face's collators know them; the first that is there counts."""


def _named_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(_named_leaves(args, "inputs"), _named_leaves(kwargs, ""))


def _numbers(value: Any) -> bool:
    """Whether it is a list of numbers, or of such lists."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_numbers(v) for v in value)
    return isinstance(value, (bool, int, float, np.number, np.bool_))


def _labelled(raw: Any) -> dict[Any, Any] | None:
    """A batch whose fields have names, as a mapping; None of any other."""
    if isinstance(raw, Mapping) or _is_dataclass(raw):
        return _fields_of(raw)
    names = getattr(raw, "_fields", ())
    if isinstance(raw, tuple) and len(names) > 2 and any(name in names for name in LABELS):
        return _fields_of(raw)
    return None


_STACKED = (
    "(x, torch.stack((y, variance), -1)) for nn.GaussianNLLLoss, by a collate_fn of the DataLoader or once before it"
)
SHARED = (
    "what all examples share as a buffer of the model, or by a small nn.Module around the model that holds it; "
    "tensor.expand(B, *tensor.shape) if the model takes one for each example"
)
"""Advice on inputs that all examples share."""


@dataclass(frozen=True)
class Batch:
    """Arguments for the model and the targets, ``size`` examples along axis 0; targets None for unlabelled data.

    ``axes`` says which of the inputs' tensors have the batch axis, by their place; the first batch decides for all.
    ``place`` is its own among all batches, for errors.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Tensor | None
    size: int
    axes: dict[int, bool] = field(default_factory=dict)
    place: str = "data, batch 0"

    @classmethod
    def of(
        cls, raw: Any, call: str, axes: dict[int, bool] | None = None, model_inputs: ModelInputs | None = None
    ) -> Batch:
        """From what a user's data yields; ``axes`` says which tensors have the batch axis, as other batches told."""
        model_inputs = ModelInputs() if model_inputs is None else model_inputs
        inputs, targets = _inputs_and_targets(raw, call, model_inputs)
        targets = _checked_targets(targets, call)
        inputs = _map_ends(inputs, _as_tensor)
        args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
        if isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):
            args = tuple(inputs)
        if kwargs:
            kwargs = model_inputs.taken(kwargs, call)
        if any(isinstance(arg, PackedSequence) for arg in (*args, *kwargs.values())):
            raise InvalidTypeError(
                call, "a PackedSequence as input", "a padded tensor, and the lengths beside it",
                why="a packed sequence holds its examples' positions between each other",
                try_="pack_padded_sequence in the model's forward",
            )  # fmt: skip
        token_ids = targets is not None and targets.ndim >= 2 and not targets.is_floating_point()
        if model_inputs.encoder_decoder and token_ids and not kwargs.keys() & {"labels", *DECODER_INPUTS}:
            kwargs["labels"] = targets  # of which the model makes its decoder's inputs
        names = dict(enumerate(_named_inputs(args, kwargs)))
        sizes = [leaf.shape[0] for _, leaf in names.values() if leaf.ndim > 0]
        if not sizes:
            raise DataError(
                call, "inputs without a tensor", "tensors with the examples along axis 0",
                why="examples are told apart along that axis", try_="a collate_fn that makes tensors of them",
            )  # fmt: skip
        size = targets.shape[0] if targets is not None and targets.ndim > 0 and targets.shape[0] in sizes else sizes[0]
        if axes:
            own = [leaf.shape[0] for i, (_, leaf) in names.items() if axes.get(i) and leaf.ndim > 0]
            size = own[0] if own and size not in own else size
        if size == 0:
            raise DataError(
                call, "a batch with no example", "at least one", why="nothing can be averaged over none",
                try_="leaving empty batches out, for example in the loader's batch_sampler",
            )  # fmt: skip
        if targets is not None and (targets.ndim == 0 or targets.shape[0] != size):
            raise DataError(
                call, f"inputs with {size} examples and targets of shape {list(targets.shape)}", f"{size} targets",
                why="both have the examples along axis 0",
            )  # fmt: skip
        if not axes or len(axes) != len(names):
            axes = {i: leaf.ndim > 0 and leaf.shape[0] == size for i, (_, leaf) in names.items()}
        odd = [(name, leaf) for i, (name, leaf) in names.items() if axes[i] and leaf.shape[:1] != (size,)]
        if odd:
            raise DataError(
                call, f"input {odd[0][0]!r} of shape {list(odd[0][1].shape)} in a batch of {size} examples",
                f"{size} along axis 0",
                why="in an earlier batch it had as many as there were examples, so it was taken to have one an example",
                try_=SHARED,
            )  # fmt: skip
        return cls(args, kwargs, targets, size, axes, call)

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """From the arguments of a model's call, which may have labels among them."""
        call = "the model's forward pass"
        leaves = [leaf for _, leaf in _named_inputs(args, kwargs)]
        sizes = [leaf.shape[0] for leaf in leaves if leaf.ndim > 0]
        if not sizes or sizes[0] == 0:
            raise DataError(call, "no example", "tensors with the examples along axis 0")
        axes = {i: leaf.ndim > 0 and leaf.shape[0] == sizes[0] for i, leaf in enumerate(leaves)}
        return cls(args, kwargs, None, sizes[0], axes)

    def _mapped(self, function: Callable[[Tensor], Tensor], **changes: Any) -> Batch:
        """With a function of every input in its place, and other changes."""
        args, kwargs = map_tensors((self.args, self.kwargs), function)
        return dataclasses.replace(self, args=args, kwargs=kwargs, **changes)

    def _map_batched(self, function: Callable[[Tensor], Tensor], **changes: Any) -> Batch:
        """The same of the inputs that have the batch axis."""
        has = iter(self.axes.values())
        return self._mapped(lambda leaf: function(leaf) if next(has) else leaf, **changes)

    @property
    def raw(self) -> tuple[Any, Tensor | None]:
        """Inputs and targets as a pair that a user could have passed."""
        return (self.args if self.args else self.kwargs), self.targets

    @cached_property
    def inputs(self) -> list[Tensor]:
        """The inputs' tensors."""
        return [leaf for _, leaf in _named_inputs(self.args, self.kwargs)]

    @property
    def names(self) -> list[str]:
        """What the inputs' tensors are called, in their order."""
        return [name for name, _ in _named_inputs(self.args, self.kwargs)]

    def digest(self) -> str:
        """A hash of all tensors, in which their order and that of the examples count."""
        leaves = [*self.inputs, *([] if self.targets is None else [self.targets])]
        return tensors_hash({f"{place:06d}": leaf for place, leaf in enumerate(leaves)})

    def take(self, index: Tensor | slice) -> Batch:
        """Some of the examples; tensors without the batch's leading size are passed as they are."""
        count = index.shape[0] if isinstance(index, Tensor) else len(range(*index.indices(self.size)))
        if isinstance(index, slice) and count == self.size and (index.step or 1) > 0:
            return self
        targets = None if self.targets is None else self.targets[index]
        return self._map_batched(lambda tensor: tensor[index], targets=targets, size=count)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        if all(leaf.device == device for leaf in (*self.inputs, *([] if self.targets is None else [self.targets]))):
            return self
        return self._mapped(move, targets=None if self.targets is None else move(self.targets))

    def aligned(self, model: nn.Module, z: Tensor, *, shift: bool, ignore_index: int) -> Batch:
        """Labels beside the outputs z that they belong to.

        Shifted by one for causal language models; ``ignore_index`` for positions that a learnt prompt put in front.

        Raises:
            DataError: labels to be shifted that have no positions.
        """
        targets = self.targets
        if targets is None:
            return self
        extra = z.shape[1] - targets.shape[1] if targets.ndim == 2 and z.ndim == 3 else 0
        if extra > 0 and extra == virtual_tokens(model):
            targets = torch.cat([targets.new_full((self.size, extra), ignore_index), targets], 1)
        if shift and targets.ndim < 2:
            raise DataError(
                "data", f"labels of shape {list(targets.shape)} to be shifted", "[B, T]",
                why="with shift_labels every position is paired with the next label", try_="shift_labels=False",
            )  # fmt: skip
        if shift:
            targets = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], ignore_index)], 1)
        return self if targets is self.targets else dataclasses.replace(self, targets=targets)

    def rebuilt(self, batched: list[Tensor]) -> Batch:
        """With others in the place of the tensors that have the batch axis, and without targets."""
        pending = iter(batched)
        return self._map_batched(lambda _: next(pending), targets=None, size=batched[0].shape[0])

    @cached_property
    def batched(self) -> list[Tensor]:
        """The inputs' tensors that have the batch axis."""
        return [leaf for i, leaf in enumerate(self.inputs) if self.axes[i]]

    def call(self, model: Callable[..., Any]) -> Tensor:
        """The model's outputs for this batch."""
        return self.fresh().handed(model)

    def fresh(self) -> Batch:
        """With copies of the inputs: layers work in place, rows keep layers' inputs, and callers refill them."""
        return self._mapped(Tensor.clone)

    def detached(self) -> Batch:
        """As `fresh`, without the graphs that inputs are made of."""
        return self._mapped(lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))

    def handed(self, model: Callable[..., Any]) -> Tensor:
        """As `call`, for a batch that the model may write to."""
        return outputs_of(model(*self.args, **self.kwargs))


def outputs_of(output: Any) -> Tensor:
    """The outputs z in what a model returns."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise ModelError(
        "the model's forward pass", f"a {type(output).__name__}", "a tensor of outputs, or an object with .logits",
        try_="a small nn.Module around the model whose forward returns the logits",
    )  # fmt: skip


def _inputs_and_targets(raw: Any, call: str, model_inputs: ModelInputs) -> tuple[Any, Any]:
    """What a user's batch says is for the model, and its targets."""
    fields = _labelled(raw)
    if fields is not None:
        own = (model_inputs.names or frozenset()) - {"labels"}  # a field that the model takes by that name is an input
        name = next((name for name in LABELS if name in fields and name not in own), None)
        if name is None:
            raise DataError(
                call, f"a mapping with keys {sorted(map(str, fields))}", 'one with "labels"',
                try_='a pair (inputs, targets), or rename the key to "labels"',
            )  # fmt: skip
        return {key: value for key, value in fields.items() if key != name}, fields[name]
    if isinstance(raw, (tuple, list)) and len(raw) == 2:
        names = getattr(raw, "_fields", ())
        return (raw[1], raw[0]) if names and names[0] in LABELS else (raw[0], raw[1])
    if isinstance(raw, (tuple, list)) and len(raw) > 2:
        required = model_inputs.required
        if required is not None and len(required) == len(raw) - 1:
            return tuple(raw[:-1]), raw[-1]
        takes = "" if required is None else f", and the model's forward pass needs {len(required)} input(s)"
        raise InvalidTypeError(
            call, f"a batch of type {type(raw).__name__} with {len(raw)} parts",
            'a pair (inputs, targets) or a mapping with "labels"',
            why=f"nothing tells which of them are inputs and targets{takes}",
            try_=f"((a, b), y) for inputs a and b by place, ({{name: a, ...}}, y) by name; {_STACKED}",
        )  # fmt: skip
    raise InvalidTypeError(
        call, f"a batch of type {type(raw).__name__}", 'a pair (inputs, targets) or a mapping with "labels"',
        try_="[(x, y)] for a list of batches, (x, y) for one; torch.as_tensor for arrays",
    )  # fmt: skip


def _checked_targets(targets: Any, call: str) -> Tensor | None:
    if isinstance(targets, (list, tuple)) and _numbers(targets):
        with contextlib.suppress(TypeError, ValueError):  # lists of several lengths
            targets = torch.as_tensor(np.asarray(targets))
    targets = _as_tensor(targets)
    if targets is not None and not isinstance(targets, Tensor):
        raise InvalidTypeError(
            call, f"targets of type {type(targets).__name__}", "a tensor, an array or lists of numbers",
            try_="torch.as_tensor(targets)"
            + (f"; {_STACKED}" if isinstance(targets, (list, tuple)) and len(targets) == 2 else ""),
        )  # fmt: skip
    return targets


class Source:
    """Data that can be read again and again in the same order without touching the global random generators.

    One batch, or what can be iterated again and again, for a model if one is called; ``listed`` if reading them runs
    nobody's code. The first pass records a hash of each batch (`Batch.digest`), and later ones are compared with it.

    Cost: a hash reads every number of a batch twice, where it lies, and makes a few sums of it.
    """

    def __init__(self, data: Data, model: nn.Module | None = None) -> None:
        is_batch = _is_batch(data)
        if not is_batch and not isinstance(data, Iterable):
            raise InvalidTypeError(
                "data", f"a {type(data).__name__}", "one batch (inputs, targets), or a list or DataLoader of batches",
                try_="a DataLoader of it, for a data set",
            )  # fmt: skip
        if not is_batch and isinstance(data, Iterator):
            raise DataError(
                "data", f"a {type(data).__name__}, which can be read only once",
                "something that can be iterated again and again",
                why="streamed products and EKFAC read the data more than once", try_="list(data), or a DataLoader",
            )  # fmt: skip
        self._first: Batch | None = None
        self._made: tuple[Any, Batch | None] = None, None
        self.batches: Iterable[Any] = [data] if is_batch else data
        self.model = model
        self._model_inputs = ModelInputs() if model is None else ModelInputs.of(model)
        # A shuffling loader draws its order from the global generator: every pass starts from the same state.
        self._generators = _generators_of(data) if isinstance(data, DataLoader) else []
        # What a list hands over runs nobody's code, and so moves no generator and changes no model.
        self.listed = type(self.batches) is list or type(self.batches) is tuple
        self._start = None if self.listed else rng_state(self._generators)
        self._axes: dict[int, bool] | None = None
        self._digests: list[str] = []
        self._whole, self._origin = False, ""
        self._count: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self._compared(self.once())

    def once(self, state: RngState | None = None, *, settled: bool = True) -> Iterator[Batch]:
        """A pass that is compared with no other; its generators start in a state, or where the source found them.

        ``settled`` if `first` tells of all batches which inputs all examples share; else each for itself.
        """
        for number, raw in enumerate(self.batches if self.listed else self._drawn(state)):
            yield self._batch(raw, number, self._axes if settled else None)

    def _drawn(self, state: RngState | None) -> Iterator[Any]:
        """What the user's data yields, with generators of its own for as long as it runs."""
        state = self._start if state is None else state
        iterator: Iterator[Any] | None = None
        while True:
            with torch.inference_mode(False), untouched_rng([], state, self._generators):
                iterator = iter(self.batches) if iterator is None else iterator
                try:
                    raw = next(iterator)
                except StopIteration:
                    return
                state = rng_state(self._generators)
            yield raw

    def _batch(self, raw: Any, number: int, axes: dict[int, bool] | None) -> Batch:
        """A batch; of the first pair of tensors, which cannot be another pair since, the one that was made before."""
        raw_before, batch = self._made
        if batch is not None and number == 0 and raw_before is raw and batch.axes is axes:
            return batch
        batch = Batch.of(raw, f"data, batch {number}", axes, self._model_inputs)
        if number == 0 and type(raw) is tuple and all(type(part) is Tensor for part in raw):
            self._made = raw, batch
        return batch

    def _compared(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        number = 0
        for number, batch in enumerate(batches, 1):
            digest = batch.digest()
            if number > len(self._digests) and not self._whole:
                self._digests.append(digest)
            elif number > len(self._digests) or digest != self._digests[number - 1]:
                raise _changed(number - 1, self._origin)
            yield batch
        if number < len(self._digests):
            raise _changed(number, self._origin)
        self._whole = True

    @property
    def digests(self) -> list[str]:
        """Of all batches, once a pass that is compared has read them."""
        return list(self._digests)

    def expect(self, digests: list[str], origin: str) -> None:
        """Compare the next passes with these digests, which something of that name (``origin``) has from before."""
        self._digests, self._whole, self._origin = list(digests), True, origin

    def refuse_shuffling(self, call: str, role: str = "") -> None:
        """Refuse a loader whose order is not known to be fixed, where results are in the order of the data."""
        got = _disorder(self.batches)
        if got:
            raise DataError(
                call, f"{got}{role and f' as {role}'}", "one in a fixed order", why="an example is known by its place",
                try_="DataLoader(data, shuffle=False), or sampler=list(sampler) where places in that order are meant",
            )  # fmt: skip

    def keep_order(self, call: str) -> None:
        """Refuse what `refuse_shuffling` refuses, and later every pass in another order than this one.

        Lists and loaders without a collator of the user's own cost nothing; others are read once, with the global
        random generators elsewhere than in the passes to come.
        """
        self.refuse_shuffling(call)
        if not _in_order(self.batches):
            for _ in self._compared(self.once(_elsewhere(self._generators))):
                pass

    def numbered(self) -> Iterator[tuple[int, Batch]]:
        """One pass over the batches, each with its place among those that the user's data yields, for errors."""
        return enumerate(self)

    def first(self) -> Batch:
        """The first batch with more than one example, else the first."""
        first = self.beginning() if self._first is None else self._first
        if first is None:
            raise no_batch()
        return first

    def beginning(self) -> Batch | None:
        """The same, or None."""
        if self._first is None:
            # Two examples are needed to see whether examples interact.
            for batch in self.once():
                if self._first is None or batch.size > 1:
                    self._first = batch
                if batch.size > 1:
                    break
        if self._first is None:
            return None
        if self._axes is None and self._first.size > 1:  # of one example, nothing tells what all examples share
            self._axes = self._first.axes
        return self._first

    def shared(self, batch: Batch) -> None:
        """Read the inputs as this batch does: its axes say which of them all examples share."""
        self._first, self._axes = batch, batch.axes

    @property
    def recorded(self) -> bool:
        """Whether there is a pass to compare others with."""
        return self._whole

    def count(self) -> int:
        """Number of examples, read off the loader where it says it, else by a pass over the data."""
        if self._count is None:
            known = _loaded(self.batches)
            self._count = sum(batch.size for batch in self.once()) if known is None else known
        return self._count

    def expected(self) -> int | None:
        """Number of examples as far as it is known without reading the data, of batches as long as the first."""
        known = _loaded(self.batches) if self._count is None else self._count
        steps = self.steps()
        return steps * self.first().size if known is None and steps is not None else known

    def steps(self) -> int | None:
        """Number of batches if it is known, for progress bars."""
        try:
            return len(self.batches) if isinstance(self.batches, Sized) else None
        except TypeError:  # a loader of a stream has a length that raises
            return None


class CutSource(Source):
    """A source's data in other batches: ``cut`` makes them of its own, with the numbers that errors have for these."""

    def __init__(
        self, source: Source, cut: Callable[[Iterator[tuple[int, Batch]]], Iterator[tuple[int, Batch]]]
    ) -> None:
        super().__init__(source.batches, source.model)
        self.source, self.cut = source, cut

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, batch in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Batch]]:
        """One pass, which the source compares with its first."""
        return self.cut(self.source.numbered())

    def steps(self) -> None:
        """None: how many batches there will be is not known."""


def _is_batch(data: Data) -> bool:
    if _is_dataclass(data):
        return not isinstance(data, Iterable)
    if _labelled(data) is not None:
        return True
    if not isinstance(data, (tuple, list)) or len(data) < 2:
        return False
    # No batch is a bare tensor.
    return any(isinstance(part, (Tensor, np.ndarray)) for part in data) or (
        len(data) == 2 and (data[1] is None or _numbers(data[1]))
    )


def _changed(number: int, origin: str) -> DataError:
    if origin:
        return DataError(
            f"data, batch {number}", f"other examples, or in another order, than those that {origin} is of",
            "the same data in the same batches", why="finished parts and those to come belong together",
            try_=f"the data as they were; else remove {origin}, and all parts are made again",
        )  # fmt: skip
    return DataError(
        f"data, batch {number}", "data that change between passes: other examples than before, or in another order",
        "the same in every pass", why="this is computed in several passes over the data, whose results belong together",
        try_="list(data), which keeps what was drawn; a data set without random augmentation, not shuffled; a larger "
        'memory_budget=, or storage="rows" of a full Fisher, with which one pass is enough',
    )  # fmt: skip


def _elsewhere(others: Sequence[torch.Generator]) -> RngState:
    """A state of the global generators that has nothing to do with where they are, and of others as they are."""
    with untouched_rng([]):
        seed = int(torch.randint(2**31, ()))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed accelerators too
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  users' code draws from it
        return rng_state(others)


def no_batch(where: str = "") -> DataError:
    """Of data, or of all processes' data, that have nothing in them."""
    return DataError(
        "data", f"no batch{where}", "at least one example", why="there is nothing to average over",
        try_="a list of batches or a DataLoader: a generator that has run before yields none",
    )  # fmt: skip


def warn_of_unshifted(batch: Batch, labels: Tensor, mask: Tensor) -> None:
    """Warn of labels ``[B, T]`` that are the inputs at their own places, as a causal model's before the shift."""
    # An encoder-decoder is given its labels.
    if labels.is_floating_point() or labels.numel() < 8 or labels.shape[1] < 2 or "labels" in batch.kwargs:
        return
    ids = (x for x in batch.inputs if x.shape == labels.shape and x.dtype in (torch.int64, torch.int32))
    if any(bool(((x == labels) | ~mask).all()) for x in ids):
        warn(
            f"{batch.place}: labels are the model's input ids, each at its own position, which is not what a model of "
            "the next token predicts. Try: shift_labels=True for such a model; shift_labels=False if this is meant."
        )


def check_finite(z: Tensor, call: str) -> None:
    """Refuse outputs with NaN or infinity."""
    if not all_finite(z):
        raise NonFiniteError(
            call, "model outputs with NaN or infinite entries", "finite outputs",
            try_="check the inputs of this batch and the model's weights",
        )  # fmt: skip


def model_device(
    model: nn.Module, names: tuple[str, ...], own: Mapping[str, nn.Parameter] | None = None
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the chosen parameters; ``own`` are the model's parameters by name, if they are known.

    Raises:
        ModelError: there is not one of each, or processes have shards of parameters.
    """
    parameters = dict(model.named_parameters()) if own is None else own
    sharded = [name for name in names if hasattr(parameters[name], "full_tensor")]  # what DTensors have
    if sharded:
        raise ModelError(
            "params", f"parameters of which each process has a shard (DTensor): {listed(sharded, 3)}",
            "whole ones, or shards of `fully_shard`", why="rows are made of layers whose weights are at hand",
            try_="a model of the full weights: torch.distributed.checkpoint.state_dict.get_model_state_dict with "
            "StateDictOptions(full_state_dict=True)",
        )  # fmt: skip
    found = {(parameters[name].device, parameters[name].dtype) for name in names}
    if len(found) > 1:
        raise ModelError(
            "params", f"parameters of {sorted(f'{d} {t}' for d, t in found)}", "one device and one dtype",
            why="a Fisher is one operator over all of them",
            try_="params= to choose the parameters of one device and dtype, or model.to(...)",
        )  # fmt: skip
    return found.pop()


# -- nested inputs: mappings, lists, tuples, named tuples and dataclasses; anything else is an end ---------------------


def _map_ends(tree: Any, function: Callable[[Any], Any]) -> Any:
    """A function of every tensor or other end of nested mappings, lists, tuples and dataclasses, as such."""
    if isinstance(tree, (list, tuple)):
        values = [_map_ends(value, function) for value in tree]
        if hasattr(tree, "_fields"):
            return tree._make(values)  # type: ignore[union-attr]
        return values if isinstance(tree, list) else tuple(values)
    if isinstance(tree, Tensor) or not (isinstance(tree, Mapping) or _is_dataclass(tree)):
        return function(tree)
    new = {name: _map_ends(value, function) for name, value in _fields_of(tree, whole=True).items()}
    if type(tree) is dict or (isinstance(tree, Mapping) and not isinstance(tree, (dict, UserDict))):
        return new
    made = copy.copy(tree)  # never made anew: a class of someone's own may want more than its fields, or change them
    for name, value in new.items():
        if isinstance(tree, Mapping):
            made[name] = value
        else:
            object.__setattr__(made, name, value)
    return made


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """A function of every tensor in nested arguments; all else as it is."""
    return _map_ends(tree, lambda value: function(value) if isinstance(value, Tensor) else value)


def _named_leaves(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        for place, value in enumerate(tree):
            yield from _named_leaves(value, f"{name}[{place}]")
    elif isinstance(tree, Mapping) or hasattr(tree, "_fields") or _is_dataclass(tree):
        for key, value in _fields_of(tree, whole=True).items():
            yield from _named_leaves(value, f"{name}.{key}" if name else str(key))


def _is_dataclass(tree: Any) -> bool:
    return dataclasses.is_dataclass(tree) and not isinstance(tree, type)


def _fields_of(tree: Any, *, whole: bool = False) -> dict[Any, Any]:
    """The fields of a mapping, a named tuple or a dataclass; if ``whole``, with all other attributes of the last."""
    if isinstance(tree, Mapping):
        return dict(tree)
    if hasattr(tree, "_fields"):
        return {name: getattr(tree, name) for name in tree._fields}
    fields = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree) if hasattr(tree, f.name)}
    return fields | getattr(tree, "__dict__", {}) if whole else fields


def _as_tensor(value: Any) -> Any:
    """An array of numbers as a tensor; all else as it is."""
    return torch.as_tensor(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else value


# -- what a loader says of itself; nothing is iterated over ------------------------------------------------------------


def _generators_of(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The loader's own generators: its own, its sampler's, its batch sampler's."""
    batch_sampler = loader.batch_sampler
    owners = [loader, loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}
    return list(found.values())


def _disorder(data: object) -> str:
    """What is wrong with the order of a loader; nothing if it is fixed, or if the data are no loader of a data set."""
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return ""
    sampler: object = data.sampler if data.batch_sampler is None else data.batch_sampler
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    drawn = isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler))
    if isinstance(sampler, DistributedSampler):
        drawn, fixed = sampler.shuffle, not sampler.shuffle and sampler.num_replicas == 1
    else:
        written_down = isinstance(sampler, (list, tuple, range, Tensor, np.ndarray))
        fixed = type(sampler) is SequentialSampler or written_down
    if drawn:
        return "a DataLoader that shuffles"
    if not fixed:
        return f"a DataLoader whose sampler, {type(sampler).__name__}, has an order that is not known"
    return "a DataLoader with in_order=False" if data.num_workers and not getattr(data, "in_order", True) else ""


def _in_order(data: object) -> bool:
    """Whether data that `_disorder` allows have an order that nothing can change."""
    if isinstance(data, DataLoader):
        # A collator of the user's own may put the examples of a batch in any order.
        plain = data.collate_fn in (default_collate, default_convert)
        return plain and not isinstance(data.dataset, IterableDataset)
    return isinstance(data, (list, tuple))


def _loaded(data: object) -> int | None:
    """How many examples a loader loads; None if it does not say."""
    if not isinstance(data, DataLoader) or data.batch_sampler is None:
        return None
    batches = data.batch_sampler
    if isinstance(batches, (list, tuple)):
        return sum(map(len, batches))
    chosen: object = data.dataset if isinstance(data.dataset, IterableDataset) else getattr(batches, "sampler", None)
    if type(batches) is not BatchSampler or not isinstance(chosen, Sized):
        return None
    return len(chosen) - (len(chosen) % batches.batch_size if batches.drop_last else 0)
