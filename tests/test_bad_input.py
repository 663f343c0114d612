"""Bad arguments, parameters, data and labels at construction: each refused with advice, before anything is computed."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherkit as fk
from tests.bad_input import F64, Case, X, Y, check, ef, ids, mlp, normal, wrapped
from tests.operator_cases import unchecked_annotations  # noqa: F401  a fixture

ARGUMENT, TYPE = fk.InvalidArgumentError, fk.InvalidTypeError


def sf(**options: Any) -> object:
    return fk.SampledFisher(mlp().eval(), (X, Y), **options)


def ief(**options: Any) -> object:
    return fk.ImprovedEmpiricalFisher(mlp().eval(), (X, Y), **options)


def truncated(**options: Any) -> object:
    return fk.TruncatedFisher(mlp().eval(), (X, Y), **options)


ONE_OF_STRUCTURES = "one of ['full', 'block', 'diagonal', 'kfac', 'ekfac']"
AN_INTEGER = "expected an integer or None"

ARGUMENTS: dict[str, Case] = {
    "function as model": Case(
        lambda: ef(lambda x: x), TYPE, TypeError, ("EmpiricalFisher: got a function as model", "a torch.nn.Module")
    ),
    "class as model": Case(
        lambda: ef(nn.Linear), TYPE, TypeError, ("EmpiricalFisher: got a type as model", "a torch.nn.Module")
    ),
    "unknown likelihood": Case(
        lambda: ef(likelihood="poisson"),
        ARGUMENT,
        ValueError,
        ("likelihood: got 'poisson'", "one of ['bernoulli', 'categorical', 'gaussian']", "Try: an object of fk.likelihoods"),
    ),
    "class as likelihood": Case(
        lambda: ef(likelihood=fk.likelihoods.Categorical), TYPE, TypeError, ("likelihood: got", "an instance of fk.likelihoods")
    ),
    "loss module as likelihood": Case(
        lambda: ef(likelihood=nn.CrossEntropyLoss()), TYPE, TypeError, ("got a CrossEntropyLoss", "an instance of fk.likelihoods")
    ),
    "no likelihood": Case(lambda: ef(likelihood=None), TYPE, TypeError, ("likelihood: got a NoneType", "'categorical'")),
    "unknown structure": Case(
        lambda: ef(structure="low_rank"), ARGUMENT, ValueError, ("EmpiricalFisher: got structure='low_rank'", ONE_OF_STRUCTURES)
    ),
    "no structure": Case(lambda: ef(structure=None), ARGUMENT, ValueError, ("got structure=None", ONE_OF_STRUCTURES)),
    "list as structure": Case(
        lambda: ef(structure=["kfac"]), ARGUMENT, ValueError, ("got structure=['kfac']", ONE_OF_STRUCTURES)
    ),
    "unknown example": Case(
        lambda: ef(example="tokens"), ARGUMENT, ValueError, ("got example='tokens'", "one of ['sequence', 'token']")
    ),
    "unknown normalization": Case(
        lambda: ef(normalization="average"), ARGUMENT, ValueError, ("got normalization='average'", "one of ['mean', 'sum']")
    ),
    "unknown kfac_positions": Case(
        lambda: ef(structure="kfac", kfac_positions="sum"),
        ARGUMENT,
        ValueError,
        ("got kfac_positions='sum'", "one of ['expand', 'reduce']"),
    ),
    "chunk_size 0": Case(lambda: ef(chunk_size=0), ARGUMENT, ValueError, ("got chunk_size=0", "expected 1 or more, or None")),
    "chunk_size -1": Case(lambda: ef(chunk_size=-1), ARGUMENT, ValueError, ("got chunk_size=-1", "1 or more, or None")),
    "chunk_size True": Case(lambda: ef(chunk_size=True), TYPE, TypeError, ("got chunk_size of type bool", AN_INTEGER)),
    "chunk_size 1.5": Case(lambda: ef(chunk_size=1.5), TYPE, TypeError, ("got chunk_size of type float", AN_INTEGER)),
    "memory_budget 0": Case(lambda: ef(memory_budget=0), ARGUMENT, ValueError, ("got memory_budget=0", "1 or more, or None")),
    "memory_budget text": Case(lambda: ef(memory_budget="1GB"), TYPE, TypeError, ("memory_budget of type str", AN_INTEGER)),
    "memory_budget infinite": Case(
        lambda: ef(memory_budget=float("inf")), TYPE, TypeError, ("memory_budget of type float", AN_INTEGER)
    ),
    "integer as generator": Case(
        lambda: sf(generator=3), TYPE, TypeError, ("SampledFisher: got a int as generator", "a torch.Generator or None")
    ),
    "draws 0": Case(lambda: sf(draws=0), ARGUMENT, ValueError, ("SampledFisher: got draws=0", "expected 1 or more")),
    "draws 1.5": Case(lambda: sf(draws=1.5), TYPE, TypeError, ("SampledFisher: got draws of type float", "an integer")),
    "draws True": Case(lambda: sf(draws=True), TYPE, TypeError, ("got draws of type bool", "an integer")),
    "seed text": Case(lambda: sf(seed="a"), TYPE, TypeError, ("SampledFisher: got seed of type str", "an integer")),
    "seed None": Case(lambda: sf(seed=None), TYPE, TypeError, ("got seed of type NoneType", "an integer")),
    "power 2": Case(lambda: ief(power=2), ARGUMENT, ValueError, ("ImprovedEmpiricalFisher: got power=2", "from 0 to 1")),
    "power -0.5": Case(lambda: ief(power=-0.5), ARGUMENT, ValueError, ("got power=-0.5", "a number from 0 to 1")),
    "power NaN": Case(lambda: ief(power=float("nan")), ARGUMENT, ValueError, ("got power=nan", "a number from 0 to 1")),
    "power True": Case(lambda: ief(power=True), TYPE, TypeError, ("got power of type bool", "expected a number")),
    "power text": Case(lambda: ief(power="half"), TYPE, TypeError, ("got power of type str", "expected a number")),
    "rank 0": Case(lambda: truncated(rank=0), ARGUMENT, ValueError, ("TruncatedFisher: got rank=0", "expected 1 or more")),
    "rank 1.5": Case(lambda: truncated(rank=1.5), TYPE, TypeError, ("got rank of type float", "an integer")),
    "rank True": Case(lambda: truncated(rank=True), TYPE, TypeError, ("got rank of type bool", "an integer")),
    "rank and tolerance": Case(
        lambda: truncated(rank=2, tolerance=0.1), ARGUMENT, ValueError, ("got rank=2 and tolerance=0.1", "expected one of them")
    ),
    "tolerance 1.5": Case(lambda: truncated(tolerance=1.5), ARGUMENT, ValueError, ("got tolerance=1.5", "0 to below 1")),
    "tolerance -0.1": Case(lambda: truncated(tolerance=-0.1), ARGUMENT, ValueError, ("got tolerance=-0.1", "0 to below 1")),
    "tolerance NaN": Case(
        lambda: truncated(tolerance=float("nan")), ARGUMENT, ValueError, ("got tolerance=nan", "0 to below 1")
    ),
    "tolerance text": Case(lambda: truncated(tolerance="low"), TYPE, TypeError, ("got tolerance of type str", "a number")),
    "shifted labels without positions": Case(
        lambda: ef(shift_labels=True), fk.DataError, ValueError, ("labels of shape [", "shift_labels")
    ),
}  # fmt: skip

CHOICE = "params: got"


def no_grad_mlp() -> nn.Module:
    return mlp().requires_grad_(False)


def with_extra(parameter: nn.Parameter) -> nn.Module:
    """A model with one more parameter, which is not used."""
    model = wrapped(lambda m, x: m.body(x))
    model.register_parameter("extra", parameter)
    return model


def half_and_half() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5).double(), nn.Linear(5, 3))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    return model


def every(name: str, parameter: nn.Parameter) -> bool:
    return True


PARAMS: dict[str, Case] = {
    "unknown name": Case(
        lambda: ef(params=["0.weight", "1.weight"]),
        fk.UnknownParameterError,
        LookupError,
        (CHOICE, "unknown parameter names ['1.weight']", "some of ['0.weight', '0.bias'", "Try: dict(model.named_parameters())"),
    ),
    "unknown single name": Case(
        lambda: ef(params="head"), fk.UnknownParameterError, LookupError, (CHOICE, "unknown parameter names ['head']", "Try:")
    ),
    "second name of a tied parameter": Case(
        lambda: ef(tied(), params=["2.weight"]),
        fk.UnknownParameterError,
        LookupError,
        ("unknown parameter names ['2.weight']", "A tied parameter has only the name of the first module that holds it"),
    ),
    "empty list": Case(
        lambda: ef(params=[]), ARGUMENT, ValueError, (CHOICE, "no parameter", "The model has 4 parameters", "Try: pass params=")
    ),
    "predicate that chooses nothing": Case(
        lambda: ef(params=lambda name, p: p.ndim > 2), ARGUMENT, ValueError, (CHOICE, "no parameter", "expected at least one")
    ),
    "nothing requires grad": Case(
        lambda: ef(no_grad_mlp()), ARGUMENT, ValueError, ("no parameter that requires grad", "Try: pass params=", "requires_grad_(True)")
    ),
    "model without parameters": Case(
        lambda: ef(nn.Tanh()), ARGUMENT, ValueError, ("no parameter that requires grad", "The model has 0 parameters")
    ),
    "integer parameter": Case(
        lambda: ef(with_extra(nn.Parameter(torch.ones(2, dtype=torch.long), requires_grad=False)), params=every),
        ARGUMENT,
        ValueError,
        ("parameters ['extra'] that are not floating point", "real floating-point parameters", "Try: leave them out with params="),
    ),
    "complex parameter": Case(
        lambda: ef(with_extra(nn.Parameter(torch.ones(2, dtype=torch.complex128)))),
        ARGUMENT,
        ValueError,
        ("parameters ['extra'] that are not floating point", "real floating-point parameters"),
    ),
    "two dtypes": Case(
        lambda: ef(half_and_half()),
        fk.ModelError,
        RuntimeError,
        (CHOICE, "'cpu torch.float32'", "'cpu torch.float64'", "expected one device and one dtype", "Try: params="),
    ),
    "number": Case(lambda: ef(params=3), TYPE, TypeError, (CHOICE, "int", "names", "predicate")),
    "parameters instead of names": Case(
        lambda: ef(model := mlp().eval(), params=list(model.parameters())), TYPE, TypeError, (CHOICE, "Parameter", "names")
    ),
}  # fmt: skip

A_PAIR = 'a pair (inputs, targets) or a mapping with "labels"'


class NoBatches:
    """Re-iterable, and empty."""

    def __iter__(self) -> Any:
        return iter([])


DATA: dict[str, Case] = {
    "generator": Case(
        lambda: ef(data=((X, Y) for _ in range(2))),
        fk.DataError,
        ValueError,
        ("data: got a generator, which can be read only once", "iterated again and again", "Try: list(data), or a DataLoader"),
    ),
    "iterator": Case(lambda: ef(data=iter([(X, Y)])), fk.DataError, ValueError, ("got a list_iterator", "Try: list(data)")),
    "zip": Case(lambda: ef(data=zip([X], [Y], strict=True)), fk.DataError, ValueError, ("got a zip", "Try: list(data)")),
    "map": Case(lambda: ef(data=map(tuple, [(X, Y)])), fk.DataError, ValueError, ("got a map", "Try: list(data)")),
    "None": Case(lambda: ef(data=None), TYPE, TypeError, ("data: got a NoneType", "one batch (inputs, targets), or a list")),
    "number": Case(lambda: ef(data=7), TYPE, TypeError, ("data: got a int", "or a list or DataLoader of batches")),
    "dataset": Case(lambda: ef(data=TensorDataset(X, Y)), TYPE, TypeError, ("data: got a TensorDataset", "DataLoader of batches")),
    "inputs alone": Case(lambda: ef(data=X), TYPE, TypeError, ("data, batch 0: got a batch of type Tensor", A_PAIR, "Try: [(x, y)]")),
    "NumPy pair": Case(
        lambda: ef(data=(X.numpy(), Y.numpy())), TYPE, TypeError, ("data, batch 0: got a batch of type ndarray", A_PAIR)
    ),
    "triple": Case(lambda: ef(data=[(X, Y, Y)]), TYPE, TypeError, ("data, batch 0: got a batch of type tuple", A_PAIR)),
    "text": Case(lambda: ef(data="train.csv"), TYPE, TypeError, ("got a batch of type str", A_PAIR)),
    "empty list": Case(lambda: ef(data=[]), fk.DataError, ValueError, ("data: got no batch", "expected at least one example")),
    "empty iterable": Case(lambda: ef(data=NoBatches()), fk.DataError, ValueError, ("data: got no batch", "at least one example")),
    "loader of an empty dataset": Case(
        lambda: ef(data=DataLoader(TensorDataset(X[:0], Y[:0]), 2)), fk.DataError, ValueError, ("got no batch", "at least one")
    ),
    "batch without examples": Case(
        lambda: ef(data=(X[:0], Y[:0])), fk.DataError, ValueError, ("data, batch 0: got a batch with no example", "at least one")
    ),
    "later batch without examples": Case(
        lambda: ef(data=[(X, Y), (X[:0], Y[:0])]), fk.DataError, ValueError, ("data, batch 1: got a batch with no example",)
    ),
    "mapping without labels": Case(
        lambda: ef(data={"input": X, "target": Y}),
        fk.DataError,
        ValueError,
        ("a mapping with keys ['input', 'target']", 'one with "labels"', "Try: a pair (inputs, targets), or rename the key"),
    ),
    "mapping class without labels": Case(
        lambda: ef(data=[UserDict(input=X)]), fk.DataError, ValueError, ("a mapping with keys ['input']", 'one with "labels"')
    ),
    "inputs without a tensor": Case(
        lambda: ef(data=[(X.tolist(), Y)]), fk.DataError, ValueError, ("data, batch 0: got inputs without a tensor", "axis 0")
    ),
    "scalar input": Case(
        lambda: ef(data=(torch.tensor(1.0), Y)), fk.DataError, ValueError, ("got inputs without a tensor", "examples along axis 0")
    ),
    "targets as a list": Case(
        lambda: ef(data=[(X, Y.tolist())]), TYPE, TypeError, ("got targets of type list", "Try: torch.as_tensor(targets)")
    ),
    "targets as an array": Case(
        lambda: ef(data=[(X, Y.numpy())]), TYPE, TypeError, ("got targets of type ndarray", "Try: torch.as_tensor(targets)")
    ),
    "fewer targets than inputs": Case(
        lambda: ef(data=(X, Y[:4])),
        fk.DataError,
        ValueError,
        ("data, batch 0: got inputs with 6 examples and targets of shape [4]", "expected 6 targets", "along axis 0"),
    ),
    "scalar target": Case(
        lambda: ef(data=(X, Y[0])), fk.DataError, ValueError, ("6 examples and targets of shape []", "expected 6 targets")
    ),
    "unlabelled for EF": Case(
        lambda: ef(data=(X, None)),
        fk.DataError,
        ValueError,
        ("data, batch 0: got no targets", "This kind uses the observed labels", "Try: fk.ExactFisher or fk.SampledFisher"),
    ),
    "unlabelled for iEF": Case(
        lambda: fk.ImprovedEmpiricalFisher(mlp().eval(), (X, None)), fk.DataError, ValueError, ("got no targets", "fk.ExactFisher")
    ),
    "unlabelled for the truncated kind": Case(
        lambda: fk.TruncatedFisher(mlp().eval(), [(X, None)]), fk.DataError, ValueError, ("got no targets", "fk.ExactFisher")
    ),
    "unlabelled mapping": Case(
        lambda: ef(data={"x": X, "labels": None}), fk.DataError, ValueError, ("got no targets", "Try: fk.ExactFisher")
    ),
    "unlabelled later": Case(
        lambda: ef(data=[(X, Y), (X, None)]), fk.DataError, ValueError, ("data, batch 1: got no targets", "fk.ExactFisher")
    ),
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
    "label too large": Case(
        lambda: ef(data=(X, Y + 1)), fk.DataError, ValueError, ("data, batch 0: got labels from 1 to 3", RANGE, "fk.likelihoods.Categorical(ignore_index=")
    ),
    "negative label": Case(lambda: ef(data=(X, Y - 1)), fk.DataError, ValueError, ("got labels from -1 to 1", RANGE)),
    "bad label in a later batch": Case(
        lambda: ef(data=[(X, Y), (X, Y + 5)]), fk.DataError, ValueError, ("data, batch 1: got labels from 5 to 7", RANGE)
    ),
    "float labels": Case(lambda: ef(data=(X, Y.double())), fk.DataError, ValueError, ("got labels of torch.float64", *INTEGERS)),
    "bool labels": Case(lambda: ef(data=(X, Y > 0)), fk.DataError, ValueError, ("got labels of torch.bool", *INTEGERS)),
    "probabilities as labels": Case(
        lambda: ef(data=(X, normal(6, 3).softmax(1))), fk.DataError, ValueError, ("got labels of torch.float64", *INTEGERS)
    ),
    "one-hot labels": Case(
        lambda: ef(data=(X, nn.functional.one_hot(Y))),
        fk.DataError,
        ValueError,
        ("labels of shape [", ", 3] for outputs [", "The last axis of the outputs holds the classes"),
    ),
    "labels as a column": Case(
        lambda: ef(data=(X, Y.unsqueeze(1))), fk.DataError, ValueError, (", 1] for outputs [", "Try: logits.movedim(1, -1)")
    ),
    "one label for several positions": Case(
        lambda: tokens(Y[:3]), fk.DataError, ValueError, ("labels of shape [", ", 2, 3]; expected [")
    ),
    "one position too many": Case(
        lambda: tokens(torch.zeros(3, 3, dtype=torch.long)), fk.DataError, ValueError, (", 3] for outputs [", "; expected [")
    ),
    "all labels ignored": Case(
        lambda: ef(data=(X, IGNORED)),
        fk.DataError,
        ValueError,
        ("data: got no example with a label that counts", "All labels are ignore_index", "Try: check the labels"),
    ),
    "all labels ignored, ekfac": Case(
        lambda: ef(data=[(X, IGNORED)], structure="ekfac"), fk.DataError, ValueError, ("no example with a label that counts",)
    ),
    "all labels ignored, streamed": Case(
        lambda: ef(data=(X, IGNORED), memory_budget=1), fk.DataError, ValueError, ("no example with a label that counts",)
    ),
    "NaN target": Case(
        lambda: gaussian(with_entry(float("nan"))), fk.DataError, ValueError, ("targets with NaN or infinite entries", "finite numbers")
    ),
    "infinite target": Case(
        lambda: gaussian(with_entry(float("inf"))), fk.DataError, ValueError, ("targets with NaN or infinite entries", "finite numbers")
    ),
    "gaussian targets of another shape": Case(
        lambda: gaussian(normal(6, 2)),
        fk.DataError,
        ValueError,
        ("targets of shape [", ", 2] for outputs [", "targets of the outputs' shape", "The likelihood is gaussian"),
    ),
    "class indices for gaussian": Case(
        lambda: gaussian(Y), fk.DataError, ValueError, ("for outputs [", ", 3]", "The likelihood is gaussian")
    ),
    "bernoulli target above 1": Case(
        lambda: bernoulli(with_entry(2.0)), fk.DataError, ValueError, ("got targets from 0.", "to 2", "between 0 and 1", "bernoulli")
    ),
    "bernoulli target below 0": Case(
        lambda: bernoulli(with_entry(-1.0)), fk.DataError, ValueError, ("got targets from -1 to 0.", "between 0 and 1")
    ),
    "bernoulli target NaN": Case(
        lambda: bernoulli(with_entry(float("nan"))), fk.DataError, ValueError, ("targets with NaN or infinite entries",)
    ),
    "class indices for bernoulli": Case(
        lambda: bernoulli(Y), fk.DataError, ValueError, ("for outputs [", "The likelihood is bernoulli")
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("name", ids(ARGUMENTS))
def test_construction__refuses_bad_arguments(name: str) -> None:
    check(ARGUMENTS[name])


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("name", ids(PARAMS))
def test_construction__refuses_bad_parameters(name: str) -> None:
    check(PARAMS[name])


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("name", ids(DATA))
def test_construction__refuses_bad_data(name: str) -> None:
    check(DATA[name])


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("name", ids(LABELS))
def test_construction__refuses_bad_labels(name: str) -> None:
    check(LABELS[name])


def test_construction__a_float32_batch_for_float64_parameters_is_the_model_s_own_error() -> None:
    with pytest.raises(RuntimeError, match="dtype") as caught:
        ef(data=(X.float(), Y))
    assert not isinstance(caught.value, fk.FisherkitError)
    assert X.dtype == F64
