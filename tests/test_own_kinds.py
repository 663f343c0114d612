"""Kinds of a user's own: what their rule may answer, and where it does not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.outputs import Columns

F64 = torch.float64
N, T, C = 5, 4, 3


def data() -> tuple[nn.Module, Tensor, Tensor]:
    """A model of positions, with positions and one whole example that are ignored."""
    torch.manual_seed(0)
    y = torch.randint(C, (N, T))
    y[0, 1:], y[2], y[3, 0] = -100, -100, -100
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, C)).double(), torch.randn(N, T, 3, dtype=F64), y


class Answer(fk.OutputRule):
    """Whatever a function makes of the outputs."""

    def __init__(self, function: Callable[[fk.Outputs], Any]) -> None:
        self.function = function

    def output_vectors(self, outputs: fk.Outputs) -> fk.OutputVectors:
        found: fk.OutputVectors = self.function(outputs)
        return found


def both(outputs: fk.Outputs) -> Tensor:
    """Two vectors of all positions, whether they count or not."""
    return torch.stack([outputs.z.softmax(-1), outputs.z.tanh()], 1)


def columns(outputs: fk.Outputs) -> Columns:
    v = both(outputs)
    return Columns(2, lambda unit, vector: v[unit, vector])


def ignored_as_nan(outputs: fk.Outputs) -> Tensor:
    return torch.where(outputs.mask[:, None, :, None], both(outputs), torch.nan)


def reference() -> Tensor:
    """(1/N) Σ Jᵀv (Jᵀv)ᵀ by one autograd call a vector, over the positions that count."""
    model, x, y = data()
    rows, counted = [], 0
    for n in range(N):
        keep = y[n] != -100
        counted += bool(keep.any())
        for make in (lambda z: z.softmax(-1), torch.tanh):
            z = model(x[n])
            grads = torch.autograd.grad((z * make(z.detach()))[keep].sum(), list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
    J = torch.stack(rows)
    return J.T @ J / counted


@pytest.mark.parametrize("memory_budget", [None, 1], ids=["kept", "streamed"])
@pytest.mark.parametrize("answer", [both, columns, ignored_as_nan])
def test_vectors__do_not_count_where_the_labels_do_not(answer: Any, memory_budget: int | None) -> None:
    model, x, y = data()
    rule = Answer(lambda outputs: fk.OutputVectors(answer(outputs)))
    fisher = fk.FisherApproximation(model, (x, y), rule, memory_budget=memory_budget)
    eye = torch.eye(fisher.size, dtype=F64)
    torch.testing.assert_close(fisher @ eye, reference(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", ["diagonal", "block", "kfac", "ekfac", "nkp"])
def test_structure__is_that_of_vectors_that_are_zero_where_nothing_counts(structure: str) -> None:
    model, x, y = data()
    found, right = (
        fk.FisherApproximation(model, (x, y), Answer(answer), structure=structure).to_dense()
        for answer in (
            lambda o: fk.OutputVectors(both(o)),
            lambda o: fk.OutputVectors(both(o) * o.mask[:, None, :, None]),
        )
    )
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


WRONG: dict[str, tuple[Callable[[fk.Outputs], Any], type[Exception], tuple[str, ...]]] = {
    "a tensor": (lambda o: o.gradient(), TypeError, ("got a Tensor", "fk.OutputVectors")),
    "nothing": (lambda o: None, TypeError, ("got a NoneType", "fk.OutputVectors")),
    "another type": (lambda o: fk.OutputVectors([1.0]), TypeError, ("a list as v", "a tensor")),  # type: ignore[arg-type]
    "no axis of vectors": (
        lambda o: fk.OutputVectors(o.gradient()),
        ValueError,
        ("[2, 4, 3]", "[n, M, P, C] = [2, M, 4, 3]", "unsqueeze(1)"),
    ),
    "other outputs": (lambda o: fk.OutputVectors(both(o)[..., :2]), ValueError, ("[2, 2, 4, 2]", "[2, M, 4, 3]")),
    "vectors first": (lambda o: fk.OutputVectors(both(o)[:1].mT), ValueError, ("[1, 2, 3, 4]", "[2, M, 4, 3]")),
    "no vector": (lambda o: fk.OutputVectors(both(o)[:, :0]), ValueError, ("no vector", "M from 1 on")),
    "integers": (lambda o: fk.OutputVectors(both(o).long()), ValueError, ("torch.int64", "torch.float64")),
    "another dtype": (
        lambda o: fk.OutputVectors(both(o).float()), ValueError, ("torch.float32", "v.to(torch.float64)"),
    ),
    "weights as keep": (
        lambda o: fk.OutputVectors(both(o), torch.ones(2, 2)), ValueError, ("keep of torch.float32", "[n, M] = [2, 2]"),
    ),
    "keep of another shape": (
        lambda o: fk.OutputVectors(both(o), torch.ones(2, 1, dtype=torch.bool)),
        ValueError,
        ("keep of", "[2, 1]", "[2, 2]"),
    ),
    "dropped of another shape": (
        lambda o: fk.OutputVectors(both(o), None, torch.ones(2, 2)), ValueError, ("dropped of", "[2, 2]", "[n] = [2]"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("structure", ["full", "diagonal"])
@pytest.mark.parametrize("name", WRONG)
def test_vectors__of_another_form_are_refused_in_words(name: str, structure: str) -> None:
    model, x, y = data()
    function, builtin, words = WRONG[name]
    with pytest.raises(fk.FisherkitError) as caught:
        fk.FisherApproximation(model, (x, y), Answer(function), structure=structure)
    assert isinstance(caught.value, builtin)
    for word in ("Answer.output_vectors: got", *words):
        assert word in str(caught.value)


def test_vectors__are_checked_in_an_optimizer_and_under_row_damping() -> None:
    model, x, y = data()
    for rule in (Answer(both), fk.optim.RowDamped(Answer(both), 0.1)):
        optimizer = fk.optim.NaturalGradient(model, lr=0.1, kind=rule, damping=0.1)
        with pytest.raises(fk.InvalidTypeError, match=r"Answer\.output_vectors: got a Tensor"):
            nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.close()
