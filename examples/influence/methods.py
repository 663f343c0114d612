"""Scores by every method, from one model. Knows no retraining.

A method is a function of a trained model, the training data and the queries that returns ``[Q, N]``, positive =
helpful.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fisherkit as fk
from examples.influence.settings import Pair

Method = Callable[[nn.Module, Pair, Pair], Tensor]


def gradients(model: nn.Module, data: Pair) -> Tensor:
    """∇ℓ of every example, ``[B, D]``."""

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=256)(parameters, *data)
    return torch.cat([g.flatten(1) for g in found.values()], 1)


def dot(model: nn.Module, train: Pair, queries: Pair) -> Tensor:
    """∇ℓ_qᵀ∇ℓ_n / N, no curvature at all."""
    return gradients(model, queries) @ gradients(model, train).mT / len(train[1])


def cosine(model: nn.Module, train: Pair, queries: Pair) -> Tensor:
    """The same of gradients of length 1."""
    q, n = (F.normalize(gradients(model, data), dim=1) for data in (queries, train))
    return q @ n.mT


def by_fisher(
    kind: type[fk.FisherApproximation],
    structure: str,
    options: dict[str, Any],
    damping: float,
    model: nn.Module,
    train: Pair,
    queries: Pair,
) -> Tensor:
    """∇ℓ_qᵀ(F + λI)⁻¹∇ℓ_n / N, λ in multiples of F's mean eigenvalue."""
    from fisherkit.influence import InfluenceScores

    fisher = kind(model, train, structure=structure, **options)
    return InfluenceScores(fisher, model, damping=fk.RelativeDamping(damping)).scores(queries, train)


FISHERS: dict[str, tuple[type[fk.FisherApproximation], str, dict[str, Any]]] = {
    "diagonal, exact": (fk.ExactFisher, "diagonal", {}),
    "KFAC, exact": (fk.ExactFisher, "kfac", {}),
    "EKFAC, exact": (fk.ExactFisher, "ekfac", {}),
    "full, EF": (fk.EmpiricalFisher, "full", {}),
    "full, iEF": (fk.ImprovedEmpiricalFisher, "full", {}),
    "full, SF 1": (fk.SampledFisher, "full", {"draws": 1}),
    "full, truncated 1": (fk.TruncatedFisher, "full", {"rank": 1}),
    "full, truncated 2": (fk.TruncatedFisher, "full", {"rank": 2}),
    "full, truncated 3": (fk.TruncatedFisher, "full", {"rank": 3}),
    "full, exact": (fk.ExactFisher, "full", {}),
}
"""Kind, structure and options by name."""


def methods(damping: float) -> dict[str, Method]:
    """All of them at one damping.

    Args:
        damping: λ over F's mean eigenvalue.
    """
    fishers = {name: partial(by_fisher, *choice, damping) for name, choice in FISHERS.items()}
    return {"dot product": dot, "cosine": cosine, **fishers}
