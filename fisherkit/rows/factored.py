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

from fisherkit.rows.base import UnitRows, spans, sum_by


class FactoredRows(UnitRows):
    """R rows of a weight ``[O, I]`` (or ``[I, O]`` if transposed), with a bias ``[O]`` after it if asked.

    Args:
        activations: ``[N, T, I]``.
        gradients: ``[R, T, O]``.
        example: which example each row belongs to, ``[R]``; None if row r is example r.
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
            pushed = flat @ weight[..., span].permute(1, 0, 2).reshape(i, -1)
            if offset is not None:
                pushed = pushed + offset[:, span].reshape(-1)
            pushed = self._to_rows(pushed.reshape(n, t, self.outputs, -1))
            parts.append(torch.einsum("rto,rtok->rk", self.gradients, pushed))
        return torch.cat(parts, 1)

    def rmatmul(self, w: Float[Tensor, "R K"]) -> Float[Tensor, "d K"]:
        """Jᵀ W: weigh the output gradients, sum those of one example, then one matmul with the activations."""
        n, t, i = self.activations.shape
        flat = self.activations.reshape(n * t, i)
        parts = []
        for span in spans(w.shape[1], self.count * t * self.outputs):
            weighed = self._to_examples(torch.einsum("rto,rk->rtok", self.gradients, w[:, span]))
            k = weighed.shape[-1]
            weight = (weighed.reshape(n * t, -1).mT @ flat).reshape(self.outputs, k, i).permute(0, 2, 1)
            parts.append(self._join(weight, weighed.sum((0, 1))))
        return torch.cat(parts, 1)

    def gram(self, other: FactoredRows) -> Float[Tensor, "R S"]:
        """J J'ᵀ: an elementwise product of two small Grams if positions are not shared, else tiles of dense rows."""
        if self.positions == 1 and other.positions == 1:
            left = self.activations[:, 0].double() @ other.activations[:, 0].double().mT + float(self.bias)
            right = self.gradients[:, 0].double() @ other.gradients[:, 0].double().mT
            if self.example is not None:
                left = left[self.example]
            if other.example is not None:
                left = left[:, other.example]
            return left * right
        result = self.gradients.new_zeros(self.count, other.count, dtype=torch.float64)
        for span in spans(self.outputs, (self.count + other.count) * (self.inputs + 1)):
            mine = self._tile(span).double()
            result += mine @ (mine if other is self else other._tile(span).double()).mT
        return result

    def squared_sum(self) -> Float[Tensor, "d"]:
        """Σ_r row_r²; without shared positions the squares factor too, and rows of one example are summed first."""
        if self.positions == 1:
            squares = self._to_examples(self.gradients.square())[:, 0]
            return self._join(squares.mT @ self.activations[:, 0].square(), squares.sum(0))
        weights, biases = [], []
        for span in spans(self.outputs, self.count * (self.inputs + 1)):
            tile = self._tile(span).square().sum(0).reshape(-1, self.inputs + self.bias)
            weights.append(tile[:, : self.inputs])
            biases.append(tile[:, self.inputs :].reshape(-1))
        return self._join(torch.cat(weights), torch.cat(biases))

    def dense(self) -> Float[Tensor, "R d"]:
        """The rows in flat order."""
        rows = self._tile(slice(0, self.outputs)).unflatten(1, (self.outputs, self.inputs + self.bias))
        weight, offset = rows[..., : self.inputs], rows[..., self.inputs :]
        weight = weight.mT if self.transposed else weight
        return torch.cat([weight.flatten(1), offset.flatten(1)], 1)

    def homogeneous(self) -> Float[Tensor, "N T I1"]:
        """The activations with the bias's constant input appended."""
        if not self.bias:
            return self.activations
        return torch.nn.functional.pad(self.activations, (0, 1), value=1.0)

    def matrices(self, span: slice) -> Float[Tensor, "s O I1"]:
        """Rows of a span as ``[O, I(+1)]`` matrices, the bias as last column."""
        activations = self.homogeneous()
        owner = activations[span] if self.example is None else activations[self.example[span]]
        return self.gradients[span].mT @ owner

    def _tile(self, span: slice) -> Float[Tensor, "R e"]:
        """Dense rows of a span of outputs, ``[R, span · (I + bias)]``."""
        activations = self.homogeneous()
        owner = activations if self.example is None else activations[self.example]
        return (self.gradients[..., span].mT @ owner).flatten(1)

    def _to_rows(self, x: Float[Tensor, "N ..."]) -> Float[Tensor, "R ..."]:
        return x if self.example is None else x[self.example]

    def _to_examples(self, x: Float[Tensor, "R ..."]) -> Float[Tensor, "N ..."]:
        return x if self.example is None else sum_by(self.example, x, self.activations.shape[0])

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

    def reordered(self, order: Int[Tensor, "R"]) -> FactoredRows:
        """The rows in another order; the activations stay where they are."""
        return self._with(self.gradients[order], order if self.example is None else self.example[order])

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
            own = torch.arange(part.count, device=part.gradients.device) if part.example is None else part.example
            example.append(own + offset)
        one_to_one = all(part.example is None for part in parts) and len(activations) == len(parts)
        return cls(
            torch.cat([_padded(a, positions) for a in activations]) if len(activations) > 1 else activations[0],
            torch.cat([_padded(part.gradients, positions) for part in parts]),
            None if one_to_one else torch.cat(example),
            bias=first.bias,
            transposed=first.transposed,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The two factors and, if rows share examples, the index."""
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
