"""Leaving one training example out, exactly: by training again without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from examples.influence.evaluation.checks import check_examples, check_scores
from examples.influence.evaluation.datamodeling import RankCorrelation, rank_correlation
from examples.influence.evaluation.retraining import Retraining, retrain
from examples.influence.evaluation.training import Build, TrainingRecipe
from fisherkit.errors import InvalidArgumentError


@dataclass(frozen=True)
class LeaveOneOut:
    """What single training examples do for queries.

    Args:
        examples: which were left out, L of them.
        effects: output with the example minus output without it, mean over seeds; positive = helpful; float64.
        noise: the standard error of each effect, from the spread over seeds; NaN with one seed.
        runs: the models behind it; the first was trained on everything.
    """

    examples: Int[Tensor, " L"]
    effects: Float[Tensor, "Q L"]
    noise: Float[Tensor, "Q L"]
    runs: Retraining

    def correlation(
        self, scores: Float[Tensor, "Q N"], *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> RankCorrelation:
        """Spearman's correlation, over the left-out examples, of scores with measured effects, for each query.

        Args:
            scores: of all N training examples; those of the left-out ones are used.
            resamples: of the bootstrap over queries and examples.
            confidence: of the intervals.
            seed: of the resamples.

        Raises:
            InvalidTypeError: scores are not a tensor of floating-point numbers.
            InvalidArgumentError: scores of another shape, or fewer than two examples left out.
            NonFiniteError: NaN or infinity.
        """
        call = "LeaveOneOut.correlation"
        return rank_correlation(
            self._own(scores, call), self.effects, resamples=resamples, confidence=confidence, seed=seed, call=call
        )

    def slope(self, scores: Float[Tensor, "Q N"]) -> float:
        """The factor b with which b · score fits the effects best, over all queries and examples.

        It is 1 where scores are (1/N) ∇ℓ_qᵀ H⁻¹ ∇ℓ_n and influence functions are exact.

        Args:
            scores: of all N training examples.

        Raises:
            InvalidTypeError: scores are not a tensor of floating-point numbers.
            InvalidArgumentError: scores of another shape, or all zero.
            NonFiniteError: NaN or infinity.
        """
        call = "LeaveOneOut.slope"
        own = self._own(scores, call)
        if not bool(own.any()):
            raise InvalidArgumentError(call=call, got="scores that are all zero", expected="some that are not")
        return float((own * self.effects).sum() / own.square().sum())

    def _own(self, scores: Tensor, call: str) -> Float[Tensor, "Q L"]:
        checked = check_scores(scores, call).to(self.effects.device)
        expected = (len(self.effects), self.runs.masks.shape[1])
        if tuple(checked.shape) != expected:
            raise InvalidArgumentError(
                call=call, got=f"scores of shape {list(checked.shape)}", expected=f"{list(expected)}"
            )
        if len(self.examples) < 2:
            raise InvalidArgumentError(call=call, got="one example left out", expected="two or more")
        return checked[:, self.examples]


def leave_one_out(
    build: Build,
    train: tuple[Any, Tensor],
    queries: tuple[Any, Tensor],
    examples: Sequence[int] | Int[Tensor, " L"],
    recipe: TrainingRecipe,
    *,
    measurement: str = "loss",
    **options: Any,
) -> LeaveOneOut:
    """Train without each of some examples, and with all of them, from the same seeds.

    A run with and one without an example start from the same model and see the other examples in the same order. What
    is left of the noise is still larger than most examples' effects unless training converges: many seeds, or a convex
    model trained to its optimum, and `LeaveOneOut.noise` to see it.

    Args:
        build: a seed to an untrained model.
        train: inputs and targets of all N training examples.
        queries: inputs and targets to measure on.
        examples: places of those to leave out.
        recipe: how to train.
        measurement: "loss" or "margin".
        **options: keywords of `retrain`: seeds, likelihood, path, progress…

    Raises:
        InvalidArgumentError: examples that are not distinct places in the training data, or seeds, names or a path that
            do not fit.

    Cost: (L + 1) · R trainings.
    """
    count = len(train[1])
    index = check_examples(examples, count, "leave_one_out")
    masks = torch.ones(len(index) + 1, count, dtype=torch.bool)  # the first is everything
    masks[1 + torch.arange(len(index)), index] = False
    runs = retrain(build, train, queries, masks, recipe, measurements=(measurement,), **options)
    outputs = runs.outputs[measurement]
    effects = outputs[:1] - outputs[1:]
    noise = (
        effects.std(1) / len(runs.seeds) ** 0.5 if len(runs.seeds) > 1 else torch.full_like(effects[:, 0], torch.nan)
    )
    return LeaveOneOut(index, effects.mean(1).mT, noise.mT, runs)
