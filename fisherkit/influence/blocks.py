"""Rows of examples in blocks: made from the data in every pass, or made once and kept, in memory or in a folder.

A block has the rows of neighbouring examples and says which example each belongs to. Owns the cutting of the data by
memory, and the folder: one safetensors file a block and a manifest, written so that a killed run goes on. A block's
file appears under its name only when it is whole, so those that are there need not be made again; the manifest says
which model, data and cutting they belong to. The same model, data and batches give the same bytes, whether the run was
interrupted or not. Files are written, read and compared with their checksums by `fisherkit.io`. Knows no Fisher matrix
and no score.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from fisherkit import io
from fisherkit.data import Batch, CutSource, Source
from fisherkit.errors import FileFormatError, InvalidArgumentError
from fisherkit.influence.compression import FILE, Basis, Compression, damaged
from fisherkit.operators import FisherOperator
from fisherkit.processes import Processes
from fisherkit.progress import bar, beside
from fisherkit.rows import restore_rows
from fisherkit.rows.collection import Rows
from fisherkit.rows.problem import Problem
from fisherkit.space import ParameterSpace

MOST = 2048
"""Examples in a block: from here on products are as fast as they get."""


@dataclass(frozen=True)
class RowBlock:
    """Rows of some neighbouring examples.

    Args:
        rows: the rows.
        owner: which of the block's examples each row belongs to, in ascending order.
        mask: which positions ``[B, P]`` of each example count.
    """

    rows: Rows
    owner: Int[Tensor, "R"]
    mask: Bool[Tensor, "B P"]

    @property
    def size(self) -> int:
        """B, its examples, those without a row included."""
        return self.mask.shape[0]

    def by_example(self, values: Shaped[Tensor, "R ..."]) -> Shaped[Tensor, "B ..."]:
        """Sum what there is for each row over an example's rows; 0 where there is none."""
        total = values.new_zeros(self.size, *values.shape[1:])
        return total.index_add_(0, self.owner, values)

    def by_position(self, values: Shaped[Tensor, "R ..."]) -> Shaped[Tensor, "B P ..."]:
        """What there is for each position's one row; 0 at positions that do not count."""
        total = values.new_zeros(*self.mask.shape, *values.shape[1:])
        total[self.mask] = values
        return total


class RowBlocks(ABC):
    """Blocks in the order of the data, as often as they are asked for.

    Args:
        settings: what the rows depend on beside the data, as JSON has it (`ModelRows.settings`).
        basis: the leading eigenvectors that they are over, if they are compressed.
        compression: what that costs, as far as it was measured; None for whole rows.
    """

    def __init__(
        self, settings: dict[str, Any], basis: Basis | None = None, compression: Compression | None = None
    ) -> None:
        self.settings, self.basis, self.compression = settings, basis, compression

    @abstractmethod
    def __iter__(self) -> Iterator[RowBlock]:
        """One pass."""

    @abstractmethod
    def count(self) -> int:
        """How many examples there are, as far as the data tell without a pass."""

    def counted(self) -> int:
        """How many there are for sure, at the price of a pass over the data."""
        return self.count()


class LiveBlocks(RowBlocks):
    """Blocks of at most so many examples, made from the data in every pass."""

    def __init__(
        self, problem: Problem, limit: int, settings: dict[str, Any], basis: Basis | None = None,
        compression: Compression | None = None,
    ) -> None:  # fmt: skip
        super().__init__(settings, basis, compression)
        self.problem, self.limit = problem, limit

    def of(self, problem: Problem | None = None, limit: int | None = None) -> LiveBlocks:
        """The same of other data, or in other blocks."""
        return LiveBlocks(problem or self.problem, limit or self.limit, self.settings, self.basis, self.compression)

    def __iter__(self) -> Iterator[RowBlock]:
        problem = replace(self.problem, source=in_pieces(self.problem.source, self.limit))
        for chunk in problem.batches("rows"):
            rows = chunk.rows if self.basis is None else self.basis.turned(chunk.rows)
            yield RowBlock(rows, chunk.owner, chunk.counted_positions[0])

    def count(self) -> int:
        return self.problem.source.count()

    def counted(self) -> int:
        """Without the model; a loader may drop or merge examples of its data set."""
        return sum(batch.size for batch in self.problem.source)

    @property
    def written_out(self) -> dict[tuple[str, ...], bool]:
        """Of each unit whether its rows are written out and not kept as factors, which goes by the first batch."""
        return {unit.names: unit.stored for unit in self.problem.plan.ruled}

    def set_written_out(self, chosen: Mapping[tuple[str, ...], bool]) -> None:
        """Keep rows as other blocks keep theirs."""
        for unit in self.problem.plan.ruled:
            unit.stored = chosen.get(unit.names, unit.stored)

    @property
    def space(self) -> ParameterSpace:
        """What the rows are over."""
        return self.problem.plan.space if self.basis is None else self.basis.space

    def row_bytes(self) -> int:
        """What one example's rows take."""
        if self.compression is not None:
            return self.compression.bytes
        return self.problem.row_bytes(self.problem.plan.space.names)


class KeptBlocks(RowBlocks):
    """All blocks, in memory."""

    def __init__(self, live: LiveBlocks) -> None:
        super().__init__(live.settings, live.basis, live.compression)
        self.blocks = list(live)

    def __iter__(self) -> Iterator[RowBlock]:
        return iter(self.blocks)

    def count(self) -> int:
        return sum(block.size for block in self.blocks)


class OncePerExample:
    """A number for each example: made block by block in the first pass over the data, known in every later one."""

    def __init__(self, function: Callable[[RowBlock], Float[Tensor, "B"]]) -> None:
        self._function = function
        self._known: Tensor | None = None

    def of(self, block: RowBlock, start: int) -> Float[Tensor, "B"]:
        """Of a block whose first example is at this place; later passes may cut the data otherwise."""
        known = 0 if self._known is None else len(self._known)
        if self._known is None or start >= known:
            made = self._function(block)
            self._known = made if self._known is None else torch.cat([self._known, made])
        return self._known[start : start + block.size]


def in_pieces(source: Source, limit: int) -> CutSource:
    """The same data in batches of at most so many examples, each with the number of the batch that it is cut from."""
    return CutSource(source, lambda batches: (
        (number, batch.take(slice(start, min(start + limit, batch.size))))
        for number, batch in batches for start in range(0, batch.size, limit)
    ))  # fmt: skip


def joined(blocks: Sequence[RowBlock]) -> RowBlock:
    """One block of several."""
    if len(blocks) == 1:
        return blocks[0]
    starts = torch.tensor([0] + [block.size for block in blocks]).cumsum(0).tolist()
    positions = max(block.mask.shape[1] for block in blocks)
    masks = [torch.nn.functional.pad(block.mask, (0, positions - block.mask.shape[1])) for block in blocks]
    owner = torch.cat([block.owner + start for block, start in zip(blocks, starts, strict=False)])
    return RowBlock(Rows.cat([block.rows for block in blocks]), owner, torch.cat(masks))


def in_groups(blocks: RowBlocks, most: int) -> Iterator[RowBlock]:
    """Blocks joined as long as they have no more than so many examples together."""
    pending: list[RowBlock] = []
    for block in blocks:
        if pending and sum(b.size for b in pending) + block.size > most:
            yield joined(pending)
            pending = []
        pending.append(block)
    yield joined(pending)


# -- in a folder -------------------------------------------------------------------------------------------------------


CALL = "prepare(folder)"
FORMAT = "fisherkit-rows"
VERSION = 3
MANIFEST = "manifest.json"
PATIENCE = 1.0
"""Seconds until what another process has written is taken to be elsewhere."""


class FolderBlocks(RowBlocks):
    """Blocks in the files that a manifest names, mapped into memory one by one, to a device.

    ``entries`` are those of the manifest's blocks that are meant; None for all.
    """

    def __init__(
        self, folder: Path, space: ParameterSpace, device: torch.device, manifest: dict[str, Any],
        basis: Basis | None = None, entries: list[dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        found = manifest.get("compression")
        super().__init__(
            manifest["settings"], basis, found and Compression(**{**found, "whole": tuple(found["whole"])})
        )
        self.folder, self.space, self.device = folder, space, device
        self.entries = manifest["blocks"] if entries is None else entries

    def __iter__(self) -> Iterator[RowBlock]:
        for entry in self.entries:
            path = self.folder / entry["file"]
            header, tensors = _read(path, self.device)
            if header[io.CHECKSUM] != entry["checksum"]:
                raise _damaged(path, "it is not the block of the manifest")
            yield _block(path, self.space, header["units"], tensors)

    def count(self) -> int:
        return sum(entry["examples"] for entry in self.entries)


def write_blocks(path: Path, live: LiveBlocks, largest: int, processes: Processes) -> FolderBlocks:
    """Write the blocks that are missing or damaged; those of another model, other data or settings are refused.

    A file has at most ``largest`` examples. Of several processes each writes the rows of its own data, in the order of
    the ranks, and is given its own; the folder is the same, whoever wrote it.
    """
    # One process alone looks into the folder and begins: what others saw of it meanwhile would be half of that.
    manifest = processes.by_first(CALL, lambda: _begun(path, live, largest))
    processes.each(CALL, lambda: _refuse_elsewhere(path, manifest))
    problem, limit = live.problem, int(manifest["limit"])
    device, source = problem.plan.example_parameter.device, in_pieces(problem.source, limit)
    live = live.of(limit=int(manifest.get("made", limit)))
    first = processes.before(lambda: sum(1 for _ in source))
    # All that is there is known to be of these data before anything is written: what is refused is left as it was.
    own = processes.each(CALL, lambda: _finished(path, source, device, first))

    def write() -> list[dict[str, Any]]:
        shown = bar(None, "rows", "blocks", shown=problem.progress)
        for number, (place, batch) in enumerate(beside(shown, source.numbered()), first):
            if number not in own:
                one = replace(problem, source=_only(source, place, batch), progress=False)
                own[number] = _entry(number, batch, _write(path / _name(number), joined(list(live.of(one))), batch))
            shown.update()
        return [own[number] for number in sorted(own)]

    entries = processes.each(CALL, write)
    manifest["blocks"] = [entry for some in processes.gathered(entries) for entry in some]
    if live.compression is not None:
        manifest["compression"] = vars(live.compression)
    processes.by_first(CALL, lambda: io.write_record(path / MANIFEST, manifest))
    return FolderBlocks(path, live.space, device, manifest, live.basis, entries)


def read_blocks(folder: str | Path, fisher: FisherOperator, damping: float) -> FolderBlocks:
    """All blocks of a folder that was written to its end, for a Fisher over the parameters of the rows."""
    path = io.as_path(folder, CALL)
    manifest = _manifest(path)
    if not manifest["blocks"]:
        raise InvalidArgumentError(
            "read(folder)", f"{path}, whose rows are not finished", "those of a prepare that ended",
            try_="prepare(train, folder=...) again, which goes on from what is there",
        )  # fmt: skip
    known, basis = manifest["settings"].get("compress"), None
    if known is not None:
        basis = Basis.read(path / FILE, fisher, damping)
        if basis.settings != known:
            raise damaged(path / FILE, "it is not the one of the manifest")
    space = fisher.space if basis is None else basis.space
    return FolderBlocks(path, space, fisher.device, manifest, basis)


def _only(source: Source, number: int, batch: Batch) -> CutSource:
    """One batch of a source."""
    return CutSource(source, lambda _: iter([(number, batch)]))


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
        CALL, f"{path.name}, which is missing or damaged ({reason})", "a block as it was written",
        try_=f"prepare(train, folder={str(path.parent)!r}) again, which makes such blocks anew",
    )  # fmt: skip


# -- the folder and its manifest ---------------------------------------------------------------------------------------


def _finished(path: Path, source: Source, device: torch.device, first: int) -> dict[int, dict[str, Any]]:
    """The blocks that need not be made, by number; those of other examples are refused."""
    found, start = {}, 0
    for number, batch in enumerate(source, first):
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


def _begun(path: Path, live: LiveBlocks, largest: int) -> dict[str, Any]:
    if not path.parent.is_dir() or (path.exists() and not path.is_dir()):
        raise InvalidArgumentError(CALL, str(path), "a folder, or a new one in a folder that exists")
    path.mkdir(exist_ok=True)
    others = (other.name for other in path.iterdir() if not other.name.endswith(".part"))  # of a killed run
    if not (path / MANIFEST).exists() and any(name != FILE for name in others):
        raise InvalidArgumentError(CALL, f"{path}, which holds other files", "an empty folder, or one of prepared rows")

    fresh, settings = not (path / MANIFEST).exists(), live.settings
    known = settings if fresh else _manifest(path)["settings"]
    if changed := io.differing(known, settings):
        raise _other(path, f"rows with different {', '.join(changed)}")
    if live.basis is not None and not live.basis.on_disk:
        live.basis.write(path / FILE)  # of a manifest that is there, as it was, by its hash in the settings
    if fresh:
        made = {} if live.basis is None else {"made": live.limit}
        begun = {"format": FORMAT, "version": VERSION, "limit": largest, "settings": settings, "blocks": [], **made}
        io.write_record(path / MANIFEST, begun)
    return _manifest(path)


def _refuse_elsewhere(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse a folder that is not the one in which the first process has begun."""
    begun = time.monotonic()
    while True:
        with suppress(FileFormatError):
            if _manifest(path) == manifest:
                return
        if time.monotonic() - begun >= PATIENCE:  # disks that several machines see may show a new file late
            break
        time.sleep(0.05)
    raise InvalidArgumentError(
        CALL, f"{path}, which is not where the first process has begun", "one folder for all processes",
        why="each writes its part of the rows there",
        try_="the same folder in all of them, on a disk that all see; group=False for rows of this process alone",
    )  # fmt: skip


def _manifest(path: Path) -> dict[str, Any]:
    advice = "another folder, or delete this one: its rows are then made again"
    return io.read_record(path / MANIFEST, {"format": FORMAT, "version": VERSION}, CALL, "a manifest", advice)


def _other(path: Path, got: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        CALL, f"{got} in {path}, which has been left as it is",
        "no rows yet, or those of the same model and data, in the same batches",
        try_="the same batches, another folder, or delete this one",
    )  # fmt: skip


def _name(number: int) -> str:
    return f"rows-{number:06d}.safetensors"


def _entry(number: int, batch: Batch, checksum: str) -> dict[str, Any]:
    return {"file": _name(number), "examples": batch.size, "checksum": checksum}
