"""The sum of weighted quadratic forms as one differentiable scalar of a model's parameters.

Owns the autograd function: one product with each operator in the forward pass gives the value and the whole gradient,
and nothing is differentiated through an operator. Knows neither tasks nor policies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arithmetic import without_autocast
from fisherkit.errors import NoClosedFormError
from fisherkit.operators import Quadratic


@dataclass(frozen=True)
class Term:
    """weight · q, q over some parameters.

    Args:
        weight: what decay has left of 1.
        quadratic: q.
    """

    weight: float
    quadratic: Quadratic

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of its parameters, when it was consolidated."""
        space = self.quadratic.operator.space
        return dict(zip(space.names, space.shapes, strict=True))


def leading(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first ``shape[i]`` entries along each axis i; a view."""
    return tensor[tuple(slice(size) for size in shape)]


def evaluate(terms: Sequence[Term], tensors: Mapping[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Σ weight · q, float64, and half its gradient by name, in the operators' dtype and the tensors' shapes.

    Args:
        terms: at least one.
        tensors: name to the parameter's value, at least as large as the terms' along each axis.
    """
    values: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    for term in terms:
        operator, shapes = term.quadratic.operator, term.shapes
        parts = [leading(tensors[name], shape).reshape(-1) for name, shape in shapes.items()]
        value, half = term.quadratic.evaluate(torch.cat(parts).to(operator.dtype))
        values.append(term.weight * value)
        weighted = half if term.weight == 1 else term.weight * half
        for name, part in operator.space.unflatten(weighted).items():
            _add(gradients, name, part, tensors[name].shape)
    return torch.stack(values).sum(), gradients


def _add(gradients: dict[str, Tensor], name: str, part: Tensor, shape: torch.Size) -> None:
    if name not in gradients and part.shape == shape:
        gradients[name] = part
        return
    if name not in gradients:
        gradients[name] = part.new_zeros(shape)
    leading(gradients[name], part.shape).add_(part)


def penalty_of(terms: Sequence[Term], strength: float, names: Sequence[str], values: Sequence[Tensor]) -> Tensor:
    """½ · strength · Σ weight · q as a differentiable scalar in the first value's dtype.

    Args:
        terms: any number; 0 without any.
        strength: the factor.
        names: of the parameters that the terms are over; at least one.
        values: the parameters themselves, in the same order.
    """
    return _Penalty.apply(tuple(terms), strength, tuple(names), *values)  # type: ignore[no-untyped-call]


class _Penalty(torch.autograd.Function):
    """½ · strength · Σ weight · q, with the gradient strength · Σ weight · (F d + h)."""

    @staticmethod
    def forward(ctx: Any, terms: Sequence[Term], strength: float, names: Sequence[str], *values: Tensor) -> Tensor:
        """The penalty in the first parameter's dtype; 0 without terms."""
        dtype, device = values[0].dtype, values[0].device
        ctx.strength, ctx.values, ctx.present = strength, values, [False] * len(values)
        if not terms:
            return torch.zeros((), dtype=dtype, device=device)
        # Products in half precision, as autocast would have them, are no Fisher products.
        with without_autocast():
            total, gradients = evaluate(terms, dict(zip(names, values, strict=True)))
        wanted = ctx.needs_input_grad[3:]
        ctx.present = [needed and name in gradients for name, needed in zip(names, wanted, strict=True)]
        ctx.save_for_backward(*(gradients[name] for name, own in zip(names, ctx.present, strict=True) if own))
        return (0.5 * strength * total).to(dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        """The gradients that the forward pass has found."""
        scaled = iter(_times(outer[0], ctx.strength, ctx.saved_tensors, ctx.values))
        pairs = zip(ctx.present, ctx.values, strict=True)
        return None, None, None, *(next(scaled).to(value.dtype) if present else None for present, value in pairs)


def _times(outer: Tensor, strength: float, gradients: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return _Times.apply(outer, strength, gradients, *values) if gradients else ()  # type: ignore[no-untyped-call]


class _Times(torch.autograd.Function):
    """outer · strength · gradients. They depend on the parameters: differentiating that is refused, not left out."""

    @staticmethod
    def forward(
        ctx: Any, outer: Tensor, strength: float, gradients: Sequence[Tensor], *values: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple((strength * outer.to(gradient.dtype)) * gradient for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        raise NoClosedFormError(
            call="EWC.penalty",
            got="a second derivative",
            expected="one backward pass, without differentiating its result",
            why="the gradient is computed in closed form and has no graph",
            try_="the Hessian in θ is strength · Σ F_t: use the Fishers' matvec",
        )
