"""Influence scores by brute force: gradients one by one from the reference, a dense inverse, and the formula."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.conformance_cases import problem, reference_dense, reference_rows
from tests.kronecker_cases import expected_matrix
from tests.reference import fisher as reference
from tests.reference.fisher import Problem
from tests.reference.outputs import EF


def data(of: Problem, index: slice = slice(None)) -> Any:
    """Some of a problem's examples as the package takes them."""
    if isinstance(of.inputs, Tensor):
        return of.inputs[index], of.targets[index]
    return {**{name: value[index] for name, value in of.inputs.items()}, "labels": of.targets[index]}


@cache
def gradients(family: str) -> Tensor:
    """∇ℓ of each batch element, its tokens' summed, [B, D]."""
    rows = reference.rows(problem(family), EF)
    total = rows.matrix.new_zeros(len(problem(family).targets), rows.matrix.shape[1])
    return total.index_add_(0, rows.element[rows.example], rows.matrix)


def dense(family: str, kind: str, structure: str, fisher: Any) -> Tensor:
    """F by brute force."""
    if structure in ("kfac", "ekfac"):
        return expected_matrix(family, kind, structure, "expand", fisher)
    return reference_dense(family, kind, structure)


def damped_inverse(matrix: Tensor, scale: float = 1.0) -> Tensor:
    """(F + λI)⁻¹ with λ a multiple of the mean eigenvalue."""
    damping = scale * matrix.diagonal().mean()
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))


def count(family: str, kind: str) -> int:
    """N."""
    return reference_rows(family, kind).count
