"""Sums add the same whether rows come in one pass or in parts that are merged, and a multiple is of all of it."""

import torch

from fisherkit.operators.truncated_kronecker import Spectrum
from fisherkit.rows import FactoredRows
from fisherkit.structures.block import NormalMatrix
from fisherkit.structures.diagonal import Squares
from fisherkit.structures.kronecker import KroneckerFactors, RotatedSquares

GENERATOR = torch.Generator().manual_seed(0)


def factored(n: int) -> FactoredRows:
    """Rows of a layer with 3 inputs, 2 outputs, 4 positions and a bias."""
    a, g = (torch.randn(n, 4, c, generator=GENERATOR, dtype=torch.float64) for c in (3, 2))
    return FactoredRows(a, g, bias=True)


def kronecker(rows: FactoredRows) -> KroneckerFactors:
    return KroneckerFactors.zeros(rows).add(
        rows, first=True, whole=True, counted=(torch.ones(rows.count, 4, dtype=torch.bool),), exists=None,
        token=False, reduce=False,
    )  # fmt: skip


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
