"""The Fishers of a whole stack of models, one after the other by fisherkit, brought together as a term of the penalty.

Owns the way from operators to stacked tensors. Knows nothing of training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from examples.continual.methods import KINDS, MAMMOTH, SQUARED, Method
from examples.continual.penalties import (
    DenseTerm,
    DiagonalTerm,
    EigenKroneckerTerm,
    FactoredTerm,
    KroneckerTerm,
    LinearizedTerm,
    Term,
)
from examples.continual.stacked import Pass, Perceptron, Stack, with_ones
from fisherkit.operators import BlockDiagonalOperator, FisherOperator, KroneckerOperator
from fisherkit.operators.kronecker import EigenKroneckerOperator
from fisherkit.operators.low_rank import LowRankOperator
from fisherkit.rows.collection import Rows
from fisherkit.rows.factored import FactoredRows

T = TypeVar("T")

MANY = 2
"""Rows an example beyond which a pass through the linearised network costs less than the rows themselves."""

BATCH = 64
"""Examples whose mean gradient is squared where a Fisher should be."""


class Builder:
    """Builds terms of one method.

    Args:
        method: its kind and structure.
        strengths: ``[S]``, one a member.
        normalize: "trace" for F·D / trace F, a mean eigenvalue of 1; None for F as it is.

    Attributes:
        seconds: of the processor that the Fishers took.
        eigenvalues: the mean eigenvalue, trace F / D, of each term; the geometric mean over members.
    """

    def __init__(self, method: Method, strengths: Tensor, normalize: str | None) -> None:
        self.method, self.strengths, self.normalize = method, strengths, normalize
        self.seconds, self.eigenvalues = 0.0, list[float]()
        self._sum: Tensor | None = None

    def term(self, stack: Stack, inputs: Tensor, labels: Tensor, window: slice, *, count: int, seed: int) -> Term:
        """A task's term at the stack's parameters.

        Args:
            stack: the models.
            inputs: the task's examples ``[E, n, I]``.
            labels: theirs, ``[E, n]``.
            window: the task's outputs.
            count: how many of the examples a Fisher is of: the first ones. Squared batch gradients take all.
            seed: of sampled labels; a seed's members share them.
        """
        if self.method.kind == "l2":
            return DiagonalTerm(stack, torch.ones_like(stack.flat()), self.strengths)
        if self.method.kind == SQUARED:
            return self._squared(stack, inputs, labels, window)
        if self.method.kind == MAMMOTH:
            return self._mammoth(stack, inputs, labels, window)
        start = time.process_time()
        operators = build(self.method, stack, inputs[:, :count], labels[:, :count], window, seed)
        traces = torch.stack([operator.trace() for operator in operators])
        term = _JOINED[self.method.structure](operators, stack, self._weights(traces, stack))
        self.seconds += time.process_time() - start
        return term

    def _weights(self, traces: Tensor, stack: Stack) -> Tensor:
        """The strengths, times D / trace where that is asked for."""
        means = traces.double() / stack.size
        self.eigenvalues.append(float(means.log().mean().exp()))
        return self.strengths if self.normalize is None else self.strengths / means.to(self.strengths.dtype)

    def _squared(self, stack: Stack, inputs: Tensor, labels: Tensor, window: slice) -> Term:
        """The mean over batches of ḡḡᵀ, or of its diagonal, with ḡ a batch's mean gradient."""
        passes, rows = Pass(stack, window), []
        for start in range(0, labels.shape[1] - BATCH + 1, BATCH):
            rows.append(stack.like())
            passes.gradient(with_ones(inputs[:, start : start + BATCH]), labels[:, start : start + BATCH], rows[-1])
        diagonals = sum(row.flat().square() for row in rows) / len(rows)
        weights = self._weights(torch.as_tensor(diagonals).sum(1), stack)
        if self.method.structure == "diagonal":
            return DiagonalTerm(stack, torch.as_tensor(diagonals), weights)
        return DenseTerm(stack, rows, weights / len(rows))

    def _mammoth(self, stack: Stack, inputs: Tensor, labels: Tensor, window: slice) -> Term:
        """The sum over tasks of the mean over examples of p ḡ², p the label's probability, around the newest centre."""
        passes, gradient = Pass(stack, window), stack.like()
        total = self._sum = torch.zeros_like(stack.flat()) if self._sum is None else self._sum
        for place in range(labels.shape[1]):
            losses = passes.gradient(with_ones(inputs[:, [place]]), labels[:, [place]], gradient)
            total += losses.neg().exp().unsqueeze(1) * gradient.flat().square() / labels.shape[1]
        return DiagonalTerm(stack, total, self.strengths, alone=True)


def build(
    method: Method, stack: Stack, inputs: Tensor, labels: Tensor, window: slice, seed: int
) -> list[FisherOperator]:
    """The Fisher of every member, as the operator that its structure is."""
    _, fisher, options = KINDS[method.kind]
    model = Perceptron(stack.widths, window).to(inputs.dtype).eval()
    found = []
    for number, flat in enumerate(stack.flat()):
        own = number // stack.each
        if method.kind == "sf":
            options = {"seed": 1000 * seed + own}
        data = inputs[own], labels[own]
        # Times one: the operator itself, without the model and what else a Fisher remembers.
        found.append(1.0 * fisher(model.load(flat), data, structure=method.structure, **options))
    return found


def _diagonal(operators: list[FisherOperator], stack: Stack, weights: Tensor) -> Term:
    return DiagonalTerm(stack, torch.stack([operator.diagonal() for operator in operators]), weights)


def _kfac(operators: list[FisherOperator], stack: Stack, weights: Tensor) -> Term:
    activations, gradients = [], []
    for blocks in zip(*(_as(BlockDiagonalOperator, operator).blocks for operator in operators), strict=True):
        factors = [_as(KroneckerOperator, block) for block in blocks]
        activations.append(torch.stack([f.activation for f in factors]))
        gradients.append(torch.stack([f.gradient for f in factors]))
    activations[0] = activations[0][:: stack.each]  # of the inputs, which a seed's members share
    return KroneckerTerm(stack, activations, gradients, weights)


def _ekfac(operators: list[FisherOperator], stack: Stack, weights: Tensor) -> Term:
    layers = []
    for blocks in zip(*(_as(BlockDiagonalOperator, operator).blocks for operator in operators), strict=True):
        own = [_as(EigenKroneckerOperator, block) for block in blocks]
        parts = ([e.activation_basis for e in own], [e.gradient_basis for e in own], [e.eigenvalue_grid for e in own])
        layers.append(tuple(torch.stack(part).to(weights.dtype) for part in parts))
    return EigenKroneckerTerm(stack, layers, weights)


def _full(operators: list[FisherOperator], stack: Stack, weights: Tensor) -> Term:
    rows = [_as(Rows, _as(LowRankOperator, operator).row_source) for operator in operators]
    activations, gradients = [], []
    for slots in zip(*(one.slots for one in rows), strict=True):
        factored = [_as(FactoredRows, slot.rows) for slot in slots]
        activations.append(with_ones(torch.stack([_as(Tensor, f.activations)[:, 0] for f in factored])))
        gradients.append(torch.stack([by_example(f) for f in factored]))
    activations[0] = activations[0][:: stack.each]
    scale = _as(LowRankOperator, operators[0]).scale  # 1/N, the same for all
    if gradients[-1].shape[1] > MANY:
        return LinearizedTerm(
            stack, activations, gradients[-1], weights * scale
        )  # the last layer's are in output space
    return FactoredTerm(stack, activations, gradients, weights * scale)


def by_example(rows: FactoredRows) -> Tensor:
    """Output gradients ``[M, O, N]`` of rows ``[R, 1, O]`` that every example has equally many of."""
    each = rows.each
    return rows.gradients[:, 0].unflatten(0, (-1, each)).permute(1, 2, 0)


def _as(kind: type[T], found: object) -> T:
    """What was found, if it is of a kind."""
    if not isinstance(found, kind):
        raise TypeError(f"should be a {kind.__name__}, not a {type(found).__name__}")
    return found


_JOINED: dict[str, Callable[[list[FisherOperator], Stack, Tensor], Term]] = {
    "diagonal": _diagonal,
    "kfac": _kfac,
    "ekfac": _ekfac,
    "full": _full,
}
