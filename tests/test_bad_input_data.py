"""Bad data and bad labels: each refused with advice, the batch named."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherkit as fk
from tests.bad_input import Case, X, Y, check, ef, ids, mlp, normal

TYPE = fk.InvalidTypeError

A_PAIR = 'a pair (inputs, targets) or a mapping with "labels"'


class Sum(nn.Module):
    """Of a layer's outputs and a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x) + y


class NoBatches:
    """Re-iterable, and empty."""

    def __iter__(self) -> Any:
        return iter([])


DATA: dict[str, Case] = {
    "generator": Case(lambda: ef(data=((X, Y) for _ in range(2))), fk.DataError,
        ("data: got a generator, which can be read only once", "iterated again and again",
            "Try: list(data), or a DataLoader")),
    "iterator": Case(lambda: ef(data=iter([(X, Y)])), fk.DataError, ("got a list_iterator", "Try: list(data)")),
    "zip": Case(lambda: ef(data=zip([X], [Y], strict=True)), fk.DataError, ("got a zip", "Try: list(data)")),
    "map": Case(lambda: ef(data=map(tuple, [(X, Y)])), fk.DataError, ("got a map", "Try: list(data)")),
    "None": Case(lambda: ef(data=None), TYPE, ("data: got a NoneType", "one batch (inputs, targets), or a list")),
    "number": Case(lambda: ef(data=7), TYPE, ("data: got a int", "or a list or DataLoader of batches")),
    "dataset": Case(lambda: ef(data=TensorDataset(X, Y)), TYPE, ("data: got a TensorDataset", "DataLoader of batches")),
    "another dtype": Case(lambda: ef(mlp().double(), data=(X.float(), Y)), fk.DataError,
        ("data, batch 0: got inputs of torch.float32; expected torch.float64, the parameters' dtype", "same dtype",
            "Try: x.to(torch.float64)")),
    "inputs alone": Case(lambda: ef(data=X), TYPE,
        ("data, batch 0: got a batch of type Tensor", A_PAIR, "Try: [(x, y)]")),
    "triple": Case(lambda: ef(data=[(X, Y, Y)]), TYPE, ("data, batch 0: got a batch of type tuple", A_PAIR)),
    "text": Case(lambda: ef(data="train.csv"), TYPE, ("got a batch of type str", A_PAIR)),
    "empty list": Case(lambda: ef(data=[]), fk.DataError, ("data: got no batch", "expected at least one example")),
    "empty iterable": Case(lambda: ef(data=NoBatches()), fk.DataError, ("data: got no batch", "at least one example")),
    "loader of an empty dataset": Case(lambda: ef(data=DataLoader(TensorDataset(X[:0], Y[:0]), 2)), fk.DataError,
        ("got no batch", "at least one")),
    "batch without examples": Case(lambda: ef(data=(X[:0], Y[:0])), fk.DataError,
        ("data, batch 0: got a batch with no example", "at least one")),
    "later batch without examples": Case(lambda: ef(data=[(X, Y), (X[:0], Y[:0])]), fk.DataError,
        ("data, batch 1: got a batch with no example",)),
    "mapping without labels": Case(lambda: ef(data={"input": X, "target": Y}), fk.DataError,
        ("a mapping with keys ['input', 'target']", 'one with "labels"',
            "Try: a pair (inputs, targets), or rename the key")),
    "mapping class without labels": Case(lambda: ef(data=[UserDict(input=X)]), fk.DataError,
        ("a mapping with keys ['input']", 'one with "labels"')),
    "inputs of several lengths": Case(lambda: ef(Sum(), data=((torch.ones(6, 4).double(), torch.ones(5, 3)), Y[:6])),
        fk.DataError, ("data, batch 0: got inputs of 5, 6 rows, with which the model fails",
            "a row for each of the 6 examples, or an input that all of them share")),
    "inputs without a tensor": Case(lambda: ef(data=[(X.tolist(), Y)]), fk.DataError,
        ("data, batch 0: got inputs without a tensor", "axis 0")),
    "scalar input": Case(lambda: ef(data=(torch.tensor(1.0), Y)), fk.DataError,
        ("got inputs without a tensor", "examples along axis 0")),
    "targets as texts": Case(lambda: ef(data=[(X, ["a"] * 6)]), TYPE,
        ("got targets of type list", "an array or lists of numbers", "Try: torch.as_tensor(targets)")),
    "fewer targets than inputs": Case(lambda: ef(data=(X, Y[:4])), fk.DataError,
        ("data, batch 0: got inputs with 6 examples and targets of shape [4]", "expected 6 targets", "along axis 0")),
    "scalar target": Case(lambda: ef(data=(X, Y[0])), fk.DataError,
        ("6 examples and targets of shape []", "expected 6 targets")),
    "unlabelled for EF": Case(lambda: ef(data=(X, None)), fk.DataError,
        ("data, batch 0: got no targets", "This kind uses the observed labels",
            "Try: fk.ExactFisher or fk.SampledFisher")),
    "unlabelled for iEF": Case(lambda: fk.ImprovedEmpiricalFisher(mlp().eval(), (X, None)), fk.DataError,
        ("got no targets", "fk.ExactFisher")),
    "unlabelled for the truncated kind": Case(lambda: fk.TruncatedFisher(mlp().eval(), [(X, None)]), fk.DataError,
        ("got no targets", "fk.ExactFisher")),
    "words as labels": Case(lambda: ef(data=(X, ["a"] * 6)), TYPE,
        ("data, batch 0: got targets of type list", "lists of numbers")),
    "two tensors as targets": Case(lambda: ef(data=(X, (Y, Y))), TYPE,
        ("data, batch 0: got targets of type tuple", "a tensor")),
    "unlabelled mapping": Case(lambda: ef(data={"input": X, "labels": None}), fk.DataError,
        ("got no targets", "Try: fk.ExactFisher")),
    "unlabelled later": Case(lambda: ef(data=[(X, Y), (X, None)]), fk.DataError,
        ("data, batch 1: got no targets", "fk.ExactFisher")),
}  # fmt: skip

RANGE = "0 to 2, or ignore_index = -100"
INTEGERS = ("expected integers", "class indices", "Try: labels.long(), or probs.argmax(-1)")


def tokens(labels: torch.Tensor) -> object:
    """Outputs (3, 2, 3)."""
    return ef(data=(normal(3, 2, 4), labels))


def gaussian(targets: torch.Tensor) -> object:
    return ef(data=(X, targets), likelihood="gaussian")


def bernoulli(targets: torch.Tensor) -> object:
    return ef(data=(X, targets), likelihood="bernoulli")


def with_entry(value: float) -> torch.Tensor:
    targets = normal(6, 3).sigmoid()
    targets[1, 2] = value
    return targets


IGNORED = torch.full_like(Y, -100)

LABELS: dict[str, Case] = {
    "label too large": Case(lambda: ef(data=(X, Y + 1)), fk.DataError,
        ("data, batch 0: got label 3;", RANGE, "The outputs (B, 3) have 3 classes on axis -1",
            "fk.likelihoods.Categorical(ignore_index=")),
    "negative label": Case(lambda: ef(data=(X, Y - 1)), fk.DataError, ("got label -1;", RANGE)),
    "bad label in a later batch": Case(lambda: ef(data=[(X, Y), (X, Y + 5)]), fk.DataError,
        ("data, batch 1: got labels 5, 6, 7;", RANGE)),
    "bad label after the first two examples": Case(lambda: ef(data=(X, torch.tensor([0, 1, 2, 0, 9, 1]))), fk.DataError,
        ("data, batch 0: got label 9;", RANGE)),
    "bad label among the first two examples of a later batch": Case(
        lambda: ef(data=[(X[:1], Y[:1]), (X[1:2], Y[1:2]), (X, Y + 1)]), fk.DataError,
        ("data, batch 2: got label 3;", RANGE)),
    "float labels": Case(lambda: ef(data=(X, Y.double())), fk.DataError, ("got labels of torch.float64", *INTEGERS)),
    "bool labels": Case(lambda: ef(data=(X, Y > 0)), fk.DataError, ("got labels of torch.bool", *INTEGERS)),
    "probabilities as labels": Case(lambda: ef(data=(X, normal(6, 3).softmax(1))), fk.DataError,
        ("got labels of torch.float64", *INTEGERS)),
    "one-hot labels": Case(lambda: ef(data=(X, nn.functional.one_hot(Y))), fk.DataError,
        ("labels of shape (B, 3) for outputs (B, 3); expected (B)", "The last axis of the outputs holds the classes")),
    "labels as a column": Case(lambda: ef(data=(X, Y.unsqueeze(1))), fk.DataError,
        ("labels of shape (B, 1) for outputs (B, 3); expected (B)", "Try: labels.squeeze(-1)")),
    "one label for several positions": Case(lambda: tokens(Y[:3]), fk.DataError,
        ("labels of shape (B) for outputs (B, 2, 3); expected (B, 2)", "Try:")),
    "one position too many": Case(lambda: tokens(torch.zeros(3, 3, dtype=torch.long)), fk.DataError,
        ("labels of shape (B, 3) for outputs (B, 2, 3); expected (B, 2)", "Try:")),
    "all labels ignored": Case(lambda: ef(data=(X, IGNORED)), fk.DataError,
        ("data: got no example with a label that counts", "All labels are ignore_index", "Try: check the labels")),
    "all labels ignored, ekfac": Case(lambda: ef(data=[(X, IGNORED)], structure="ekfac"), fk.DataError,
        ("no example with a label that counts",)),
    "all labels ignored, streamed": Case(lambda: ef(data=(X, IGNORED), memory_budget=1), fk.DataError,
        ("no example with a label that counts",)),
    "NaN target": Case(lambda: gaussian(with_entry(float("nan"))), fk.DataError,
        ("targets with NaN or infinite entries", "finite numbers")),
    "infinite target": Case(lambda: gaussian(with_entry(float("inf"))), fk.DataError,
        ("targets with NaN or infinite entries", "finite numbers")),
    "gaussian targets of another shape": Case(lambda: gaussian(normal(6, 2)), fk.DataError,
        ("targets of shape (B, 2) for outputs (B, 3)", "targets of the outputs' shape", "The likelihood is gaussian")),
    "class indices for gaussian": Case(lambda: gaussian(Y), fk.DataError,
        ("targets of shape (B) for outputs (B, 3)", "The likelihood is gaussian")),
    "bernoulli target above 1": Case(lambda: bernoulli(with_entry(2.0)), fk.DataError,
        ("got target 2;", "between 0 and 1", "bernoulli")),
    "bernoulli target below 0": Case(lambda: bernoulli(with_entry(-1.0)), fk.DataError,
        ("got target -1;", "between 0 and 1")),
    "bernoulli target NaN": Case(lambda: bernoulli(with_entry(float("nan"))), fk.DataError,
        ("targets with NaN or infinite entries",)),
    "class indices for bernoulli": Case(lambda: bernoulli(Y), fk.DataError,
        ("targets of shape (B) for outputs (B, 3)", "The likelihood is bernoulli")),
}  # fmt: skip


@pytest.mark.parametrize("name", ids(DATA))
def test_construction__refuses_bad_data(name: str) -> None:
    check(DATA[name])


@pytest.mark.parametrize("name", ids(LABELS))
def test_construction__refuses_bad_labels(name: str) -> None:
    check(LABELS[name])


def test_ids_that_are_floats__are_told_apart_from_dtypes_that_do_not_go_together() -> None:
    model = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(fk.DataError, match=r"float32 where a table of embeddings.*x.long\(\)"):
        fk.EmpiricalFisher(model, (torch.zeros(5, 4), torch.zeros(5).long()))
