"""Training rows in a folder: one safetensors file a block and a manifest, written so that a killed run goes on.

A block's file appears under its name only when it is whole, so those that are there need not be made again; the
manifest says which model, data and cutting they belong to. The same model and data give the same bytes, whether the run
was interrupted or not. Owns the files; knows no score. Pickle is never used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm.auto import tqdm

from fisherkit import io
from fisherkit.data import Batch, Source
from fisherkit.errors import FileFormatError, InvalidArgumentError
from fisherkit.influence.blocks import LimitedSource, LiveBlocks, RowBlock, RowBlocks, joined
from fisherkit.rows import restore_rows
from fisherkit.space import ParameterSpace

FORMAT = "fisherkit-rows"
VERSION = 1
MANIFEST = "manifest.json"
CALL = "prepare(folder)"


class FolderBlocks(RowBlocks):
    """Blocks in files, read one by one.

    Args:
        folder: where.
        space: the parameters of the rows.
        device: where rows go.
        manifest: what `write_blocks` left.
    """

    def __init__(self, folder: Path, space: ParameterSpace, device: torch.device, manifest: dict[str, Any]) -> None:
        super().__init__(bool(manifest["settings"]["token"]))
        self.folder, self.space, self.device, self.manifest = folder, space, device, manifest

    def __iter__(self) -> Iterator[RowBlock]:
        """One pass over the files."""
        for entry in self.manifest["blocks"]:
            yield _read(self.folder / entry["file"], self.space, self.device)

    def count(self) -> int:
        """Known."""
        return sum(entry["examples"] for entry in self.manifest["blocks"])


def write_blocks(folder: str | Path, live: LiveBlocks, settings: dict[str, Any]) -> FolderBlocks:
    """Write the blocks that are not there yet.

    Args:
        folder: made if its parent exists; what another run has left there is gone on from.
        live: makes the blocks.
        settings: what the rows depend on beside the data; JSON.

    Raises:
        InvalidArgumentError: no folder can be there, or it holds rows of another model, other data or other settings.
        FileFormatError: the manifest or a block is damaged.

    Cost: a forward and a backward pass over what is missing; one block in memory at a time.
    """
    path = _folder(folder)
    manifest = _begun(path, settings, live.limit)
    problem, limit = live.problem, int(manifest["limit"])
    source = LimitedSource(problem.source, limit)
    entries: list[dict[str, Any]] = []
    for number, batch in enumerate(tqdm(source, desc="rows", disable=not problem.progress, leave=False)):
        name, digest = f"rows-{number:06d}.safetensors", _digest(batch)
        if not (path / name).exists():
            one = LiveBlocks(replace(problem, source=_OneBatch(batch), progress=False), limit)
            _write(path / name, joined(list(one)), digest)
        elif _header(path / name)["data"] != digest:
            at = sum(entry["examples"] for entry in entries)
            raise InvalidArgumentError(**_other(path, f"rows of other data from example {at} on"))
        entries.append({"file": name, "examples": batch.size})
    manifest["blocks"] = entries
    io.replace_text(path / MANIFEST, json.dumps(manifest, indent=1))
    return FolderBlocks(path, problem.plan.space, problem.plan.example_parameter.device, manifest)


class _OneBatch(Source):
    """A batch as data."""

    def __init__(self, batch: Batch) -> None:
        super().__init__([])
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        yield self.batch


def _folder(folder: str | Path) -> Path:
    path = io.as_path(folder, CALL)
    if not path.parent.is_dir() or (path.exists() and not path.is_dir()):
        raise InvalidArgumentError(call=CALL, got=str(path), expected="a folder, or a new one in a folder that exists")
    path.mkdir(exist_ok=True)
    return path


def _begun(path: Path, settings: dict[str, Any], limit: int) -> dict[str, Any]:
    """The manifest that is there, or a new one."""
    file = path / MANIFEST
    if not file.exists():
        if any(not other.name.endswith(".part") for other in path.iterdir()):  # a killed run may leave parts
            raise InvalidArgumentError(
                call=CALL, got=f"{path}, which holds other files", expected="an empty folder, or one of prepared rows"
            )
        begun = {"format": FORMAT, "version": VERSION, "limit": limit, "settings": settings, "blocks": []}
        io.replace_text(file, json.dumps(begun, indent=1))
        return begun
    try:
        manifest: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
        known, version = dict(manifest["settings"]), int(manifest["version"])
        int(manifest["limit"])
    except (LookupError, ValueError, TypeError) as error:
        raise FileFormatError(
            call=CALL, got=f"a manifest that cannot be read ({error})", expected="that of prepared rows"
        ) from error
    if manifest.get("format") != FORMAT or version > VERSION:
        raise FileFormatError(
            call=CALL,
            got=f"a manifest of format {manifest.get('format')!r}, version {version}",
            expected=f"{FORMAT!r}, at most {VERSION}",
        )
    changed = sorted(key for key in settings.keys() | known.keys() if settings.get(key) != known.get(key))
    if changed:
        raise InvalidArgumentError(**_other(path, f"rows with another {', '.join(changed)}"))
    return manifest


def _other(path: Path, got: str) -> dict[str, str]:
    return {
        "call": CALL,
        "got": f"{got} in {path}, which has been left as it is",
        "expected": "no rows yet, or those of the same model and data",
        "try_": "another folder, or delete this one",
    }


def _write(path: Path, block: RowBlock, digest: str) -> None:
    tensors: dict[str, Tensor] = {"owner": block.owner, "mask": block.mask}
    units = []
    for number, slot in enumerate(block.rows.slots):
        own = slot.rows.tensors()
        units.append({"kind": slot.rows.kind, "names": slot.names, "options": slot.rows.options(), "tensors": [*own]})
        tensors.update({f"{number}.{name}": tensor for name, tensor in own.items()})
    whole = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    # One key: the order of several would change from run to run.
    io.replace_file(path, whole, {FORMAT: json.dumps({"data": digest, "units": units})})


def _read(path: Path, space: ParameterSpace, device: torch.device) -> RowBlock:
    header, tensors = io.read_tensors(path, device, CALL, "prepare")
    try:
        units = json.loads(header[FORMAT])["units"]
        states = [
            io.State(
                unit["kind"],
                tuple(unit["names"]),
                {name: tensors[f"{number}.{name}"] for name in unit["tensors"]},
                unit["options"],
            )
            for number, unit in enumerate(units)
        ]
        return RowBlock(restore_rows(space, states), tensors["owner"], tensors["mask"])
    except (LookupError, ValueError, TypeError) as error:
        raise FileFormatError(
            call=CALL, got=f"{path.name}, which cannot be read ({error})", expected="a block of prepared rows"
        ) from error


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {})[FORMAT]))
    except (SafetensorError, OSError, LookupError, ValueError) as error:
        raise FileFormatError(
            call=CALL,
            got=f"{path.name}, which cannot be read ({error})",
            expected="a block of prepared rows",
            try_="delete the file; it will be made again",
        ) from error


def _digest(batch: Batch) -> str:
    """SHA-256 of a batch's tensors."""
    digest = hashlib.sha256()
    tensors, _ = batch.leaves()
    for tensor in [*tensors, *([] if batch.targets is None else [batch.targets])]:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
