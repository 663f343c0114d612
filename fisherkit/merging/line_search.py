"""Which model between two is best by a loss: a merge that is checked against the average, where examples are at hand.

Owns the search along the straight line. What the loss is, and which examples it reads, is the caller's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fisherkit.arguments import check_number, is_number
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError
from fisherkit.merging.merge import averaged
from fisherkit.merging.models import Model
from fisherkit.merging.policy import MergePolicy

Loss = Callable[[dict[str, Tensor]], float | Tensor]

CALL = "line_search"


def line_search(
    start: Model,
    end: Model,
    loss: Loss,
    *,
    shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    policy: MergePolicy | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    return_info: bool = False,
) -> Any:
    """The model of least loss among θ_start + s (θ_end − θ_start), such as between the models' average and a merge.

    What `merge` minimises are quadratic forms around each model, which need not hold where the merged model is. A few
    examples of each task say whether they do, and how far to go: by this loss the result is no worse than either end.

    Args:
        start: a module, state dict or path, such as the models' `average`.
        end: the same of a merged model.
        loss: takes a state dict and returns its loss on examples of all tasks, best of all held-out ones. Losses that
            are not finite count as larger than all others.
        shares: s that are tried, from 0 to 1; of equal losses the first counts.
        policy: what is allowed where the two leave a choice besides parameters, as in `average`.
        out: write safetensors there instead of returning tensors: a folder (``model.safetensors``), or a file's name.
        overwrite: replace a model that is there.
        return_info: also return a `MergeInfo`, whose ``losses`` are of all shares and whose ``share`` is the s taken.

    Returns:
        A state dict, or the path of what was written; with ``return_info`` a pair with the `MergeInfo`.

    Raises:
        InvalidTypeError: a loss that is no function, or returns no number; shares that are none; as in `average`.
        InvalidArgumentError: no share, or one below 0 or above 1; as in `average`.
        NonFiniteError: no loss is finite; as in `average`.

    Cost: a reading of both models and an evaluation of the loss for each share; a copy of what is no path.
    """
    if not callable(loss):
        raise InvalidTypeError(
            call=CALL, got=f"loss of type {type(loss).__name__}", expected="a function of a state dict",
            try_="lambda state: cross_entropy(functional_call(model, state, x), y)",
        )  # fmt: skip
    if not isinstance(shares, Sequence):
        raise InvalidTypeError(
            call=CALL, got=f"shares of type {type(shares).__name__}", expected="a sequence of numbers from 0 to 1",
            try_="shares=(0, 0.5, 1)",
        )  # fmt: skip
    tried = [check_number(CALL, "shares", share, most=1) for share in shares]
    if not tried:
        raise InvalidArgumentError(call=CALL, got="shares=()", expected="at least one", try_="shares=(0, 0.5, 1)")
    # The loss may load states into the very modules whose tensors these are.
    ends = [model if isinstance(model, (str, Path)) else copy.deepcopy(model) for model in (start, end)]
    losses = tuple((share, _loss(loss, averaged(CALL, ends, [1 - share, share], policy))) for share in tried)
    best, least = min(losses, key=lambda pair: pair[1] if math.isfinite(pair[1]) else math.inf)
    if not math.isfinite(least):
        raise NonFiniteError(
            call=CALL, got=f"losses {[value for _, value in losses]}", expected="a finite one",
            why="neither model has a loss that can be compared", try_="look at the loss of each model",
        )  # fmt: skip
    found, info = averaged(CALL, ends, [1 - best, best], policy, out, overwrite, return_info=True)
    return (found, replace(info, losses=losses, share=best)) if return_info else found


def _loss(loss: Loss, state: dict[str, Tensor]) -> float:
    found = loss(state)
    if isinstance(found, np.generic) or (isinstance(found, Tensor) and found.numel() == 1):
        found = found.item()
    if not is_number(found):
        raise InvalidTypeError(
            call=CALL, got=f"a loss that returns {found!r:.80}", expected="a number, or a tensor of one",
            try_="its mean over examples",
        )  # fmt: skip
    return float(found)
