"""Comparisons and output-space cases that the tests of the reference share."""

import torch
from torch import Tensor

from tests.reference.outputs import IGNORE_INDEX, Likelihood


def output_case(likelihood: Likelihood, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Outputs and a target of one example; one position of several is ignored."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(*shape, dtype=torch.float64, generator=generator)
    if likelihood == "gaussian":
        return z, torch.randn(*shape, dtype=torch.float64, generator=generator)
    if likelihood == "bernoulli":
        return z, torch.randint(2, shape, generator=generator).double()
    y = torch.randint(shape[-1], shape[:-1], generator=generator)
    if y.ndim:
        y[1] = IGNORE_INDEX
    return z, y


def outer(found: Tensor) -> Tensor:
    """Σ v vᵀ."""
    flat = found.reshape(len(found), -1)
    return flat.T @ flat


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    """Compare in the Frobenius norm."""
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= relative * expected.norm() + 1e-14


def assert_below(lower: Tensor, upper: Tensor) -> None:
    """Compare in the Loewner order."""
    assert torch.linalg.eigvalsh(upper - lower)[0] >= -1e-10 * upper.trace()
