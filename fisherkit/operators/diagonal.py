"""A diagonal Fisher matrix: one number for each parameter, every operation in closed form and O(D)."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit import io
from fisherkit.operators.base import FisherOperator, Makers
from fisherkit.operators.factorization import Factorization
from fisherkit.operators.linalg import check_tensor, damped_reciprocal
from fisherkit.rows.collection import Rows
from fisherkit.space import ParameterSpace


class DiagonalOperator(FisherOperator):
    """F = diag(d).

    Args:
        space: the parameters it acts on.
        diagonal: d [D], finite numbers of 0 or more; its dtype and device are the operator's. Kept, not copied.
    """

    tag: ClassVar[str] = "diagonal"

    def __init__(self, space: ParameterSpace, diagonal: Float[Tensor, "..."]) -> None:
        diagonal = check_tensor(diagonal, [space.size], "DiagonalOperator(diagonal)", nonnegative=True)
        super().__init__(space, dtype=diagonal.dtype, device=diagonal.device)
        self._entries = diagonal

    def _matmat(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self._entries.unsqueeze(-1) * columns

    def _diagonal(self) -> Float[Tensor, "D"]:
        return self._entries.clone()

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        return _DiagonalFactorization(self, damping)

    def _draw(self, generator: torch.Generator | None, count: int) -> Float[Tensor, "D n"]:
        noise = torch.randn(self.size, count, dtype=self.dtype, device=self.device, generator=generator)
        return self._entries.sqrt().unsqueeze(-1) * noise

    def _scaled(self, scale: float) -> DiagonalOperator:
        return DiagonalOperator(self.space, scale * self._entries)

    def _plus(self, other: FisherOperator) -> FisherOperator | None:
        return DiagonalOperator(self.space, self._entries + other._diagonal()) if other.is_diagonal else None

    def _frobenius(self) -> Float[Tensor, ""]:
        return self._entries.double().norm()

    def _blocks(self) -> tuple[FisherOperator, ...]:
        places = self.space.slices.items()
        return tuple(DiagonalOperator(self.space.restrict([name]), self._entries[place]) for name, place in places)

    @classmethod
    def _blocks_of_node(cls, node: io.Node, space: ParameterSpace, reader: io.Reader) -> Makers | None:
        def read(name: str) -> FisherOperator:
            span = space.slices[name]
            return cls(space.restrict([name]), reader.rows(node.places["diagonal"], span.start, span.stop))

        return {(name,): functools.partial(read, name) for name in space.names} if "diagonal" in node.places else None

    is_diagonal = True
    inversion = "cheap"

    def _average(self) -> FisherOperator:
        parts = []
        for name, shape in zip(self.space.names, self.space.shapes, strict=True):
            grid = self._entries[self.space.slices[name]].reshape(shape[0] if shape else 1, -1)
            parts.append(grid.mean(0, keepdim=True).expand_as(grid).reshape(-1))
        return DiagonalOperator(self.space, torch.cat(parts))

    def _eigenvalues(self, k: int) -> Float[Tensor, "k"]:
        return self._entries.double().topk(k).values

    def _eigenvectors(self, k: int) -> Float[Tensor, "D k"]:
        places = self._entries.double().topk(k).indices
        columns = torch.zeros(self.size, k, dtype=self.dtype, device=self.device)
        return columns.scatter_(0, places.unsqueeze(0), 1.0)

    def _to_dense(self) -> Float[Tensor, "D D"]:
        return self._entries.diag()

    def _state(self) -> io.State:
        return io.State(self.tag, self.space.names, {"diagonal": self._entries})

    def _packed(self, dtype: torch.dtype) -> io.State:
        return self._state().map(lambda tensor: tensor.to(dtype))

    @classmethod
    def _from_state(cls, space: ParameterSpace, state: io.State) -> DiagonalOperator:
        return cls(space, state.tensors["diagonal"])


class _DiagonalFactorization(Factorization):
    """diag(1 / (d + λ))."""

    def __init__(self, operator: DiagonalOperator, damping: float) -> None:
        super().__init__(operator, damping)
        self._shifted = operator._entries.double() + damping
        reciprocal = damped_reciprocal(operator._entries, damping, operator.dtype, "DiagonalOperator.factorize")
        self._reciprocal = reciprocal.to(operator.dtype).unsqueeze(-1)

    def _solve(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        return self._reciprocal * columns

    def _row_squares(self, rows: Rows) -> Float[Tensor, "R"]:
        return rows.weighted_squares(self._reciprocal.squeeze(-1))

    def _logdet(self) -> Float[Tensor, ""]:
        return self._shifted.log().sum()
