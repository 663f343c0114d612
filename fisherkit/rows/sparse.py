"""Rows of an embedding table: each touches only the tokens of its example, so only these are kept.

Entries are (row, token, gradient vector), one for each different token of a row; a vocabulary × vocabulary matrix, or
even one dense row a sample, is never made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit.rows.base import UnitRows, spans, sum_by


class SparseRows(UnitRows):
    """R rows of a table ``[V, E]``.

    Args:
        row: row of each entry, ``[n]``.
        token: table row of each entry, ``[n]``; a pair (row, token) occurs once.
        values: ``[n, E]``.
        count: R.
        vocabulary: V.
    """

    form = "sparse"

    def __init__(
        self, row: Int[Tensor, "n"], token: Int[Tensor, "n"], values: Float[Tensor, "n E"], *, count: int,
        vocabulary: int,
    ) -> None:  # fmt: skip
        super().__init__(count, vocabulary * values.shape[1])
        self.row, self.token, self.values, self.vocabulary = row, token, values, vocabulary

    @classmethod
    def gathered(cls, tokens: Int[Tensor, "R T"], gradients: Float[Tensor, "R T E"], vocabulary: int) -> SparseRows:
        """Rows from tokens and the gradients of their embedding vectors; repeats within a row are summed."""
        row = torch.arange(len(tokens), device=tokens.device).repeat_interleave(tokens.shape[1])
        return cls.summed(row, tokens.flatten(), gradients.flatten(0, 1), count=len(tokens), vocabulary=vocabulary)

    @classmethod
    def summed(
        cls, row: Int[Tensor, "n"], token: Int[Tensor, "n"], values: Float[Tensor, "n E"], *, count: int,
        vocabulary: int,
    ) -> SparseRows:  # fmt: skip
        """Rows from entries of which several may be of the same row and token."""
        unique, place = torch.unique(token + row * vocabulary, return_inverse=True)
        values = sum_by(place, values, len(unique))
        return cls(unique // vocabulary, unique % vocabulary, values, count=count, vocabulary=vocabulary)

    def zeros(self, count: int, like: Tensor) -> SparseRows:
        """So many rows of zeros of the same table, in ``like``'s dtype and on its device."""
        none = torch.zeros(0, dtype=torch.long, device=like.device)
        return SparseRows(none, none, like.new_zeros(0, self.values.shape[1]), count=count, vocabulary=self.vocabulary)

    def matmul(self, u: Float[Tensor, "d K"]) -> Float[Tensor, "R K"]:
        table = u.reshape(self.vocabulary, self.values.shape[1], u.shape[1])
        return sum_by(self.row, torch.einsum("ne,nek->nk", self.values, table[self.token]), self.count)

    def rmatmul(self, w: Float[Tensor, "R K"], out: Float[Tensor, "d K"] | None = None) -> Float[Tensor, "d K"]:
        weighed = torch.einsum("ne,nk->nek", self.values, w[self.row])
        found = sum_by(self.token, weighed, self.vocabulary).reshape(self.size, w.shape[1])
        return found if out is None else out.copy_(found)

    def gram(self, other: SparseRows, precise: bool = True) -> Float[Tensor, "R S"]:
        """J J'ᵀ over tiles of the tokens that occur on both sides; always precise."""
        result = self.values.new_zeros(self.count, other.count, dtype=torch.float64)
        shared = torch.unique(self.token)
        shared = shared[torch.isin(shared, other.token)]
        width = self.values.shape[1]
        for span in spans(shared.shape[0], (self.count + other.count) * width) if len(shared) else ():
            result += self._columns(shared[span]) @ other._columns(shared[span]).mT
        return result

    def _columns(self, tokens: Int[Tensor, "s"]) -> Float[Tensor, "R e"]:
        """Dense float64 rows restricted to some tokens, which are sorted."""
        place = torch.searchsorted(tokens, self.token).clamp_max(tokens.shape[0] - 1)
        hit = tokens[place] == self.token
        width = self.values.shape[1]
        tile = self.values.new_zeros(self.count, tokens.shape[0], width, dtype=torch.float64)
        tile[self.row[hit], place[hit]] = self.values[hit].double()
        return tile.flatten(1)

    def squared_sum(self) -> Float[Tensor, "d"]:
        return sum_by(self.token, self.values.square(), self.vocabulary).reshape(-1)

    def weighted_squares(self, weights: Float[Tensor, "d"]) -> Float[Tensor, "R"]:
        """Σ_i w_i row_i² over the tokens that occur."""
        table = weights.reshape(self.vocabulary, -1)
        return sum_by(self.row, (self.values.square() * table[self.token]).sum(1), self.count)

    def dense(self) -> Float[Tensor, "R d"]:
        rows = self.values.new_zeros(self.count, self.vocabulary, self.values.shape[1])
        rows[self.row, self.token] = self.values
        return rows.flatten(1)

    def _with(self, row: Tensor, values: Tensor) -> SparseRows:
        return SparseRows(row, self.token, values, count=self.count, vocabulary=self.vocabulary)

    def scaled(self, scale: float) -> SparseRows:
        return self._with(self.row, self.values * scale)

    def reordered(self, order: Int[Tensor, "R"], regular: bool = False) -> SparseRows:
        """Some or all of the rows in another order: only their numbers change."""
        order = order.to(self.row.device)
        place = torch.full((self.count,), -1, device=self.row.device)
        place[order] = torch.arange(len(order), device=self.row.device)
        row = place[self.row]
        kept = row >= 0
        return SparseRows(row[kept], self.token[kept], self.values[kept], count=len(order), vocabulary=self.vocabulary)

    def double(self) -> SparseRows:
        return self._with(self.row, self.values.double())

    @classmethod
    def cat(cls, parts: Sequence[SparseRows]) -> SparseRows:
        if len(parts) == 1:
            return parts[0]
        starts = torch.tensor([0] + [part.count for part in parts]).cumsum(0).tolist()
        return cls(
            torch.cat([part.row + start for part, start in zip(parts, starts, strict=False)]),
            torch.cat([part.token for part in parts]),
            torch.cat([part.values for part in parts]),
            count=starts[-1],
            vocabulary=parts[0].vocabulary,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"row": self.row, "token": self.token, "values": self.values}

    def options(self) -> dict[str, int]:
        return {"count": self.count, "vocabulary": self.vocabulary}
