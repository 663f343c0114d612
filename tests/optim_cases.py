"""What the optimizers' tests share: losses by the textbook, per-example gradients by a loop, and one step's change.

Everything that the optimizers are compared with is made here or in `tests.reference`, of autograd and dense matrices.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fisherkit as fk
from tests.reference.fisher import Problem, block_indices, forward_one, layout
from tests.reference.fisher import rows as reference_rows
from tests.reference.kronecker import kronecker
from tests.reference.models import FAMILIES
from tests.reference.outputs import EF, EXACT, IEF, IGNORE_INDEX, Kind, gradient, loss, truncated_kind

KINDS: dict[str, Kind] = {"ef": EF, "ief": IEF, "exact": EXACT, "truncated": truncated_kind(2)}
OPTIONS: dict[str, dict[str, Any]] = {"truncated": {"rank": 2}, "sf": {"draws": 2, "seed": 3}}


def problem(family: str, seed: int = 0) -> Problem:
    """A family of the reference, float64, eval mode."""
    return FAMILIES[family].problem(seed=seed)


def call(of: Problem, take: slice = slice(None)) -> Tensor:
    """The outputs of some of the examples, with their graph."""
    if isinstance(of.inputs, Mapping):
        output: Any = of.model(**{name: value[take] for name, value in of.inputs.items()})
    else:
        output = of.model(of.inputs[take])
    return getattr(output, "logits", output)


def counted(of: Problem) -> list[int]:
    """Examples with a label that counts."""
    labels = of.likelihood == "categorical"
    return [n for n, y in enumerate(of.targets) if not labels or bool((y != IGNORE_INDEX).any())]


def batch_loss(of: Problem, take: slice = slice(None), reduction: str = "mean") -> Tensor:
    """The examples' losses, each summed over its positions, reduced over those that count."""
    total = torch.stack([loss(z, y, of.likelihood) for z, y in zip(call(of, take), of.targets[take], strict=True)])
    number = len([n for n in counted(of) if n in range(*take.indices(len(of.targets)))])
    return total.sum() / (number if reduction == "mean" else 1)


def jacobian(of: Problem) -> tuple[Tensor, Tensor]:
    """Per-example loss gradients J ``[N, D]`` and s_n = ‖∂ℓ_n/∂z_n‖² ``[N]``."""
    parameters = list(of.chosen().values())
    found, squares = [], []
    for n in counted(of):
        z = forward_one(of, n)
        own = torch.autograd.grad(
            loss(z, of.targets[n], of.likelihood), parameters, allow_unused=True, materialize_grads=True
        )
        found.append(torch.cat([g.reshape(-1) for g in own]))
        squares.append(gradient(z.detach(), of.targets[n], of.likelihood).square().sum())
    return torch.stack(found), torch.stack(squares)


def blockwise(of: Problem, dense: Tensor) -> Tensor:
    """Zero between modules."""
    kept = torch.zeros_like(dense)
    for index in block_indices(reference_rows(of, EF)).values():
        kept[index[:, None], index] = dense[index[:, None], index]
    return kept


def fisher(of: Problem, kind: str, structure: str, sharing: Any = "expand") -> Tensor:
    """F by brute force, the mean over examples, in a structure."""
    if kind == "sf":
        # Labels are drawn by the package; what it makes of them is checked against the reference elsewhere.
        dense = fk.SampledFisher(
            of.model, (of.inputs, of.targets), likelihood=of.likelihood, **OPTIONS["sf"]
        ).to_dense()
    elif structure in ("kfac", "ekfac"):
        return kronecker(of, KINDS[kind], structure, sharing)
    else:
        rows = reference_rows(of, KINDS[kind])
        dense = rows.matrix.T @ rows.matrix / rows.count
    if structure == "block":
        return blockwise(of, dense)
    return torch.diag(dense.diagonal()) if structure == "diagonal" else dense


def damped(matrix: Tensor, vector: Tensor, damping: float) -> Tensor:
    """(F + λI)⁻¹ v."""
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype), vector)


def flat(of: Problem) -> Tensor:
    """The chosen parameters."""
    return torch.cat([p.detach().reshape(-1) for p in of.chosen().values()])


def places(of: Problem) -> dict[str, slice]:
    """Where each parameter lies."""
    return layout(of)


def one_step(of: Problem, reduction: str = "mean", cuts: tuple[int, ...] = (), **options: Any) -> Tensor:
    """What `NaturalGradient` with lr = 1 subtracts from the parameters, whose values come back.

    Args:
        of: the problem.
        reduction: of the loss.
        cuts: sizes of the micro-batches; none for one batch.
        options: the optimizer's.
    """
    before = flat(of)
    kind = options.get("kind")
    options = (OPTIONS.get(kind, {}) if isinstance(kind, str) else {}) | options
    optimizer = fk.optim.NaturalGradient(
        of.model, lr=1.0, likelihood=of.likelihood, reduction=reduction, params=of.chosen(), **options
    )
    backward(of, reduction, cuts)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.close()
    change = before - flat(of)
    restore(of, before)
    return change


def backward(of: Problem, reduction: str = "mean", cuts: tuple[int, ...] = ()) -> None:
    """The gradient of the mean (or sum) over all examples that count, in one or several backward passes."""
    start, number = 0, len(counted(of))
    for size in cuts or (len(of.targets),):
        part = batch_loss(of, slice(start, start + size), "sum")
        (part / (number if reduction == "mean" else 1)).backward()
        start += size


def restore(of: Problem, values: Tensor) -> None:
    """Put values into the chosen parameters."""
    with torch.no_grad():
        for p, own in zip(of.chosen().values(), values.split([p.numel() for p in of.chosen().values()]), strict=True):
            p.copy_(own.reshape(p.shape))


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Train mode in here."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def close(actual: Tensor, expected: Tensor, relative: float = 1e-7) -> None:
    """Norm-wise."""
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= relative * expected.norm() + 1e-14, (
        actual - expected
    ).norm() / expected.norm()
