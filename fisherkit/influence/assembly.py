"""From blocks of scores to what is returned: which options go together, and how blocks are joined.

Knows tensors only.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import InvalidArgumentError, InvalidTypeError


def check_options(by: Any, groups: Any, normalize: Any) -> None:
    """Refuse what is not allowed and what does not go together.

    Raises:
        InvalidArgumentError: an option that is none of the allowed ones, two that do not go together, a negative group.
        InvalidTypeError: groups that are not integers.
    """
    call = "scores"
    if groups is not None and not isinstance(groups, Tensor):
        raise InvalidTypeError(call=call, got=f"a {type(groups).__name__} as groups", expected="a tensor of integers")
    if groups is not None and (groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool):
        raise InvalidTypeError(call=call, got=f"groups of {groups.dtype}", expected="a tensor of integers")
    if groups is not None and groups.numel() and int(groups.long().min()) < 0:
        raise InvalidArgumentError(call=call, got=f"group {int(groups.long().min())}", expected="0 or more")
    for name, value, allowed in (("by", by, (None, "module", "token")), ("normalize", normalize, (None, "relatif"))):
        if value not in allowed:
            raise InvalidArgumentError(call=call, got=f"{name}={value!r}", expected=f"one of {list(allowed)}")
    if by == "token" and (groups is not None or normalize is not None):
        raise InvalidArgumentError(
            call=call,
            got='by="token" with groups= or normalize=',
            expected="either of them",
            why="both are about whole examples",
            try_='scores(..., by="token") and sums over it',
        )
    if groups is not None and normalize is not None:
        raise InvalidArgumentError(
            call=call,
            got=f"groups with normalize={normalize!r}",
            expected="either of them",
            why="RelatIF is relative to one example's own influence",
        )


def side_by_side(parts: list[Tensor]) -> Tensor:
    """Blocks of training examples in one tensor; shorter sequences end in zeros."""
    if parts[0].ndim == 3:
        longest = max(part.shape[2] for part in parts)
        parts = [torch.nn.functional.pad(part, (0, longest - part.shape[2])) for part in parts]
    return torch.cat(parts, 1)


def stacked(parts: list[Tensor]) -> Tensor:
    """Blocks of queries in one tensor, each let go as soon as it is copied."""
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
    start = 0
    while parts:
        part = parts.pop(0)
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def check_group_count(groups: Tensor, examples: int) -> None:
    """Refuse other than one group for each example.

    Raises:
        InvalidArgumentError: not one group for each.
    """
    if groups.shape != (examples,):
        raise InvalidArgumentError(
            call="scores(groups)",
            got=f"groups of shape {list(groups.shape)} for {examples} training examples",
            expected="one number for each",
        )


def grouped(scores: Float[Tensor, "Q N"], groups: Tensor) -> Float[Tensor, "Q G"]:
    """Sums over groups of training examples.

    Raises:
        InvalidArgumentError: not one group for each example.
    """
    check_group_count(groups, scores.shape[1])
    groups = groups.to(scores.device, torch.long)
    total = scores.new_zeros(scores.shape[0], int(groups.max()) + 1)
    return total.index_add_(1, groups, scores)
