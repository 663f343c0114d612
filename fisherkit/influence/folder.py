"""Training rows in a folder: one safetensors file a block and a manifest, written so that a killed run goes on.

A block's file appears under its name only when it is whole, so those that are there need not be made again; the
manifest says which model, data and cutting they belong to. The same model, data and batches give the same bytes,
whether the run was interrupted or not. Owns the folder and its manifest; a block's file is `block_file`'s. Knows no
score.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from fisherkit import io
from fisherkit.data import Batch, Source
from fisherkit.errors import FileFormatError, InvalidArgumentError
from fisherkit.influence.block_file import CALL, damaged, data_digest, read_block, write_block
from fisherkit.influence.blocks import LimitedSource, LiveBlocks, RowBlock, RowBlocks, joined
from fisherkit.space import ParameterSpace

FORMAT = "fisherkit-rows"
VERSION = 2
MANIFEST = "manifest.json"


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
            stored = read_block(self.folder / entry["file"], self.device)
            if stored.checksum != entry["checksum"]:
                raise FileFormatError(**damaged(stored.path, "it is not the block of the manifest"))
            yield stored.rows(self.space)

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
        InvalidArgumentError: no folder can be there, or it holds rows of another model, other data, other batches or
            other settings.
        FileFormatError: the manifest is damaged. Damaged blocks are made again.

    Cost: one reading of what is there; a forward and a backward pass over what is missing; one block in memory at a
        time.
    """
    path = _folder(folder)
    manifest = _begun(path, settings, live.limit)
    problem, limit = live.problem, int(manifest["limit"])
    space, device = problem.plan.space, problem.plan.example_parameter.device
    source = LimitedSource(problem.source, limit)
    entries: list[dict[str, Any]] = []
    spoilt: list[int] = []

    def made(number: int, place: int, batch: Batch) -> dict[str, Any]:
        one = LiveBlocks(replace(problem, source=_OneBatch(batch, place), progress=False), limit)
        return _entry(number, batch, write_block(path / _name(number), joined(list(one)), batch))

    bar = tqdm(source.numbered(), desc="rows", disable=not problem.progress, leave=False)
    for number, (place, batch) in enumerate(bar):
        if not (path / _name(number)).exists():
            entries.append(made(number, place, batch))
            continue
        try:
            stored = read_block(path / _name(number), device)
        except FileFormatError:
            # Made again once all others are known to be of these data: what is refused is left as it was.
            spoilt.append(number)
            entries.append({"examples": batch.size})
            continue
        _refuse_other(path, stored.header, batch, start=sum(entry["examples"] for entry in entries))
        entries.append(_entry(number, batch, stored.checksum))
    for number, (place, batch) in enumerate(source.numbered() if spoilt else ()):
        if number in spoilt:
            entries[number] = made(number, place, batch)
    manifest["blocks"] = entries
    _write(path / MANIFEST, manifest)
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
        _write(file, begun)
        return begun
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
            try_="another folder, or delete this one: its rows are then made again",
        ) from error  # fmt: skip
    if manifest.get("format") != FORMAT or version != VERSION:
        raise FileFormatError(
            call=CALL,
            got=f"a manifest of format {manifest.get('format')!r}, version {version} in {path}",
            expected=f"{FORMAT!r}, version {VERSION}",
            try_="another folder, or delete this one: its rows are then made again",
        )
    changed = sorted(key for key in settings.keys() | known.keys() if settings.get(key) != known.get(key))
    if changed:
        raise InvalidArgumentError(**_other(path, f"rows with another {', '.join(changed)}"))
    return manifest


def _write(file: Path, manifest: dict[str, Any]) -> None:
    io.replace_text(file, json.dumps({**manifest, io.CHECKSUM: io.seal(manifest)}, indent=1))


def _refuse_other(path: Path, header: Mapping[str, Any], batch: Batch, start: int) -> None:
    """Raise unless a block is of these examples.

    Raises:
        InvalidArgumentError: it is of more or fewer, or of others.
    """
    if header["examples"] != batch.size:
        sizes = f"{header['examples']:,} examples from example {start:,} on and not {batch.size:,}"
        raise InvalidArgumentError(**_other(path, f"rows of other batches ({sizes})"))
    if header["data"] != data_digest(batch):
        raise InvalidArgumentError(**_other(path, f"rows of other data from example {start:,} on"))


def _other(path: Path, got: str) -> dict[str, str]:
    return {
        "call": CALL,
        "got": f"{got} in {path}, which has been left as it is",
        "expected": "no rows yet, or those of the same model and data, in the same batches",
        "try_": "the same batches, another folder, or delete this one",
    }


def _name(number: int) -> str:
    return f"rows-{number:06d}.safetensors"


def _entry(number: int, batch: Batch, checksum: str) -> dict[str, Any]:
    return {"file": _name(number), "examples": batch.size, "checksum": checksum}
