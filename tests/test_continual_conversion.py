"""Other libraries' strength: their penalties written out by brute force, against ours at the converted strength."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.continual import EWC, convert_strength
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.operators import DiagonalOperator
from tests.bad_input import Case, check, ids
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


EXACT: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], dict[str, Any]]] = {
    "paper": (paper, {}),
    "kuc2477": (paper, {"source": "kuc2477"}),
    "vandeven": (paper, {"source": "vandeven"}),
    "no half": (lambda model, d: 2 * paper(model, d), {"half": False}),
    "mammoth without its weights": (lambda model, d: 2 * paper(model, d), {"source": "mammoth"}),
    "sum": (sum_over_examples, {"half": False, "average": "sum", "examples": N}),
    "batches": (sum_over_examples_by_batches, {"average": "batches", "batch_size": B}),
}


def setting(normalize: str | None) -> tuple[nn.Module, EWC, fk.EmpiricalFisher]:
    model = mlp()
    fisher = fk.EmpiricalFisher(model, (X, Y), structure="diagonal")
    ewc = EWC(model, normalize=normalize)
    ewc.consolidate(fisher)
    return model, ewc, fisher


@pytest.mark.parametrize("normalize", ["trace", "norm", None])
@pytest.mark.parametrize("name", ids(EXACT))
def test_convert_strength__makes_the_penalties_equal(name: str, normalize: str | None) -> None:
    theirs, facts = EXACT[name]
    model, ewc, fisher = setting(normalize)
    before = flat(model)
    start = mlp()
    move(model, 1)
    ewc.strength = convert_strength(7.0, normalize=normalize, fisher=fisher, **facts)
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


@pytest.mark.parametrize("source", ["avalanche", "facil"])
def test_convert_strength__of_squared_batches_holds_on_average_at_a_minimum(source: str) -> None:
    """The mean over 500 cuts into batches, within 3 % once (N − B)/(N − 1) of cutting without replacement is put in."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (N,), generator=generator)
    model = at_a_minimum(labels)
    rows = example_gradients(model, labels)
    assert float(rows.mean(0).norm()) < 1e-6 * float(rows.norm())
    cuts = [rows[torch.randperm(N, generator=generator)].reshape(N // B, B, -1).mean(1) for _ in range(500)]
    mean_square = torch.stack([batches.square().mean(0) for batches in cuts]).mean(0)  # FACIL's B and N cancel to this
    d = torch.ones(rows.shape[1], dtype=F64)
    theirs = 3.0 * (0.5 if source == "facil" else 1.0) * float((mean_square * d.square()).sum())
    fisher = fk.EmpiricalFisher(model, (X, labels), structure="diagonal")
    strength = convert_strength(3.0, source, batch_size=B, normalize=None)
    ours = 0.5 * strength * float(fisher.quadratic_form(d))
    assert abs(theirs / ours / ((N - B) / (N - 1)) - 1) < 0.03


def test_convert_strength__of_squared_batches_is_too_small_where_the_mean_gradient_is_not_zero() -> None:
    """All examples alike: a batch's square is F and not F/B, so the true factor is B times the converted one."""
    model = mlp()
    row = example_gradients(model)[0]
    assert float((row.expand(B, -1).mean(0).square() - row.square()).abs().max()) < 1e-15
    assert convert_strength(1.0, squared="batch", average="batches", batch_size=B, normalize=None) == 1 / B


def test_convert_strength__of_batches_counts_each_way_of_averaging() -> None:
    facts: dict[str, Any] = {"squared": "batch", "batch_size": 10, "normalize": None}
    assert convert_strength(1.0, average="batches", **facts) == pytest.approx(0.1)
    assert convert_strength(1.0, average="examples", **facts) == pytest.approx(0.01)
    assert convert_strength(1.0, average="sum", examples=50, **facts) == pytest.approx(0.5)
    assert convert_strength(1.0, "avalanche", batch_size=10, normalize=None) == pytest.approx(0.2)
    assert convert_strength(1.0, "vandeven", squared="batch", average="batches", batch_size=10, normalize=None) == (
        pytest.approx(0.1)
    )


def test_convert_strength__takes_a_fisher_of_unknown_kind_and_the_exact_one_where_the_other_library_has_it() -> None:
    exact = fk.ExactFisher(mlp(), (X, Y), structure="diagonal")
    mean = float(exact.trace()) / exact.size
    assert convert_strength(1.0, "vandeven", fisher=exact) == pytest.approx(mean, rel=1e-12)
    with pytest.raises(InvalidArgumentError, match="kind 'exact'"):
        convert_strength(1.0, fisher=exact)
    unknown = DiagonalOperator(exact.space, exact.diagonal())
    assert convert_strength(1.0, fisher=unknown) == pytest.approx(mean, rel=1e-12)


def converting(*arguments: Any, **facts: Any) -> Callable[[], object]:
    return lambda: convert_strength(*arguments, **facts)


RAW: dict[str, Any] = {"normalize": None}
TABLE: dict[str, tuple[Callable[[], object], type[fk.FisherkitError], tuple[str, ...]]] = {
    "strength": (converting("1", **RAW), InvalidTypeError, ("strength of type str",)),
    "negative": (converting(-1.0, **RAW), InvalidArgumentError, ("strength=-1.0",)),
    "source": (converting(1.0, "sequoia", **RAW), InvalidArgumentError, ("'sequoia'", "'avalanche'", "half=")),
    "average": (converting(1.0, average="mean", **RAW), InvalidArgumentError, ("average='mean'", "'sum'")),
    "squared": (converting(1.0, squared="both", **RAW), InvalidArgumentError, ("squared='both'",)),
    "no batch size": (converting(1.0, "avalanche", **RAW), InvalidArgumentError, ("batch_size=None",)),
    "no examples": (converting(1.0, average="sum", **RAW), InvalidArgumentError, ("examples=None",)),
    "no fisher": (converting(1.0), InvalidArgumentError, ("without fisher=", "normalize=None")),
    "no operator": (converting(1.0, fisher=3), InvalidTypeError, ("a int",)),
    "a sum": (lambda: convert_strength(1.0, fisher=fk.EmpiricalFisher(mlp(), (X, Y), normalization="sum")),
        InvalidArgumentError, ('normalization="sum"',)),
    "a multiple": (lambda: convert_strength(1.0, fisher=fk.operators.normalize(fk.EmpiricalFisher(mlp(), (X, Y)))),
        InvalidArgumentError, ("a sum or multiple, ", "as it was built")),
    "another kind": (
        lambda: convert_strength(1.0, fisher=fk.ImprovedEmpiricalFisher(mlp(), (X, Y), structure="diagonal")),
        InvalidArgumentError, ("kind 'ief'", "'ef'", "fk.EmpiricalFisher")),
    "normalize": (converting(1.0, normalize="max"), InvalidArgumentError, ("normalize='max'",)),
}  # fmt: skip


@pytest.mark.parametrize("name", ids(TABLE))
def test_convert_strength__refuses_with_a_message(name: str) -> None:
    check(Case(*TABLE[name]))
