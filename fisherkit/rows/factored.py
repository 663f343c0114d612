"""Rows kept as the two factors of a linear layer's gradient: row = Σ_t g_t a_tᵀ, never N × D.

The activations a belong to an example and are shared by all its rows; the output gradients g belong to a row. A bias is
one more input that is always 1. This file owns the algebra of the pair; where the pair comes from is the rules'
business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit.rows.base import UnitRows, inner_products, spans, sum_by


class FactoredRows(UnitRows):
    """R rows of a weight ``[O, I]`` (or ``[I, O]`` if transposed), with a bias ``[O]`` after it if asked.

    Args:
        activations: ``[N, T, I]``.
        gradients: ``[R, T, O]``.
        example: which example each row belongs to, ``[R]``; None if the rows are ordered by example and every example
            has R / N of them.
        bias: whether the unit has a bias behind the weight.
        transposed: whether the weight is stored ``[I, O]``.
    """

    kind = "factored"

    def __init__(
        self,
        activations: Float[Tensor, "N T I"],
        gradients: Float[Tensor, "R T O"],
        example: Int[Tensor, "R"] | None = None,
        *,
        bias: bool,
        transposed: bool = False,
    ) -> None:
        self.inputs, self.outputs = activations.shape[-1], gradients.shape[-1]
        super().__init__(gradients.shape[0], self.outputs * (self.inputs + bias))
        self.activations, self.gradients, self.example = activations, gradients, example
        self.bias, self.transposed = bias, transposed

    @property
    def positions(self) -> int:
        """T."""
        return self.activations.shape[1]

    def matmul(self, u: Float[Tensor, "d K"]) -> Float[Tensor, "R K"]:
        """J U: push each input column through the layer, then meet the output gradients."""
        weight, offset = self._split(u)
        n, t, i = self.activations.shape
        flat = self.activations.reshape(n * t, i)
        parts = []
        for span in spans(u.shape[1], self.count * t * self.outputs):
            columns = weight[..., span].permute(1, 0, 2).reshape(i, -1)
            if offset is None:
                pushed = flat @ columns
            else:
                pushed = torch.addmm(offset[:, span].reshape(-1), flat, columns)
            parts.append(self._meet(pushed.reshape(n, t * self.outputs, -1)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def rmatmul(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "d K"]:
        """Jᵀ W: weigh the output gradients, sum those of one example, then one matmul with the activations."""
        n, t, i = self.activations.shape
        flat = self.activations.reshape(n * t, i)
        parts = []
        for span in spans(w.shape[1], self.count * t * self.outputs):
            weighed = self._weigh(w[:, span]).reshape(n * t, -1, self.outputs)  # [N T, K, O]
            k = weighed.shape[1]
            weight = (weighed.reshape(n * t, -1).mT @ flat).reshape(k, self.outputs, i).permute(1, 2, 0)
            parts.append(self._join(weight, weighed.sum(0).mT))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def gram(self, other: FactoredRows, precise: bool = True) -> Float[Tensor, "R S"]:
        """J J'ᵀ: an elementwise product of two small Grams if positions are not shared, else tiles of dense rows."""
        if self.positions == 1 and other.positions == 1:
            same = other.activations is self.activations
            mine, theirs = self.activations[:, 0], other.activations[:, 0]
            left = inner_products(mine, mine if same else theirs, precise) + float(self.bias)
            mine, theirs = self.gradients[:, 0], other.gradients[:, 0]
            right = inner_products(mine, mine if other is self else theirs, precise)
            left = self._to_rows(left)
            return right.mul_(other._to_rows(left.mT).mT)
        result = self.gradients.new_zeros(self.count, other.count, dtype=torch.float64)
        for span in spans(self.outputs, (self.count + other.count) * (self.inputs + 1)):
            mine = self._tile(span).flatten(1)
            result += inner_products(mine, mine if other is self else other._tile(span).flatten(1), precise)
        if self.bias:
            mine = self.gradients.sum(1)
            result += inner_products(mine, mine if other is self else other.gradients.sum(1), precise)
        return result

    def row_norms(self) -> Float[Tensor, "R"]:
        """‖row‖², float64."""
        if self.positions == 1:
            on_inputs = self.activations[:, 0].square().sum(1, dtype=torch.float64) + float(self.bias)
            return self.gradients[:, 0].square().sum(1, dtype=torch.float64) * self._to_rows(on_inputs)
        total = self.gradients.new_zeros(self.count, dtype=torch.float64)
        for span in spans(self.outputs, self.count * (self.inputs + 1)):
            total += self._tile(span).square_().sum((1, 2), dtype=torch.float64)
        return total + (self.gradients.sum(1).square().sum(1, dtype=torch.float64) if self.bias else 0)

    def squared_sum(self) -> Float[Tensor, "d"]:
        """Σ_r row_r²; without shared positions the squares factor too, and rows of one example are summed first."""
        if self.positions == 1:
            squares = self._to_examples(self.gradients[:, 0].square())
            return self._join(squares.mT @ self.activations[:, 0].square(), squares.sum(0))
        weights = [
            self._tile(span).square_().sum(0) for span in spans(self.outputs, self.count * (self.inputs + 1))
        ]
        return self._join(torch.cat(weights), self.gradients.sum(1).square_().sum(0))

    def dense(self) -> Float[Tensor, "R d"]:
        """The rows in flat order."""
        size = self.outputs * self.inputs
        rows = self.gradients.new_empty(self.count, self.size)
        weight, (left, right) = rows[:, :size], self._pair(slice(0, self.outputs))
        if self.transposed:
            torch.bmm(right.mT, left.mT, out=weight.unflatten(1, (self.inputs, self.outputs)))
        else:
            torch.bmm(left, right, out=weight.unflatten(1, (self.outputs, self.inputs)))
        if self.bias:
            torch.sum(self.gradients, 1, out=rows[:, size:])
        return rows

    def homogeneous(self) -> Float[Tensor, "N T I1"]:
        """The activations with the bias's constant input appended."""
        if not self.bias:
            return self.activations
        return torch.nn.functional.pad(self.activations, (0, 1), value=1.0)

    def matrices(self, span: slice) -> Float[Tensor, "s O I1"]:
        """Rows of a span as ``[O, I(+1)]`` matrices, the bias as last column."""
        return self.gradients[span].mT @ self.homogeneous()[self._owner()[span]]

    @property
    def each(self) -> int:
        """How many rows every example has; 0 if they are listed one by one."""
        return self.count // max(1, self.activations.shape[0]) if self.example is None else 0

    def _owner(self) -> Int[Tensor, "R"]:
        """The example of each row."""
        if self.example is not None:
            return self.example
        examples = torch.arange(self.activations.shape[0], device=self.activations.device)
        return examples.repeat_interleave(self.each)

    def _pair(self, span: slice) -> tuple[Float[Tensor, "R s T"], Float[Tensor, "R T I"]]:
        """Both sides of each row, over a span of outputs."""
        activations = self.activations if self.each == 1 else self.activations[self._owner()]
        return self.gradients[..., span].mT, activations

    def _tile(self, span: slice) -> Float[Tensor, "R s I"]:
        """Weight rows of a span of outputs."""
        if self.each <= 1:
            left, right = self._pair(span)
            return left @ right
        # All rows of an example in one product, which reads the activations once.
        n, t, i = self.activations.shape
        left = self.gradients[..., span].reshape(n, self.each, t, -1).transpose(2, 3).reshape(n, -1, t)
        return (left @ self.activations).reshape(self.count, -1, i)

    def _meet(self, x: Float[Tensor, "N S K"]) -> Float[Tensor, "R K"]:
        """Σ_s g_rs x_ns of every row with its example's."""
        g = self.gradients.flatten(1)
        if self.each:
            return (g.reshape(x.shape[0], self.each, -1) @ x).flatten(0, 1)
        return (g.unsqueeze(1) @ x[self.example]).squeeze(1)

    def _weigh(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "N T K O"]:
        """Σ_r w_r g_r over the rows of every example."""
        n, t = self.activations.shape[:2]
        if self.each:
            left, g = w.reshape(n, self.each, -1).mT, self.gradients.reshape(n, self.each, -1)
            found = left @ g if self.each > 1 else left * g
            return found.reshape(n, -1, t, self.outputs).transpose(1, 2)
        return self._to_examples(torch.einsum("rto,rk->rtko", self.gradients, w))

    def _to_rows(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "R ..."]:
        return x if self.each == 1 else x[self._owner()]

    def _to_examples(self, x: Float[Tensor, "R ..."]) -> Float[Tensor, "N ..."]:
        if self.each == 1:
            return x
        if self.each:
            return x.unflatten(0, (-1, self.each)).sum(1)
        return sum_by(self._owner(), x, self.activations.shape[0])

    def _split(self, u: Float[Tensor, "d K"]) -> tuple[Float[Tensor, "O I K"], Float[Tensor, "O K"] | None]:
        size = self.outputs * self.inputs
        first = (self.inputs, self.outputs) if self.transposed else (self.outputs, self.inputs)
        weight = u[:size].reshape(*first, u.shape[1])
        return (weight.transpose(0, 1) if self.transposed else weight), (u[size:] if self.bias else None)

    def _join(self, weight: Float[Tensor, "O I ..."], offset: Float[Tensor, "_ ..."]) -> Float[Tensor, "d ..."]:
        flat = (weight.transpose(0, 1) if self.transposed else weight).reshape(-1, *weight.shape[2:])
        return torch.cat([flat, offset]) if self.bias else flat

    def _with(self, gradients: Tensor, example: Tensor | None) -> FactoredRows:
        return FactoredRows(self.activations, gradients, example, bias=self.bias, transposed=self.transposed)

    def scaled(self, scale: float) -> FactoredRows:
        """Every row times a number."""
        return self._with(self.gradients * scale, self.example)

    def reordered(self, order: Int[Tensor, "R"], regular: bool = False) -> FactoredRows:
        """The rows in another order; the activations stay where they are."""
        return self._with(self.gradients[order], None if regular else self._owner()[order])

    def double(self) -> FactoredRows:
        """The rows in float64."""
        return FactoredRows(
            self.activations.double(), self.gradients.double(), self.example, bias=self.bias, transposed=self.transposed
        )

    @classmethod
    def cat(cls, parts: Sequence[FactoredRows]) -> FactoredRows:
        """All rows of the parts; parts that share their activations (chunks of one batch) go on sharing them."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        positions = max(part.positions for part in parts)
        activations: list[Tensor] = []
        example, offset = [], 0
        for part in parts:
            if not activations or part.activations is not activations[-1]:
                offset += activations[-1].shape[0] if activations else 0
                activations.append(part.activations)
            example.append(part._owner() + offset)
        regular = first.each > 0 and all(part.each == first.each for part in parts) and len(activations) == len(parts)
        return cls(
            torch.cat([_padded(a, positions) for a in activations]) if len(activations) > 1 else activations[0],
            torch.cat([_padded(part.gradients, positions) for part in parts]),
            None if regular else torch.cat(example),
            bias=first.bias,
            transposed=first.transposed,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The two factors and, unless rows are ordered by example, the index."""
        index = {} if self.example is None else {"example": self.example}
        return {"activations": self.activations, "gradients": self.gradients, **index}

    def options(self) -> dict[str, int]:
        """Bias and orientation."""
        return {"bias": int(self.bias), "transposed": int(self.transposed)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], options: dict[str, int]) -> FactoredRows:
        """Back from a file."""
        return cls(
            tensors["activations"],
            tensors["gradients"],
            tensors.get("example"),
            bias=bool(options["bias"]),
            transposed=bool(options["transposed"]),
        )


def _padded(x: Float[Tensor, "n T c"], positions: int) -> Float[Tensor, "n P c"]:
    # Zero gradients at the positions that a shorter batch does not have leave every sum as it was.
    return torch.nn.functional.pad(x, (0, 0, 0, positions - x.shape[1])) if x.shape[1] < positions else x
