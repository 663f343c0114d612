"""What removing the most helpful training examples does to each query, by training again without them.

Owns the curve. Knows training only as `retrain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import InvalidArgumentError
from fisherkit.influence.evaluation.arguments import check_columns, check_scores
from fisherkit.influence.evaluation.bootstrap import Interval, check_bootstrap, multiplicities, percentile_interval
from fisherkit.influence.evaluation.recipe import TrainingRecipe
from fisherkit.influence.evaluation.retraining import retrain
from fisherkit.influence.evaluation.runs_file import Retraining
from fisherkit.influence.evaluation.stacked_models import Build
from fisherkit.influence.evaluation.subsets import removal_masks


@dataclass(frozen=True)
class RemovalCurve:
    """How much worse queries get without their k most helpful training examples.

    Args:
        counts: k, K of them.
        drops: output of the model trained on everything minus that of the model without the k; positive = worse; mean
            over seeds, float64. With ``measurement="loss"`` it is the rise of the loss.
        means: ``[K]``, over queries.
        intervals: of the means, when queries are drawn anew.
        runs: the models behind it; the first was trained on everything.
    """

    counts: tuple[int, ...]
    drops: Float[Tensor, "K Q"]
    means: Float[Tensor, " K"]
    intervals: tuple[Interval, ...]
    runs: Retraining


def removal_curve(
    build: Build,
    train: tuple[Any, Tensor],
    queries: tuple[Any, Tensor],
    scores: Float[Tensor, "Q N"],
    counts: Sequence[int],
    recipe: TrainingRecipe,
    *,
    measurement: str = "loss",
    resamples: int = 1000,
    confidence: float = 0.95,
    **options: Any,
) -> RemovalCurve:
    """Train without each query's k most helpful examples, for each k.

    Random scores give the curve to compare with: any removal of data makes models worse.

    Args:
        build: a seed to a model, as in `retrain`.
        train: inputs and targets of all N training examples.
        queries: inputs and targets, one query for each row of scores.
        scores: positive = helpful.
        counts: k.
        recipe: how to train.
        measurement: "loss" or "margin".
        resamples: of the bootstrap over queries, whose seed is fixed.
        confidence: of the intervals.
        **options: keywords of `retrain`.

    Raises:
        InvalidTypeError: scores are not a tensor of floating-point numbers.
        InvalidArgumentError: shapes or counts that do not fit, and as in `retrain`.
        NonFiniteError: NaN or infinity.

    Cost: (K · Q + 1) · R trainings.
    """
    call = "removal_curve"
    checked = check_scores(scores, call)
    check_bootstrap(resamples, confidence, call)
    check_columns(checked, len(train[1]), call)
    if len(checked) != len(queries[1]):
        raise InvalidArgumentError(
            call=call, got=f"scores of {len(checked)} queries and data of {len(queries[1])}", expected="as many"
        )
    removed = removal_masks(checked, counts)
    masks = torch.cat([torch.ones_like(removed[0, :1]), removed.flatten(0, 1)])
    outputs = retrain(build, train, queries, masks, recipe, measurements=(measurement,), **options)
    mean = outputs.outputs[measurement].mean(1)
    # Of every model only its own query counts.
    drops = mean[0] - mean[1:].view(*removed.shape[:2], -1).diagonal(dim1=1, dim2=2)
    weights = multiplicities(len(checked), resamples, torch.Generator().manual_seed(0)) / len(checked)
    intervals = tuple(percentile_interval(weights @ drop, confidence) for drop in drops)
    return RemovalCurve(tuple(counts), drops, drops.mean(1), intervals, outputs)
