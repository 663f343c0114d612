"""An operator once more in another dtype or on another device.

Sums of several Fishers with little damping cancel: they are solved in float64, whatever dtype they are kept in. Owns
the way there, through the state that files hold, and what must not be lost on it: a matrix that is symmetric and
positive semi-definite up to the rounding of its own dtype becomes so up to that of float64.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit import io
from fisherkit.errors import NoClosedFormError
from fisherkit.operators.algebra import SumOperator
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.block_diagonal import BlockDiagonalOperator
from fisherkit.operators.dense import DenseOperator
from fisherkit.operators.kronecker import KroneckerOperator
from fisherkit.operators.linalg import spectrum
from fisherkit.operators.persistence import restore


def convert(operator: FisherOperator, dtype: torch.dtype, device: torch.device) -> FisherOperator:
    """The same matrix in another dtype and on another device.

    Args:
        operator: any operator whose tensors lie in memory.
        dtype: of the result.
        device: of the result.

    Returns:
        The operator itself where nothing changes, else a new one of the same structure; metadata as before.

    Raises:
        NoClosedFormError: the rows are streamed from the data and lie nowhere.

    Cost: its tensors once more; an eigen-decomposition of every dense matrix and Kronecker factor.
    """
    plain = operator._unwrap()
    if plain.dtype == dtype and plain.device == device:
        return plain
    result = _convert(plain, dtype, device)
    result.metadata = dict(operator.metadata)
    return result


def _convert(operator: FisherOperator, dtype: torch.dtype, device: torch.device) -> FisherOperator:
    if isinstance(operator, BlockDiagonalOperator):
        return BlockDiagonalOperator(operator.space, [convert(block, dtype, device) for block in operator.blocks])
    if isinstance(operator, SumOperator):
        return SumOperator([convert(term, dtype, device) for term in operator.terms])
    if isinstance(operator, DenseOperator):
        matrix, _ = _semidefinite(operator.to_dense(), "DenseOperator(matrix)")
        return DenseOperator(operator.space, matrix.to(device, dtype))
    if isinstance(operator, KroneckerOperator):
        a, on_inputs = _semidefinite(operator.activation, "KroneckerOperator(activation)")
        g, on_outputs = _semidefinite(operator.gradient, "KroneckerOperator(gradient)")
        return KroneckerOperator(
            operator.space, a.to(device, dtype), g.to(device, dtype), operator.layout.transposed, symmetric=True,
            activation_spectrum=lambda: (on_inputs[0].to(device), on_inputs[1].to(device)),
            gradient_spectrum=lambda: (on_outputs[0].to(device), on_outputs[1].to(device)),
        )  # fmt: skip
    try:
        state = operator._state()
    except NoClosedFormError as error:
        raise error.at(f"{operator._name} in {dtype}") from error
    return restore(operator.space, _state_in(state, dtype, device))


def _state_in(state: io.State, dtype: torch.dtype, device: torch.device) -> io.State:
    tensors = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in state.tensors.items()
    }
    return replace(state, tensors=tensors, children=tuple(_state_in(child, dtype, device) for child in state.children))


def _semidefinite(matrix: Float[Tensor, "n n"], call: str) -> tuple[Float[Tensor, "n n"], tuple[Tensor, Tensor]]:
    """The nearest positive semi-definite matrix in float64, and its spectrum.

    In float32 a matrix that is semi-definite has eigenvalues down to minus 1e-7 of its largest. With a damping below
    that, a sum of such matrices would have no minimiser.
    """
    values, vectors = spectrum((matrix + matrix.mT) / 2, call)
    nearest = (vectors * values) @ vectors.mT
    return (nearest + nearest.mT) / 2, (values, vectors)
