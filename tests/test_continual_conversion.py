"""Other libraries' strength: their penalties by brute force, against ours at the strength of docs/continual.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.continual import EWC
from tests.small_data import mlp
from tests.test_continual import flat, move, task

F64 = torch.float64
N, B = 24, 4
X, Y = task(3, number=N)


def example_gradients(model: nn.Module, labels: Tensor = Y) -> Tensor:
    """∂ℓ_n/∂θ, one backward pass each."""
    rows = []
    for x, y in zip(X, labels, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def paper(model: nn.Module, d: Tensor) -> Tensor:
    return 0.5 * (example_gradients(model).square().mean(0) * d.square()).sum()


def sum_over_examples(model: nn.Module, d: Tensor) -> Tensor:
    return (example_gradients(model).square().sum(0) * d.square()).sum()


def sum_over_examples_by_batches(model: nn.Module, d: Tensor) -> Tensor:
    return 0.5 * (example_gradients(model).square().sum(0) / (N // B) * d.square()).sum()


# 2 k α: twice the library's ½ or 1, and what its Fisher is of the mean over examples.
FACTORS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], float]] = {
    "paper": (paper, 1),
    "mammoth without its weights": (lambda model, d: 2 * paper(model, d), 2),
    "sum": (sum_over_examples, 2 * N),
    "batches": (sum_over_examples_by_batches, B),
}


@pytest.mark.parametrize("normalize", ["trace", None])
@pytest.mark.parametrize("name", FACTORS)
def test_strength__makes_the_penalties_equal(name: str, normalize: str | None) -> None:
    theirs, factor = FACTORS[name]
    model = mlp()
    fisher = fk.EmpiricalFisher(model, (X, Y), structure="diagonal")
    ewc = EWC(model, normalize=normalize)
    ewc.consolidate(fisher)
    before = flat(model)
    start = mlp()
    move(model, 1)
    ewc.strength = 7.0 * factor * (1.0 if normalize is None else float(fisher.trace()) / fisher.size)
    torch.testing.assert_close(ewc.penalty().detach(), 7.0 * theirs(start, flat(model) - before), rtol=1e-10, atol=0.0)


def at_a_minimum(labels: Tensor) -> nn.Module:
    """Softmax regression on labels that no model fits: the mean gradient is 0, single examples' are not."""
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), labels)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return model


@pytest.mark.parametrize("half", [1.0, 0.5], ids=["avalanche", "facil"])
def test_strength__of_squared_batches_holds_on_average_at_a_minimum(half: float) -> None:
    """The mean over 500 cuts into batches, within 3 % once (N − B)/(N − 1) of cutting without replacement is put in."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (N,), generator=generator)
    model = at_a_minimum(labels)
    rows = example_gradients(model, labels)
    assert float(rows.mean(0).norm()) < 1e-6 * float(rows.norm())
    cuts = [rows[torch.randperm(N, generator=generator)].reshape(N // B, B, -1).mean(1) for _ in range(500)]
    mean_square = torch.stack([batches.square().mean(0) for batches in cuts]).mean(0)  # FACIL's B and N cancel to this
    d = torch.ones(rows.shape[1], dtype=F64)
    theirs = 3.0 * half * float((mean_square * d.square()).sum())
    fisher = fk.EmpiricalFisher(model, (X, labels), structure="diagonal")
    strength = 2 * half / B * 3.0
    ours = 0.5 * strength * float(fisher.quadratic_form(d))
    assert abs(theirs / ours / ((N - B) / (N - 1)) - 1) < 0.03
