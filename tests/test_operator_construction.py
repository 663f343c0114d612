"""Matrices without an inverse, and tensors that make no operator: each is refused, and the message says why."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from fisherkit.errors import (
    FisherkitError,
    InvalidArgumentError,
    InvalidTypeError,
    NonFiniteError,
    SingularMatrixError,
)
from fisherkit.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    KroneckerOperator,
)
from fisherkit.space import ParameterSpace
from tests.operator_cases import (
    CONV,
    CONV1D,
    LAYER,
    MIXED,
    block_diagonal,
    diagonal,
    normal,
    positive,
)

F64, F32 = torch.float64, torch.float32
ONES = torch.ones(15, dtype=F64)


CALLS: dict[str, tuple[Callable[[], object], type[FisherkitError], str]] = {
    # singular
    "singular diagonal": (
        lambda: DiagonalOperator(LAYER, ONES * (torch.arange(15) > 1)).logdet(0.0),
        SingularMatrixError,
        "DiagonalOperator.logdet(damping=0): got a singular matrix; expected a positive definite one. "
        "2 of its 15 eigenvalues are 0, or too small for torch.float64, so F + damping·I has no inverse and its log "
        "det is -inf. Try: damping > 0, or fk.RelativeDamping(1e-6).",
    ),
    "singular dense": (
        lambda: DenseOperator(LAYER, positive(15, 0, F64, rank=4)).solve(ONES, 0.0),
        SingularMatrixError,
        "DenseOperator.solve(damping=0): got a singular matrix; expected a positive definite one. Its rank",
    ),
    "singular dense in float32": (
        lambda: DenseOperator(LAYER, positive(15, 0, F32, rank=4)).solve(ONES.float(), 0.0),
        SingularMatrixError,
        "got a singular matrix",
    ),
    "singular Kronecker": (
        lambda: KroneckerOperator(LAYER, positive(5, 0, F64, rank=2), positive(3, 1, F64)).solve(ONES, 0.0),
        SingularMatrixError,
        "KroneckerOperator.solve(damping=0): got a singular matrix; expected a positive definite one. 9 of",
    ),
    "singular eigen": (
        lambda: EigenKroneckerOperator(CONV, torch.eye(4), torch.eye(3), torch.zeros(3, 4)).logdet(0.0),
        SingularMatrixError,
        "12 of its 12 eigenvalues are 0",
    ),
    "singular block": (
        lambda: BlockDiagonalOperator(
            LAYER,
            [
                DiagonalOperator(LAYER.restrict(["l.weight"]), ONES[:12]),
                DiagonalOperator(LAYER.restrict(["l.bias"]), 0 * ONES[:3]),
            ],
        ).solve(ONES, 0.0),
        SingularMatrixError,
        "BlockDiagonalOperator.solve(damping=0): got a singular block over ['l.bias']; expected positive",
    ),
    # constructors
    "diagonal of another length": (
        lambda: DiagonalOperator(LAYER, ONES[:4]),
        InvalidArgumentError,
        "DiagonalOperator(diagonal): got shape [4]; expected [15].",
    ),
    "negative diagonal": (lambda: DiagonalOperator(LAYER, -2 * ONES), InvalidArgumentError, "15 negative entries"),
    "NaN diagonal": (lambda: DiagonalOperator(LAYER, ONES * torch.nan), NonFiniteError, "NaN or infinite entries"),
    "integer diagonal": (lambda: DiagonalOperator(LAYER, ONES.long()), InvalidTypeError, "a tensor of torch.int64"),
    "complex diagonal": (lambda: DiagonalOperator(LAYER, ONES * 1j), InvalidTypeError, "a real floating-point dtype"),
    "list for a diagonal": (lambda: DiagonalOperator(LAYER, [1.0]), InvalidTypeError, "got a list; expected a torch"),
    "asymmetric matrix": (
        lambda: DenseOperator(LAYER, normal(15, 15, seed=0)),
        InvalidArgumentError,
        "DenseOperator(matrix): got a matrix that differs from its transpose by up to",
    ),
    "indefinite matrix": (
        lambda: DenseOperator(LAYER, torch.diag(ONES * torch.arange(-1, 14))).eigenvalues(1),
        InvalidArgumentError,
        "got a matrix with eigenvalue -1 beside 13; expected no negative eigenvalue",
    ),
    "factor without the bias's column": (
        lambda: KroneckerOperator(LAYER, torch.eye(4), torch.eye(3)),
        InvalidArgumentError,
        "KroneckerOperator(activation): got shape [4, 4]; expected [5, 5]",
    ),
    "factors of two dtypes": (
        lambda: KroneckerOperator(LAYER, torch.eye(5), torch.eye(3, dtype=F64)),
        InvalidTypeError,
        "KroneckerOperator(gradient): got a tensor of torch.float64; expected torch.float32",
    ),
    "factors on two devices": (
        lambda: KroneckerOperator(LAYER, torch.eye(5), torch.eye(3, device="meta")),
        InvalidArgumentError,
        "KroneckerOperator(gradient): got a tensor on meta; expected cpu",
    ),
    "transposed layer not said to be": (
        lambda: KroneckerOperator(CONV1D, torch.eye(5), torch.eye(3)),
        InvalidArgumentError,
        "expected one layer's weight [O, I], or that and then its bias [O]. A Kronecker product covers one layer. "
        "Try: space.restrict(names) for one layer, or transposed=.",
    ),
    "Kronecker product over two layers": (
        lambda: KroneckerOperator(MIXED, torch.eye(5), torch.eye(3)),
        InvalidArgumentError,
        "a Kronecker product covers one layer",
    ),
    "transposed eigenvalues": (
        lambda: EigenKroneckerOperator(CONV, torch.eye(4), torch.eye(3), torch.ones(4, 3)),
        InvalidArgumentError,
        "EigenKroneckerOperator(eigenvalues): got shape [4, 3]; expected [3, 4]",
    ),
    "negative eigenvalues": (
        lambda: EigenKroneckerOperator(CONV, torch.eye(4), torch.eye(3), -torch.ones(3, 4)),
        InvalidArgumentError,
        "12 negative entries",
    ),
    "blocks that leave out a name": (
        lambda: BlockDiagonalOperator(LAYER, [DiagonalOperator(LAYER.restrict(["l.bias"]), ONES[:3])]),
        InvalidArgumentError,
        "got blocks that leave out ['l.weight'], add [] and repeat []; expected each of the 2 names of the space",
    ),
    "blocks that overlap": (
        lambda: BlockDiagonalOperator(MIXED, [*block_diagonal(F64)[0].blocks, diagonal(F64, MIXED.restrict("z"))[0]]),
        InvalidArgumentError,
        "repeat ['z']",
    ),
    "blocks in another order": (
        lambda: BlockDiagonalOperator(
            LAYER, [DiagonalOperator(ParameterSpace(LAYER.names[::-1], LAYER.shapes[::-1]), ONES)]
        ),
        InvalidArgumentError,
        "a block over ['l.bias', 'l.weight'] whose shapes or order are not the space's",
    ),
    "blocks of two dtypes": (
        lambda: BlockDiagonalOperator(
            LAYER, [diagonal(F64, LAYER.restrict(["l.weight"]))[0], diagonal(F32, LAYER.restrict(["l.bias"]))[0]]
        ),
        InvalidTypeError,
        "got blocks of [torch.float64, torch.float32]; expected one dtype",
    ),
    "blocks that are tensors": (
        lambda: BlockDiagonalOperator(LAYER, [ONES]),
        InvalidTypeError,
        "got blocks of type ['Tensor']; expected FisherOperators",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, id=name.replace(" ", "-")) for name in CALLS])
def test_bad_matrix__is_refused_with_advice(name: str) -> None:
    call, error, message = CALLS[name]
    with pytest.raises(error, match=re.escape(message).replace("a\\ Kronecker", "[aA]\\ Kronecker")):
        call()
    assert issubclass(error, (ValueError, TypeError, LookupError, ArithmeticError))


def test_eigen_kronecker__of_bases_that_do_not_span_everything_is_its_dense_matrix() -> None:
    """Few examples make factors of low rank; what their eigenvectors do not span is F's null space."""
    generator = torch.Generator().manual_seed(0)
    on_inputs = torch.linalg.qr(torch.randn(4, 2, generator=generator, dtype=torch.float64)).Q
    on_outputs = torch.linalg.qr(torch.randn(3, 2, generator=generator, dtype=torch.float64)).Q
    values = torch.rand(2, 2, generator=generator, dtype=torch.float64)
    thin = EigenKroneckerOperator(CONV, on_inputs, on_outputs, values)
    dense = torch.kron(on_outputs, on_inputs) @ values.flatten().diag() @ torch.kron(on_outputs, on_inputs).T
    v = torch.randn(thin.size, 2, generator=generator, dtype=torch.float64)
    regular = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)

    def close(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    close(thin @ v, dense @ v)
    close(thin.diagonal(), dense.diagonal())
    close(thin.solve(v, damping=0.1), torch.linalg.solve(regular, v))
    close(thin.logdet(0.1), torch.logdet(regular))
    close(thin.eigenvalues(6), torch.linalg.eigvalsh(dense).flip(0)[:6].clamp_min(0))
    with pytest.raises(SingularMatrixError):
        thin.factorize(0.0)
