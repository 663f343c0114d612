"""How the package itself computes: in float32 at least, outside of autocast, with numbers that are finite.

Owns what every layer needs for that: the dtype that a model's Fisher has, a context in which autocast is off, the
cheapest exact test for NaN and infinity, and products with a matrix that only its products tell. Knows tensors only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any, TypeAlias, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import InvalidArgumentError, NonFiniteError

MatMat: TypeAlias = Callable[[Tensor], Tensor]
"""A linear map of columns, [D, K] -> [D, K]."""

F = TypeVar("F", bound=Callable[..., Any])

HALF = (torch.float16, torch.bfloat16)
"""Dtypes in which sums of squares lose their digits."""

_DEVICES = ("cpu", "cuda", "xpu", "mps")


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The dtype of rows, sums and factors of a model in this dtype: float32 for half precision, else its own."""
    return torch.float32 if dtype in HALF else dtype


class without_autocast(ExitStack):  # noqa: N801  (read as a verb)
    """Autocast off on every device, as a ``with`` block or as a decorator: products in half precision are no Fisher's.

    Not for generators, whose body would run after the block has ended.
    """

    def __enter__(self) -> without_autocast:
        """Turn it off where it is on."""
        for device in filter(torch.is_autocast_enabled, _DEVICES):
            self.enter_context(torch.autocast(device, enabled=False))
        return self

    def __call__(self, function: F) -> F:
        """The function with autocast off around it."""

        @wraps(function)
        def without(*args: Any, **kwargs: Any) -> Any:
            if not any(map(torch.is_autocast_enabled, _DEVICES)):
                return function(*args, **kwargs)
            with without_autocast():
                return function(*args, **kwargs)

        return cast(F, without)


def all_finite(*tensors: Tensor) -> bool:
    """Whether no entry is NaN or infinite; exact, with one wait for the device.

    By norms, which read each number once and make no mask; a norm may overflow where no entry does, so entries are
    looked at where one is not finite.
    """
    return finite_by(norms(floating := [t for t in tensors if t.is_floating_point()]), floating)


def norms(tensors: list[Tensor]) -> list[float]:
    """The norm of each tensor, with one wait for the device; infinite where squares overflow."""
    if len(tensors) < 2:
        return [torch.linalg.vector_norm(t, dtype=at_least_single(t.dtype)).item() for t in tensors]
    # A kernel for many of them on accelerators, as in torch's own optimizers.
    found: list[float] = together(torch._foreach_norm(tensors)).tolist()
    return found


def finite_by(found: Sequence[float], tensors: Sequence[Tensor]) -> bool:
    """Whether no entry of tensors with these norms is NaN or infinite."""
    return all(map(math.isfinite, found)) or all(bool(torch.isfinite(t).all()) for t in tensors)


def square_bound(found: Sequence[float], tensors: Sequence[Tensor]) -> float:
    """About the most that ‖row‖², summed, can be of rows that are products of two of these tensors with these norms."""
    # 2ab ≤ a² + b². A bias stands beside inputs of 1.
    total = sum(norm * norm + t.numel() for norm, t in zip(found, tensors, strict=True))
    return total * total


def may_overflow(squares: float, dtype: torch.dtype) -> bool:
    """Whether sums of squares with such a bound may be too large for a dtype."""
    return squares > 1e-6 * torch.finfo(dtype).max


def overflow(call: str, where: str, dtype: torch.dtype) -> NonFiniteError:
    """The error of sums that are not finite, of rows that are."""
    return NonFiniteError(
        call, f"infinite sums of squares: {where}", "finite ones",
        why="the gradients and activations that they are made of are finite, and their squares too large for "
        f"{dtype}, whose largest number is {torch.finfo(dtype).max:.1e}",
        try_="model and data in float64, as by model.double(); inputs and a loss of another scale",
    )  # fmt: skip


def together(numbers: Sequence[Tensor]) -> Float[Tensor, "n"]:
    """Single numbers as one tensor, to be read at once."""
    first = numbers[0]
    alike = all(one.dtype == first.dtype and one.device == first.device for one in numbers)
    return torch.stack(tuple(numbers) if alike else [one.to(first) for one in numbers])


def checked_product(
    matmat: MatMat, columns: Float[Tensor, "D K"], call: str = "matmat(columns)"
) -> Float[Tensor, "D K"]:
    """A user's product, without its graph; refused in another shape or dtype, in which it would broadcast silently."""
    result = matmat(columns).detach()
    if result.shape != columns.shape or result.dtype != columns.dtype:
        raise InvalidArgumentError(
            call, f"a product of shape {list(result.shape)} and dtype {result.dtype}",
            f"shape {list(columns.shape)} and dtype {columns.dtype}, those of its argument",
            why="products map columns [D, K] to columns [D, K]",
        )  # fmt: skip
    return result
