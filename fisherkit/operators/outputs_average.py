"""A layer's Fisher matrix averaged over its outputs, and mixtures with that average.

A layer's block has an entry for each pair of (output, input) pairs. Its average over outputs is I ⊗ M with
M = (1/O) Σ_o F[(o, ·), (o, ·)], the partial trace divided by O. It knows which inputs matter and not which
outputs do: for G ⊗ A it is tr(G)/O · I ⊗ A, the metric of RegMean (Jin et al., arXiv 2212.09849) up to a scale.
"""

from __future__ import annotations

import functools

import torch

from fisherkit.arguments import check_number
from fisherkit.operators.base import FisherOperator
from fisherkit.operators.composite import SumOperator, add, join
from fisherkit.operators.diagonal import DiagonalOperator
from fisherkit.operators.kronecker import KroneckerOperator
from fisherkit.operators.layer_layout import LayerLayout


def average_over_outputs(operator: FisherOperator) -> FisherOperator:
    """The average over outputs of each module's own block, I ⊗ M, with the same trace.

    A module's weight [O, ...] and its bias [O] have the outputs along their first axis (along the last for a Kronecker
    product known to be transposed). A parameter on its own with one axis has one input: its average is the mean times
    I. Parameters of different modules do not interact in the average.

    Cost: rows are written out, one module at a time, streamed ones as a matrix; of an operator of your own D products,
        by J columns. Others take no more memory than their own.
    """
    own = operator._average()
    if own is not None:
        return own
    if len(terms := operator._terms()) > 1:
        return functools.reduce(add, map(average_over_outputs, terms))
    if len(blocks := operator._blocks()) > 1:
        return join(operator.space, [average_over_outputs(block) for block in blocks])
    return _by_module(operator)


def mix_with_average(operator: FisherOperator, ratio: float) -> FisherOperator:
    """(F + ρR) / (1 + ρ) with R the `average_over_outputs`: F at ratio ρ = 0, R in the limit of large ρ.

    For G ⊗ A with mean(G) = tr(G)/O this is (G + ρ mean(G) I) ⊗ A / (1 + ρ), damping of the gradient factor alone.

    Raises:
        InvalidTypeError, InvalidArgumentError: ρ is no number, or negative, NaN or infinite.
    """
    check_number("mix_with_average", "ratio", ratio)
    if ratio == 0:
        return operator
    if len(terms := operator._terms()) > 1:
        return SumOperator([mix_with_average(term, ratio) for term in terms])
    if len(blocks := operator._blocks()) > 1:
        return join(operator.space, [mix_with_average(block, ratio) for block in blocks])
    share = 1 / (1 + ratio)
    return add(operator._scaled(share), average_over_outputs(operator)._scaled(1 - share))


def _by_module(operator: FisherOperator) -> FisherOperator:
    """I ⊗ M of every module; a parameter that does not share its module's outputs stands for itself."""
    space, parts = operator.space, list[FisherOperator]()
    order = torch.arange(space.size, device=operator.device)
    for names in space.blocks.values():
        own = space.restrict(names)
        first, *others = own.shapes
        whole = not others or (bool(first) and others == [first[:1]])  # one parameter, or a weight and its bias
        for part in [own] if whole else [space.restrict([name]) for name in names]:
            places = space.take(order, part.names)
            if not part.shapes[0]:
                parts.append(DiagonalOperator(part, operator._moment(places.unsqueeze(0)).reshape(1)))
                continue
            layout = LayerLayout.of(part, False, "average_over_outputs")
            moment = operator._moment(layout.to_grid(places.unsqueeze(-1))[0])
            identity = torch.eye(layout.outputs, dtype=moment.dtype, device=moment.device)
            parts.append(KroneckerOperator(part, (moment + moment.mT) / 2, identity, symmetric=True))
    return join(space, parts)
