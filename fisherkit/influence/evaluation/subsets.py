"""Subsets of the training examples as masks. Knows only counts and scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherkit.arguments import is_integer
from fisherkit.errors import InvalidArgumentError
from fisherkit.influence.evaluation.arguments import check_examples, check_scores


def random_subsets(examples: int, subsets: int, *, fraction: float = 0.5, seed: int = 0) -> Bool[Tensor, "S N"]:
    """Random subsets of one size, ⌊fraction · N⌋ examples without repetition.

    Args:
        examples: N.
        subsets: S.
        fraction: of the examples that each subset has.
        seed: of the draw; the first subsets of a longer list are those of a shorter one.

    Raises:
        InvalidArgumentError: a count below 1, or a fraction that leaves none or all of the examples.
    """
    size = int(fraction * examples)
    if examples < 2 or subsets < 1 or not 0 < size < examples:
        raise InvalidArgumentError(
            call="random_subsets", got=f"examples={examples}, subsets={subsets}, fraction={fraction}",
            expected="subsets ≥ 1 and 1 ≤ fraction · examples < examples",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(subsets, examples, dtype=torch.bool)
    for row in masks:
        row[torch.randperm(examples, generator=generator)[:size]] = True
    return masks


def leave_one_out_masks(examples: int, left_out: Sequence[int] | Int[Tensor, " L"]) -> Bool[Tensor, "L N"]:
    """All examples but one, for each of some.

    Args:
        examples: N.
        left_out: which one is missing in each row.

    Raises:
        InvalidArgumentError: not distinct examples, or fewer than two examples in all.
    """
    call = "leave_one_out_masks"
    if examples < 2:
        raise InvalidArgumentError(call=call, got=f"examples={examples}", expected="two or more")
    index = check_examples(left_out, examples, call)
    masks = torch.ones(len(index), examples, dtype=torch.bool)
    masks[torch.arange(len(index)), index] = False
    return masks


def removal_masks(scores: Float[Tensor, "Q N"], counts: Sequence[int]) -> Bool[Tensor, "K Q N"]:
    """All examples without the k that help a query most, for each k and query.

    Args:
        scores: positive = helpful.
        counts: k; 1 ≤ k < N.

    Raises:
        InvalidTypeError: scores are not a tensor of floating-point numbers.
        InvalidArgumentError: a wrong shape, or counts out of range.
        NonFiniteError: NaN or infinity.
    """
    call = "removal_masks"
    checked = check_scores(scores, call)
    queries, examples = checked.shape
    if not counts or not all(is_integer(k) and 1 <= k < examples for k in counts):
        raise InvalidArgumentError(
            call=call, got=f"counts={list(counts)}", expected=f"integers from 1 to {examples - 1}"
        )
    order = checked.argsort(stable=True, dim=1, descending=True)
    masks = torch.ones(len(counts), queries, examples, dtype=torch.bool)
    for mask, k in zip(masks, counts, strict=True):
        mask.scatter_(1, order[:, :k].cpu(), False)
    return masks
