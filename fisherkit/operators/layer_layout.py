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

    A convolution's inputs are in-channels per group times the kernel's size. ``transposed``: the weight is stored as
    [I, O]. ``leading``: the bias comes before the weight, as of a module that registers it first.
    """

    outputs: int
    inputs: int
    bias: bool
    transposed: bool
    leading: bool = False

    @classmethod
    def of(cls, space: ParameterSpace, transposed: bool, call: str) -> LayerLayout:
        """The layout of a space of a weight, or of a weight and its bias; any other space is refused."""
        leading = len(space.names) == 2 and len(space.shapes[0]) == 1 < len(space.shapes[1])
        weight, *others = reversed(space.shapes) if leading else space.shapes
        first, rest = (weight[0], math.prod(weight[1:])) if weight else (0, 0)
        outputs, inputs = (rest, first) if transposed else (first, rest)
        if not weight or others not in ([], [(outputs,)]):
            stored = "[I, O]" if transposed else "[O, I]"
            raise InvalidArgumentError(
                call, f"a space of {dict(zip(space.names, space.shapes, strict=True))}",
                f"one layer's weight {stored}, or that and then its bias [O]",
                why="a Kronecker product covers one layer", try_="space.restrict(names) for one layer, or transposed=",
            )  # fmt: skip
        return cls(outputs, inputs, bool(others), transposed, leading)

    @property
    def width(self) -> int:
        """I, and one more with a bias: the activation factor's size."""
        return self.inputs + self.bias

    def to_grid(self, columns: Shaped[Tensor, "D K"]) -> Shaped[Tensor, "K O J"]:
        """Flat columns as one grid a column; J is `width`."""
        weight, bias = self._parts(columns.mT)
        if self.transposed:
            grid = weight.reshape(-1, self.inputs, self.outputs).mT
        else:
            grid = weight.reshape(-1, self.outputs, self.inputs)
        return torch.cat([grid, bias.unsqueeze(-1)], dim=-1) if self.bias else grid

    def _parts(self, rows: Shaped[Tensor, "K D"]) -> tuple[Shaped[Tensor, "K W"], Shaped[Tensor, "K O"]]:
        weights = self.outputs * self.inputs
        if self.leading:
            return rows[:, self.outputs :], rows[:, : self.outputs]
        return rows[:, :weights], rows[:, weights:]

    def to_flat(self, grid: Shaped[Tensor, "K O J"]) -> Shaped[Tensor, "D K"]:
        """The inverse of `to_grid`."""
        if not self.bias:
            return (grid.mT if self.transposed else grid).flatten(1).mT
        rows = grid.new_empty(len(grid), self.outputs * self.width)
        weights, bias = self._parts(rows)
        weight, column = grid.split_with_sizes((self.inputs, 1), 2)
        weight = weight.mT if self.transposed else weight
        weights.view(weight.shape).copy_(weight)
        bias.copy_(column.squeeze(2))
        return rows.mT


def marginals(grid: Float[Tensor, "O J"]) -> tuple[Float[Tensor, "O"], Float[Tensor, "J"]]:
    """Sums over rows and columns, scaled so that their outer product sums to what the grid does."""
    total = grid.sum()
    return grid.sum(1), grid.sum(0) / torch.where(total > 0, total, 1)
