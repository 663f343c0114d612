"""How the package itself computes: in float32 at least, outside of autocast, with numbers that are finite.

Owns what every layer needs for that: the dtype that a model's Fisher has, a context in which autocast is off, the
cheapest exact test for NaN and infinity, and products with a matrix that only its products tell. Knows tensors only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import InvalidArgumentError

MatMat: TypeAlias = Callable[[Tensor], Tensor]
"""A linear map of columns, [D, K] -> [D, K]."""

HALF = (torch.float16, torch.bfloat16)
"""Dtypes in which sums of squares lose their digits."""

_DEVICES = ("cpu", "cuda", "xpu", "mps")


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The dtype of rows, sums and factors of a model in this dtype: float32 for half precision, else its own."""
    return torch.float32 if dtype in HALF else dtype


@contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast off on every device, as a ``with`` block or as a decorator: products in half precision are no Fisher's.

    Not for generators, whose body would run after the block has ended.
    """
    active = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    if not active:
        yield
        return
    with ExitStack() as stack:
        for device in active:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def all_finite(*tensors: Tensor) -> bool:
    """Whether no entry is NaN or infinite; exact, with one wait for the device.

    By norms, which read each number once and make no mask; a norm may overflow where no entry does, so entries are
    looked at where one is not finite.
    """
    floating = [t for t in tensors if t.is_floating_point()]
    if not floating:
        return True
    with torch.no_grad():
        if len(floating) == 1:
            found = [floating[0].sum(dtype=at_least_single(floating[0].dtype)).item()]
        else:  # a kernel for many of them on accelerators, as in torch's own optimizers
            norms = torch._foreach_norm(floating)
            found = torch.stack([norm.to(norms[0]) for norm in norms]).tolist()
        return all(map(math.isfinite, found)) or all(bool(torch.isfinite(t).all()) for t in floating)


def checked_product(
    matmat: MatMat, columns: Float[Tensor, "D K"], call: str = "matmat(columns)"
) -> Float[Tensor, "D K"]:
    """A user's product, without its graph; refused in another shape or dtype, in which it would broadcast silently."""
    result = matmat(columns).detach()
    if result.shape != columns.shape or result.dtype != columns.dtype:
        raise InvalidArgumentError(
            call=call, got=f"a product of shape {list(result.shape)} and dtype {result.dtype}",
            expected=f"shape {list(columns.shape)} and dtype {columns.dtype}, those of its argument",
            why="products map columns [D, K] to columns [D, K]",
        )  # fmt: skip
    return result
