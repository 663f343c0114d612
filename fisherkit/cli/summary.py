"""The numbers of a Fisher file: each layer's trace, and the largest eigenvalues where they have a closed form.

Reads one block at a time. Owns what is summed up; `show` owns how it looks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkit.cli.text import progress
from fisherkit.errors import MemoryBudgetError, NoClosedFormError
from fisherkit.operators import FisherOperator, open_file
from fisherkit.space import ParameterSpace

KEPT = 200
"""Eigenvalues that are kept."""
LARGEST_SIDE = 4096
"""Of a matrix that is decomposed: seconds, not hours."""


@dataclass(frozen=True)
class Layer:
    """One module's own parameters.

    Args:
        name: of the module; of the parameters where they are the model's own.
        parameters: their names.
        kind: the tag of the block or blocks that they lie in; "joint" where a block goes beyond the layer.
        size: number of entries.
        trace: the sum of their diagonal entries.
        share: of the whole trace; 0 if that is 0.
        mean_eigenvalue: trace / size.
    """

    name: str
    parameters: tuple[str, ...]
    kind: str
    size: int
    trace: float
    share: float
    mean_eigenvalue: float


@dataclass(frozen=True)
class Summary:
    """What a Fisher file holds.

    Args:
        file: its path.
        files: how many there are, an index not counted.
        bytes: on disk.
        operator: the tag of the operator in files.
        blocks: how many independent ones.
        size: D.
        dtype: of the operator.
        metadata: what was recorded.
        checksums: whether the file has them; then all of its values are those that were written.
        trace: of the whole matrix.
        layers: in flat order.
        eigenvalues: the largest, in descending order; None if a block has no closed form that is cheap enough.
        no_eigenvalues: why there are none; empty if there are.
    """

    file: str
    files: int
    bytes: int
    operator: str
    blocks: int
    size: int
    dtype: str
    metadata: dict[str, str]
    checksums: bool
    trace: float
    layers: tuple[Layer, ...]
    eigenvalues: tuple[float, ...] | None
    no_eigenvalues: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        return asdict(self)


def summarize(path: Path) -> Summary:
    """Read a Fisher file block by block and add it up.

    Args:
        path: the file, or the index of one in shards.

    Raises:
        FileFormatError: no such file, damaged, or not a Fisher file.
    """
    file = open_file(path)
    traces: dict[str, float] = {}
    kinds: dict[str, str] = {}
    spectra: list[Tensor] = []
    refused: list[str] = []
    dtype = ""
    for names in progress(file.blocks):
        block = file.read(names)
        dtype = str(block.dtype).removeprefix("torch.")
        kinds.update(dict.fromkeys(names, block.tag))
        pieces = block.space.unflatten(block.diagonal().double())
        sums = torch.stack([pieces[name].sum() for name in block.space.names])
        traces.update(zip(block.space.names, sums.tolist(), strict=True))
        try:
            spectra.append(_largest(block))
        except (NoClosedFormError, MemoryBudgetError) as error:
            refused.append(error.why or error.got)
    largest = torch.cat(spectra).sort(descending=True).values[:KEPT] if spectra else torch.zeros(0)
    reason = (
        f"none in closed form for {len(refused)} of {len(file.blocks)} blocks, because {refused[0]}" if refused else ""
    )
    total = sum(traces.values())
    return Summary(
        file=str(path), files=len(file.files), bytes=file.nbytes, operator=file.header.root.kind,
        blocks=len(file.blocks), size=file.space.size, dtype=dtype, metadata=file.metadata,
        checksums=file.has_checksums, trace=total, layers=_layers(file.space, file.blocks, kinds, traces, total),
        eigenvalues=None if refused else tuple(largest.tolist()), no_eigenvalues=reason,
    )  # fmt: skip


def _largest(block: FisherOperator) -> Tensor:
    side = block.decomposed_side
    if side > LARGEST_SIDE:
        why = (
            f"a {block.tag} block would have to decompose a matrix of side {side:,}, above {LARGEST_SIDE:,} "
            "(fk.estimators.lanczos_eigenvalues needs products alone)"
        )
        raise NoClosedFormError(
            call="show", got=f"a matrix of side {side:,}", expected=f"{LARGEST_SIDE:,} or less", why=why
        )
    return block.eigenvalues(min(KEPT, block.size)).cpu()


def _layers(
    space: ParameterSpace,
    blocks: tuple[tuple[str, ...], ...],
    kinds: dict[str, str],
    traces: dict[str, float],
    total: float,
) -> tuple[Layer, ...]:
    sizes = dict(zip(space.names, space.sizes, strict=True))
    block_of = {name: names for names in blocks for name in names}
    found = []
    for module, names in space.blocks.items():
        seen: dict[str, None] = {}
        for name in names:
            joint = not set(block_of[name]) <= set(names)
            seen[f"{kinds[name]}, joint" if joint else kinds[name]] = None
        trace, size = sum(traces[name] for name in names), sum(sizes[name] for name in names)
        share = trace / total if total else 0.0
        found.append(Layer(module or ", ".join(names), names, " + ".join(seen), size, trace, share, trace / size))
    return tuple(found)
