"""How long a merge by Fisher files will take, from what their headers say of the layers.

Owns the count of operations and the machine's speed; reads no tensor and solves nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch

from fisherkit.io.fisher_file import FisherHeader
from fisherkit.io.state import Node
from fisherkit.merging.blocks import DENSE_SIZE

STEPS = 60
"""Of conjugate gradients, as layers of MiniLM take with the default damping."""

EIGEN = 45
"""Decompositions of a matrix of size n take about 9 n³ operations at a fifth of a matrix product's speed."""

PROBE = 512


def expected_seconds(headers: Sequence[FisherHeader]) -> float:
    """Of solving all layers that are Kronecker products, on this machine's CPU by one thread; other blocks are quick.

    Cost: some milliseconds, for three matrix products.
    """
    operations = sum(_operations(header) for header in headers)
    return operations / _speed() if operations else 0.0


def _operations(header: FisherHeader) -> float:
    shapes, total = dict(zip(header.space.names, header.space.shapes, strict=True)), 0.0
    for node in _leaves(header.root):
        if "kronecker" in node.kind:
            size = sum(math.prod(shapes[name]) for name in node.names)
            outputs = max(shapes[node.names[0]][:1], default=1)
            inputs = size // outputs
            iterated = EIGEN / 2 * (outputs**3 + inputs**3) + STEPS * 2 * (outputs + inputs) * size
            total += size**3 / 3 if size <= DENSE_SIZE else iterated
    return total


def _leaves(node: Node) -> Iterator[Node]:
    if not node.children:
        yield node
    for child in node.children:
        yield from _leaves(child)


def _speed() -> float:
    """Operations a second of a product of float64 matrices, by one thread."""
    matrix, best = torch.ones(PROBE, PROBE, dtype=torch.float64), math.inf
    for _ in range(3):
        begin = time.process_time()
        matrix @ matrix
        best = min(best, time.process_time() - begin)
    return 2 * PROBE**3 / max(best, 1e-6)
