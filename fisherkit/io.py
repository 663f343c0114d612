"""Files: safetensors with a JSON description in the header, written whole or not at all.

Owns the bytes: atomic replacement, and for Fisher files the names of tensors inside the file, the header's keys and the
format's version. Knows nothing of what an operator means; ``operators.persistence`` turns a `State` back into an
operator. Pickle is never used.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fisherkit.errors import FileFormatError, InvalidArgumentError, InvalidTypeError
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

    def map(self, function: Callable[[Tensor], Tensor]) -> State:
        """The same with every tensor, those of its children too, replaced by what the function makes of it."""
        tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, children=tuple(child.map(function) for child in self.children))


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
    check_folder(path, f"save({str(path)!r})")
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "space": json.dumps({n: list(s) for n, s in zip(space.names, space.shapes, strict=True)}),
        "operator": json.dumps(tree),
        "metadata": json.dumps(metadata),
    }
    replace_file(path, tensors, header)


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
    header, tensors = read_tensors(path, device, call, "fisher.save")
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


def as_path(path: str | Path, call: str) -> Path:
    """A path as a Path.

    Raises:
        InvalidTypeError: it is no path.
    """
    if not isinstance(path, (str, Path)):
        raise InvalidTypeError(call=call, got=f"a {type(path).__name__}", expected="the path of a file")
    return Path(path)


def check_folder(path: str | Path, call: str) -> None:
    """Find out before the work is done whether a file can be written.

    Raises:
        InvalidArgumentError: the folder does not exist, or the path is a folder.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InvalidArgumentError(
            call=call,
            got=f"a folder that does not exist: {path.parent}",
            expected="an existing folder",
            try_="Path(path).parent.mkdir(parents=True)",
        )
    if path.is_dir():
        raise InvalidArgumentError(call=call, got="a folder", expected="a file's name", try_="a file in that folder")


def replace_file(path: str | Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file; whoever opens the path finds the old file or the whole new one, never a part.

    Args:
        path: where; an existing file is replaced.
        tensors: contiguous tensors that share no memory.
        header: string keys and values.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=header)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut right after the replacement leaves an empty file
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_tensors(
    path: str | Path, device: torch.device | str, call: str, writer: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the tensors of a safetensors file.

    Args:
        path: the file.
        device: where its tensors go.
        call: the public call, for errors.
        writer: what writes such files, for errors.

    Raises:
        FileFormatError: damaged, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            # The handle is not a mapping: keys() is its only way to tell what it holds.
            names = file.keys()
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise FileFormatError(**_unreadable(call, error, writer)) from error


def _unreadable(call: str, error: Exception, writer: str = "fisher.save") -> dict[str, str]:
    return {
        "call": call,
        "got": f"a file that cannot be read ({error})",
        "expected": f"a complete file written by {writer}",
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
