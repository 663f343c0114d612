"""The paper's updates and γ, example by example and class by class, by formulas written out on dense matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gradient_of(model: nn.Module, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([g.reshape(-1) for g in found])


def per_example(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the losses ``[N, D]``, of every output ``[N, C, D]``, and probabilities ``[N, C]``."""
    losses, outputs, probabilities = [], [], []
    for n in range(len(x)):
        z = model(x[n : n + 1])[0]
        losses.append(gradient_of(model, F.cross_entropy(z, y[n])))
        outputs.append(torch.stack([gradient_of(model, z[c]) for c in range(len(z))]))
        probabilities.append(torch.softmax(z, 0).detach())
    return torch.stack(losses), torch.stack(outputs), torch.stack(probabilities)


def exact_fisher(outputs: Tensor, probabilities: Tensor) -> Tensor:
    """Σ_n Σ_c p ∇log p ∇log pᵀ."""
    size = outputs.shape[2]
    total = torch.zeros(size, size, dtype=outputs.dtype)
    for jacobian, p in zip(outputs, probabilities, strict=True):
        for c in range(len(p)):
            score = jacobian[c] - p @ jacobian
            total += p[c] * torch.outer(score, score)
    return total


def truncated_fisher(outputs: Tensor, probabilities: Tensor, y: Tensor, rank: int) -> Tensor:
    """Gradient first, then pivoted Cholesky of what is left of each example's output Hessian."""
    size = outputs.shape[2]
    total = torch.zeros(size, size, dtype=outputs.dtype)
    for jacobian, p, label in zip(outputs, probabilities, y, strict=True):
        u = p - F.one_hot(label, len(p))
        left = torch.diag(p) - torch.outer(p, p)
        v = u / (u @ torch.linalg.pinv(left) @ u).sqrt()
        for _ in range(rank):
            row = jacobian.T @ v
            total += torch.outer(row, row)
            left = left - torch.outer(v, v)
            pivot = int(left.diagonal().argmax())
            v = left[:, pivot] / left[pivot, pivot].clamp_min(1e-300).sqrt()
    return total


def empirical_update(rows: Tensor, right: Tensor, damping: float) -> Tensor:
    """Jᵀ(JJᵀ + λI)⁻¹ r, eq. 5 with r = 1 and eq. 8 with r = s."""
    return rows.T @ torch.linalg.solve(rows @ rows.T + damping * torch.eye(len(rows), dtype=rows.dtype), right)


def damped_solve(matrix: Tensor, gradient: Tensor, damping: float) -> Tensor:
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), gradient)


def quality(update: Tensor, fisher: Tensor, gradient: Tensor) -> float:
    """Eq. 15."""
    return float((update @ fisher @ update).sqrt() / (update @ gradient).abs())
