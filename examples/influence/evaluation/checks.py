"""Scores, masks and outputs as users pass them, checked before anything is computed."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherkit.arithmetic import all_finite
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError


def check_scores(scores: object, call: str, name: str = "scores") -> Float[Tensor, "Q N"]:
    """A finite matrix of scores, as float64."""
    tensor = check_floats(scores, call, name, "a [Q, N] tensor, a row for each query")
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise InvalidArgumentError(
            call=call, got=f"{name} of shape {list(tensor.shape)}", expected="[Q, N], one row for each query",
            try_="scores.unsqueeze(0) for one query",
        )  # fmt: skip
    return tensor


def check_floats(value: object, call: str, name: str, expected: str) -> Tensor:
    """A tensor of finite floating-point numbers, detached, as float64."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"{name} of {value.dtype}" if isinstance(value, Tensor) else f"{name} of type {type(value).__name__}"
        raise InvalidTypeError(call=call, got=got, expected=expected, try_="torch.as_tensor(array).double()")
    if not all_finite(value):
        raise NonFiniteError(
            call=call, got=f"{name} with NaN or infinite entries", expected="finite numbers",
            why="they cannot be ranked",
        )  # fmt: skip
    return value.detach().double()


def check_masks(masks: object, call: str, examples: int | None = None) -> Bool[Tensor, "S N"]:
    """Which examples are in which subset."""
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
        got = f"masks of {masks.dtype}" if isinstance(masks, Tensor) else f"masks of type {type(masks).__name__}"
        raise InvalidTypeError(
            call=call, got=got, expected="a boolean [S, N] tensor, a row for each subset", try_="random_subsets(N, S)"
        )
    if masks.ndim != 2 or 0 in masks.shape or (examples is not None and masks.shape[1] != examples):
        raise InvalidArgumentError(
            call=call, got=f"masks of shape {list(masks.shape)}",
            expected=f"[S, {'N' if examples is None else examples}], a row for each subset, a column for each example",
        )  # fmt: skip
    if not bool(masks.any(1).all()):
        raise InvalidArgumentError(call=call, got="a subset without examples", expected="at least one in each")
    return masks


def check_outputs(outputs: object, call: str, subsets: int, queries: int) -> Float[Tensor, "S Q"]:
    """Measured outputs, averaged over seeds if they have that axis."""
    tensor = check_floats(outputs, call, "outputs", "a tensor [S, Q] or [S, seeds, Q], larger = better")
    fits = tensor.ndim in (2, 3) and (tensor.shape[0], tensor.shape[-1]) == (subsets, queries) and 0 not in tensor.shape
    if not fits:
        raise InvalidArgumentError(
            call=call, got=f"outputs of shape {list(tensor.shape)}",
            expected=f"[{subsets}, {queries}] or [{subsets}, seeds, {queries}]",
            why=f"there are {subsets} subsets in masks and {queries} queries in scores",
        )  # fmt: skip
    mean = tensor.mean(1) if tensor.ndim == 3 else tensor
    constant = (mean == mean[:1]).all(0)
    if bool(constant.any()):
        raise InvalidArgumentError(
            call=call, got=f"outputs of query {int(constant.nonzero()[0])} that are the same for every subset",
            expected="outputs that vary", why="nothing is there to be predicted",
            try_="other queries, or check that models were trained on different subsets",
        )  # fmt: skip
    return mean


def check_examples(examples: object, count: int, call: str) -> Int[Tensor, " L"]:
    """Places of distinct training examples."""
    index = torch.as_tensor(examples)
    whole = index.ndim == 1 and index.numel() > 0 and not index.is_floating_point() and index.dtype != torch.bool
    if not whole or int(index.min()) < 0 or int(index.max()) >= count or len(index.unique()) < len(index):
        raise InvalidArgumentError(
            call=call, got=f"examples = {str(examples)[:80]}", expected=f"distinct integers from 0 to {count - 1}"
        )
    return index.long()
