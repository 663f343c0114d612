"""Finding mislabelled training examples: how well a ranking puts them first, and two plain rankings to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from examples.influence.evaluation.checks import check_floats
from examples.influence.evaluation.losses import Loss, loss_of
from examples.influence.evaluation.statistics import (
    Interval,
    Ranking,
    check_bootstrap,
    multiplicities,
    percentile_interval,
)
from fisherkit.data import Data, Source
from fisherkit.errors import DataError, InvalidArgumentError, InvalidTypeError
from fisherkit.rows.verified import plan_of
from fisherkit.space import ParameterSpace


@dataclass(frozen=True)
class Detection:
    """How well a ranking finds what is mislabelled.

    Args:
        auroc: the share of pairs, one mislabelled and one not, that are in the right order; ties count half.
        auroc_interval: of it, with mislabelled and other examples drawn anew separately.
        average_precision: Σ_k (R_k − R_{k−1}) P_k over the distinct values, as scikit-learn has it.
        precision_interval: of it.
    """

    auroc: float
    auroc_interval: Interval
    average_precision: float
    precision_interval: Interval

    def __str__(self) -> str:
        (a, b), (c, d) = self.auroc_interval, self.precision_interval
        return (
            f"AUROC {self.auroc:.3f} [{a:.3f}, {b:.3f}], "
            f"average precision {self.average_precision:.3f} [{c:.3f}, {d:.3f}]"
        )


def flip_labels(
    labels: Int[Tensor, " N"], fraction: float, *, classes: int, seed: int = 0
) -> tuple[Int[Tensor, " N"], Bool[Tensor, " N"]]:
    """Give a random share of the examples a random wrong label.

    Args:
        labels: class indices.
        fraction: ⌊fraction · N⌋ examples are mislabelled.
        classes: C; each wrong label is equally likely.
        seed: of the draw.

    Returns:
        The new labels, and which ones are wrong.

    Raises:
        InvalidArgumentError: labels outside 0 … C − 1, fewer than two classes, or no example to mislabel.
    """
    count = int(fraction * len(labels)) if labels.ndim == 1 else 0
    fits = not labels.is_floating_point() and classes > 1 and 0 < count < len(labels)
    if not fits or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InvalidArgumentError(
            call="flip_labels", got=f"labels of shape {list(labels.shape)}, fraction={fraction}, classes={classes}",
            expected="class indices [N] from 0 to classes − 1, and 1 ≤ fraction · N < N",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.randperm(len(labels), generator=generator)[:count]] = True
    shift = torch.randint(1, classes, (len(labels),), generator=generator) * wrong
    return (labels + shift.to(labels)) % classes, wrong.to(labels.device)


def mislabel_detection(
    rankings: Mapping[str, Float[Tensor, " N"]],
    mislabelled: Bool[Tensor, " N"],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Detection]:
    """How well each ranking puts the mislabelled examples first.

    Show `plain_rankings` beside any other: the training loss alone is often near 1, and then a high value says little.

    Args:
        rankings: by name; larger = more suspect, such as self-influence.
        mislabelled: which examples are.
        resamples: of the bootstrap; the same ones for every ranking.
        confidence: of the intervals.
        seed: of the resamples.

    Raises:
        InvalidTypeError: not tensors of the right kind.
        InvalidArgumentError: no rankings, sizes that differ, or only mislabelled or only other examples.
        NonFiniteError: NaN or infinity.

    Cost: O(resamples · N) for each ranking.
    """
    call = "mislabel_detection"
    check_bootstrap(resamples, confidence, call)
    if not isinstance(mislabelled, Tensor) or mislabelled.dtype != torch.bool or mislabelled.ndim != 1:
        raise InvalidTypeError(
            call=call, got=f"mislabelled of type {getattr(mislabelled, 'dtype', type(mislabelled).__name__)}",
            expected="a boolean tensor [N]",
        )  # fmt: skip
    wrong = mislabelled.cpu()
    if not rankings or not bool(wrong.any()) or bool(wrong.all()):
        raise InvalidArgumentError(
            call=call, got=f"{len(rankings)} rankings, {int(wrong.sum())} of {len(wrong)} examples mislabelled",
            expected="at least one ranking, and examples of both kinds",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(resamples, len(wrong), dtype=torch.float64)
    for kind in (wrong, ~wrong):
        weights[:, kind] = multiplicities(int(kind.sum()), resamples, generator)
    once = torch.ones(1, len(wrong), dtype=torch.float64)
    found = {}
    for name, ranking in rankings.items():
        values = check_floats(ranking, call, f"rankings[{name!r}]", "a tensor [N]").cpu()
        if values.shape != wrong.shape:
            raise InvalidArgumentError(
                call=call, got=f"rankings[{name!r}] of shape {list(values.shape)}", expected=f"[{len(wrong)}]"
            )
        (area, precision), (areas, precisions) = (_areas(values, wrong, w) for w in (once, weights))
        found[name] = Detection(
            float(area), percentile_interval(areas, confidence),
            float(precision), percentile_interval(precisions, confidence),
        )  # fmt: skip
    return found


def _areas(
    values: Float[Tensor, " N"], positive: Bool[Tensor, " N"], weights: Float[Tensor, "B N"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """AUROC and average precision of weighted examples."""
    hits = weights * positive
    p, n = hits.sum(1), (weights * ~positive).sum(1)
    ranks = Ranking(values.unsqueeze(0)).ranks(weights)[:, 0]
    area = ((hits * ranks).sum(1) - p * (p + 1) / 2) / (p * n)
    # From the largest value down: an example's precision is that of everything at least as large.
    down = Ranking(-values.unsqueeze(0))
    order, right = down.order[0], down.right[0]
    above_hits, above = (torch.nn.functional.pad(w[:, order].cumsum(1), (1, 0))[:, right] for w in (hits, weights))
    precision = torch.where(hits > 0, above_hits / above.clamp_min(1), 0.0)
    return area, (hits * precision).sum(1) / p


def plain_rankings(model: nn.Module, data: Data, *, likelihood: Loss = "categorical") -> dict[str, Float[Tensor, " N"]]:
    """The two rankings that need no Fisher: each training example's loss, and the norm of its gradient.

    Args:
        model: trained, in eval mode; gradients are with respect to all parameters that require grad.
        data: the training data, one batch or a re-iterable of batches.
        likelihood: of the loss: a likelihood's name or object, torch's loss module, or a function of outputs and
            targets that returns a loss for each example.

    Returns:
        "loss" and "gradient norm", float64, in the order of the data.

    Raises:
        InvalidArgumentError: an unknown likelihood.
        DataError: data without targets, or whose order is not known to be fixed.
        ModelError: dropout or batch norm in train mode.

    Cost: one forward and backward pass an example.
    """
    call = "plain_rankings"
    loss = loss_of(likelihood, call)
    parameters = [p for p in model.parameters() if p.requires_grad]
    source = Source(data, model)
    source.keep_order(call)
    plan_of(model, ParameterSpace.of(model, None), source)  # finds out which inputs all examples share
    losses, norms = [], []
    for whole in source:
        batch = whole.to(parameters[0].device)
        if batch.targets is None:
            raise DataError(call=call, got="no targets", expected="pairs (inputs, targets)")
        for n in range(batch.size):
            one = slice(n, n + 1)
            value = loss(batch.take(one).call(model), batch.targets[one])[0]
            gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
            losses.append(value.detach().double())
            norms.append(torch.stack([g.double().norm() for g in gradients]).norm())
    return {"loss": torch.stack(losses), "gradient norm": torch.stack(norms)}
