"""Sums add the same whether rows come in one pass or in parts that are merged, and a multiple is of all of it."""

import pytest
import torch

from fisherkit.rows import FactoredRows
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.space import ParameterSpace
from fisherkit.structures import structures

NAMES = ("weight", "bias")
SPACE = ParameterSpace(NAMES, ((2, 3), (2,)))
GENERATOR = torch.Generator().manual_seed(0)


def factored(n: int) -> FactoredRows:
    """Rows of a layer with 3 inputs, 2 outputs, 4 positions and a bias."""
    a, g = (torch.randn(n, 4, c, generator=GENERATOR, dtype=torch.float64) for c in (3, 2))
    return FactoredRows(a, g, bias=True)


def chunk(rows: FactoredRows) -> Chunk:
    """A chunk of them alone, all of whose positions count."""
    n = rows.count
    slots = [UnitSlot(NAMES, rows)]
    return Chunk(Rows(SPACE, slots), torch.arange(n), True, True, n, True, (torch.ones(n, 4, dtype=torch.bool),), None)


@pytest.mark.parametrize("name", ["full", "block", "kfac", "ekfac", "diagonal"])
def test_sums__of_two_halves_are_merged_and_scaled_as_the_fisher(name: str) -> None:
    structure = structures()[name](SPACE, torch.float64, torch.device("cpu"), (NAMES,))
    parts = factored(5), factored(7)
    one, two = (structure.empty().added([chunk(rows)]) for rows in parts)
    both = structure.empty().added([chunk(FactoredRows.cat(list(parts)))])
    probe = torch.randn(SPACE.size, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    merged = structure.operator(one.merge(two), 1.0)
    torch.testing.assert_close(merged.matvec(probe), structure.operator(both, 1.0).matvec(probe))
    doubled = structure.operator(one.scaled(2.0), 1.0)
    torch.testing.assert_close(doubled.matvec(probe), 2 * structure.operator(one, 1.0).matvec(probe))
