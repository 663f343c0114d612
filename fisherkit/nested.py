"""Nested inputs: a function of every end, and the tensors with the names by which a user knows them.

Mappings, lists, tuples, named tuples and dataclasses nest; anything else is an end. Knows no batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def map_ends(tree: Any, function: Callable[[Any], Any]) -> Any:
    """A function of every tensor or other end of nested mappings, lists, tuples and dataclasses, of the same types."""
    if isinstance(tree, Mapping):
        return {key: map_ends(value, function) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        values = [map_ends(value, function) for value in tree]
        if hasattr(tree, "_fields"):
            return type(tree)(*values)
        return values if isinstance(tree, list) else tuple(values)
    if is_dataclass(tree):
        old = fields_of(tree)
        new = {name: map_ends(value, function) for name, value in old.items()}
        return tree if all(new[name] is old[name] for name in old) else dataclasses.replace(tree, **new)
    return function(tree)


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A function of every tensor; all else as it is."""
    return map_ends(tree, lambda value: function(value) if isinstance(value, Tensor) else value)


def named_leaves(tree: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors with the names by which a user knows them."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        for place, value in enumerate(tree):
            yield from named_leaves(value, f"{name}[{place}]")
    elif isinstance(tree, Mapping) or hasattr(tree, "_fields") or is_dataclass(tree):
        for key, value in fields_of(tree).items():
            yield from named_leaves(value, f"{name}.{key}" if name else str(key))


def is_dataclass(tree: Any) -> bool:
    """Whether it is a dataclass's object."""
    return dataclasses.is_dataclass(tree) and not isinstance(tree, type)


def fields_of(tree: Any) -> dict[Any, Any]:
    """The fields of a mapping, a named tuple or a dataclass."""
    if isinstance(tree, Mapping):
        return dict(tree)
    names = tree._fields if hasattr(tree, "_fields") else [f.name for f in dataclasses.fields(tree) if f.init]
    return {name: getattr(tree, name) for name in names}


def as_tensor(value: Any) -> Any:
    """An array of numbers as a tensor; all else as it is."""
    return torch.as_tensor(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else value
