"""Rank correlations of scores with retraining: the linear datamodeling score, its intervals, and its noise ceiling.

Source: Park, Georgiev, Ilyas, Leclerc, Madry, "TRAK: Attributing Model Behavior at Scale" (ICML 2023, arXiv
2303.14186), definition 2.3. Takes scores, masks and measured outputs from anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from examples.influence.evaluation.checks import check_floats, check_masks, check_outputs, check_scores
from examples.influence.evaluation.statistics import (
    Interval,
    Ranking,
    check_bootstrap,
    multiplicities,
    percentile_interval,
    resampled_spearman,
    spearman,
)
from fisherkit.arguments import check_count
from fisherkit.errors import InvalidArgumentError


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation of predicted with measured effects, averaged over queries.

    A *case* is what the correlation runs over: a subset, or a left-out example.

    Args:
        mean: over queries.
        per_query: ``[Q]``, float64.
        interval: of the mean, when queries and cases are both drawn anew.
        over_queries: the interval when only queries are.
        over_cases: the interval when only cases (subsets, or left-out examples) are.
        cases: how many cases the correlation runs over.
        samples: ``[B]``, the mean in each resample of both. The same seed and sizes give the same resamples, so that
            the samples of two methods on the same data can be compared one by one; `difference` does.
        confidence: of the intervals.
    """

    mean: float
    per_query: Float[Tensor, " Q"]
    interval: Interval
    over_queries: Interval
    over_cases: Interval
    cases: int
    samples: Float[Tensor, " B"] = field(repr=False)
    confidence: float = 0.95

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.mean:.3f} [{low:.3f}, {high:.3f}] ({self.confidence:.0%} interval, "
            f"{len(self.per_query)} queries, {self.cases} cases)"
        )

    def difference(self, other: RankCorrelation) -> tuple[float, Interval]:
        """This mean minus another's, measured on the same queries and cases, with a paired interval.

        Args:
            other: of another method, with the same resamples, seed and confidence.

        Raises:
            InvalidArgumentError: another number of queries, cases or resamples.
        """
        own, theirs = ((len(c.per_query), c.cases, len(c.samples)) for c in (self, other))
        if own != theirs:
            raise InvalidArgumentError(
                call="RankCorrelation.difference", got=f"(queries, cases, resamples) = {theirs}", expected=f"{own}",
                why="a paired interval needs both on the same data and resamples",
            )  # fmt: skip
        return self.mean - other.mean, percentile_interval(self.samples - other.samples, self.confidence)


def rank_correlation(
    predicted: Float[Tensor, "Q S"],
    measured: Float[Tensor, "Q S"],
    *,
    resamples: int,
    confidence: float,
    seed: int,
    call: str,
) -> RankCorrelation:
    """Spearman's correlation of what scores say with what retraining says, for each query, and intervals."""
    check_bootstrap(resamples, confidence, call)
    queries, cases = predicted.shape
    device = predicted.device
    per_query = spearman(predicted, measured)
    generator = torch.Generator().manual_seed(seed)
    case_weights = multiplicities(cases, resamples, generator).to(device)
    query_weights = multiplicities(queries, resamples, generator).to(device) / queries
    resampled = resampled_spearman(Ranking(predicted), Ranking(measured), case_weights)
    both = (resampled * query_weights).sum(1)
    return RankCorrelation(
        float(per_query.mean()), per_query,
        percentile_interval(both, confidence),
        percentile_interval(query_weights @ per_query, confidence),
        percentile_interval(resampled.mean(1), confidence),
        cases, both, confidence,
    )  # fmt: skip


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
    if checked.shape[1] != subsets.shape[1]:
        raise InvalidArgumentError(
            call=call, got=f"scores of {checked.shape[1]} training examples", expected=f"{subsets.shape[1]}",
            why="masks have that many",
        )  # fmt: skip
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


@dataclass(frozen=True)
class NoiseCeiling:
    """The score that perfect predictions would get.

    Args:
        mean: over queries.
        per_query: ``[Q]``, float64.
        interval: of the mean, when queries are drawn anew.
    """

    mean: float
    per_query: Float[Tensor, " Q"]
    interval: Interval

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"


def noise_ceiling(
    outputs: Float[Tensor, "S R Q"], *, splits: int = 50, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> NoiseCeiling:
    """The linear datamodeling score of the true expected outputs, estimated from halves of the seeds.

    For each query: ρ, Spearman's correlation over subsets between the means of two disjoint halves of the seeds,
    averaged over random splits; r = 2 sin(πρ/6), the normal distribution's Pearson correlation that goes with ρ;
    reliability of the mean over all R seeds by Spearman and Brown, r_R = k r / (1 + (k − 1) r), k = R / ⌊R/2⌋; then
    √r_R, the correlation of that mean with its expectation, and back to ranks, 6/π · asin(√r_R / 2).

    Assumptions: an output is the subset's expected output plus noise that is independent between seeds and equally
    large for all subsets; both are roughly normal over subsets. A negative r counts as 0, and for very noisy outputs √
    is biased, so that a ceiling far below 1 is rough. It bounds any predictor that depends on the subset alone. Runs of
    different subsets that share a seed share their initial model: noise common to all subsets does not lower the
    ceiling, and need not.

    Args:
        outputs: with the axis of seeds.
        splits: random halves to average over.
        resamples: of the bootstrap over queries.
        confidence: of the interval.
        seed: of splits and resamples.

    Raises:
        InvalidTypeError: not a tensor of floating-point numbers.
        InvalidArgumentError: not ``[S, R, Q]``, or fewer than two seeds or three subsets.
        NonFiniteError: NaN or infinity.

    Cost: O(splits · Q · S log S).
    """
    call = "noise_ceiling"
    tensor = check_floats(outputs, call, "outputs", "a tensor [S, seeds, Q]")
    check_bootstrap(resamples, confidence, call)
    check_count(call, "splits", splits)
    if tensor.ndim != 3 or tensor.shape[0] < 3 or tensor.shape[1] < 2 or tensor.shape[2] < 1:
        raise InvalidArgumentError(
            call=call, got=f"outputs of shape {list(tensor.shape)}", expected="[S, seeds, Q], two seeds or more",
            why="noise shows in the difference between seeds",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    runs = tensor.shape[1]
    half = runs // 2
    total = tensor.new_zeros(tensor.shape[2])
    for _ in range(splits):
        order = torch.randperm(runs, generator=generator).to(tensor.device)
        first, second = (tensor[:, part].mean(1).mT for part in (order[:half], order[half : 2 * half]))
        total += spearman(first, second)
    r = (2 * torch.sin(torch.pi / 6 * total / splits)).clamp_min(0)
    k = runs / half
    reliability = k * r / (1 + (k - 1) * r)
    per_query = 6 / math.pi * torch.asin(reliability.sqrt() / 2)
    weights = multiplicities(len(per_query), resamples, generator).to(tensor.device) / len(per_query)
    return NoiseCeiling(float(per_query.mean()), per_query, percentile_interval(weights @ per_query, confidence))
