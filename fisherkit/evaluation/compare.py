"""`compare`: every kind's update on one batch, judged by the exact Fisher.

Owns the arguments, their checks and their conventions; `Comparison` does the work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fisherkit.arguments import is_integer
from fisherkit.arithmetic import without_autocast
from fisherkit.data import Batch
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.evaluation.comparison import CALL, SGD, Comparison
from fisherkit.evaluation.table import QualityTable
from fisherkit.kind_specs import KindSpec
from fisherkit.likelihoods import Likelihood
from fisherkit.model_inputs import ModelInputs
from fisherkit.space import Selection
from fisherkit.structures import structure_named


@without_autocast()
def compare(
    model: nn.Module,
    batch: Any,
    *,
    kinds: Sequence[str] = ("sgd", "ef", "ief", "sf", "exact"),
    structures: Sequence[str] = ("full",),
    gram_dampings: Sequence[float] = (1e-7, 1e-5, 1e-3, 1e-1),
    likelihood: str | Likelihood | nn.Module = "categorical",
    params: Selection = None,
    example: str = "sequence",
    shift_labels: bool | None = None,
    drop_duplicates: float | None = None,
    seed: int = 0,
    draws: int = 1,
) -> QualityTable:
    """γ and γ/γ_SGD of the update of every kind, in every structure, at every damping.

    All in the paper's sum normalization, ∇L = Σ_n ∇ℓ_n and F = Σ_n (no 1/N). With J the rows ∇ℓ_n (unscaled),
    s_n = ‖∂ℓ_n/∂z_n‖^(2·power) and Ĵ the rows of a Fisher F = ĴᵀĴ, the updates of the full structure are the paper's
    (arXiv 2406.06420, eq. 5, 8, 49):

    - "sgd": ∇L
    - "ef": Jᵀ(JJᵀ + λI)⁻¹1
    - "ief": Jᵀ(JJᵀ + λI)⁻¹s
    - "sf", "truncated", "exact": (F + λI)⁻¹∇L = (1/λ)[I − Ĵᵀ(ĴĴᵀ + λI)⁻¹Ĵ]∇L, computed so that small λ does not cancel

    "block" is the same module by module; "diagonal", "kfac" and "ekfac" are (F + λI)⁻¹∇L with that structure of the
    kind, which for "ief" is the paper's ieKFAC.

    Args:
        model: read, never changed; like all that follow as for `fisherkit.FisherApproximation`.
        batch: one batch with targets.
        kinds: "sgd", "ef", "ief", "sf", "truncated" and "exact", with a setting after a colon: "ief:0.5" (power),
            "sf:4" (draws), "truncated:3" (rank; 2 if none), "truncated:0.01" (tolerance: written with a point).
        structures: of "full", "block", "diagonal", "kfac" and "ekfac".
        gram_dampings: λ > 0, each for every kind and structure but "sgd".
        likelihood: the loss module that you train with, as ``nn.CrossEntropyLoss(...)``, or a name, "categorical",
            "gaussian", "bernoulli" or "poisson", or an object of `fisherkit.likelihoods`.
        params: which parameters.
        example: "sequence" or "token".
        shift_labels: labels belong to the outputs one position before them; None: as the model says of itself.
        drop_duplicates: None to keep every example. Else a cosine in (0, 1): an example whose gradient has a larger
            absolute cosine with that of an earlier kept one is left out of the updates of all kinds but "sgd" and
            "exact", as if the batch did not have it. γ is judged on the whole batch all the same. γ of ill-conditioned
            kinds depends on it, so the table says how many were dropped.
        seed: of sampled labels.
        draws: of "sf" without a setting.

    Returns:
        A table: the gradient's row first, if asked for, then one for each structure, kind and damping, nested in that
        order.

    Raises:
        InvalidTypeError: an argument of the wrong type.
        InvalidArgumentError: an unknown kind or structure, a damping that is not positive, a cosine outside (0, 1).
        DataError: no example, no targets, or targets that do not fit.
        ModelError: dropout or batch statistics in train mode.
        MemoryBudgetError: rows that do not fit in memory.

    Cost: one forward pass and one backward pass for each output vector, shared by all kinds in "full" and "block"; for
    each of these one Gram matrix of its R rows and O(R³) a damping; a build of its own for each other structure.
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(call=CALL, got=f"a {type(model).__name__} as model", expected="a torch.nn.Module")
    _check_draws(draws, seed)
    _check_cosine(drop_duplicates)
    # "sf" without a setting has as many draws as the argument says.
    specs = [
        replace(KindSpec.parse(f"sf:{draws}" if text == "sf" else text, call=CALL, also=(SGD,)), text=text)
        for text in _listed("kinds", kinds)
        if text != SGD
    ]
    dampings = _positive(gram_dampings)
    for structure in _listed("structures", structures):
        structure_named(structure, CALL)
    if isinstance(batch, list) and batch and not isinstance(batch[0], Tensor):
        raise InvalidTypeError(
            call=CALL, got=f"a list of {len(batch)} batches", expected="one batch, (inputs, targets) or a mapping",
            try_="[compare(model, batch) for batch in batches], and fk.evaluation.average",
        )  # fmt: skip
    start = time.perf_counter()
    options = {"likelihood": likelihood, "params": params, "example": example, "shift_labels": shift_labels}
    own = Batch.of(batch, "batch", model_inputs=ModelInputs.of(model))
    comparison = Comparison(model, own, specs, seed, options, updates=len(specs) * len(dampings))
    comparison.drop_duplicates(drop_duplicates)
    found = [comparison.update(spec, structure, dampings) for structure in structures for spec in specs]
    return comparison.judge(found, start, sgd=SGD in kinds)


def _listed(name: str, values: Sequence[str]) -> Sequence[str]:
    """The values, once they are known to be a list of names and not one name."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InvalidTypeError(
            call=CALL, got=f"{name} of type {type(values).__name__}", expected="a sequence", try_=f'{name}=("...",)'
        )
    if not values:
        raise InvalidArgumentError(call=CALL, got=f"no {name}", expected="at least one")
    _check_repeats(name, values)
    return values


def _check_repeats(name: str, values: Sequence[Any]) -> None:
    repeated = [value for value in values if values.count(value) > 1]
    if repeated:
        raise InvalidArgumentError(call=CALL, got=f"{name} with {repeated[0]!r} twice", expected="each once")


def _positive(values: Sequence[float]) -> tuple[float, ...]:
    """The dampings."""
    if not isinstance(values, Sequence):
        raise InvalidTypeError(
            call=CALL, got=f"gram_dampings of type {type(values).__name__}", expected="a sequence of numbers"
        )
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidTypeError(call=CALL, got=f"a damping of type {type(value).__name__}", expected="a number")
        if not 0 < value < math.inf:
            raise InvalidArgumentError(
                call=CALL, got=f"gram damping {value}", expected="a finite number above 0",
                why="a Fisher with fewer rows than parameters is singular",
            )  # fmt: skip
    if not values:
        raise InvalidArgumentError(call=CALL, got="no gram_dampings", expected="at least one")
    _check_repeats("gram_dampings", values)
    return tuple(float(value) for value in values)


def _check_cosine(value: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidTypeError(
            call=CALL, got=f"drop_duplicates of type {type(value).__name__}", expected="a number or None"
        )
    if not 0 < value < 1:
        raise InvalidArgumentError(
            call=CALL, got=f"drop_duplicates={value}", expected="a cosine between 0 and 1, or None",
            try_="0.99 for near-duplicates alone",
        )  # fmt: skip


def _check_draws(value: int, seed: int) -> None:
    for name, number in (("draws", value), ("seed", seed)):
        if not is_integer(number):
            raise InvalidTypeError(call=CALL, got=f"{name} of type {type(number).__name__}", expected="an integer")
    if value < 1:
        raise InvalidArgumentError(call=CALL, got=f"draws={value}", expected="1 or more")
