"""How high a linear datamodeling score can be, given how noisy the measured outputs are.

Owns one formula and its assumptions. Knows only outputs with an axis of seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arguments import check_count
from fisherkit.errors import InvalidArgumentError
from fisherkit.influence.evaluation.arguments import check_floats
from fisherkit.influence.evaluation.bootstrap import Interval, check_bootstrap, multiplicities, percentile_interval
from fisherkit.influence.evaluation.ranks import spearman


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
    outputs: Float[Tensor, "S R Q"],
    *,
    splits: int = 50,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
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
