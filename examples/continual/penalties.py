"""The gradient of ½ Σ_t w_t (θ−θ_t)ᵀ F_t (θ−θ_t) for a whole stack of models, one structure of F a class.

A term is one task's: its operator for every member, each times a weight of its own (the strength, and the factor that
normalises a trace). Terms are never folded: a sum of Kronecker products stays a sum. Knows no kind of Fisher.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from examples.continual.stacked import Stack, add_matmul, matmul


class Term(ABC):
    """F_t of every member and the parameters θ_t that it is centred on.

    Args:
        center: θ_t; copied.
        alone: it stands for all tasks so far, in place of the terms before it.
    """

    def __init__(self, center: Stack, alone: bool = False) -> None:
        self.alone = alone
        self.center = center.like(center.storage.clone())

    @abstractmethod
    def add_product(self, difference: Stack, out: Stack) -> None:
        """Add w F δ to out."""


class DiagonalTerm(Term):
    """A diagonal.

    Args:
        center: θ_t.
        diagonals: ``[S, D]`` in the modules' order.
        weights: w ``[S]``.
        alone: as in `Term`.
    """

    def __init__(self, center: Stack, diagonals: Tensor, weights: Tensor, alone: bool = False) -> None:
        super().__init__(center, alone)
        self.diagonal = center.like().put(diagonals * weights.unsqueeze(1)).storage

    def add_product(self, difference: Stack, out: Stack) -> None:
        """Elementwise."""
        out.storage.addcmul_(self.diagonal, difference.storage)


class KroneckerTerm(Term):
    """A Kronecker product G ⊗ A for each layer.

    Args:
        center: θ_t.
        activations: A of each layer, ``[S, I + 1, I + 1]``, or ``[E, I + 1, I + 1]`` where a seed's members share it.
        gradients: G of each layer, ``[S, O, O]``.
        weights: w ``[S]``.
    """

    def __init__(
        self, center: Stack, activations: Sequence[Tensor], gradients: Sequence[Tensor], weights: Tensor
    ) -> None:
        super().__init__(center)
        self.activations = list(activations)
        self.gradients = [g * weights[:, None, None] for g in gradients]

    def add_product(self, difference: Stack, out: Stack) -> None:
        """G Δ A."""
        for a, g, delta, total in zip(self.activations, self.gradients, difference.layers, out.layers, strict=True):
            add_matmul(total, torch.bmm(g, delta), a)


class EigenKroneckerTerm(Term):
    """A Kronecker product's eigenbasis with eigenvalues of its own for each layer.

    Args:
        center: θ_t.
        layers: of each layer U_A ``[S, I + 1, I + 1]``, U_G ``[S, O, O]`` and the eigenvalues ``[S, O, I + 1]``.
        weights: w ``[S]``.
    """

    def __init__(self, center: Stack, layers: Sequence[tuple[Tensor, ...]], weights: Tensor) -> None:
        super().__init__(center)
        self.layers = [(u_a, u_g, values * weights[:, None, None]) for u_a, u_g, values in layers]

    def add_product(self, difference: Stack, out: Stack) -> None:
        """U_G (Λ ∘ U_Gᵀ Δ U_A) U_Aᵀ."""
        for (u_a, u_g, values), delta, total in zip(self.layers, difference.layers, out.layers, strict=True):
            total += u_g @ (values * (u_g.mT @ delta @ u_a)) @ u_a.mT


class FactoredTerm(Term):
    """JᵀJ with rows kept as factors: row m of example n has the gradient g_nm a_nᵀ in a layer.

    Args:
        center: θ_t.
        activations: of each layer, ``[S, N, I + 1]``, or ``[E, N, I + 1]`` where a seed's members share them.
        gradients: of each layer, ``[S, M, O, N]``; rows that an example lacks are zero.
        weights: w ``[S]``, 1/N included.
    """

    def __init__(
        self, center: Stack, activations: Sequence[Tensor], gradients: Sequence[Tensor], weights: Tensor
    ) -> None:
        super().__init__(center)
        self.activations = list(activations)
        self.columns = [a.mT.contiguous() for a in activations]
        self.gradients, self.weights = list(gradients), weights[:, None, None, None]

    def add_product(self, difference: Stack, out: Stack) -> None:
        """Jᵀ (J δ)."""
        rows: Tensor | float = 0.0
        for columns, g, delta in zip(self.columns, self.gradients, difference.layers, strict=True):
            rows = rows + (g * matmul(delta, columns).unsqueeze(1)).sum(2)
        weighed = torch.as_tensor(rows).unsqueeze(2) * self.weights
        for a, g, total in zip(self.activations, self.gradients, out.layers, strict=True):
            add_matmul(total, (g * weighed).sum(1), a)


class LinearizedTerm(Term):
    """JᵀVVᵀJ with the outputs' Jacobian J as a pass through the network linearised at θ_t: for many rows an example.

    Args:
        center: θ_t.
        activations: as in `FactoredTerm`.
        vectors: V, in output space, ``[S, M, C, N]``.
        weights: w ``[S]``, 1/N included.
    """

    def __init__(self, center: Stack, activations: Sequence[Tensor], vectors: Tensor, weights: Tensor) -> None:
        super().__init__(center)
        self.activations = list(activations)
        self.columns = [a.mT.contiguous() for a in activations]
        self.vectors, self.weights = vectors, weights[:, None, None]

    def add_product(self, difference: Stack, out: Stack) -> None:
        """Forward and back; a unit that is off at θ_t passes nothing."""
        passed = matmul(difference.layers[0], self.columns[0])
        for w, delta, columns in zip(self.center.layers[1:], difference.layers[1:], self.columns[1:], strict=True):
            passed = torch.ops.aten.threshold_backward(passed, columns[:, :-1], 0.0)
            passed = torch.baddbmm(matmul(delta, columns), w[:, :, :-1], passed)
        rows = (self.vectors * passed.unsqueeze(1)).sum(2, keepdim=True)
        back = (self.vectors * rows).sum(1) * self.weights
        for number in range(len(self.columns) - 1, -1, -1):
            add_matmul(out.layers[number], back, self.activations[number])
            if number:
                back = torch.bmm(self.center.layers[number][:, :, :-1].mT, back)
                back = torch.ops.aten.threshold_backward(back, self.columns[number][:, :-1], 0.0)


class DenseTerm(Term):
    """JᵀJ with rows written out.

    Args:
        center: θ_t.
        rows: a stack for each row, R of them.
        weights: w ``[S]``, the rows' common factor included.
    """

    def __init__(self, center: Stack, rows: Sequence[Stack], weights: Tensor) -> None:
        super().__init__(center)
        layers = zip(*(row.layers for row in rows), strict=True)
        self.rows = [torch.stack(own, 1).flatten(2) for own in layers]
        self.weights = weights[:, None, None]

    def add_product(self, difference: Stack, out: Stack) -> None:
        """Jᵀ (J δ)."""
        found: Tensor | float = 0.0
        for own, delta in zip(self.rows, difference.layers, strict=True):
            found = found + torch.bmm(own, delta.reshape(len(own), -1, 1))
        weighed = (torch.as_tensor(found) * self.weights).mT
        for own, total in zip(self.rows, out.layers, strict=True):
            total.view(len(own), 1, -1).baddbmm_(weighed, own)


class Penalty:
    """A sum of terms."""

    def __init__(self) -> None:
        self.terms: list[Term] = []

    def append(self, term: Term) -> None:
        """Take a term."""
        self.terms = [term] if term.alone else [*self.terms, term]

    def add_gradient(self, at: Stack, out: Stack) -> None:
        """Add the gradient at some parameters to out."""
        for term in self.terms:
            term.add_product(at.like(at.storage - term.center.storage), out)
