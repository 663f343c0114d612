"""A rank correlation for each query, their mean, and intervals for it.

Owns the result that the linear datamodeling score and leave-one-out share. Knows neither: a *case* is whatever the
correlation runs over, a subset or an example.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.errors import InvalidArgumentError
from fisherkit.influence.evaluation.bootstrap import Interval, check_bootstrap, multiplicities, percentile_interval
from fisherkit.influence.evaluation.ranks import Ranking, resampled_spearman, spearman


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's correlation of predicted with measured effects, averaged over queries.

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
    """Spearman for each query, the mean, and bootstrap intervals.

    Args:
        predicted: what scores say, a row for each query.
        measured: what retraining says.
        resamples: B.
        confidence: of the intervals.
        seed: of the resamples.
        call: for errors.
    """
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
