"""Accumulators add the same whether rows come in one pass or in parts that are merged."""

import torch

from fisherkit.accumulators import KroneckerFactors, NormalMatrix, RotatedSquares, Squares
from fisherkit.rows import FactoredRows

GENERATOR = torch.Generator().manual_seed(0)


def factored(n: int) -> FactoredRows:
    """Rows of a layer with 3 inputs, 2 outputs, 4 positions and a bias."""
    a, g = (torch.randn(n, 4, c, generator=GENERATOR, dtype=torch.float64) for c in (3, 2))
    return FactoredRows(a, g, bias=True)


def test_merge__is_the_sum_of_both_passes() -> None:
    first, second = factored(5), factored(7)
    both = FactoredRows.cat([first, second])
    counted = {rows.count: (torch.ones(rows.count, 4, dtype=torch.bool),) for rows in (first, second, both)}
    dense = both.dense()

    def kronecker(rows: FactoredRows) -> KroneckerFactors:
        empty = KroneckerFactors.zeros(rows)
        return empty.add(
            rows, first=True, whole=True, counted=counted[rows.count], exists=None, token=False, reduce=False
        )  # fmt: skip

    squares = Squares(torch.zeros(8).double())
    merged = squares.add(first).merge(squares.add(second))
    torch.testing.assert_close(merged.total, dense.square().sum(0))

    matrix = NormalMatrix(torch.zeros(8, 8).double())
    joined = matrix.add(first.dense()).merge(matrix.add(second.dense()))
    torch.testing.assert_close(joined.total, dense.mT @ dense)

    factors, expected = kronecker(first).merge(kronecker(second)), kronecker(both)
    assert factors.count == expected.count == 12 * 4
    torch.testing.assert_close(factors.activation.dense(), expected.activation.dense())
    torch.testing.assert_close(factors.gradient.dense(), expected.gradient.dense())

    bases = (torch.linalg.qr(torch.randn(k, k, generator=GENERATOR, dtype=torch.float64)).Q for k in (4, 2))
    rotated = RotatedSquares(*bases, torch.zeros(2, 4).double())
    torch.testing.assert_close(rotated.add(first).merge(rotated.add(second)).total, rotated.add(both).total)
