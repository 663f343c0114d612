"""Terms of the penalty: weighted quadratic forms, their sum as a differentiable scalar, and their form in a state dict.

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

from fisherkit import io
from fisherkit.arithmetic import without_autocast
from fisherkit.errors import NoClosedFormError
from fisherkit.operators import Quadratic, state_of
from fisherkit.operators.persistence import restore
from fisherkit.space import ParameterSpace


@dataclass(frozen=True)
class Term:
    """weight · q, q a quadratic form over some parameters and the weight what decay has left of 1."""

    weight: float
    quadratic: Quadratic

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of its parameters, when it was consolidated."""
        space = self.quadratic.operator.space
        return dict(zip(space.names, space.shapes, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors take."""
        beside = sum(tensor.nbytes for tensor in self.quadratic.tensors().values())
        return beside + self.quadratic.operator.nbytes

    def to_plain(self) -> dict[str, Any]:
        """Dicts, lists, strings, numbers and tensors: what a state dict may hold without pickled classes."""
        return {
            "weight": self.weight,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "quadratic": self.quadratic.tensors(),
            "operator": _plain(state_of(self.quadratic.operator)),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], device: torch.device) -> Term:
        """The inverse of `to_plain`, on a device; any error of Python's or of the package's for something else."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, copy=True)

        shapes = plain["shapes"]
        space = ParameterSpace(tuple(shapes), tuple(tuple(shape) for shape in shapes.values()))
        operator = restore(space, _state(plain["operator"]).map(move))
        return cls(float(plain["weight"]), Quadratic(operator, **{n: move(t) for n, t in plain["quadratic"].items()}))


def _plain(state: io.State) -> dict[str, Any]:
    return {**vars(state), "names": list(state.names), "children": [_plain(child) for child in state.children]}


def _state(plain: Mapping[str, Any]) -> io.State:
    children = tuple(_state(child) for child in plain["children"])
    return io.State(plain["kind"], tuple(plain["names"]), dict(plain["tensors"]), dict(plain["options"]), children)


def leading(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first ``shape[i]`` entries along each axis i; a view."""
    return tensor[tuple(slice(size) for size in shape)]


def evaluate(terms: Sequence[Term], tensors: Mapping[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Σ weight · q, float64, and half its gradient by name, in the operators' dtype and the tensors' shapes.

    Tensors are at least as large as the terms' along each axis.
    """
    values: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    for term in terms:
        operator = term.quadratic.operator
        parts = [leading(tensors[name], shape).reshape(-1) for name, shape in term.shapes.items()]
        value, half = term.quadratic.evaluate(torch.cat(parts).to(operator.dtype))
        values.append(term.weight * value)
        weighted = half if term.weight == 1 else term.weight * half
        for name, part in operator.space.unflatten(weighted).items():
            if name not in gradients and part.shape == tensors[name].shape:
                gradients[name] = part
                continue
            if name not in gradients:
                gradients[name] = part.new_zeros(tensors[name].shape)
            leading(gradients[name], part.shape).add_(part)
    return torch.stack(values).sum(), gradients


def penalty_of(terms: Sequence[Term], strength: float, parameters: Mapping[str, Tensor]) -> Tensor:
    """½ · strength · Σ weight · q as a differentiable scalar in the first parameter's dtype; 0 without terms."""
    return _Penalty.apply(tuple(terms), strength, tuple(parameters), *parameters.values())  # type: ignore[no-untyped-call]


class _Penalty(torch.autograd.Function):
    """½ · strength · Σ weight · q, with the gradient strength · Σ weight · (F d + h)."""

    @staticmethod
    def forward(ctx: Any, terms: Sequence[Term], strength: float, names: Sequence[str], *values: Tensor) -> Tensor:
        ctx.strength, ctx.values, ctx.present = strength, values, [False] * len(values)
        if not terms:
            return values[0].new_zeros(())
        # Products in half precision, as autocast would have them, are no Fisher products.
        with without_autocast():
            total, gradients = evaluate(terms, dict(zip(names, values, strict=True)))
        ctx.present = [
            needed and name in gradients for name, needed in zip(names, ctx.needs_input_grad[3:], strict=True)
        ]
        ctx.save_for_backward(*(gradients[name] for name, own in zip(names, ctx.present, strict=True) if own))
        return (0.5 * strength * total).to(values[0].dtype)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        found: Any = ctx.saved_tensors
        if found:
            found = _Times.apply(outer[0], ctx.strength, found, *ctx.values)  # type: ignore[no-untyped-call]
        scaled, pairs = iter(found), zip(ctx.present, ctx.values, strict=True)
        return None, None, None, *(next(scaled).to(value.dtype) if present else None for present, value in pairs)


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
