"""The finest independent diagonal blocks of an operator, in memory or in a file that is not read yet.

Owns how partitions of a sum's terms join, and what a block of each structure is. A block-diagonal matrix has the blocks
of its blocks, a diagonal one a block for each parameter, a sum those of its terms, joined where they overlap; any other
operator is one block.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence

import torch

from fisherkit import io
from fisherkit.operators.algebra import SumOperator, add
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.block_diagonal import BlockDiagonalOperator
from fisherkit.operators.diagonal import DiagonalOperator
from fisherkit.operators.persistence import check_names, restore
from fisherkit.space import ParameterSpace

Blocks = dict[tuple[str, ...], Callable[[], FisherOperator]]
"""A block's names to the block, made when called; in flat order of their first names."""


def split(operator: FisherOperator) -> tuple[FisherOperator, ...]:
    """The finest independent diagonal blocks that are known, so that F = blockdiag of them.

    Args:
        operator: any.

    Returns:
        Operators over disjoint parts of the space that cover it, in flat order of their first names, without metadata:
        of a block-diagonal operator its blocks' blocks, of a diagonal one a diagonal for each parameter, of a sum the
        blocks of its terms joined where they overlap, each the sum of the terms' parts. Any other operator is returned
        as it is, without its metadata. Tensors are shared with the operator.
    """
    return tuple(make() for make in blocks_of(operator).values())


def blocks_of(operator: FisherOperator) -> Blocks:
    """The blocks of an operator.

    Args:
        operator: any.
    """
    plain, space = operator._unwrap(), operator.space
    # Exactly these classes: a class of one's own that derives from one may act otherwise.
    if type(plain) is BlockDiagonalOperator:
        return _in_order(space, [blocks_of(block) for block in plain.blocks])
    if type(plain) is DiagonalOperator:
        entries = plain._entries
        return {(n,): functools.partial(_diagonal, space, n, entries[span]) for n, span in space.slices.items()}
    if type(plain) is SumOperator:
        return _of_sum(space, [blocks_of(term) for term in plain.terms])
    return {space.names: lambda: _bare(plain)}


def blocks_of_node(node: io.Node, space: ParameterSpace, reader: io.Reader) -> Blocks:
    """The blocks of an operator in a file; making one reads its tensors and no others.

    Args:
        node: the operator.
        space: its parameters.
        reader: of the file; must be open when a block is made.

    Raises:
        FileFormatError: the description is of other parameters.
    """
    check_names(node, space)
    if node.kind == BlockDiagonalOperator.kind and node.children:
        return _in_order(space, [blocks_of_node(c, space.restrict(c.names), reader) for c in node.children])
    if node.kind == DiagonalOperator.kind and "diagonal" in node.places:
        place = node.places["diagonal"]
        return {(n,): functools.partial(_read_diagonal, space, n, reader, place) for n in space.names}
    if node.kind == SumOperator.kind and node.children:
        return _of_sum(space, [blocks_of_node(child, space, reader) for child in node.children])
    return {space.names: lambda: restore(space, reader.state(node))}


def join(space: ParameterSpace, blocks: Sequence[FisherOperator]) -> FisherOperator:
    """The block-diagonal operator of some blocks over a space; a single one is itself.

    Args:
        space: all their parameters.
        blocks: at least one.
    """
    return blocks[0] if len(blocks) == 1 else BlockDiagonalOperator(space, blocks)


def _diagonal(space: ParameterSpace, name: str, entries: torch.Tensor) -> FisherOperator:
    return DiagonalOperator(space.restrict([name]), entries)


def _read_diagonal(space: ParameterSpace, name: str, reader: io.Reader, place: io.Place) -> FisherOperator:
    span = space.slices[name]
    return _diagonal(space, name, reader.rows(place, span.start, span.stop))


def _of_sum(space: ParameterSpace, terms: Sequence[Blocks]) -> Blocks:
    groups = finest_partition([names for blocks in terms for names in blocks])
    found: Blocks = {}
    for group in groups:
        part = space.restrict(group)
        makers = [[make for names, make in blocks.items() if names[0] in group] for blocks in terms]
        found[part.names] = functools.partial(_sum, part, makers)
    return _in_order(space, [found])


def _sum(space: ParameterSpace, terms: Sequence[Sequence[Callable[[], FisherOperator]]]) -> FisherOperator:
    return functools.reduce(add, [folded(space, [make() for make in makers]) for makers in terms])


def folded(space: ParameterSpace, blocks: Sequence[FisherOperator]) -> FisherOperator:
    """As `join`, but diagonals are one diagonal, which folds with more.

    Args:
        space: all their parameters.
        blocks: at least one.
    """
    if all(type(block) is DiagonalOperator for block in blocks):
        entries = {block.space.names[0]: block._diagonal() for block in blocks}
        return DiagonalOperator(space, torch.cat([entries[name] for name in space.names]))
    return join(space, blocks)


def finest_partition(units: Iterable[tuple[str, ...]]) -> list[set[str]]:
    """The finest partition of which every unit lies in one part.

    Args:
        units: names that belong together; they may overlap.
    """
    group_of: dict[str, set[str]] = {}
    for unit in units:
        merged: set[str] = set(unit).union(*(group_of[name] for name in unit if name in group_of))
        group_of.update(dict.fromkeys(merged, merged))
    return list({id(group): group for group in group_of.values()}.values())


def _in_order(space: ParameterSpace, parts: Iterable[Blocks]) -> Blocks:
    place = {name: i for i, name in enumerate(space.names)}
    found = [item for blocks in parts for item in blocks.items()]
    return dict(sorted(found, key=lambda item: place[item[0][0]]))


def _bare(operator: FisherOperator) -> FisherOperator:
    """The operator without metadata; itself if it has none."""
    if not operator.metadata:
        return operator
    bare = copy.copy(operator)
    bare.metadata = {}
    return bare
