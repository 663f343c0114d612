"""What the theorems share: the package's Fisher of a reference family, and models whose outputs are given numbers.

A :func:`table` has the identity as its Jacobian, so that its Fisher is the output metric itself: what a kind does in
output space can be read off through the public interface.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fisherkit import (
    EmpiricalFisher,
    ExactFisher,
    FisherApproximation,
    ImprovedEmpiricalFisher,
    SampledFisher,
    TruncatedFisher,
)
from tests.reference.fisher import Problem, forward_one
from tests.reference.models import FAMILIES
from tests.reference.outputs import loss

KINDS: dict[str, tuple[type[FisherApproximation], dict[str, Any]]] = {
    "ef": (EmpiricalFisher, {}),
    "ief": (ImprovedEmpiricalFisher, {}),
    "sf": (SampledFisher, {"draws": 3}),
    "exact": (ExactFisher, {}),
    "truncated": (TruncatedFisher, {"rank": 2}),
}


def problem(family: str, seed: int = 0) -> Problem:
    """A family of the reference in float64."""
    return FAMILIES[family].problem(seed=seed)


def build(kind: type[FisherApproximation], of: Problem, **options: Any) -> FisherApproximation:
    """The package's Fisher of a problem of the reference."""
    conventions = {"likelihood": of.likelihood, "example": of.example, "params": of.params} | options
    return kind(of.model, (of.inputs, of.targets), **conventions)


def table(z: Tensor) -> tuple[nn.Module, Tensor]:
    """A model and inputs such that example n's outputs are exactly ``z[n]``, each its own parameter."""
    n, shape = z.shape[0], z.shape[1:]
    layer = nn.Linear(n, shape.numel(), bias=False).to(z.dtype)
    with torch.no_grad():
        layer.weight.copy_(z.reshape(n, -1).T)
    return nn.Sequential(layer, nn.Unflatten(1, shape)), torch.eye(n, dtype=z.dtype)


def metric(kind: type[FisherApproximation], z: Tensor, target: Tensor, likelihood: Any, **options: Any) -> Tensor:
    """Σ_m v_m v_mᵀ of every example, ``[n, P, P]`` with all its outputs joined, in ``z``'s dtype."""
    model, inputs = table(z)
    fisher = kind(model, (inputs, target), likelihood=likelihood, normalization="sum", **options)
    n, width = z.shape[0], z[0].numel()
    blocks = fisher.to_dense().reshape(width, n, width, n)
    return torch.stack([blocks[:, i, :, i] for i in range(n)])


def gradients(of: Problem) -> Tensor:
    """Per-sample loss gradients ``[N, D]``, by autograd of the loss itself, one example at a time."""
    found = []
    for n in range(len(of.targets)):
        value = loss(forward_one(of, n), of.targets[n], of.likelihood)
        grads = torch.autograd.grad(value, list(of.chosen().values()))
        found.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(found)


def error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖_F / ‖expected‖_F in float64."""
    assert got.shape == expected.shape
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def assert_below(lower: Tensor, upper: Tensor, tolerance: float = 1e-12) -> None:
    """lower ≼ upper in the Loewner order, to rounding."""
    smallest = torch.linalg.eigvalsh((upper - lower).double())[..., 0]
    scale = torch.linalg.eigvalsh(upper.double())[..., -1]
    assert bool((smallest >= -tolerance * scale).all()), float((smallest / scale).min())
