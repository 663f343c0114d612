"""Training rows in a folder: one safetensors file a block and a manifest, written so that a killed run goes on.

A block's file appears under its name only when it is whole, so those that are there need not be made again; the
manifest says which model, data and cutting they belong to. The same model, data and batches give the same bytes,
whether the run was interrupted or not. Files are written, read and compared with their checksums by `fisherkit.io`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fisherkit import io
from fisherkit.data import Batch, Source
from fisherkit.errors import FileFormatError, InvalidArgumentError
from fisherkit.influence.blocks import LimitedSource, LiveBlocks, RowBlock, RowBlocks, joined
from fisherkit.rows import restore_rows
from fisherkit.space import ParameterSpace

CALL = "prepare(folder)"
FORMAT = "fisherkit-rows"
VERSION = 3
MANIFEST = "manifest.json"


class FolderBlocks(RowBlocks):
    """Blocks in the files that a manifest names, read one by one, to a device."""

    def __init__(self, folder: Path, space: ParameterSpace, device: torch.device, manifest: dict[str, Any]) -> None:
        super().__init__(manifest["settings"])
        self.folder, self.space, self.device, self.manifest = folder, space, device, manifest

    def __iter__(self) -> Iterator[RowBlock]:
        for entry in self.manifest["blocks"]:
            path = self.folder / entry["file"]
            header, tensors = _read(path, self.device)
            if header[io.CHECKSUM] != entry["checksum"]:
                raise _damaged(path, "it is not the block of the manifest")
            yield _block(path, self.space, header["units"], tensors)

    def count(self) -> int:
        """Of the manifest."""
        return sum(entry["examples"] for entry in self.manifest["blocks"])


def write_blocks(folder: str | Path, live: LiveBlocks) -> FolderBlocks:
    """Write the blocks that are missing or damaged; those of another model, other data or settings are refused."""
    path = _folder(folder)
    manifest = _begun(path, live.settings, live.limit)
    problem, limit = live.problem, int(manifest["limit"])
    space, device = problem.plan.space, problem.plan.example_parameter.device
    source = LimitedSource(problem.source, limit)
    # All that is there is known to be of these data before anything is written: what is refused is left as it was.
    entries = _there(path, source, device) if any(path.glob("rows-*.safetensors")) else {}
    bar = tqdm(source.numbered(), desc="rows", disable=not problem.progress, leave=False)
    for number, (place, batch) in enumerate(bar):
        if number not in entries:
            one = replace(problem, source=_OneBatch(batch, place), progress=False)
            checksum = _write(path / _name(number), joined(list(LiveBlocks(one, limit, live.settings))), batch)
            entries[number] = _entry(number, batch, checksum)
    manifest["blocks"] = [entries[number] for number in sorted(entries)]
    _write_manifest(path, manifest)
    return FolderBlocks(path, space, device, manifest)


class _OneBatch(Source):
    """A batch as data, and its number among all."""

    def __init__(self, batch: Batch, number: int) -> None:
        super().__init__([])
        self.batch, self.number = batch, number

    def __iter__(self) -> Iterator[Batch]:
        yield self.batch

    def numbered(self) -> Iterator[tuple[int, Batch]]:
        yield self.number, self.batch


# -- a block's file ----------------------------------------------------------------------------------------------------


def _write(path: Path, block: RowBlock, batch: Batch) -> str:
    """Write the rows of a batch, a file that is there when it is whole, and give its checksum."""
    tensors: dict[str, Tensor] = {"owner": block.owner, "mask": block.mask}
    units = []
    for number, slot in enumerate(block.rows.slots):
        own = slot.rows.tensors()
        units.append({"kind": slot.rows.form, "names": slot.names, "options": slot.rows.options(), "tensors": [*own]})
        tensors.update({f"{number}.{name}": tensor for name, tensor in own.items()})
    header = {"format": FORMAT, "data": batch.digest(), "examples": str(batch.size), "units": json.dumps(units)}
    return io.replace_checked_file(path, tensors, header)


def _read(path: Path, device: torch.device) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A block's header and tensors as they were written."""
    try:
        header, tensors = io.read_tensors(path, device, CALL, "prepare")
    except FileFormatError as error:
        raise _damaged(path, error.got) from error
    if header.get("format") != FORMAT or io.CHECKSUM not in header:
        raise _damaged(path, "it does not say that it is one, or has no checksum")
    return header, tensors


def _block(path: Path, space: ParameterSpace, units: str, tensors: dict[str, Tensor]) -> RowBlock:
    try:
        states = [
            io.State(
                unit["kind"], tuple(unit["names"]),
                {name: tensors[f"{number}.{name}"] for name in unit["tensors"]}, unit["options"],
            )
            for number, unit in enumerate(json.loads(units))
        ]  # fmt: skip
        return RowBlock(restore_rows(space, states), tensors["owner"], tensors["mask"])
    except (LookupError, ValueError, TypeError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> FileFormatError:
    return FileFormatError(
        call=CALL, got=f"{path.name}, which is missing or damaged ({reason})", expected="a block as it was written",
        try_=f"prepare(train, folder={str(path.parent)!r}) again, which makes such blocks anew",
    )  # fmt: skip


# -- the folder and its manifest ---------------------------------------------------------------------------------------


def _there(path: Path, source: LimitedSource, device: torch.device) -> dict[int, dict[str, Any]]:
    """The blocks that need not be made, by number; those of other examples are refused."""
    found, start = {}, 0
    for number, batch in enumerate(source):
        try:
            header, _ = _read(path / _name(number), device)
        except FileFormatError:
            header = {}  # to be made
        if header and int(header["examples"]) != batch.size:
            sizes = f"{header['examples']} examples from example {start:,} on and not {batch.size:,}"
            raise _other(path, f"rows of other batches ({sizes})")
        if header and header["data"] != batch.digest():
            raise _other(path, f"rows of other data from example {start:,} on")
        if header:
            found[number] = _entry(number, batch, header[io.CHECKSUM])
        start += batch.size
    return found


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
        _write_manifest(path, begun)
        return begun
    advice = "another folder, or delete this one: its rows are then made again"
    try:
        manifest: dict[str, Any] = dict(io.parse(file.read_text(encoding="utf-8")))
        # Those from before there were checksums have none.
        if io.CHECKSUM in manifest and manifest[io.CHECKSUM] != io.seal(manifest):
            raise ValueError("it is not what was written, by its checksum")
        known, version = dict(manifest["settings"]), int(manifest["version"])
        int(manifest["limit"])
    except (OSError, LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise FileFormatError(
            call=CALL, got=f"a manifest that cannot be read ({error}) in {path}", expected="that of prepared rows",
            try_=advice,
        ) from error  # fmt: skip
    if manifest.get("format") != FORMAT or version != VERSION:
        raise FileFormatError(
            call=CALL, got=f"a manifest of format {manifest.get('format')!r}, version {version} in {path}",
            expected=f"{FORMAT!r}, version {VERSION}", try_=advice,
        )  # fmt: skip
    changed = sorted(key for key in settings.keys() | known.keys() if settings.get(key) != known.get(key))
    if changed:
        raise _other(path, f"rows with another {', '.join(changed)}")
    return manifest


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    io.replace_text(path / MANIFEST, json.dumps({**manifest, io.CHECKSUM: io.seal(manifest)}, indent=1))


def _other(path: Path, got: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        call=CALL, got=f"{got} in {path}, which has been left as it is",
        expected="no rows yet, or those of the same model and data, in the same batches",
        try_="the same batches, another folder, or delete this one",
    )  # fmt: skip


def _name(number: int) -> str:
    return f"rows-{number:06d}.safetensors"


def _entry(number: int, batch: Batch, checksum: str) -> dict[str, Any]:
    return {"file": _name(number), "examples": batch.size, "checksum": checksum}
