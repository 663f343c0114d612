"""The linear datamodeling score, and the mean of several models' scores.

Source: Park, Georgiev, Ilyas, Leclerc, Madry, "TRAK: Attributing Model Behavior at Scale" (ICML 2023, arXiv
2303.14186), definition 2.3. Owns the prediction for a subset; takes scores, masks and measured outputs from anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherkit.errors import InvalidArgumentError
from fisherkit.influence.evaluation.arguments import check_columns, check_masks, check_outputs, check_scores
from fisherkit.influence.evaluation.correlated import RankCorrelation, rank_correlation


def linear_datamodeling_score(
    scores: Float[Tensor, "Q N"],
    masks: Bool[Tensor, "S N"],
    outputs: Float[Tensor, "S Q"] | Float[Tensor, "S R Q"],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> RankCorrelation:
    """How well sums of scores rank the outputs of models that were trained on subsets.

    For each query q, Spearman's correlation over the subsets s between the prediction Σ_{n in s} score[q, n] and the
    measured output of models trained on s; then the mean over queries. Signs: a positive score says that the example
    helps the query, and a larger output is better (−loss or margin, as `retrain` records them). Scores of the opposite
    sign give the opposite result; a positive factor for each query changes nothing, and neither does a constant that is
    added where all subsets have the same size.

    Args:
        scores: one row for each query, positive = helpful.
        masks: which training examples each subset has.
        outputs: of the models trained on the subsets; an axis of seeds is averaged first.
        resamples: of the bootstrap.
        confidence: of the intervals, which are percentiles of the mean over queries: with queries drawn anew, with
            subsets drawn anew, and with both. They do not include what other seeds would change. Subsets that are
            drawn twice are ties, which pull a rank correlation down a little if there are few subsets.
        seed: of the resamples.

    Returns:
        The mean, each query's own, and intervals. A query whose predictions do not vary counts as 0.

    Raises:
        InvalidTypeError: not tensors of the right kind.
        InvalidArgumentError: shapes that do not fit, an empty subset, fewer than two subsets, or a query whose outputs
            do not vary.
        NonFiniteError: NaN or infinity.

    Cost: O(resamples · Q · S).
    """
    call = "linear_datamodeling_score"
    checked = check_scores(scores, call)
    subsets = check_masks(masks, call)
    check_columns(checked, subsets.shape[1], call)
    if len(subsets) < 2:
        raise InvalidArgumentError(call=call, got="one subset", expected="at least two", try_="100 or more")
    measured = check_outputs(outputs, call, len(subsets), len(checked)).to(checked.device)
    predicted = predicted_outputs(checked, subsets)
    return rank_correlation(
        predicted, measured.mT, resamples=resamples, confidence=confidence, seed=seed, call=call
    )  # fmt: skip


def predicted_outputs(scores: Float[Tensor, "Q N"], masks: Bool[Tensor, "S N"]) -> Float[Tensor, "Q S"]:
    """Σ_{n in s} score[q, n], float64; exactly constant where it varies by no more than rounding does."""
    scores = scores.double()
    predicted = scores @ masks.to(scores.device).double().mT
    rounding = 8 * torch.finfo(torch.float64).eps * scores.abs().sum(1, keepdim=True)
    flat = predicted.amax(1, keepdim=True) - predicted.amin(1, keepdim=True) <= rounding
    return torch.where(flat, 0.0, predicted)


def average_scores(scores: Sequence[Float[Tensor, "Q N"]]) -> Float[Tensor, "Q N"]:
    """The mean of the scores of several models, trained alike from different seeds.

    Retraining averages over seeds, and so should scores: one model's scores have that model's own noise.

    Args:
        scores: one matrix for each model, all over the same queries and training examples.

    Returns:
        Their mean, float64.

    Raises:
        InvalidTypeError: not tensors of floating-point numbers.
        InvalidArgumentError: none, or shapes that differ.
        NonFiniteError: NaN or infinity.
    """
    call = "average_scores"
    checked = [check_scores(matrix, call, f"scores[{i}]") for i, matrix in enumerate(scores)]
    shapes = {tuple(matrix.shape) for matrix in checked}
    if len(shapes) != 1:
        raise InvalidArgumentError(
            call=call, got=f"shapes {sorted(shapes)}", expected="one or more matrices of one shape [Q, N]"
        )
    return torch.stack(checked).mean(0)
