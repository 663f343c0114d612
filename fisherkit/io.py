"""Fisher files: safetensors with a JSON description in the header, written whole or not at all.

Owns the bytes: names of tensors inside the file, the header's keys, the format's version, atomic replacement. Knows
nothing of what an operator means; ``operators.persistence`` turns a `State` back into an operator. Pickle is never
used.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fisherkit.errors import FileFormatError, InvalidArgumentError
from fisherkit.space import ParameterSpace

FORMAT = "fisherkit"
VERSION = 1


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


def write(path: str | Path, state: State, space: ParameterSpace, metadata: dict[str, str]) -> None:
    """Write a Fisher file; the final name appears only when the file is complete.

    Args:
        path: where; an existing file is replaced.
        state: the operator's state.
        space: its parameter space.
        metadata: string keys and values to record beside it.

    Raises:
        InvalidArgumentError: the folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InvalidArgumentError(
            call=f"save({str(path)!r})",
            got=f"a folder that does not exist: {path.parent}",
            expected="an existing folder",
            try_="Path(path).parent.mkdir(parents=True)",
        )
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "space": json.dumps({n: list(s) for n, s in zip(space.names, space.shapes, strict=True)}),
        "operator": json.dumps(tree),
        "metadata": json.dumps(metadata),
    }
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=header)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[State, ParameterSpace, dict[str, str]]:
    """Read a Fisher file.

    Args:
        path: the file.
        device: where its tensors go.

    Returns:
        The operator's state, its space and the recorded metadata.

    Raises:
        FileFormatError: no such file, damaged, not a Fisher file, or a version from the future.
    """
    call = f"load({str(path)!r})"
    if not Path(path).is_file():
        raise FileFormatError(
            call=call, got="no such file", expected="one written by fisher.save", try_="check the path"
        )
    try:
        header, tensors = _open(path, str(device))
    except (SafetensorError, OSError) as error:
        raise FileFormatError(**_unreadable(call, error)) from error
    if header.get("format") != FORMAT:
        raise FileFormatError(
            call=call,
            got="a safetensors file of another kind",
            expected="one written by fisher.save",
            try_="check the path",
        )
    try:
        version = int(header["version"])
        shapes = json.loads(header["space"])
        space = ParameterSpace(tuple(shapes), tuple(tuple(s) for s in shapes.values()))
        state, metadata = _unpack(json.loads(header["operator"]), tensors), json.loads(header["metadata"])
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(**_unreadable(call, error)) from error
    if version > VERSION:
        raise FileFormatError(
            call=call, got=f"format version {version}", expected=f"at most {VERSION}", try_="a newer fisherkit"
        )
    return state, space, metadata


def _open(path: str | Path, device: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt", device=device) as file:
        # The handle is not a mapping: keys() is its only way to tell what it holds.
        names = file.keys()
        return file.metadata() or {}, {name: file.get_tensor(name) for name in names}


def _unreadable(call: str, error: Exception) -> dict[str, str]:
    return {
        "call": call,
        "got": f"a file that cannot be read ({error})",
        "expected": "a complete file written by fisher.save",
        "try_": "save it again; an interrupted save leaves the old file in place",
    }


def _pack(state: State, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    keys = {}
    for name, tensor in state.tensors.items():
        keys[name] = f"{prefix}{name}"
        # safetensors refuses tensors that share memory, and views that are not contiguous.
        tensors[keys[name]] = tensor.detach().clone(memory_format=torch.contiguous_format)
    children = [_pack(child, f"{prefix}{i}.", tensors) for i, child in enumerate(state.children)]
    return {
        "kind": state.kind,
        "names": list(state.names),
        "tensors": keys,
        "options": state.options,
        "children": children,
    }


def _unpack(tree: dict[str, Any], tensors: dict[str, Tensor]) -> State:
    return State(
        tree["kind"],
        tuple(tree["names"]),
        {name: tensors[key] for name, key in tree["tensors"].items()},
        tree["options"],
        tuple(_unpack(child, tensors) for child in tree["children"]),
    )
