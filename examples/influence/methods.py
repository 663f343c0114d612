"""Scores by every method, from one model. Knows no retraining.

A method fits what it needs of a model and its training data once, and then scores at any damping: scores are
``[Q, N]``, positive = helpful, damping is λ in multiples of the fitted matrix's mean eigenvalue.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fisherkit as fk
from examples.influence.candidates import CANDIDATES
from examples.influence.peers import peers
from examples.influence.scorer import Method, Scorer, needed
from examples.influence.settings import Pair


def gradients(model: nn.Module, data: Pair) -> Tensor:
    """∇ℓ of every example with respect to what is trained, ``[B, D]``."""

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=256)(parameters, *data)
    return torch.cat([g.flatten(1) for g in found.values()], 1)


def dot(model: nn.Module, train: Pair) -> Scorer:
    """∇ℓ_qᵀ∇ℓ_n / N, no curvature at all."""
    own = gradients(model, train) / len(train[1])
    return lambda queries, damping: gradients(model, queries) @ own.mT


def cosine(model: nn.Module, train: Pair) -> Scorer:
    """The same of gradients of length 1."""
    own = F.normalize(gradients(model, train), dim=1)
    return lambda queries, damping: F.normalize(gradients(model, queries), dim=1) @ own.mT


def by_fisher(
    kind: type[fk.FisherApproximation], structure: str, options: dict[str, Any], model: nn.Module, train: Pair
) -> Scorer:
    """∇ℓ_qᵀ(F + λI)⁻¹∇ℓ_n / N."""
    fisher: fk.operators.FisherOperator = kind(model, train, structure=structure, **options)
    if structure == "full" and fisher.rows > fisher.size:  # type: ignore[attr-defined]
        # Once for all dampings.
        fisher = fk.operators.DenseOperator(fisher.space, fisher.to_dense())

    def scores(queries: Pair, damping: float | None) -> Tensor:
        relative = fk.RelativeDamping(needed(damping))
        influence = fk.influence.InfluenceScores(
            fisher, model, likelihood="categorical", examples=len(train[1]), damping=relative
        )
        return influence.scores(queries, train)

    return scores


FISHERS: dict[str, tuple[type[fk.FisherApproximation], str, dict[str, Any]]] = {
    "diagonal, exact": (fk.ExactFisher, "diagonal", {}),
    "KFAC, exact": (fk.ExactFisher, "kfac", {}),
    "EKFAC, exact": (fk.ExactFisher, "ekfac", {}),
    "EKFAC, truncated 1": (fk.TruncatedFisher, "ekfac", {"rank": 1}),
    "EKFAC, truncated 2": (fk.TruncatedFisher, "ekfac", {"rank": 2}),
    "block, truncated 2": (fk.TruncatedFisher, "block", {"rank": 2}),
    "full, EF": (fk.EmpiricalFisher, "full", {}),
    "full, iEF": (fk.ImprovedEmpiricalFisher, "full", {}),
    "full, SF 1": (fk.SampledFisher, "full", {"draws": 1}),
    "full, truncated 1": (fk.TruncatedFisher, "full", {"rank": 1}),
    "full, truncated 2": (fk.TruncatedFisher, "full", {"rank": 2}),
    "full, truncated 3": (fk.TruncatedFisher, "full", {"rank": 3}),
    "full, exact": (fk.ExactFisher, "full", {}),
}
"""Kind, structure and options by name: what the package offers."""

UNDAMPED = ("dot product", "cosine")
"""Methods without a damping."""


def methods() -> Mapping[str, Method]:
    """All of them, those of other libraries where they are installed."""
    fishers = {name: partial(by_fisher, *choice) for name, choice in FISHERS.items()}
    return {"dot product": dot, "cosine": cosine, **fishers, **CANDIDATES, **peers()}
