"""Sums add the same whether rows come in one pass or in parts that are merged, and a multiple is of all of it."""

import pytest
import torch

from fisherkit.operators.linalg import Spectrum
from fisherkit.rows import FactoredRows
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.space import ParameterSpace
from fisherkit.structures import KFAC, structures
from fisherkit.structures.block import NormalMatrix
from fisherkit.structures.diagonal import Squares
from fisherkit.structures.kronecker import KroneckerFactors, RotatedSquares

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


def kronecker(rows: FactoredRows) -> KroneckerFactors:
    of = chunk(rows)
    return KroneckerFactors.zeros(rows).added(of.rows.slots[0], of, KFAC(SPACE, torch.float64, torch.device("cpu"), ()))


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


def test_merge__is_the_sum_of_both_passes() -> None:
    first, second = factored(5), factored(7)
    both = FactoredRows.cat([first, second])
    dense = both.dense()

    merged = Squares(first.squared_sum()).merge(Squares(second.squared_sum()))
    torch.testing.assert_close(merged.diagonal, dense.square().sum(0))

    joined = NormalMatrix.of(first).merge(NormalMatrix.of(second))
    torch.testing.assert_close(joined.matrix, dense.mT @ dense)

    factors, expected = kronecker(first).merge(kronecker(second)), kronecker(both)
    assert factors.count == expected.count == 12 * 4
    torch.testing.assert_close(factors.activation.dense(), expected.activation.dense())
    torch.testing.assert_close(factors.gradient.dense(), expected.gradient.dense())

    a, g = (
        Spectrum(torch.ones(k).double(), torch.linalg.qr(torch.randn(k, k, generator=GENERATOR).double()).Q)
        for k in (4, 2)
    )
    rotated = RotatedSquares(a, g, False, torch.zeros(2, 4).double())
    torch.testing.assert_close(rotated.add(first).merge(rotated.add(second)).total, rotated.add(both).total)


def test_scaled__is_so_much_of_the_fisher_and_weighs_in_a_merge() -> None:
    first, second = kronecker(factored(5)), kronecker(factored(40))
    weighed = first.scaled(3.0).merge(second)
    count = 3 * first.count + second.count
    assert weighed.count == count
    expected = 3 * first.activation.dense() + second.activation.dense()
    torch.testing.assert_close(weighed.activation.dense(), expected)
    torch.testing.assert_close(weighed.gradient.dense(), 3 * first.gradient.dense() + second.gradient.dense())
