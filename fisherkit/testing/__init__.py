"""Check any `FisherOperator`, the package's or your own, against the matrix that it should be.

Build the operator, write its matrix out by other means, and pass both to `check_fisher`:

    from fisherkit.testing import check_fisher

    def test_my_operator():
        report = check_fisher(MyOperator(space, ...), dense)
        print(report)                      # the relative error of each operation

It needs no test framework.
"""

from fisherkit.testing.conformance import MAY_BE_REFUSED, TOLERANCES, ConformanceError, ConformanceReport, check_fisher

__all__ = ["MAY_BE_REFUSED", "TOLERANCES", "ConformanceError", "ConformanceReport", "check_fisher"]
