"""How one layer's flat parameters lie on the grid [outputs, inputs] that its Kronecker factors act on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fisherkit.errors import InvalidArgumentError
from fisherkit.space import ParameterSpace


@dataclass(frozen=True)
class LayerLayout:
    """The grid of one layer: row o holds what feeds output o, the bias in the last column.

    Args:
        outputs: O.
        inputs: I, without the bias's column. A convolution's is in-channels per group times the kernel's size.
        bias: whether the flat order goes on with a bias [O] after the weight.
        transposed: whether the weight is stored as [I, O] and not as [O, I].
    """

    outputs: int
    inputs: int
    bias: bool
    transposed: bool

    @classmethod
    def of(cls, space: ParameterSpace, transposed: bool, call: str) -> LayerLayout:
        """The layout of a space of a weight, or of a weight and then its bias; any other space is refused."""
        weight = space.shapes[0]
        first, rest = (weight[0], math.prod(weight[1:])) if weight else (0, 0)
        outputs, inputs = (rest, first) if transposed else (first, rest)
        if not weight or len(space.names) > 2 or (len(space.names) == 2 and space.shapes[1] != (outputs,)):
            stored = "[I, O]" if transposed else "[O, I]"
            raise InvalidArgumentError(
                call=call, got=f"a space of {dict(zip(space.names, space.shapes, strict=True))}",
                expected=f"one layer's weight {stored}, or that and then its bias [O]",
                why="a Kronecker product covers one layer", try_="space.restrict(names) for one layer, or transposed=",
            )  # fmt: skip
        return cls(outputs, inputs, len(space.names) == 2, transposed)

    @property
    def width(self) -> int:
        """I, and one more with a bias: the activation factor's size."""
        return self.inputs + self.bias

    def to_grid(self, columns: Shaped[Tensor, "D K"]) -> Shaped[Tensor, "K O J"]:
        """Flat columns as one grid a column; J is `width`."""
        count, weights = columns.shape[1], self.outputs * self.inputs
        rows = columns.mT
        if self.transposed:
            grid = rows[:, :weights].reshape(count, self.inputs, self.outputs).mT
        else:
            grid = rows[:, :weights].reshape(count, self.outputs, self.inputs)
        return torch.cat([grid, rows[:, weights:].unsqueeze(-1)], dim=-1) if self.bias else grid

    def to_flat(self, grid: Shaped[Tensor, "K O J"]) -> Shaped[Tensor, "D K"]:
        """The inverse of `to_grid`."""
        count, weights = len(grid), self.outputs * self.inputs
        rows = grid.new_empty(count, self.outputs * self.width)
        first, second = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        weight = grid[..., : self.inputs]
        rows[:, :weights].unflatten(1, (first, second)).copy_(weight.mT if self.transposed else weight)
        if self.bias:
            rows[:, weights:] = grid[..., -1]
        return rows.mT


def marginals(grid: Float[Tensor, "O J"]) -> tuple[Float[Tensor, "O"], Float[Tensor, "J"]]:
    """Sums over rows and columns, scaled so that their outer product sums to what the grid does."""
    total = grid.sum()
    return grid.sum(1), grid.sum(0) / torch.where(total > 0, total, 1)
