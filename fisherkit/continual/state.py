"""A term as plain containers and tensors, and back: what a state dict may hold without pickled classes.

Owns the layout; operators describe themselves by `io.State`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkit import io
from fisherkit.continual.penalty import Term
from fisherkit.operators import Quadratic, state_of
from fisherkit.operators.persistence import restore
from fisherkit.space import ParameterSpace


def pack(term: Term) -> dict[str, Any]:
    """The term as dicts, lists, strings, numbers and tensors."""
    quadratic = term.quadratic
    return {
        "weight": term.weight,
        "shapes": {name: list(shape) for name, shape in term.shapes.items()},
        "quadratic": quadratic.tensors(),
        "operator": _plain(state_of(quadratic.operator)),
    }


def unpack(packed: Mapping[str, Any], device: torch.device) -> Term:
    """The term that `pack` described, on a device.

    Raises:
        FisherkitError, LookupError, TypeError, ValueError: it was not described by `pack`.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, copy=True)

    shapes = packed["shapes"]
    space = ParameterSpace(tuple(shapes), tuple(tuple(shape) for shape in shapes.values()))
    operator = restore(space, _state(packed["operator"]).map(move))
    tensors = {name: move(tensor) for name, tensor in packed["quadratic"].items()}
    return Term(float(packed["weight"]), Quadratic(operator, **tensors))


def _plain(state: io.State) -> dict[str, Any]:
    return {
        "kind": state.kind,
        "names": list(state.names),
        "tensors": dict(state.tensors),
        "options": dict(state.options),
        "children": [_plain(child) for child in state.children],
    }


def _state(plain: Mapping[str, Any]) -> io.State:
    children = tuple(_state(child) for child in plain["children"])
    return io.State(plain["kind"], tuple(plain["names"]), dict(plain["tensors"]), dict(plain["options"]), children)
