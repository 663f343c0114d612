"""Rows, Fishers and steps of models outside the zoo: one autograd call a row, each example alone, no package code."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Data = tuple[Any, Any] | list[tuple[Any, Any]]
"""A batch of inputs (a tensor, a tuple or a mapping of them) and targets, or several."""


def weights(model: nn.Module) -> Tensor:
    """All parameters, as a copy."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(value: Tensor, of: nn.Module | Iterable[Tensor], vector: Tensor | None = None) -> Tensor:
    """Jᵀ v in the parameters, or in those of a model that require grad; zeros where there is none."""
    own = [p for p in of.parameters() if p.requires_grad] if isinstance(of, nn.Module) else list(of)
    found = torch.autograd.grad(value, own, vector, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([g.to_dense().flatten() for g in found])


def alone(model: nn.Module, x: Any, n: int) -> Tensor:
    """Outputs of example n from a batch of one."""
    if isinstance(x, Mapping):
        return model(**{name: one[n : n + 1].clone() for name, one in x.items()})
    return model(*(one[n : n + 1].clone() for one in (x if isinstance(x, tuple) else (x,))))


def rows(
    model: nn.Module,
    data: Data,
    kind: str = "ef",
    of: Iterable[Tensor] | None = None,
    loss: Callable[..., Tensor] = F.cross_entropy,
) -> Tensor:
    """Jᵀ v of all examples, ``[R, D]``.

    v is the loss gradient for "ef", a column of a root of diag(p) − p pᵀ for "exact", of the identity for "gaussian".
    """
    own, found = list(model.parameters() if of is None else of), []
    own = [p for p in own if p.requires_grad]
    for x, y in [data] if isinstance(data, tuple) else data:
        first = x
        while not isinstance(first, Tensor):
            first = next(iter(first.values() if isinstance(first, Mapping) else first))
        for n in range(len(first)):
            z = alone(model, x, n)
            if kind == "ef":
                found.append(gradient(loss(z, y[n : n + 1], reduction="sum"), own))
            elif kind == "gaussian":
                found += [gradient(entry, own) for entry in z.flatten()]
            else:
                p = z[0].detach().softmax(-1)
                found += [gradient(z[0], own, v) for v in (p.sqrt().diag() - torch.outer(p, p.sqrt())).mT]
    return torch.stack(found)


def fisher(model: nn.Module, data: Data, kind: str = "ef", **options: Any) -> Tensor:
    """F = (1/N) Σ rows rowsᵀ with N the number of examples."""
    found = rows(model, data, kind, **options)
    vectors = {"ef": 1}.get(kind) or alone(model, (data if isinstance(data, tuple) else data[0])[0], 0).numel()
    return found.mT @ found / (len(found) / vectors)


def damped(matrix: Tensor, damping: float) -> Tensor:
    """F + λI."""
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


def natural(j: Tensor, damping: float) -> Tensor:
    """(JᵀJ/N + λI)⁻¹ of the mean row: what a step of the empirical kind goes against."""
    return torch.linalg.solve(damped(j.mT @ j / len(j), damping), j.mean(0))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Tensor) -> Tensor:
    """How far a step against the mean cross-entropy of a batch moves the parameters, backwards."""
    before = weights(model)
    optimizer.zero_grad()
    F.cross_entropy(model(*x) if isinstance(x, tuple) else model(x), y).backward()
    optimizer.step()
    return before - weights(model)
