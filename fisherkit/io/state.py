"""An operator as a tree of named tensors and plain options, in memory or as a file's header describes it.

`State` has the tensors, `Node` says under which keys of the files they are. Owns the tree's JSON form. Knows nothing of
what an operator means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class State:
    """What an operator needs to come back: a tree of named tensors and plain options.

    Args:
        kind: the operator's registered name.
        names: the parameters it acts on, in flat order.
        tensors: its tensors.
        options: JSON-compatible settings.
        children: the states of the operators it is made of.
    """

    kind: str
    names: tuple[str, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    children: tuple[State, ...] = ()

    def all_tensors(self) -> list[Tensor]:
        """Its tensors and those of its children."""
        return [*self.tensors.values(), *(tensor for child in self.children for tensor in child.all_tensors())]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.all_tensors())

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The same with every tensor, those of its children too, replaced by what the function makes of it."""
        tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, children=tuple(child.map(function) for child in self.children))


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: under one key, or cut along its first axis under several.

    Args:
        keys: its names in the file, in order.
        rows: length of each part's first axis; empty for a tensor in one piece.
    """

    keys: tuple[str, ...]
    rows: tuple[int, ...] = ()

    def to_json(self) -> Any:
        """The key, or an object with "parts" and "rows"."""
        return {"parts": list(self.keys), "rows": list(self.rows)} if self.rows else self.keys[0]

    @classmethod
    def from_json(cls, found: Any) -> Place:
        """The inverse of `to_json`."""
        if isinstance(found, str):
            return cls((found,))
        keys, rows = tuple(found["parts"]), tuple(found["rows"])
        if not keys or len(keys) != len(rows) or not all(isinstance(r, int) and r > 0 for r in rows):
            raise ValueError(f"parts {list(keys)} with rows {list(rows)}")
        return cls(keys, rows)


@dataclass(frozen=True)
class Node:
    """A `State` whose tensors are still in the file: ``places`` says where each of them lies."""

    kind: str
    names: tuple[str, ...]
    places: dict[str, Place]
    options: dict[str, Any]
    children: tuple[Node, ...]

    def all_keys(self) -> list[str]:
        """The keys of its tensors and of its children's."""
        own = [key for place in self.places.values() for key in place.keys]
        return [*own, *(key for child in self.children for key in child.all_keys())]

    def state(self, read: Callable[[Place], Tensor]) -> State:
        """The state that it describes, whose tensors a function reads."""
        tensors = {role: read(place) for role, place in self.places.items()}
        return State(self.kind, self.names, tensors, self.options, tuple(child.state(read) for child in self.children))

    def to_json(self) -> dict[str, Any]:
        """The tree as JSON, as a header has it."""
        return {
            "kind": self.kind,
            "names": list(self.names),
            "tensors": {role: place.to_json() for role, place in self.places.items()},
            "options": self.options,
            "children": [child.to_json() for child in self.children],
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Node:
        """The inverse of `to_json`; LookupError, TypeError, ValueError or AttributeError for anything else."""
        kind, names = tree["kind"], tree["names"]
        if not (isinstance(kind, str) and isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise TypeError(f"an operator of kind {kind!r} over {names!r}")
        return cls(
            kind, tuple(names), {role: Place.from_json(place) for role, place in tree["tensors"].items()},
            tree["options"], tuple(cls.from_json(child) for child in tree["children"]),
        )  # fmt: skip


def pack(state: State, largest: int | None, prefix: str = "") -> tuple[Node, dict[str, Tensor]]:
    """A state as a node and the tensors it names, cut along the first axis where they have more than so many bytes."""
    places: dict[str, Place] = {}
    tensors: dict[str, Tensor] = {}
    for role, tensor in state.tensors.items():
        key = f"{prefix}{role}"
        places[role], parts = Place((key,)), (tensor,)
        if largest is not None and tensor.nbytes > largest and tensor.ndim and len(tensor) > 1:
            parts = tensor.split(max(1, largest * len(tensor) // tensor.nbytes))
            places[role] = Place(tuple(f"{key}.{i}" for i in range(len(parts))), tuple(map(len, parts)))
        tensors.update(zip(places[role].keys, parts, strict=True))
    children = []
    for i, child in enumerate(state.children):
        node, below = pack(child, largest, f"{prefix}{i}.")
        children.append(node)
        tensors.update(below)
    return Node(state.kind, state.names, places, state.options, tuple(children)), tensors
