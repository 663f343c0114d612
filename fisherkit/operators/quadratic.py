"""Sums of quadratic forms Σ_t (θ − θ_t)ᵀF_t(θ − θ_t), joined into one where the operators fold into one.

Owns how a joined sum is kept, so that its value is a sum of what is not negative and does not cancel:

| operators | kept as | memory beside F |
|---|---|---|
| diagonal | (θ − m)ᵀF(θ − m) + c, m the exact minimum entry by entry | D |
| rows (full) | ‖√s (J(θ − m) − b)‖² + c, an offset b for each row; dense once that is smaller | D + R |
| others that fold (dense) | (θ − m)ᵀF(θ − m) + 2(θ − m)ᵀh + c, m a damped minimum, h the gradient left there | 2D |

What does not fold, such as Kronecker products, is not joined. Knows neither models nor what the sums are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.operators.base import FisherOperator, fold
from fisherkit.operators.dense import DenseOperator
from fisherkit.operators.persistence import restore
from fisherkit.rows.collection import Rows


@dataclass(frozen=True)
class Quadratic:
    """q(θ) = dᵀFd + 2dᵀh + c with d = θ − m, or ‖√s (Jd − b)‖² + c for rows with an offset.

    Args:
        operator: F, of one structure.
        centre: m [D], in F's dtype and on its device.
        constant: c, a scalar in float64.
        linear: h [D]; None for 0.
        offset: b [R], only for an operator with `stored_rows`; None for 0.
    """

    operator: FisherOperator
    centre: Float[Tensor, "D"]
    constant: Float[Tensor, ""]
    linear: Float[Tensor, "D"] | None = None
    offset: Float[Tensor, "R"] | None = None

    @classmethod
    def of(cls, operator: FisherOperator, centre: Float[Tensor, "D"]) -> Quadratic:
        """(θ − centre)ᵀF(θ − centre)."""
        return cls(operator, centre, centre.new_zeros((), dtype=torch.float64))

    def evaluate(self, theta: Float[Tensor, "D"]) -> tuple[Float[Tensor, ""], Float[Tensor, "D"]]:
        """The value at θ ``[D]``, float64, and half the gradient, F d + h, from one product with F."""
        d = theta - self.centre
        if self.offset is not None:
            rows, scale = _rows(self)
            errors = rows.matmul(d.unsqueeze(-1)).squeeze(-1) - self.offset
            half = rows.rmatmul((scale * errors).unsqueeze(-1)).squeeze(-1)
            return scale * errors.square().sum(dtype=torch.float64) + self.constant, half
        half = self.operator._matmat(d.unsqueeze(-1)).squeeze(-1)
        value = (d * half).sum(dtype=torch.float64) + self.constant
        if self.linear is None:
            return value, half
        return value + 2 * (d * self.linear).sum(dtype=torch.float64), half + self.linear

    def scaled(self, scale: float) -> Quadratic:
        """scale · q."""
        linear = None if self.linear is None else scale * self.linear
        return replace(self, operator=scale * self.operator, constant=scale * self.constant, linear=linear)

    def map(self, function: Callable[[Tensor], Tensor]) -> Quadratic:
        """The same with every tensor replaced, for instance by a copy on another device."""
        state = self.operator._state().map(function)
        operator = restore(self.operator.space, state)
        parts = {name: function(tensor) for name, tensor in self.tensors().items()}
        return Quadratic(operator, **parts)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors beside F's, by the names of its arguments."""
        own = {"centre": self.centre, "constant": self.constant, "linear": self.linear, "offset": self.offset}
        return {name: tensor for name, tensor in own.items() if tensor is not None}


def atoms(operator: FisherOperator) -> Iterator[FisherOperator]:
    """Operators over parts of the space, each of one structure, whose quadratic forms add up to the operator's."""
    terms = operator._terms()
    parts = terms if len(terms) > 1 else terms[0]._blocks()
    if len(parts) == 1:
        yield parts[0]
        return
    for part in parts:
        yield from atoms(part)


def join(a: Quadratic, b: Quadratic) -> Quadratic | None:
    """a + b as one quadratic if the operators fold into one, else None; exact up to rounding.

    Where a parameter has no curvature at all, b's centre stays.

    Cost: O(D) for diagonals, two products with b's rows for rows, a Cholesky factorization for dense matrices.
    """
    if a.operator.space != b.operator.space:
        return None
    a, b = _dense_beside(a, b), _dense_beside(b, a)
    operator = fold(a.operator, b.operator)
    if operator is None:
        return None
    if a.operator.is_diagonal and b.operator.is_diagonal:
        return _join_diagonals(a, b, operator)
    if operator.stored_rows is not None and a.operator.stored_rows is not None and b.operator.stored_rows is not None:
        return _join_rows(a, b, operator)
    return _at_minimum(operator, b.centre, lambda theta: _sum(a.evaluate(theta), b.evaluate(theta)))


def _join_diagonals(a: Quadratic, b: Quadratic, operator: FisherOperator) -> Quadratic:
    """Per entry: f(θ − m)² + g(θ − n)² = (f + g)(θ − k)² + fg/(f + g) (m − n)², k the weighted mean of m and n."""
    total, gap = operator._diagonal(), a.centre - b.centre
    share = torch.where(total > 0, a.operator._diagonal() / total, 0)
    left = (b.operator._diagonal() * share * gap.square()).sum(dtype=torch.float64)
    return Quadratic(operator, b.centre + share * gap, a.constant + b.constant + left)


def _join_rows(a: Quadratic, b: Quadratic, operator: FisherOperator) -> Quadratic:
    """The rows below each other, those of b with the offset that a's centre makes necessary."""
    shift = (b.centre - a.centre).unsqueeze(-1)
    # The fold has put a's rows first and the scales' roots into the rows.
    parts = [_offset(a), _offset(b) + _rows(b)[0].matmul(shift).squeeze(-1)]
    offset = torch.cat([_rows(q)[1] ** 0.5 * part for q, part in zip((a, b), parts, strict=True)])
    stacked = Quadratic(operator, a.centre, a.constant + b.constant, offset=offset)
    if _rows(stacked)[0].nbytes <= operator.size**2 * a.centre.element_size():
        return stacked
    return _at_minimum(_written_out(stacked), b.centre, stacked.evaluate)


def _dense_beside(q: Quadratic, other: Quadratic) -> Quadratic:
    """Rows in memory as a matrix if the other is one already, so that the two fold; else q itself."""
    if not other.operator.is_dense or q.operator.stored_rows is None:
        return q
    value, gradient = q.evaluate(q.centre)
    return Quadratic(_written_out(q), q.centre, value, linear=gradient)


def _at_minimum(
    operator: FisherOperator, start: Float[Tensor, "D"], evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Quadratic:
    """The quadratic with matrix F that has these values and gradients, centred where it is nearly lowest.

    Far from its minimum a small value would be the difference of large ones. The damping keeps the centre close where F
    says little, so that rounding does not carry it away; whatever it leaves of the gradient is the linear part, so that
    the centre does not have to be exact.
    """
    centre = start
    trace = float(operator._trace())
    if trace > 0:
        damping = torch.finfo(operator.dtype).eps ** 0.5 * trace / operator.size
        step = operator.factorize(damping).matvec(evaluate(start)[1])
        centre = start - step
    value, gradient = evaluate(centre)
    return Quadratic(operator, centre, value, linear=gradient)


def _sum(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return a[0] + b[0], a[1] + b[1]


def _rows(q: Quadratic) -> tuple[Rows, float]:
    rows = q.operator.stored_rows
    if rows is None:
        raise TypeError(f"an offset of rows beside {q.operator!r}, which has none")
    return rows


def _written_out(q: Quadratic) -> DenseOperator:
    rows, scale = _rows(q)
    return DenseOperator(q.operator.space, (scale * rows.normal_matrix()).to(q.operator.dtype))


def _offset(q: Quadratic) -> Tensor:
    return q.centre.new_zeros(_rows(q)[0].count) if q.offset is None else q.offset
