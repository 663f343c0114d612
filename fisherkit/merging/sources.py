"""Fishers as blocks that are read one by one, from memory or from files, and the partition that all of them share.

The merging problem falls apart where every Fisher does. Owns the joined partition; knows no solver.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from fisherkit.errors import InvalidArgumentError, InvalidTypeError, listed
from fisherkit.operators import FisherOperator, open_file, split
from fisherkit.operators.block_diagonal import join
from fisherkit.operators.persistence import renamed
from fisherkit.space import ParameterSpace, finest_partition
from fisherkit.wrappers import matching

Fisher: TypeAlias = FisherOperator | str | Path
"""An operator, or the path of a Fisher file."""

Names: TypeAlias = tuple[str, ...]


class FisherSource(ABC):
    """Independent diagonal blocks of one Fisher.

    Args:
        space: all its parameters.
        metadata: what was recorded when it was built.
        blocks: names of each of the finest independent blocks.
        device: where they are once read.

    Attributes:
        recorded: names to those under which they were measured, where these differ.
    """

    def __init__(
        self, space: ParameterSpace, metadata: dict[str, str], blocks: tuple[Names, ...], device: torch.device
    ) -> None:
        self.space, self.metadata, self.blocks, self.device = space, metadata, blocks, device
        self.recorded: Mapping[str, str] = {}

    @abstractmethod
    def read(self, names: Names) -> FisherOperator:
        """The operator over some whole blocks."""


class RenamedSource(FisherSource):
    """Another one by the names that its parameters have in a model.

    Args:
        source: measured on that model within a wrapper.
        names: each of its names to the model's.
    """

    def __init__(self, source: FisherSource, names: Mapping[str, str]) -> None:
        self._source, self._names, space = source, names, source.space
        blocks = tuple(tuple(names[name] for name in block) for block in source.blocks)
        renamed_space = ParameterSpace(tuple(names[name] for name in space.names), space.shapes)
        super().__init__(renamed_space, source.metadata, blocks, source.device)
        self.recorded = {new: source.recorded.get(old, old) for old, new in names.items()}

    def read(self, names: Names) -> FisherOperator:
        """The operator over some whole blocks."""
        wanted = set(names)
        operator = self._source.read(tuple(old for old, new in self._names.items() if new in wanted))
        return renamed(operator, {name: self._names[name] for name in operator.space.names})


class MemorySource(FisherSource):
    """An operator in memory."""

    def __init__(self, operator: FisherOperator) -> None:
        parts = split(operator)
        self._parts = {part.space.names[0]: part for part in parts}
        blocks = tuple(part.space.names for part in parts)
        super().__init__(operator.space, dict(operator.metadata), blocks, operator.device)

    def read(self, names: Names) -> FisherOperator:
        """The operator over some whole blocks."""
        return join(self.space.restrict(names), [self._parts[name] for name in names if name in self._parts])


class FileSource(FisherSource):
    """A Fisher file of which only the blocks that are asked for are read."""

    def __init__(self, path: Path) -> None:
        self._file = open_file(path)
        super().__init__(self._file.space, dict(self._file.metadata), self._file.blocks, self._file.device)

    def read(self, names: Names) -> FisherOperator:
        """The operator over some whole blocks."""
        return join(self.space.restrict(names), split(self._file.read(names)))


def open_fisher(fisher: Fisher, label: str) -> FisherSource:
    """A source of blocks.

    Args:
        fisher: an operator, or the path of a Fisher file.
        label: what messages call it.

    Raises:
        InvalidTypeError: neither.
        FileFormatError: the file is missing, damaged or no Fisher file.
    """
    if isinstance(fisher, FisherOperator):
        return MemorySource(fisher)
    if isinstance(fisher, (str, Path)):
        return FileSource(Path(fisher))
    raise InvalidTypeError(
        call=f"merge, {label}",
        got=f"a {type(fisher).__name__}",
        expected="a FisherOperator, or the path of a Fisher file",
        try_="fk.EmpiricalFisher(model, data)",
    )


def named_as(source: FisherSource, known: Collection[str]) -> FisherSource:
    """The Fisher by a model's own names, if it was measured on the model within a wrapper, and else as it is.

    Args:
        source: a Fisher.
        known: the model's names.
    """
    names = matching(source.space.names, known)
    changed = any(old != new for old, new in names.items())
    return RenamedSource(source, names) if changed and len(set(names.values())) == len(names) else source


def joined_blocks(sources: Sequence[FisherSource], names: Iterable[str]) -> list[Names]:
    """The finest partition of some names in which no block of any source is torn apart.

    Args:
        sources: the Fishers.
        names: in the order that the blocks' names shall have.

    Returns:
        Blocks in the order of their first names.

    Raises:
        InvalidArgumentError: a block reaches beyond the names, or the sources order its names differently.
    """
    order = {name: place for place, name in enumerate(names)}
    units: list[Names] = [(name,) for name in order]
    for number, source in enumerate(sources, 1):
        for block in source.blocks:
            inside = [name for name in block if name in order]
            if inside and len(inside) < len(block):
                raise InvalidArgumentError(
                    call=f"merge, Fisher {number}",
                    got=f"a block over {listed(map(repr, block))}, of which "
                    f"{listed(repr(n) for n in block if n not in order)} cannot be merged",
                    expected="blocks whose parameters all models and Fishers have, in the same shapes",
                    why="parameters of one block interact, and a part of them cannot be solved for alone",
                    try_="Fishers built with the same params=, without the parameters that differ",
                )
            units += [block] if inside else []
    groups = [sorted(group, key=order.__getitem__) for group in finest_partition(units)]
    blocks = [tuple(group) for group in sorted(groups, key=lambda group: order[group[0]])]
    for number, source in enumerate(sources, 1):
        for block in blocks:
            if (own := source.space.restrict(block).names) != block:
                raise InvalidArgumentError(
                    call=f"merge, Fisher {number}",
                    got=f"the parameters {listed(map(repr, own))} in another order than the first Fisher's",
                    expected="one order of parameters",
                    try_="Fishers built from models of one class",
                )
    return blocks
