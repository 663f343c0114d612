"""The truncated kind of softmax outputs by its definition in a hundred decimal digits, where float64 has none left.

Shares no formula with the package: no closed form, no logarithm, no square root.
"""

from decimal import Decimal, localcontext

import torch
from torch import Tensor

from tests.reference.outputs import IGNORE_INDEX

Row = list[Decimal]
Matrix = list[Row]

DIGITS = 100
ZERO = Decimal(10) ** -80  # what is left of a used-up direction after rounding to so many digits


def precise_metric(z: Tensor, y: Tensor, rank: int) -> Tensor:
    """Σ v vᵀ of one example with outputs ``[P, C]`` and labels ``[P]``, all outputs joined; float64."""
    with localcontext() as context:
        context.prec = DIGITS
        classes, size = z.shape[1], z.numel()
        h: Matrix = [[Decimal(0)] * size for _ in range(size)]
        u: Row = [Decimal(0)] * size
        form = Decimal(0)
        for t, label in enumerate(y.tolist()):
            if label == IGNORE_INDEX:
                continue
            start = t * classes
            u_t, h_t = _softmax(z[t], label)
            u[start : start + classes] = u_t
            for a, row in enumerate(h_t):
                h[start + a][start : start + classes] = row
            form += _inverse_form(h_t, u_t)
        left = [[h[a][b] - u[a] * u[b] / form for b in range(size)] for a in range(size)]
        for _ in range(rank - 1):
            c = max(range(size), key=lambda a: left[a][a])
            if left[c][c] < ZERO:
                break
            pivot = left[c]
            left = [[left[a][b] - pivot[a] * pivot[b] / pivot[c] for b in range(size)] for a in range(size)]
        kept = [[float(h[a][b] - left[a][b]) for b in range(size)] for a in range(size)]
        return torch.tensor(kept, dtype=torch.float64)


def _softmax(z: Tensor, label: int) -> tuple[Row, Matrix]:
    """Gradient and Hessian of −log softmax(z)_label."""
    weights = [Decimal(float(entry)).exp() for entry in z]
    p = [weight / sum(weights) for weight in weights]
    u = [p_a - (a == label) for a, p_a in enumerate(p)]
    return u, [[p_a * ((a == b) - p_b) for b, p_b in enumerate(p)] for a, p_a in enumerate(p)]


def _inverse_form(h: Matrix, u: Row) -> Decimal:
    """uᵀ H⁺ u = uᵀ x for any x with H x = u: the one whose first entry is zero, by elimination."""
    m, x = [row[1:] for row in h[1:]], u[1:]
    n = len(x)
    for k in range(n):
        for a in range(k + 1, n):
            factor = m[a][k] / m[k][k]
            m[a] = [m[a][b] - factor * m[k][b] for b in range(n)]
            x[a] -= factor * x[k]
    for k in reversed(range(n)):
        known = sum((m[k][b] * x[b] for b in range(k + 1, n)), Decimal(0))
        x[k] = (x[k] - known) / m[k][k]
    return sum((a * b for a, b in zip(u[1:], x, strict=True)), Decimal(0))
