"""From a Fisher file back to an operator, without the model: whole, or any of the blocks of a file that is open."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from fisherkit import io
from fisherkit.arguments import check_device
from fisherkit.errors import FileFormatError, InvalidArgumentError, UnknownParameterError
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.composite import BlockDiagonalOperator
from fisherkit.operators.persistence import blocks_of_node, parts_fit, restore
from fisherkit.operators.sharded import ShardedOperator
from fisherkit.processes import ALONE, Group, Processes
from fisherkit.space import ParameterSpace


def load(
    path: str | Path, *, device: torch.device | str = "cpu", shard: bool = False, group: Group = None
) -> FisherOperator:  # fmt: skip
    """The operator that ``fisher.save(path)`` wrote: frozen, and in need of no model.

    Args:
        path: the file; of one in shards its index, or the path that was given to ``save``.
        device: where its tensors go.
        shard: share its blocks out to the processes of ``group``, as many as there are now, by their parameters; each
            reads its own alone. False for all blocks in each process that calls.
        group: as of `fisherkit.FisherApproximation`.

    Returns:
        An operator of the saved structure and dtype; what was recorded at saving is in ``.metadata``.

    Raises:
        MissingFileError: no such file; it is a FileNotFoundError too.
        FileFormatError: damaged, not a Fisher file, of a version from the future, or of an unknown tag.
        InvalidArgumentError: a device that is not there.
        ProcessError: the processes have other files.
    """
    call = f"load({str(path)!r})"
    processes = Processes.of(group, call) if shard else ALONE
    place = processes.each(call, lambda: check_device(call, device))
    if processes.size > 1:
        return _shared_out(path, place, processes.on(place), call)
    state, space, metadata = io.read(path, device=place)
    with parts_fit(call):
        operator = restore(space, state)
    operator.metadata = dict(metadata)
    return operator


def open_together(path: str | Path, processes: Processes, call: str, device: torch.device | str = "cpu") -> FisherFile:
    """A file that all of some processes open, each by its own path; other files in some of them are refused."""
    file = processes.each(call, lambda: open_file(path, device=device))
    header = file.header
    processes.require_same(call, lambda: {
        "file": (file.space, header.root, file.metadata), "checksums of the file": header.checksums.known,
    })  # fmt: skip
    return file


def _shared_out(path: str | Path, device: torch.device, processes: Processes, call: str) -> ShardedOperator:
    file = open_together(path, processes, call, device)
    owner = processes.owners({names: file.space.restrict(names).size for names in file.blocks})
    blocks = processes.each(
        call, lambda: {names: file.read(names) for names, rank in owner.items() if rank == processes.rank}
    )
    dtypes = processes.gathered(next((block.dtype for block in blocks.values()), None))
    dtype = next(one for one in dtypes if one is not None)
    whole = ShardedOperator.of(file.space, blocks, processes, dtype=dtype, device=device)
    whole.metadata = file.metadata
    return whole


def open_file(path: str | Path, *, device: torch.device | str = "cpu") -> FisherFile:
    """Open a Fisher file without reading its tensors.

    Args:
        path: the file; of one in shards its index, or the path that was given to ``save``.
        device: where tensors go that are read from it.

    Raises:
        InvalidTypeError: not a path.
        MissingFileError: no such file.
        FileFormatError: damaged, not a Fisher file, or of a version from the future.
        InvalidArgumentError: a device that is not there.
    """
    path = io.as_path(path, "open_file(path)")
    call = f"open_file({str(path)!r})"
    header = io.read_header(path, call)
    found = FisherFile(header, check_device(call, device))
    with parts_fit(call):  # a damaged tree may have blocks over anything
        covered = sorted(name for names in found.blocks for name in names)
    if covered != sorted(header.space.names):
        raise FileFormatError(
            call, f"a file with blocks over {covered}", f"each of {sorted(header.space.names)} once",
            try_="save it again",
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class FisherFile:
    """An open Fisher file; made by `open_file`. It keeps no file open between reads."""

    header: io.FisherHeader
    device: torch.device

    def __repr__(self) -> str:
        known = self.metadata
        what = " ".join(known[key] for key in ("kind", "structure") if key in known)
        return f"<FisherFile: {what or 'a matrix'}, D = {self.space.size:,}, {len(self.files)} file(s)>"

    @property
    def space(self) -> ParameterSpace:
        """All parameters of the file."""
        return self.header.space

    @property
    def metadata(self) -> dict[str, str]:
        """What was recorded when the matrix was built and saved."""
        return self.header.metadata

    @property
    def has_checksums(self) -> bool:
        """Whether what is read is compared with checksums; files from before they were introduced have none."""
        return bool(self.header.checksums)

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files that hold the tensors."""
        return tuple(sorted({*self.header.files.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes on disk, of the index and all shards if it has some."""
        return self.header.nbytes

    @cached_property
    def blocks(self) -> tuple[tuple[str, ...], ...]:
        """Names of the finest independent blocks, as `fisherkit.operators.split` gives them."""
        return tuple(blocks_of_node(self.header.root, self.space, io.Reader(self.header, self.device)))

    def read(self, names: Iterable[str]) -> FisherOperator:
        """The operator over some of the blocks, without metadata; reads their tensors and nothing else.

        Args:
            names: parameters, in any order: all of one block, or of several, which give a `BlockDiagonalOperator`.

        Raises:
            UnknownParameterError: names that the file does not have.
            InvalidArgumentError: no names, or a block of which only a part is named.
            FileFormatError: a file is missing, damaged, or of another save; the message names it.
        """
        wanted = {names} if isinstance(names, str) else set(names)
        chosen = self._chosen(wanted)
        call = self.header.call
        with parts_fit(call):
            blocks = blocks_of_node(self.header.root, self.space, io.Reader(self.header, self.device))
            made = [blocks[block]() for block in chosen]
        return made[0] if len(made) == 1 else BlockDiagonalOperator(self.space.restrict(wanted), made)

    def _chosen(self, wanted: set[str]) -> list[tuple[str, ...]]:
        call = "FisherFile.read(names)"
        unknown = sorted(wanted - set(self.space.names))
        if unknown:
            raise UnknownParameterError(
                call, f"unknown names {unknown}", f"names of {self.header.path.name}", try_="FisherFile.space.names"
            )
        chosen = [block for block in self.blocks if wanted & set(block)]
        cut = [block for block in chosen if not wanted >= set(block)]
        if cut or not chosen:
            raise InvalidArgumentError(
                call, f"a part of the block {list(cut[0])}" if cut else "no names", "whole blocks",
                why="parameters of one block interact", try_="a union of FisherFile.blocks",
            )  # fmt: skip
        return chosen
