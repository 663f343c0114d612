"""Rows kept as the two factors of a linear layer's gradient: row = Σ_t g_t a_tᵀ, never N × D.

The activations a belong to an example and are shared by all its rows; the output gradients g belong to a row. A bias is
one more input that is always 1. This file owns the algebra of the pair; where the pair comes from is the rules'
business.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit.rows.base import TILE, UnitRows, aligned_product, inner_products, product, spans, sum_by
from fisherkit.rows.patches import Activations, Patches, padded, stacked

CACHED = 1 << 21
"""Entries of a temporary that should stay in the processor's cache: 8 MiB in float32."""

WRITTEN = 1 << 23
"""Entries of rows that are written out at a time for a product: 32 MiB in float32, memory that is used again."""

LONGEST = 1 << 13
"""Most terms, about, of a dot product in the rows' own dtype where rows are written out."""


class FactoredRows(UnitRows):
    """R rows of a weight ``[O, I]`` (or ``[I, O]`` if transposed), with a bias ``[O]`` after it if asked.

    Args:
        activations: ``[N, T, I]``, or a convolution's patches.
        gradients: ``[R, T, O]``.
        example: which example each row belongs to, ``[R]``; None if the rows are ordered by example and every example
            has R / N of them.
        bias: whether the unit has a bias behind the weight.
        transposed: whether the weight is stored ``[I, O]``.
    """

    form = "factored"

    def __init__(
        self, activations: Activations, gradients: Float[Tensor, "R T O"], example: Int[Tensor, "R"] | None = None,
        *, bias: bool, transposed: bool = False,
    ) -> None:  # fmt: skip
        self.inputs, self.outputs = activations.shape[2], gradients.shape[2]
        super().__init__(gradients.shape[0], self.outputs * (self.inputs + bias))
        self.activations, self.gradients, self.example = activations, gradients, example
        self.bias, self.transposed = bias, transposed

    @property
    def positions(self) -> int:
        """T, the positions that an example has."""
        return self.activations.shape[1]

    def matmul(self, u: Float[Tensor, "d K"]) -> Float[Tensor, "R K"]:
        """J U: push each input column through the layer, then meet the output gradients; or rows written out."""
        weight, offset = self._split(u)
        n, t, i = self.activations.shape
        if self.writes_out(u.shape[1]):
            result = u.new_zeros(self.count, u.shape[1])
            for outputs in self._output_spans(longest=max(LONGEST, WRITTEN // max(1, self.count))):
                tile, columns = self._tile(outputs), weight[outputs].flatten(0, 1)
                # Shorter sums, added up, keep the digits that one of I·O terms would lose; addmm_ would make it one.
                for some, met in zip(tile.split(LONGEST, 1), columns.split(LONGEST), strict=True):
                    result += product(some, met)
            return result if offset is None else result.addmm_(self.gradients.sum(1), offset)
        if u.shape[1] == 1 and isinstance(self.activations, Tensor):
            columns, inputs = weight[:, :, 0].mT, self.activations.reshape(n * t, i)
            whole = inputs @ columns if offset is None else torch.addmm(offset[:, 0], inputs, columns)
            return self._meet(whole.view(n, t * self.outputs, 1))
        found = []
        for span in spans(u.shape[1], self.count * t * self.outputs):
            columns = weight[..., span].permute(1, 0, 2).reshape(i, -1)
            pushed = [a.reshape(-1, i) @ columns for _, a in self.chunks()]
            whole = pushed[0] if len(pushed) == 1 else torch.cat(pushed)
            if offset is not None:
                whole += offset[:, span].reshape(-1)
            found.append(self._meet(whole.reshape(n, t * self.outputs, -1)))
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def rmatmul(self, w: Float[Tensor, "R K"], out: Float[Tensor, "d K"] | None = None) -> Float[Tensor, "d K"]:
        """Jᵀ W: weigh the output gradients, sum those of one example, then one matmul with the activations."""
        n, t, i = self.activations.shape
        out = w.new_empty(self.size, w.shape[1]) if out is None else out
        if self.writes_out(w.shape[1]):
            weight, offset = self._split(out)  # views of it
            for outputs in self._output_spans():
                weight[outputs] = (self._tile(outputs).mT @ w).reshape(-1, i, w.shape[1])
            if offset is not None:
                torch.mm(self.gradients.sum(1).mT, w, out=offset)
            return out
        if w.shape[1] == 1 and isinstance(self.activations, Tensor) and not self.transposed:
            weighed = self._weighed(w, n)
            weighed, size = weighed.reshape(n * t, self.outputs).mT, self.outputs * i
            torch.mm(weighed, self.activations.reshape(n * t, i), out=out[:size].view(self.outputs, i))
            if self.bias:
                torch.sum(weighed, 1, keepdim=True, out=out[size:])
            return out
        for span in spans(w.shape[1], self.count * t * self.outputs):
            weighed = self._weigh(w[:, span]).reshape(n, t, -1)  # [N, T, K O]
            parts = [weighed[s].flatten(0, 1).mT @ a.reshape(-1, i) for s, a in self.chunks()]
            weight = functools.reduce(torch.add, parts).reshape(-1, self.outputs, i).permute(1, 2, 0)
            out[:, span] = self._join(weight, weighed.sum((0, 1)).reshape(-1, self.outputs).mT)
        return out

    def gram(self, other: FactoredRows, precise: bool = True) -> Float[Tensor, "R S"]:
        """J J'ᵀ: an elementwise product of two small Grams if positions are not shared, else tiles of dense rows."""
        if self.positions == 1 and other.positions == 1:
            mine = self._inputs()
            left = inner_products(mine, mine if other.activations is self.activations else other._inputs(), precise)
            left = left.add_(1.0) if self.bias else left
            mine = self.gradients[:, 0]
            right = inner_products(mine, mine if other is self else other.gradients[:, 0], precise)
            if self.each == other.each == 1:
                return right.mul_(left)
            if self.each and other.each:
                # In place: written out for every row, the inputs' part would be gathered twice.
                by_example = right.unflatten(1, (-1, other.each)).unflatten(0, (-1, self.each))
                by_example.mul_(left[:, None, :, None])
                return right
            return right.mul_(other._to_rows(self._to_rows(left).mT).mT)
        result = self.gradients.new_zeros(self.count, other.count, dtype=torch.float64)
        for span in self._output_spans(other.count):
            mine = self._tile(span)
            result += inner_products(mine, mine if other is self else other._tile(span), precise)
        if self.bias:
            mine = self.gradients.sum(1)
            result += inner_products(mine, mine if other is self else other.gradients.sum(1), precise)
        return result

    def squared_sum(self) -> Float[Tensor, "d"]:
        """Σ_r row_r²; without shared positions the squares factor too, and rows of one example are summed first."""
        if self.positions == 1:
            squares, inputs = self._to_examples(self.gradients[:, 0].square()), self._inputs().square()
            left, right = (inputs, squares) if self.transposed else (squares, inputs)
            out, size = squares.new_empty(self.size), self.outputs * self.inputs
            torch.mm(left.mT, right, out=out[:size].view(left.shape[1], right.shape[1]))
            if self.bias:
                torch.sum(squares, 0, out=out[size:])
            return out
        parts = (tile.square_().sum(0) for _, tile in self._tiles(slice(0, self.outputs)))
        weight = functools.reduce(torch.Tensor.add_, parts)
        return self._join(weight, self.gradients.sum(1).square_().sum(0))

    def weighted_squares(self, weights: Float[Tensor, "d"]) -> Float[Tensor, "R"]:
        """Σ_i w_i row_i²; without shared positions the squares factor."""
        if self.positions > 1:
            return super().weighted_squares(weights)
        weight, offset = self._split(weights.unsqueeze(1))
        inner = self._inputs().square() @ weight.squeeze(2).mT
        if offset is not None:
            inner += offset.squeeze(1)
        return (self.gradients[:, 0].square() * self._to_rows(inner)).sum(1)

    def dense(self) -> Float[Tensor, "R d"]:
        size = self.outputs * self.inputs
        rows = self.gradients.new_empty(self.count, self.size)
        self._write(rows[:, :size], slice(0, self.outputs), transposed=self.transposed)
        if self.bias:
            torch.sum(self.gradients, 1, out=rows[:, size:])
        return rows

    def chunks(self, *, constant: bool = False) -> Iterator[tuple[slice, Float[Tensor, "n T I1"]]]:
        """The activations, patches a few examples at a time; with ``constant`` the bias's input, if there is one."""
        a, constant = self.activations, constant and self.bias
        if isinstance(a, Tensor):
            yield slice(0, len(a)), torch.nn.functional.pad(a, (0, 1), value=1.0) if constant else a
            return
        n, t, i = a.shape
        step = max(1, CACHED // (t * i))
        for start in range(0, n, step):
            span = slice(start, min(start + step, n))
            yield span, a.take(span, constant=constant)

    def rotated(self, on_inputs: Float[Tensor, "I1 r"], on_outputs: Float[Tensor, "O s"]) -> Iterator[FactoredRows]:
        """The rows in other bases of inputs and outputs, the bias being one of the inputs."""
        g = aligned_product(self.gradients, on_outputs)
        offset = on_inputs[-1] if self.bias else None
        if isinstance(self.activations, Tensor):
            a = aligned_product(self.activations, on_inputs[: self.inputs])
            yield FactoredRows(a if offset is None else a.add_(offset), g, self.example, bias=False)
            return
        for span, a in self._owners(self.activations.shape[1] * self.inputs):
            a = aligned_product(a, on_inputs[: self.inputs])
            yield FactoredRows(a if offset is None else a.add_(offset), g[span], bias=False)

    def writes_out(self, columns: int) -> bool:
        """Whether products with so many columns are faster by rows written out, some outputs at a time.

        From the factors they take T·I·O multiplications an example for every column; of M rows written out, M·I·O, and
        T·M·I·O once. Twice as many are allowed to the factors, which touch less memory.
        """
        t, each = self.positions, self.count / max(1, self.activations.shape[0])
        return 2 * each * (t + columns) <= t * columns

    @property
    def written_numbers(self) -> int:
        """Of one row that is written out, or of its factors at a single position."""
        return self.size if self.positions > 1 else self.row_numbers

    @property
    def inner_cost(self) -> int:
        return self.inputs + self.outputs if self.positions == 1 else self.size

    def product_cost(self, columns: int) -> int:
        return self.size * (self.positions + columns if self.writes_out(columns) else self.positions * columns)

    @property
    def each(self) -> int:
        """How many rows every example has; 0 if they are listed one by one."""
        return self.count // max(1, self.activations.shape[0]) if self.example is None else 0

    def _inputs(self) -> Float[Tensor, "N I"]:
        """The activations of rows without shared positions."""
        a = self.activations
        return (a if isinstance(a, Tensor) else a[:])[:, 0]

    def _owner(self) -> Int[Tensor, "R"]:
        """The example of each row."""
        if self.example is not None:
            return self.example
        examples = torch.arange(self.activations.shape[0], device=self.activations.device)
        return examples.repeat_interleave(self.each)

    def _owners(self, cost: int) -> Iterator[tuple[slice, Float[Tensor, "n T I"]]]:
        """Spans of rows with the activations of their examples, once for an example where it has rows of its own.

        ``cost`` is the entries of the largest temporary for one example, or one row where rows are listed one by one.
        """
        step = max(1, CACHED // max(1, cost))
        units = self.activations.shape[0] if self.each else self.count
        for start in range(0, max(1, units), step):  # once even if there are no rows
            span = slice(start, min(start + step, units))
            if self.example is None:
                yield slice(span.start * self.each, span.stop * self.each), self.activations[span]
            else:
                yield span, self.activations[self.example[span]]

    def _tiles(self, outputs: slice) -> Iterator[tuple[slice, Float[Tensor, "r o I"]]]:
        """Spans of rows with their weight rows of some outputs, written out, as many as the processor's cache holds."""
        if (patches := self._windows()) is not None:
            for n in range(self.count):
                g = self.gradients[n, :, outputs].unflatten(0, (patches.group, -1))
                yield slice(n, n + 1), patches.product(n, g).unsqueeze(0)
            return
        width, each = len(range(*outputs.indices(self.outputs))), max(1, self.each)
        for span, a in self._owners(max(each * width, self.positions) * self.inputs):
            # All rows of an example in one product, which reads the activations once.
            left = self.gradients[span, :, outputs].unflatten(0, (len(a), each)).transpose(2, 3).flatten(1, 2)
            yield span, (left @ a).reshape(-1, width, self.inputs)

    def _windows(self) -> Patches | None:
        """Activations of rows that a convolution's own weight gradient writes out fastest."""
        a = self.activations
        return a if isinstance(a, Patches) and self.each == 1 and a.has_kernel and self.count else None

    def _output_spans(self, others: int = 0, longest: int = TILE) -> Iterator[slice]:
        """Outputs whose rows, and so many others', written out make one temporary, none longer than that."""
        return spans(self.outputs, max(self.count + others, TILE // longest) * (self.inputs + 1))

    def _tile(self, outputs: slice) -> Float[Tensor, "R e"]:
        """The weight rows of some outputs, written out, ``[R, outputs · I]``."""
        width = len(range(*outputs.indices(self.outputs)))
        rows = self.gradients.new_empty(self.count, width * self.inputs)
        self._write(rows, outputs)
        return rows

    def _write(self, rows: Float[Tensor, "R e"], outputs: slice, transposed: bool = False) -> None:
        """The same, to where it shall be."""
        shape = (self.inputs, -1) if transposed else (-1, self.inputs)
        if self.each > 1 or self._windows() is not None:
            for span, tile in self._tiles(outputs):
                rows[span].unflatten(1, shape).copy_(tile.mT if transposed else tile)
            return
        for span, a in self._owners(self.positions * self.inputs):
            g, place = self.gradients[span, :, outputs], rows[span].unflatten(1, shape)
            if transposed:
                torch.bmm(a.mT, g, out=place)
            else:
                torch.bmm(g.mT, a, out=place)

    def _meet(self, x: Float[Tensor, "N S K"]) -> Float[Tensor, "R K"]:
        """Σ_s g_rs x_ns of every row with its example's."""
        g = self.gradients.flatten(1)
        if self.each == 1:
            # A product and a pairwise sum: over many positions and outputs, one long dot product loses digits.
            return (g.unsqueeze(2) * x).sum(1)
        if self.each:
            return torch.bmm(g.reshape(x.shape[0], self.each, -1), x).flatten(0, 1)
        return (g.unsqueeze(1) @ x[self.example]).squeeze(1)

    def _weighed(self, w: Float[Tensor, "R 1"], examples: int) -> Float[Tensor, "..."]:
        """`_weigh` of one column, in any shape."""
        if self.each > 1:
            return torch.bmm(w.reshape(examples, 1, self.each), self.gradients.reshape(examples, self.each, -1))
        return self.gradients * w.unsqueeze(1) if self.each else self._weigh(w)

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
        flat = (weight.transpose(0, 1) if self.transposed else weight).flatten(0, 1)
        return torch.cat([flat, offset]) if self.bias else flat

    def _with(self, gradients: Tensor, example: Tensor | None, activations: Activations | None = None) -> FactoredRows:
        a = self.activations if activations is None else activations
        return FactoredRows(a, gradients, example, bias=self.bias, transposed=self.transposed)

    def scaled(self, scale: float) -> FactoredRows:
        return self._with(self.gradients * scale, self.example)

    def reordered(self, order: Int[Tensor, "R"], regular: bool = False) -> FactoredRows:
        """The rows in another order; the activations stay where they are."""
        # Without an index, activations lie as the rows do; those of several parts, part after part, do not any more.
        return self._with(self.gradients[order], None if regular and self.example is not None else self._owner()[order])

    def compact(self) -> FactoredRows:
        """Without the activations of examples that have no row."""
        if self.example is None:
            return self
        kept, example = torch.unique(self.example, return_inverse=True)
        a = self.activations
        few = a[kept] if isinstance(a, Tensor) else a.examples(kept)
        each, rest = divmod(self.count, max(1, len(kept)))
        regular = rest == 0 and torch.equal(self.example, kept.repeat_interleave(each))
        return self._with(self.gradients, None if regular else example, few)

    def zeros(self, count: int, examples: int, example: Int[Tensor, "R"] | None, like: Tensor) -> FactoredRows:
        """So many rows of zeros of the unit, in ``like``'s dtype and on its device; ``example`` as in the class."""
        a, g = like.new_zeros(examples, 1, self.inputs), like.new_zeros(count, 1, self.outputs)
        return self._with(g, example, a)

    def double(self) -> FactoredRows:
        return self._with(self.gradients.double(), self.example, self.activations.double())

    @classmethod
    def cat(cls, parts: Sequence[FactoredRows]) -> FactoredRows:
        """All rows of the parts; parts that share their activations (chunks of one batch) go on sharing them."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        positions = max(part.positions for part in parts)
        activations: list[Activations] = []
        example, offset = [], 0
        for part in parts:
            if not activations or part.activations is not activations[-1]:
                offset += activations[-1].shape[0] if activations else 0
                activations.append(part.activations)
            example.append(part._owner() + offset)
        regular = first.each > 0 and all(part.each == first.each for part in parts) and len(activations) == len(parts)
        gradients = torch.cat([padded(part.gradients, positions) for part in parts])
        return first._with(gradients, None if regular else torch.cat(example), stacked(activations, positions))

    def tensors(self) -> dict[str, Tensor]:
        """The two factors and, unless rows are ordered by example, the index."""
        index = {} if self.example is None else {"example": self.example}
        return {"activations": self.activations[:], "gradients": self.gradients, **index}

    @property
    def floating(self) -> Tensor:
        """The output gradients; patches need not be made to be asked."""
        return self.gradients

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """The two factors; of patches, the input."""
        return self.activations if isinstance(self.activations, Tensor) else self.activations.x, self.gradients

    @property
    def nbytes(self) -> int:
        """Bytes in memory; of patches, those of the input."""
        return sum(t.numel() * t.element_size() for t in self.numbers)

    def options(self) -> dict[str, int]:
        return {"bias": int(self.bias), "transposed": int(self.transposed)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], options: dict[str, int]) -> FactoredRows:
        given = (tensors.get(name) for name in ("activations", "gradients", "example"))
        return cls(*given, **{name: bool(options[name]) for name in ("bias", "transposed")})  # type: ignore[arg-type]
