"""A model that comes back whole from the package's own passes, whatever its forward pass writes on it.

Owns what is put back and where other values of parameters go meanwhile. Knows neither rows nor gradients.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import eq, is_
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = {bool, int, float, str, type(None), tuple}
_CONTAINERS = {dict, OrderedDict, defaultdict, list, set, deque}
_LONGEST = 1 << 16
"""Containers with more entries are data and not state; they are not looked into."""

_SMALL = 1 << 20
"""Entries up to which integers may be counters or caches; more are quantized weights, which are only read."""


@contextmanager
def kept_whole(model: nn.Module) -> Iterator[None]:
    """Put back what passes of a model write on its modules: attributes, buffers, and the contents of containers.

    Old weight norm recomputes ``weight``, caches keep tensors of a graph or of a transform that is over, moving
    averages move. In here buffers, and plain tensors without gradient, are copies, so that the model's own are never
    written to. Hooks are left to those who register them.

    Args:
        model: the model; called only inside.

    Cost: a copy of all buffers, and a look at every attribute of every module.
    """
    before, places = _contents(list(model.modules()))
    try:
        if places:
            _put_copies(places)
        yield
    finally:
        for container, content in before:
            _put_back(container, content)


def functional_call(
    model: nn.Module, values: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """What a model returns with other values of some parameters or buffers, in every place that has them.

    As `torch.func.functional_call`, which loses a module's parameters where the module goes by two names.

    Args:
        model: the model.
        values: by name.
        args: of the call.
        kwargs: of the call.

    Raises:
        RuntimeError: a scripted module, whose parameters cannot be replaced.
    """
    modules = list(model.modules())
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        raise RuntimeError("the parameters of a scripted module cannot be replaced")
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    new = {id(tensor): values[name] for name, tensor in own if name in values}
    # A dict of a module occurs once among distinct modules, whatever the module is called.
    places = [
        (held, name, tensor)
        for module in modules
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if id(tensor) in new
    ]
    try:
        for held, name, tensor in places:
            held[name] = new[id(tensor)]  # type: ignore[assignment]  # a plain tensor in a parameter's place
        return model(*args, **kwargs)
    finally:
        for held, name, tensor in places:
            held[name] = tensor  # type: ignore[assignment]


def _contents(modules: list[nn.Module]) -> tuple[list[tuple[Any, Any]], list[tuple[Any, str, Tensor]]]:
    """Every module's attributes and the containers among them, each with a shallow copy; and where tensors are."""
    found: list[tuple[Any, Any]] = []
    places: list[tuple[Any, str, Tensor]] = []
    seen: set[int] = set()
    pending: list[Any] = []
    for module in modules:
        attributes = module.__dict__
        found.append((attributes, attributes.copy()))
        for name, value in attributes.items():
            kind = type(value)
            if kind in _PLAIN:
                continue
            if kind in _CONTAINERS:
                if name == "_buffers":
                    places += [(value, key, t) for key, t in value.items() if t is not None]
                if "_hooks" not in name:
                    pending.append(value)
            elif isinstance(value, Tensor):
                places.append((attributes, name, value))
    while pending:
        container = pending.pop()
        if id(container) in seen or len(container) > _LONGEST:
            continue
        seen.add(id(container))
        found.append((container, container.copy()))
        if container:
            inner = container.values() if isinstance(container, dict) else container
            pending += [value for value in inner if type(value) in _CONTAINERS]
    return found, places


def _put_copies(places: list[tuple[Any, str, Tensor]]) -> None:
    """Copies in the place of buffers and of plain tensors that passes may write to."""
    copies: dict[int, Tensor] = {}
    with torch.no_grad():
        for held, name, tensor in places:
            if _writable(tensor):
                if id(tensor) not in copies:
                    copies[id(tensor)] = tensor.clone()
                held[name] = copies[id(tensor)]


def _writable(tensor: Tensor) -> bool:
    """Whether a forward pass can write to a tensor and it is no weight."""
    if tensor.requires_grad or tensor.layout != torch.strided:
        return False
    if not tensor.is_floating_point() and tensor.numel() > _SMALL:
        return False
    return 0 not in tensor.stride() or tensor.numel() <= 1  # torch refuses to write to what is expanded


def _put_back(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        same = len(container) == len(content) and all(map(is_, container.values(), content.values()))
        if not same or not all(map(eq, container, content)):
            container.clear()
            container.update(content)
    elif isinstance(container, set):
        if container != content:
            container.clear()
            container.update(content)
    elif len(container) != len(content) or not all(map(is_, container, content)):
        container.clear()
        container.extend(content)
