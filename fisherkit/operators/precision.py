"""An operator once more in another dtype or on another device.

Sums of several Fishers with little damping cancel: they are solved in float64, whatever dtype they are kept in. Owns
the way there, through the state that files hold, and what must not be lost on it: a matrix that was symmetric and
positive semi-definite up to the rounding of its own dtype stays so to the last bit.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fisherkit import io
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

    Cost: its tensors once more.
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
        return DenseOperator(operator.space, _symmetric(operator.to_dense()).to(device, dtype))
    if isinstance(operator, KroneckerOperator):
        a, g = (_symmetric(factor).to(device) for factor in (operator.activation, operator.gradient))
        call = "KroneckerOperator(factor)"
        return KroneckerOperator(
            operator.space, a.to(dtype), g.to(dtype), operator.layout.transposed, symmetric=True,
            # Eigenvalues below 0 are judged by the dtype that the factor was computed in.
            activation_spectrum=partial(spectrum, a, call), gradient_spectrum=partial(spectrum, g, call),
        )  # fmt: skip
    return restore(operator.space, _state_in(operator._state(), dtype, device))


def _state_in(state: io.State, dtype: torch.dtype, device: torch.device) -> io.State:
    tensors = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in state.tensors.items()
    }
    return replace(state, tensors=tensors, children=tuple(_state_in(child, dtype, device) for child in state.children))


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
