"""Ways of merging without data that Fishers are compared with, in their shortest form, on states of float64 tensors.

Each is a few lines of its paper's formulas on task vectors τ_t = θ_t − θ_start; scales are the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]


def ties(models: Sequence[State], start: State, scale: float, keep: float = 0.2) -> State:
    """Trim, elect sign, merge: Yadav et al., "TIES-Merging" (arXiv 2306.01708).

    Args:
        models: fine-tuned states.
        start: where they began.
        scale: of the merged task vector.
        keep: share of each task vector's entries, the largest, that is kept.
    """
    vectors = torch.stack([_flat(model, start) - _flat(start, start) for model in models])
    least = (
        vectors.abs().kthvalue(vectors.shape[1] - max(1, round(keep * vectors.shape[1])) + 1, 1, keepdim=True).values
    )
    vectors = torch.where(vectors.abs() >= least, vectors, 0.0)
    agree = (vectors.sign() == vectors.sum(0).sign()) & (vectors != 0)
    mean = (vectors * agree).sum(0) / agree.sum(0).clamp(min=1)
    return _unflat(_flat(start, start) + scale * mean, start)


def dare(models: Sequence[State], start: State, scale: float, drop: float = 0.5, seed: int = 0) -> State:
    """Drop entries of task vectors at random, and rescale: Yu et al., "Language models are super Mario" (2311.03099).

    Args:
        models: fine-tuned states.
        start: where they began.
        scale: of the sum of what is left.
        drop: share that is dropped.
        seed: of the choice.
    """
    generator, total = torch.Generator().manual_seed(seed), _flat(start, start)
    for model in models:
        vector = _flat(model, start) - _flat(start, start)
        kept = torch.rand(vector.shape, generator=generator) >= drop
        total += scale * torch.where(kept, vector, 0.0) / (1 - drop)
    return _unflat(total, start)


def iso_c(models: Sequence[State], start: State, scale: float) -> State:
    """Summed task matrices with all singular values at their mean: Marczak et al., "No Task Left Behind" (2502.04959).

    What is no matrix takes the average task vector.

    Args:
        models: fine-tuned states.
        start: where they began.
        scale: of a matrix's change.
    """
    merged = {}
    for name, origin in start.items():
        total = sum((model[name] - origin for model in models), torch.zeros_like(origin))
        if origin.ndim == 2:
            u, s, vh = torch.linalg.svd(total, full_matrices=False)
            merged[name] = origin + scale * s.mean() * (u @ vh)
        else:
            merged[name] = origin + total / len(models)
    return merged


def wudi(models: Sequence[State], start: State, steps: int = 300) -> State:
    """Task vectors that interfere less: Cheng et al., "Whoever started the interference…" (arXiv 2503.08099).

    Adam on Σ_t ‖(τ − τ_t) τ_tᵀ‖² / ‖τ_t‖² of each matrix, from τ = Σ_t τ_t; run to its end it would be RegMean with
    τ_tᵀτ_t / ‖τ_t‖² in place of the inputs' second moments. What is no matrix is averaged.

    Args:
        models: fine-tuned states.
        start: where they began.
        steps: of Adam, each of a hundredth of the task vectors' mean size.
    """
    merged = {}
    for name, origin in start.items():
        vectors = torch.stack([model[name] - origin for model in models])
        total = vectors.sum(0)
        if origin.ndim == 2 and bool(vectors.any()):
            grams = vectors.mT @ vectors / vectors.square().sum((1, 2), keepdim=True).clamp(min=1e-30)
            optimizer = torch.optim.Adam([total], lr=float(vectors.abs().mean()) / 100)
            for _ in range(steps):
                total.grad = 2 * ((total - vectors) @ grams).sum(0)
                optimizer.step()
            merged[name] = origin + total
        else:
            merged[name] = origin + total / len(models)
    return merged


def _flat(state: State, like: State) -> Tensor:
    return torch.cat([state[name].reshape(-1) for name in like])


def _unflat(vector: Tensor, like: State) -> State:
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {name: part.reshape(t.shape) for part, (name, t) in zip(parts, like.items(), strict=True)}
