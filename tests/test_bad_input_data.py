"""Data and models that are refused, with which message."""

from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherkit as fk
from fisherkit import likelihoods
from tests import by_hand
from tests.bad_input import F64, Case, X, Y, check, ef, ids, mlp, normal, wrapped
from tests.reference.zoo import Compose

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
    "number": Case(lambda: ef(data=7), TYPE, ("data: got an int", "or a list or DataLoader of batches")),
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


# -- models without a well-defined Fisher in their present state -------------------------------------------------------


MODEL, BAD_DATA = fk.ModelError, fk.DataError
EVAL = "Try: model.eval()"
SEQUENCE = normal(6, 3, 4)


def in_train_mode(layer: nn.Module) -> object:
    """An MLP with the layer, by the name "1", in the middle."""
    return ef(mlp(layer.double()).train())


def recurrent(layer: nn.Module) -> object:
    model = wrapped(lambda m, x: m.body(x)[0][:, -1], layer).train()
    return ef(model, (SEQUENCE, Y))


def attention() -> object:
    model = wrapped(lambda m, x: m.body(x, x, x)[0].mean(1), nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True))
    return ef(model.train(), (SEQUENCE, Y))


def outputs(function: Callable[[Any, Tensor], Any], **options: Any) -> object:
    """A model in eval mode with these outputs."""
    return ef(wrapped(function), **options)


COUPLED = "Batch statistics couple the examples of a batch"
RANDOM = "Dropout makes every pass different"

TRAIN_MODE: dict[str, Case] = {
    "dropout": Case(lambda: in_train_mode(nn.Dropout(0.3)), MODEL,
        ("got Dropout '1' in train mode", "eval mode", RANDOM, EVAL)),
    "channel dropout": Case(lambda: in_train_mode(nn.Dropout1d(0.3)), MODEL, ("got Dropout1d '1' in train mode", EVAL)),
    "alpha dropout": Case(lambda: in_train_mode(nn.AlphaDropout(0.3)), MODEL,
        ("got AlphaDropout '1' in train mode", EVAL)),
    "nested dropout": Case(lambda: in_train_mode(nn.Sequential(nn.Identity(), nn.Dropout())), MODEL,
        ("Dropout '1.1' in train mode",)),
    "batch norm": Case(lambda: in_train_mode(nn.BatchNorm1d(5)), MODEL,
        ("BatchNorm1d '1' in train mode", COUPLED, EVAL)),
    "recurrent dropout": Case(lambda: recurrent(nn.LSTM(4, 3, num_layers=2, dropout=0.2, batch_first=True)), MODEL,
        ("got LSTM 'body' in train mode", RANDOM, EVAL)),
    "attention dropout": Case(attention, MODEL, ("got MultiheadAttention 'body' in train mode", RANDOM, EVAL)),
    "randomized ReLU": Case(lambda: in_train_mode(nn.RReLU()), MODEL, ("rrelu", "deterministic", EVAL)),
    "functional dropout": Case(lambda: outputs(lambda m, x: m.body(F.dropout(x, 0.2, True))), MODEL,
        ("the model's forward pass: got an active dropout", "a deterministic model", EVAL)),
    "functional dropout by default": Case(lambda: outputs(lambda m, x: m.body(F.dropout(x))), MODEL,
        ("got an active dropout", EVAL)),
    "dropout in a functional attention": Case(
        lambda: outputs(lambda m, x: m.body(F.scaled_dot_product_attention(x, x, x, dropout_p=0.1))), MODEL,
        ("got an active scaled_dot_product_attention", "With dropout every pass has another Fisher", EVAL)),
    "low-level dropout": Case(lambda: outputs(lambda m, x: m.body(torch.dropout(x, 0.5, True))), MODEL,
        ("deterministic", EVAL)),
}  # fmt: skip

REST = ("an output", "changes with the rest of its batch", "examples that do not influence each other", EVAL)
LARGEST_FIRST = torch.cat([10 * X[:1], X[1:]])
SORTED_START = torch.cat([X.sort(0).values[:2] - 5, X[2:]])


def own_statistics() -> Compose:
    """Batch norm by hand, the same in train and eval mode."""
    return Compose(lambda m, x: m.body((x - x.mean(0)) / x.std(0, correction=0).clamp_min(1e-3)), body=mlp())


INTERACTION: dict[str, Case] = {
    "batch mean subtracted": Case(lambda: outputs(lambda m, x: m.body(x - x.mean(0))), MODEL, REST),
    "batch softmax": Case(lambda: outputs(lambda m, x: m.body(x).softmax(0)), MODEL, REST),
    "sorted along the batch": Case(lambda: outputs(lambda m, x: m.body(x.sort(0).values)), MODEL, REST),
    "batch statistics by hand": Case(lambda: ef(own_statistics().eval()), MODEL, REST),
    "batch norm without running statistics": Case(
        lambda: ef(mlp(nn.BatchNorm1d(5, track_running_stats=False).double()).eval()), MODEL, REST),
    "attention over the batch": Case(lambda: outputs(lambda m, x: m.body(F.scaled_dot_product_attention(x, x, x))),
        MODEL, REST),
    "scaled by the batch's largest, which comes first": Case(
        lambda: outputs(lambda m, x: m.body(x / x.abs().amax()), data=(LARGEST_FIRST, Y)), MODEL, REST),
    "sorted along the batch, the first two in order": Case(
        lambda: outputs(lambda m, x: m.body(x.sort(0).values), data=(SORTED_START, Y)), MODEL, REST),
    "batch mean subtracted, a batch of one first": Case(
        lambda: outputs(lambda m, x: m.body(x - x.mean(0)), data=[(X[:1], Y[:1]), (X[1:], Y[1:])]), MODEL, REST),
    "noise in forward": Case(lambda: outputs(lambda m, x: m.body(x + torch.randn_like(x))), MODEL,
        ("a deterministic forward pass", EVAL)),
    "noise in forward, one example": Case(
        lambda: outputs(lambda m, x: m.body(x + torch.randn_like(x)), data=(X[:1], Y[:1])), MODEL,
        ("deterministic", EVAL)),
    "embedding with max_norm": Case(
        lambda: ef(wrapped(lambda m, x: m.body(x).sum(1), nn.Embedding(9, 3, max_norm=1.0)), (Y.reshape(3, 2), Y[:3])),
        MODEL,
        ("got an embedding with max_norm", "max_norm=None", "It changes the table", "Try: renormalize the table once")),
}  # fmt: skip


def images(m: Any, x: Tensor) -> Tensor:
    """Logits (B, C, H, W)."""
    z: Tensor = m.body(x)
    return z[:, :, None, None].expand(-1, -1, 2, 2)


def not_a_number(m: Any, x: Tensor) -> Tensor:
    """NaN for large inputs only."""
    z: Tensor = m.body(x)
    return torch.where(x.sum(1, keepdim=True) > 50, float("nan"), z)


def infinite_slope(m: Any, x: Tensor) -> Tensor:
    """Finite outputs whose gradient is not: √ at 0."""
    z: Tensor = m.body(x)
    return z + (0 * z).sqrt()


def no_gradient() -> Compose:
    """Inference code that a user forgot to make trainable."""
    return Compose(torch.no_grad()(lambda m, x: m.body(x)), body=mlp())


FORWARD = "the model's forward pass: got"
ADVICE_FOR_IMAGES = "Try: z.movedim(1, -1).flatten(1, -2) in the model for images of logits (B, C, H, W)"

OUTPUTS: dict[str, Case] = {
    "images of logits": Case(lambda: outputs(images), BAD_DATA,
        ("got outputs of shape (B, 3, 2, 2)", "(B, C) or (B, T, C)", ADVICE_FOR_IMAGES)),
    "images for gaussian": Case(lambda: outputs(images, data=(X, normal(6, 3, 2, 2)), likelihood="gaussian"), BAD_DATA,
        (ADVICE_FOR_IMAGES,)),
    "one number an example": Case(lambda: outputs(lambda m, x: m.body(x).sum(1)), BAD_DATA,
        ("got outputs of shape (B);", "one output for each class", 'Try: likelihood="bernoulli" for one logit')),
    "one class": Case(lambda: ef(mlp(outputs=1).eval(), (X, 0 * Y)), BAD_DATA,
        ("got outputs of shape (B, 1)", "at least two classes", 'Try: likelihood="bernoulli"')),
    "one number a batch": Case(lambda: outputs(lambda m, x: m.body(x).sum()), MODEL,
        (FORWARD, "outputs of shape []", "Examples lie along axis 0")),
    "batch axis lost": Case(lambda: outputs(lambda m, x: m.body(x).sum(0, keepdim=True)), MODEL,
        (FORWARD, "outputs of shape [1, 3] for 2")),
    "tuple": Case(lambda: outputs(lambda m, x: (m.body(x), x)), MODEL,
        (FORWARD + " a tuple", "a tensor of outputs, or an object with .logits",
            "Try: a small nn.Module around the model")),
    "nothing": Case(lambda: outputs(lambda m, x: None), MODEL, (FORWARD + " a NoneType", "Try:")),
    "mapping without logits": Case(lambda: outputs(lambda m, x: {"scores": m.body(x)}), MODEL,
        (FORWARD + " a dict", "with .logits")),
    "NaN": Case(lambda: ef(data=(X * float("nan"), Y)), fk.NonFiniteError,
        ("data, batch 0: got model outputs with NaN or infinite entries", "finite outputs",
            "Try: check the inputs of this batch")),
    "NaN in a later batch": Case(lambda: outputs(not_a_number, data=[(X, Y), (X + 99, Y)]), fk.NonFiniteError,
        ("data, batch 1: got model outputs",)),
    "infinite weights": Case(lambda: outputs(lambda m, x: m.body(x) / 0), fk.NonFiniteError,
        ("with NaN or infinite entries",)),
    "NaN gradients": Case(lambda: outputs(infinite_slope), fk.NonFiniteError, ("NaN", "gradient")),
    "class indices": Case(lambda: outputs(lambda m, x: F.one_hot(m.body(x).argmax(1), 3)), MODEL,
        (FORWARD, "torch.int64")),
    "complex": Case(lambda: outputs(lambda m, x: torch.complex(m.body(x), m.body(x))), MODEL,
        (FORWARD, "torch.complex128")),
    "detached": Case(lambda: outputs(lambda m, x: m.body(x).detach()), MODEL, (FORWARD, "gradient")),
    "forward without gradients": Case(lambda: ef(no_gradient().eval()), MODEL, (FORWARD, "gradient")),
    "meta device": Case(lambda: ef(mlp().to("meta").eval()), MODEL, ("meta",)),
}  # fmt: skip


@pytest.mark.parametrize("name", ids(TRAIN_MODE))
def test_construction__refuses_train_mode(name: str) -> None:
    check(TRAIN_MODE[name])


@pytest.mark.parametrize("name", ids(INTERACTION))
def test_construction__refuses_examples_that_interact_and_random_models(name: str) -> None:
    check(INTERACTION[name])


@pytest.mark.parametrize("name", ids(OUTPUTS))
def test_construction__refuses_bad_outputs(name: str) -> None:
    check(OUTPUTS[name])


def stochastic_depth(m: Any, x: Tensor) -> Tensor:
    """Every example skips the branch with probability 0.1, whatever the mode."""
    keep = (torch.rand(x.shape[0], 1) > 0.1).to(x.dtype)
    z: Tensor = m.body(x)
    return keep * z + 0.1 * x[:, :3]


@pytest.mark.parametrize("seed", range(4))
def test_construction__refuses_models_that_are_random_now_and_then(seed: int) -> None:
    """Two passes agree by chance four times out of five."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with pytest.raises(fk.ModelError, match="deterministic"):
            outputs(stochastic_depth)


HARMLESS: dict[str, Callable[[], nn.Module]] = {
    "dropout in eval mode": lambda: mlp(nn.Dropout(0.5)).eval(),
    "dropout of rate 0 in train mode": lambda: mlp(nn.Dropout(0.0)).train(),
    "batch norm in eval mode": lambda: mlp(nn.BatchNorm1d(5).double()).eval(),
    "randomized ReLU in eval mode": lambda: mlp(nn.RReLU()).eval(),
    "functional dropout switched off": lambda: wrapped(lambda m, x: m.body(F.dropout(x, 0.5, m.training))),
    "random numbers without effect": lambda: wrapped(lambda m, x: m.body(x + 0 * torch.rand_like(x))),
}


@pytest.mark.parametrize("name", ids(HARMLESS))
def test_construction__accepts_what_only_looks_random(name: str) -> None:
    assert ef(HARMLESS[name]()).examples == 6


def test_construction__a_layer_used_in_a_new_way_in_a_later_batch_goes_the_slow_exact_way() -> None:
    class Switching(nn.Module):
        """The second weight works with the first layer's bias once the inputs are large."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5, dtype=F64), nn.Linear(5, 3, dtype=F64)

        def forward(self, x: Tensor) -> Tensor:
            if float(x.mean()) > 50:
                return F.linear(self.first(x).tanh(), self.second.weight, self.first.bias[:3] * 1)
            return self.second(self.first(x).tanh())

    model, data = Switching(), [(X, Y), (X + 99, Y)]
    fisher = ef(model, data)
    torch.testing.assert_close(fisher.trace(), by_hand.rows(model, data).square().sum() / fisher.examples)
    assert {entry.rule for entry in fisher.coverage().entries} >= {"loop"}


def test_ids_that_are_floats__are_told_apart_from_dtypes_that_do_not_go_together() -> None:
    model = nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(fk.DataError, match=r"float32 where a table of embeddings.*x.long\(\)"):
        fk.EmpiricalFisher(model, (torch.zeros(5, 4), torch.zeros(5).long()))


INPUTS: dict[str, tuple[Any, type[fk.FisherkitError], str]] = {
    "width": ((X[:, :2], Y), fk.ModelError, r"inputs\[0\] of shape \[6, 2\].*cannot be multiplied"),
    "two inputs": (((X, X), Y), fk.InvalidTypeError, r"inputs\[0\] of shape \[6, 4\].*positional arguments"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs__that_the_model_does_not_take_are_named(name: str) -> None:
    data, error, says = INPUTS[name]
    for call in (fk.EmpiricalFisher, fk.evaluation.loss_gradient):
        with pytest.raises(error, match=says):
            call(mlp(), data)


# -- losses of likelihoods ---------------------------------------------------------------------------------------------

Z = torch.linspace(-1, 1, 18, dtype=F64).reshape(2, 3, 3)
NLL = likelihoods.GaussianNLL()

TARGETS: dict[str, tuple[likelihoods.Likelihood, object, str]] = {
    "short": (likelihoods.Categorical(), torch.zeros(2, 2, dtype=torch.long), "shape [2, 2] for z of shape [2, 3, 3]"),
    "flat": (likelihoods.Categorical(), torch.zeros(6, dtype=torch.long), "expected [2, 3]"),
    "one-hot": (likelihoods.Categorical(), torch.zeros(2, 3, 3, dtype=torch.long), "expected [2, 3]"),
    "few probabilities": (likelihoods.Categorical(), torch.ones(2, 3, 2), "expected [2, 3, 3]"),
    "no class": (likelihoods.Categorical(), torch.full((2, 3), 3), "label 3; expected 0 to 2"),
    "no class of log-probabilities": (likelihoods.LogProbabilities(), torch.full((2, 3), -1), "label -1"),
    **{f"one row, {likelihood.name}": (likelihood, torch.zeros(3).double(), "target of shape [3]")
       for likelihood in (likelihoods.Gaussian(), likelihoods.Bernoulli(), likelihoods.Poisson(), NLL)},
    "one column": (likelihoods.Gaussian(), torch.zeros(2, 3, 1).double(), "expected [2, 3, 3]"),
    "no variance": (NLL, torch.ones(2, 3, 3).double(), "expected [2, 3, 6]"),
    "text": (likelihoods.Gaussian(), "a", "a str as target"),
    "a list": (likelihoods.Categorical(), [0, 1], "a list as target"),
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_loss__of_targets_that_do_not_fit_is_refused(name: str) -> None:
    likelihood, target, words = TARGETS[name]
    with pytest.raises(fk.FisherkitError) as caught:
        likelihood.loss(Z, target)  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{type(likelihood).__name__}.loss: got ")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "likelihood", [likelihoods.Categorical(), likelihoods.Gaussian(), likelihoods.Bernoulli(), NLL]
)
def test_loss__of_outputs_without_an_axis_is_refused(likelihood: likelihoods.Likelihood) -> None:
    with pytest.raises(fk.DataError, match=r"loss: got z of shape \[\]; expected \[., C\]"):
        likelihood.loss(torch.tensor(1.0), torch.tensor(0))
