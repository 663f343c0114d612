"""Matrices without an inverse, tensors that make no operator, bad vectors, numbers and sums: each is refused."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fisherkit.errors import (
    FisherkitError,
    InvalidArgumentError,
    InvalidTypeError,
    NonFiniteError,
    SingularMatrixError,
    UnknownParameterError,
)
from fisherkit.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    EigenKroneckerOperator,
    FisherOperator,
    KroneckerOperator,
    RelativeDamping,
    SumOperator,
)
from fisherkit.space import ParameterSpace
from tests.operator_cases import CONV, CONV1D, LAYER, MIXED, block_diagonal, diagonal, kronecker, normal, positive

F64, F32 = torch.float64, torch.float32
ONES = torch.ones(15, dtype=F64)


def operator() -> FisherOperator:
    return kronecker(F64)[0]


def named(**changes: Any) -> dict[str, Any]:
    tensors = {name.replace(".", "_"): tensor for name, tensor in LAYER.unflatten(ONES).items()} | changes
    return {name.replace("_", "."): tensor for name, tensor in tensors.items() if tensor is not None}


CALLS: dict[str, tuple[Callable[[], object], type[FisherkitError], str]] = {
    # singular
    "singular diagonal": (
        lambda: DiagonalOperator(LAYER, ONES * (torch.arange(15) > 1)).logdet(0.0),
        SingularMatrixError,
        "DiagonalOperator.logdet(damping=0): got a singular matrix; expected a positive definite one. "
        "2 of its 15 eigenvalues are 0, or too small for torch.float64, so F + damping·I has no inverse and its log "
        "det is -inf. Try: damping > 0, or damping=fk.RelativeDamping(1e-6).",
    ),
    "singular dense": (lambda: DenseOperator(LAYER, positive(15, 0, F64, rank=4)).solve(ONES, 0.0), SingularMatrixError,
        "DenseOperator.solve(damping=0): got a singular matrix; expected a positive definite one. Its rank"),
    "singular dense in float32": (lambda: DenseOperator(LAYER, positive(15, 0, F32, rank=4)).solve(ONES.float(), 0.0),
        SingularMatrixError, "got a singular matrix"),
    "singular Kronecker": (
        lambda: KroneckerOperator(LAYER, positive(5, 0, F64, rank=2), positive(3, 1, F64)).solve(ONES, 0.0),
        SingularMatrixError,
        "KroneckerOperator.solve(damping=0): got a singular matrix; expected a positive definite one. 9 of"),
    "singular eigen": (lambda: EigenKroneckerOperator(CONV, torch.eye(4), torch.eye(3), torch.zeros(3, 4)).logdet(0.0),
        SingularMatrixError, "12 of its 12 eigenvalues are 0"),
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
    "diagonal of another length": (lambda: DiagonalOperator(LAYER, ONES[:4]), InvalidArgumentError,
        "DiagonalOperator(diagonal): got shape [4]; expected [15]."),
    "negative diagonal": (lambda: DiagonalOperator(LAYER, -2 * ONES), InvalidArgumentError, "15 negative entries"),
    "NaN diagonal": (lambda: DiagonalOperator(LAYER, ONES * torch.nan), NonFiniteError, "NaN or infinite entries"),
    "integer diagonal": (lambda: DiagonalOperator(LAYER, ONES.long()), InvalidTypeError, "a tensor of torch.int64"),
    "complex diagonal": (lambda: DiagonalOperator(LAYER, ONES * 1j), InvalidTypeError, "a real floating-point dtype"),
    "list for a diagonal": (lambda: DiagonalOperator(LAYER, [1.0]), InvalidTypeError, "got a list; expected a torch"),
    "asymmetric matrix": (lambda: DenseOperator(LAYER, normal(15, 15, seed=0)), InvalidArgumentError,
        "DenseOperator(matrix): got a matrix that differs from its transpose by up to"),
    "indefinite matrix": (lambda: DenseOperator(LAYER, torch.diag(ONES * torch.arange(-1, 14))).eigenvalues(1),
        InvalidArgumentError, "got a matrix with eigenvalue -1 beside 13; expected no negative eigenvalue"),
    "factor without the bias's column": (lambda: KroneckerOperator(LAYER, torch.eye(4), torch.eye(3)),
        InvalidArgumentError, "KroneckerOperator(activation): got shape [4, 4]; expected [5, 5]"),
    "factors of two dtypes": (lambda: KroneckerOperator(LAYER, torch.eye(5), torch.eye(3, dtype=F64)), InvalidTypeError,
        "KroneckerOperator(gradient): got a tensor of torch.float64; expected torch.float32"),
    "factors on two devices": (lambda: KroneckerOperator(LAYER, torch.eye(5), torch.eye(3, device="meta")),
        InvalidArgumentError, "KroneckerOperator(gradient): got a tensor on meta; expected cpu"),
    "transposed layer not said to be": (
        lambda: KroneckerOperator(CONV1D, torch.eye(5), torch.eye(3)),
        InvalidArgumentError,
        "expected one layer's weight [O, I], or that and then its bias [O]. A Kronecker product covers one layer. "
        "Try: space.restrict(names) for one layer, or transposed=.",
    ),
    "Kronecker product over two layers": (lambda: KroneckerOperator(MIXED, torch.eye(5), torch.eye(3)),
        InvalidArgumentError, "a Kronecker product covers one layer"),
    "transposed eigenvalues": (lambda: EigenKroneckerOperator(CONV, torch.eye(4), torch.eye(3), torch.ones(4, 3)),
        InvalidArgumentError, "EigenKroneckerOperator(eigenvalues): got shape [4, 3]; expected [3, 4]"),
    "negative eigenvalues": (lambda: EigenKroneckerOperator(CONV, torch.eye(4), torch.eye(3), -torch.ones(3, 4)),
        InvalidArgumentError, "12 negative entries"),
    "blocks that leave out a name": (
        lambda: BlockDiagonalOperator(LAYER, [DiagonalOperator(LAYER.restrict(["l.bias"]), ONES[:3])]),
        InvalidArgumentError,
        "got blocks that leave out ['l.weight'], add [] and repeat []; expected each of the 2 names of the space"),
    "blocks that overlap": (
        lambda: BlockDiagonalOperator(MIXED, [*block_diagonal(F64)[0].blocks, diagonal(F64, MIXED.restrict("z"))[0]]),
        InvalidArgumentError, "repeat ['z']"),
    "blocks in another order": (lambda: BlockDiagonalOperator(LAYER,
            [DiagonalOperator(ParameterSpace(LAYER.names[::-1], LAYER.shapes[::-1]), ONES)]), InvalidArgumentError,
        "a block over ['l.bias', 'l.weight'] whose shapes or order are not the space's"),
    "blocks of two dtypes": (lambda: BlockDiagonalOperator(LAYER,
            [diagonal(F64, LAYER.restrict(["l.weight"]))[0], diagonal(F32, LAYER.restrict(["l.bias"]))[0]]),
        InvalidTypeError, "got blocks of [torch.float64, torch.float32]; expected one dtype"),
    "blocks that are tensors": (lambda: BlockDiagonalOperator(LAYER, [ONES]), InvalidTypeError,
        "got blocks of type ['Tensor']; expected FisherOperators"),
    # vectors
    "wrong length": (lambda: operator() @ ONES[:-1], InvalidArgumentError,
        "KroneckerOperator.matvec: got shape [14]; expected [D] or [D, K] with D = 15."),
    "rows instead of columns": (lambda: operator() @ ONES.unsqueeze(0), InvalidArgumentError, "columns last"),
    "three axes": (lambda: operator() @ ONES.reshape(15, 1, 1), InvalidArgumentError, "got shape [15, 1, 1]"),
    "scalar": (lambda: operator() @ torch.tensor(1.0), InvalidArgumentError, "got shape []"),
    "wrong dtype": (
        lambda: operator() @ ONES.float(),
        InvalidTypeError,
        "KroneckerOperator.matvec: got a vector of torch.float32; expected torch.float64, the operator's. "
        "Nothing is cast silently. Try: v.to(torch.float64).",
    ),
    "integers": (lambda: operator() @ ONES.long(), InvalidTypeError, "a vector of torch.int64"),
    "wrong device": (lambda: operator() @ ONES.to("meta"), InvalidArgumentError, "a vector on meta; expected cpu"),
    "NumPy array": (lambda: operator() @ ONES.numpy(), InvalidTypeError, "a ndarray; expected a tensor"),
    "NaN": (lambda: operator() @ (ONES * torch.nan), NonFiniteError, "a vector with NaN or infinite entries"),
    "infinity": (lambda: operator().quadratic_form(ONES / 0), NonFiniteError, "finite numbers"),
    "missing name": (lambda: operator() @ named(l_bias=None), UnknownParameterError,
        "missing names ['l.bias'] and unknown names []; expected exactly the 2 names of space.names"),
    "unknown name": (lambda: operator() @ named(l_gain=ONES), UnknownParameterError, "unknown names ['l.gain']"),
    "shape in a dict": (lambda: operator() @ named(l_bias=ONES[:4]), InvalidArgumentError,
        "got shape [4] for 'l.bias'; expected [3], or [3, 'K'] with one K for all names"),
    "columns in some entries of a dict": (lambda: operator() @ named(l_bias=torch.ones(3, 2, dtype=F64)),
        InvalidArgumentError, "one K for all names"),
    "dtypes in a dict": (lambda: operator() @ {name: tensor.float() for name, tensor in named().items()},
        InvalidTypeError, "a vector of torch.float32"),
    "unflatten": (lambda: LAYER.unflatten(ONES[:3]), InvalidArgumentError, "space.unflatten: got shape [3]"),
    "vector to an inverse": (lambda: operator().factorize(0.1).matvec(ONES[:2]), InvalidArgumentError,
        "KroneckerOperator.factorize().matvec: got shape [2]"),
    # numbers
    "negative damping": (
        lambda: operator().solve(ONES, damping=-1.0),
        InvalidArgumentError,
        "KroneckerOperator.solve(damping=-1.0): got damping -1.0; expected a finite number, 0 or more. "
        "F + damping·I must stay positive semi-definite.",
    ),
    "NaN damping": (lambda: operator().factorize(float("nan")), InvalidArgumentError, "got damping nan"),
    "infinite damping": (lambda: operator().logdet(float("inf")), InvalidArgumentError, "got damping inf"),
    "bool damping": (lambda: operator().factorize(True), InvalidTypeError,
        "got damping of type bool; expected a float or fk.RelativeDamping"),
    "string damping": (lambda: operator().logdet("auto"), InvalidTypeError, "got damping of type str"),
    "tensor damping": (lambda: operator().factorize(torch.tensor(0.1)), InvalidTypeError, "Try: float(damping)"),
    "negative relative damping": (lambda: RelativeDamping(-0.1), InvalidArgumentError, "RelativeDamping(damping=-0.1)"),
    "no eigenvalues": (lambda: operator().eigenvalues(0), InvalidArgumentError,
        "KroneckerOperator.eigenvalues: got k=0; expected an integer from 1 to 15."),
    "too many eigenvalues": (lambda: operator().eigenvalues(16), InvalidArgumentError, "got k=16; expected an integer"),
    "fractional eigenvalues": (lambda: operator().eigenvalues(2.5), InvalidTypeError, "got k of type float"),
    "negative scale": (lambda: -0.5 * operator(), InvalidArgumentError,
        "KroneckerOperator * scale: got scale=-0.5; expected a finite number, 0 or more. Operators form a cone"),
    "NaN scale": (lambda: operator() * float("nan"), InvalidArgumentError, "got scale=nan"),
    "infinite scale": (lambda: operator() * float("inf"), InvalidArgumentError, "got scale=inf"),
    "bool scale": (lambda: operator() * True, InvalidTypeError, "got scale of type bool; expected a number"),
    "tensor scale": (lambda: operator() * torch.tensor(2.0), InvalidTypeError, "got scale of type Tensor"),
    # sums
    "add a number": (lambda: operator() + 1.0, InvalidTypeError, "got a float; expected a FisherOperator"),
    "add other names": (
        lambda: operator() + diagonal(F64, CONV1D)[0],
        InvalidArgumentError,
        "KroneckerOperator + DiagonalOperator: got operators over different parameters: only the first has "
        "['l.weight', 'l.bias']; only the second has ['t.weight', 't.bias']; expected the same names, shapes and",
    ),
    "add other shapes": (lambda: operator() + diagonal(F64, ParameterSpace(LAYER.names, ((3, 4), (2,))))[0],
        InvalidArgumentError, "shapes differ in 'l.bias': [3] and [2]"),
    "add another order": (lambda: operator() + diagonal(F64, ParameterSpace(LAYER.names[::-1], LAYER.shapes[::-1]))[0],
        InvalidArgumentError, "the names are in another order"),
    "add another dtype": (lambda: operator() + diagonal(F32)[0], InvalidTypeError,
        "got torch.float64 and torch.float32; expected one dtype"),
    "empty sum": (lambda: SumOperator([]), InvalidArgumentError, "got no terms"),
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
