"""∇L against autograd of the loss that everyone knows, on every model family and with every convention."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.evaluation import loss_gradient
from tests.reference import fisher as reference
from tests.reference.models import EVERY_FORM, FAMILIES
from tests.reference.outputs import EF
from tests.snapshot import untouched
from tests.tolerances import CONFORMANCE

F64 = torch.float64


@pytest.mark.parametrize("family", [*EVERY_FORM, "mapping_batch", "mapping_batch_logits", "frozen_bias"])
def test_loss_gradient__is_the_mean_of_the_references_rows(family: str) -> None:
    problem = FAMILIES[family].problem()
    rows = reference.rows(problem, EF)
    options = {"likelihood": problem.likelihood, "example": problem.example}
    data = (problem.inputs, problem.targets)
    if not isinstance(problem.inputs, Tensor):
        data = {**problem.inputs, "labels": problem.targets}  # type: ignore[assignment]
    with untouched(problem.model, data):
        mean = loss_gradient(problem.model, data, **options)
    torch.testing.assert_close(mean, rows.matrix.sum(0) / rows.count, rtol=1e-8, atol=1e-12)


class Tokens(nn.Module):
    """(B, T) token ids to (B, T, C) logits that depend on all earlier tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids).cumsum(1)))


def tokens() -> tuple[nn.Module, Tensor, Tensor]:
    """Labels with ignored ones: some in the first example, all in the second."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, ids, labels = Tokens().to(F64), torch.randint(7, (4, 5)), torch.randint(7, (4, 5))
    labels[0, :2] = labels[1] = -100
    return model, ids, labels


def autograd(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize(("example", "count"), [("sequence", 3), ("token", 13)])
@pytest.mark.parametrize("normalization", ["mean", "sum"])
def test_loss_gradient__skips_ignored_labels_and_counts_as_the_fisher(
    example: str, count: int, normalization: str
) -> None:
    model, ids, labels = tokens()
    loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="sum")
    got = loss_gradient(model, (ids, labels), example=example, normalization=normalization)
    fisher = fk.ExactFisher(model, (ids, labels), example=example, normalization=normalization)
    assert fisher.examples == count
    torch.testing.assert_close(got, autograd(loss, model) / (count if normalization == "mean" else 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_loss_gradient__does_not_depend_on_batches(dtype: torch.dtype) -> None:
    model, ids, labels = tokens()
    model = model.to(dtype)
    whole = loss_gradient(model, (ids, labels))
    assert whole.dtype == dtype
    pieces = loss_gradient(model, [(ids[:3], labels[:3]), (ids[3:], labels[3:])])
    assert (whole - pieces).norm() <= CONFORMANCE[dtype] * whole.norm()


def test_loss_gradient__is_over_the_chosen_parameters() -> None:
    model, ids, labels = tokens()
    whole = loss_gradient(model, (ids, labels))
    model.requires_grad_(False)
    torch.testing.assert_close(loss_gradient(model, (ids, labels), params=["head.weight", "head.bias"]), whole[28:])


def test_loss_gradient__shifts_labels_for_causal_models() -> None:
    model, ids, _ = tokens()
    causal = type("TinyForCausalLM", (Tokens,), {})()
    causal.load_state_dict(model.state_dict())
    loss = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / 4
    expected = autograd(loss, model)
    for found in (
        loss_gradient(causal.to(F64), {"ids": ids, "labels": ids}),
        loss_gradient(model, {"ids": ids, "labels": ids}, shift_labels=True),
    ):
        torch.testing.assert_close(found, expected)


def test_loss_gradient__is_that_of_bfloat16_models() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    data = torch.ones(4, 3, dtype=torch.bfloat16), torch.tensor([0, 1, 1, 1])
    got = loss_gradient(model, data)
    assert got.dtype == torch.bfloat16
    loss = F.cross_entropy(model(data[0]).float(), data[1])
    torch.testing.assert_close(got, autograd(loss, model), rtol=2e-2, atol=2e-2)


class NoGraph(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


X, Y = torch.ones(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("model", "data", "options", "error", "message"),
    [
        (nn.Linear(3, 2), (X, Y), {"example": "word"}, fk.InvalidArgumentError, "example='word'"),
        (nn.Linear(3, 2), (X, Y), {"normalization": "max"}, fk.InvalidArgumentError, "normalization='max'"),
        (nn.Linear(3, 2), (X, Y), {"likelihood": "weibull"}, fk.InvalidArgumentError, "'weibull'"),
        (nn.Linear(3, 2), (X, Y), {"params": ["w"]}, fk.UnknownParameterError, "'w'"),
        (torch.relu, (X, Y), {}, fk.InvalidTypeError, "expected a torch.nn.Module"),
        (nn.Linear(3, 2), (X, None), {}, fk.DataError, "got no targets"),
        (nn.Linear(3, 2), [], {}, fk.DataError, "no example with a label that counts"),
        (nn.Linear(3, 2), (X, Y * 0 - 100), {}, fk.DataError, "no example with a label that counts"),
        (nn.Linear(3, 2), (X, Y + 5), {}, fk.DataError, "got labels 5, 6; expected 0 to 1"),
        (nn.Linear(3, 2), (X / 0, Y), {}, fk.NonFiniteError, "NaN or infinite"),
        (nn.Sequential(nn.Linear(3, 2), nn.Dropout()), (X, Y), {}, fk.ModelError, "Dropout '1' in train mode"),
        (NoGraph(3, 2), (X, Y), {}, fk.ModelError, "outputs that do not depend on the parameters"),
    ],
)
def test_loss_gradient__refuses(model: Any, data: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        loss_gradient(model, data, **options)
