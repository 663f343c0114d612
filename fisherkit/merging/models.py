"""Models as named tensors that are read one by one, wherever they lie.

Owns the three forms of a model: a module, a state dict, and safetensors files of which only the headers are read until
a tensor is asked for; and averages of such tensors. Changes no model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fisherkit.arguments import LARGEST, is_number, shown
from fisherkit.arithmetic import all_finite
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError, warn
from fisherkit.io.model_files import ModelFiles
from fisherkit.wrappers import plain, unwrapped

Model: TypeAlias = nn.Module | Mapping[str, Tensor] | str | Path
"""A module, its state dict, or the path of a safetensors file, of a sharded one's index, or of a folder with either."""

STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""Last parts of names that are buffers where nothing tells buffers from parameters: in state dicts and files."""


@dataclass(frozen=True)
class ModelSource:
    """Named tensors of one model: ``read`` gives one, which is not to be changed and may share memory with the model.

    ``aliases`` lead from a later name of a tensor to its first; ``devices`` say nothing of what is in files.
    """

    label: str
    call: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]
    buffers: frozenset[str]
    aliases: dict[str, str] = field(default_factory=dict)
    devices: dict[str, torch.device] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


def open_model(model: Model, label: str, call: str) -> ModelSource:
    """A source of named tensors; messages call it by the label."""
    if isinstance(model, nn.Module):
        model = unwrapped(model)
        state = model.state_dict()
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        return _of_tensors(state, label, call, buffers=state.keys() - parameters)
    if isinstance(model, Mapping):
        return _of_tensors(model, label, call)
    if isinstance(model, (str, Path)):
        found = ModelFiles(Path(model), f"{call}, {label}")
        own = _own_names(found.forms)
        shapes = {name: found.forms[own[name]][0] for name in own}
        dtypes = {name: found.forms[own[name]][1] for name in own}
        return ModelSource(
            label, call, shapes, dtypes, lambda name: found.read(own[name]), _statistics(own), files=tuple(found.paths)
        )
    raise InvalidTypeError(
        f"{call}, {label}", f"a {type(model).__name__}", "a module, a state dict, or the path of safetensors files"
    )


def _of_tensors(
    tensors: Mapping[str, Tensor], label: str, call: str, buffers: Collection[str] | None = None
) -> ModelSource:
    odd = sorted(str(name) for name, t in tensors.items() if not isinstance(t, Tensor) or not isinstance(name, str))
    if odd:
        raise InvalidTypeError(
            f"{call}, {label}", f"entries that are no named tensors: {odd}", "a state dict of name -> tensor",
            try_="leave them out",
        )  # fmt: skip
    own = _own_names(tensors)
    kept = {name: tensors[own[name]].detach() for name in own}
    first: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in kept.items():
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        owner = first.setdefault(place, name) if tensor.numel() else name
        if owner != name:
            aliases[name] = owner
    return ModelSource(
        label, call, {name: tuple(tensor.shape) for name, tensor in kept.items()},
        {name: tensor.dtype for name, tensor in kept.items()}, kept.__getitem__,
        _statistics(kept) if buffers is None else frozenset(name for name in own if own[name] in buffers),
        aliases, {name: tensor.device for name, tensor in kept.items()},
    )  # fmt: skip


def _statistics(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name for name in names if name.rpartition(".")[2] in STATISTICS)


def _own_names(names: Collection[str]) -> dict[str, str]:
    found = {plain(name): name for name in names}
    return found if len(found) == len(names) else {name: name for name in names}


def open_models(models: Sequence[Model], call: str) -> list[ModelSource]:
    """The sources of a list of models."""
    if isinstance(models, (str, Path)) or not isinstance(models, Sequence):
        raise InvalidTypeError(
            call, f"models of type {type(models).__name__}", "a list of models", try_=f"{call}([model_a, model_b], ...)"
        )
    if not models:
        raise InvalidArgumentError(call, "no models", "at least one")
    found = [open_model(model, f"model {number}", call) for number, model in enumerate(models, 1)]
    if len(found) > 1 and any(".lora_" in name for name in found[0].shapes):
        warn(
            f"{call}: LoRA's A and B are merged apart, and what the models compute with, W + s·BA, is no average of "
            "theirs then. Try: fk.merging.merge, or average, with fk.adapters.merged_weights(model) in the place of "
            "each model, and fk.adapters.write_merged_weights for the result."
        )
    return found


def check_weights(weights: Sequence[float] | Tensor | str | None, count: int, call: str) -> tuple[float, ...]:
    """One number for each model, 0 or more and not all 0; None for equal ones that add up to 1."""
    if weights is None:
        return (1 / count,) * count
    if isinstance(weights, str) or not isinstance(weights, (Sequence, Tensor)):
        raise InvalidTypeError(call, f"weights={weights!r}", "one number for each model, or None")
    values: list[Any] = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    if not all(map(is_number, values)):
        raise InvalidTypeError(call, f"weights={values!r}", "numbers")
    if len(values) != count:
        raise InvalidArgumentError(call, f"{len(values)} weights", f"{count}, one for each model")
    if not all(w >= 0 for w in values) or not 0 < sum(values) <= LARGEST:
        raise InvalidArgumentError(
            call, f"weights=[{', '.join(map(shown, values))}]", "finite numbers, 0 or more, not all 0, of a finite sum",
            why="a negative multiple of a Fisher is not positive semi-definite",
        )  # fmt: skip
    return tuple(float(w) for w in values)


def weighted_average(models: Sequence[ModelSource], weights: Sequence[float], name: str) -> Tensor:
    """Σ w_t θ_t / Σ w_t, float64; exactly θ_1 where all models are equal, or θ_t where the others' weights are 0."""
    base = next(place for place, weight in enumerate(weights) if weight)  # with a weight alone, it is returned as it is
    origin = read_double(models[base], name)
    total, mean = sum(weights), torch.zeros_like(origin)
    for place, (model, weight) in enumerate(zip(models, weights, strict=True)):
        if place != base:
            mean.add_(read_double(model, name, origin.device) - origin, alpha=weight / total)
    return mean.add_(origin)


def read_double(model: ModelSource, name: str, device: torch.device | None = None) -> Tensor:
    """One tensor in float64, if it is finite."""
    tensor = model.read(name)
    found = tensor.to(tensor.device if device is None else device, torch.float64)
    if not all_finite(found):
        raise NonFiniteError(
            f"{model.call}, {model.label}", f"NaN or infinite entries in {name!r}", "finite numbers",
            try_="check the training run that it came from",
        )  # fmt: skip
    return found
