"""Bad arguments and bad choices of parameters: each refused with advice, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fisherkit as fk
from tests.bad_input import Case, X, Y, check, ef, ids, mlp, wrapped

ARGUMENT, TYPE = fk.InvalidArgumentError, fk.InvalidTypeError


def sf(**options: Any) -> object:
    return fk.SampledFisher(mlp().eval(), (X, Y), **options)


def ief(**options: Any) -> object:
    return fk.ImprovedEmpiricalFisher(mlp().eval(), (X, Y), **options)


def truncated(**options: Any) -> object:
    return fk.TruncatedFisher(mlp().eval(), (X, Y), **options)


ONE_OF_STRUCTURES = "one of ['full', 'block', 'diagonal', 'kfac', 'ekfac', 'nkp'"  # then those that tests define
AN_INTEGER = "expected an integer or None"

ARGUMENTS: dict[str, Case] = {
    "function as model": Case(lambda: ef(lambda x: x), TYPE,
        ("EmpiricalFisher: got a function as model", "a torch.nn.Module")),
    "class as model": Case(lambda: ef(nn.Linear), TYPE, ("EmpiricalFisher: got a type as model", "a torch.nn.Module")),
    "unknown likelihood": Case(lambda: ef(likelihood="weibull"), ARGUMENT,
        ("likelihood: got 'weibull'", "one of ['bernoulli', 'categorical', 'gaussian', 'poisson']",
            "Try: an object of fk.likelihoods")),
    "class as likelihood": Case(lambda: ef(likelihood=fk.likelihoods.Categorical), TYPE,
        ("likelihood: got", "an instance of fk.likelihoods")),
    "loss module as likelihood": Case(lambda: ef(likelihood=nn.HuberLoss()), TYPE,
        ("got a HuberLoss as loss", "'nn.CrossEntropyLoss'", "a subclass of fk.likelihoods")),
    "no likelihood": Case(lambda: ef(likelihood=None), TYPE, ("likelihood: got a NoneType", "'categorical'")),
    "unknown structure": Case(lambda: ef(structure="low_rank"), ARGUMENT,
        ("EmpiricalFisher: got structure='low_rank'", ONE_OF_STRUCTURES)),
    "no structure": Case(lambda: ef(structure=None), ARGUMENT, ("got structure=None", ONE_OF_STRUCTURES)),
    "list as structure": Case(lambda: ef(structure=["kfac"]), ARGUMENT, ("got structure=['kfac']", ONE_OF_STRUCTURES)),
    "unknown example": Case(lambda: ef(example="tokens"), ARGUMENT,
        ("got example='tokens'", "one of ['sequence', 'token']")),
    "shift_labels text": Case(lambda: ef(shift_labels="no"), ARGUMENT,
        ("got shift_labels='no'", "one of [None, True, False]")),
    "unknown normalization": Case(lambda: ef(normalization="average"), ARGUMENT,
        ("got normalization='average'", "one of ['mean', 'sum']")),
    "unknown kfac_positions": Case(lambda: ef(structure="kfac", kfac_positions="sum"), ARGUMENT,
        ("got kfac_positions='sum'", "one of ['expand', 'reduce']")),
    "chunk_size 0": Case(lambda: ef(chunk_size=0), ARGUMENT, ("got chunk_size=0", "expected 1 or more, or None")),
    "chunk_size -1": Case(lambda: ef(chunk_size=-1), ARGUMENT, ("got chunk_size=-1", "1 or more, or None")),
    "chunk_size True": Case(lambda: ef(chunk_size=True), TYPE, ("got chunk_size of type bool", AN_INTEGER)),
    "chunk_size 1.5": Case(lambda: ef(chunk_size=1.5), TYPE, ("got chunk_size of type float", AN_INTEGER)),
    "memory_budget 0": Case(lambda: ef(memory_budget=0), ARGUMENT, ("got memory_budget=0", "1 or more, or None")),
    "memory_budget text": Case(lambda: ef(memory_budget="1GB"), TYPE, ("memory_budget of type str", AN_INTEGER)),
    "memory_budget infinite": Case(lambda: ef(memory_budget=float("inf")), TYPE,
        ("memory_budget of type float", AN_INTEGER)),
    "integer as generator": Case(lambda: sf(generator=3), TYPE,
        ("SampledFisher: got a int as generator", "a torch.Generator or None")),
    "draws 0": Case(lambda: sf(draws=0), ARGUMENT, ("SampledFisher: got draws=0", "expected 1 or more")),
    "draws 1.5": Case(lambda: sf(draws=1.5), TYPE, ("SampledFisher: got draws of type float", "an integer")),
    "draws True": Case(lambda: sf(draws=True), TYPE, ("got draws of type bool", "an integer")),
    "seed text": Case(lambda: sf(seed="a"), TYPE, ("SampledFisher: got seed of type str", "an integer")),
    "seed None": Case(lambda: sf(seed=None), TYPE, ("got seed of type NoneType", "an integer")),
    "power 2": Case(lambda: ief(power=2), ARGUMENT, ("ImprovedEmpiricalFisher: got power=2", "from 0 to 1")),
    "power -0.5": Case(lambda: ief(power=-0.5), ARGUMENT, ("got power=-0.5", "a number from 0 to 1")),
    "power NaN": Case(lambda: ief(power=float("nan")), ARGUMENT, ("got power=nan", "a number from 0 to 1")),
    "power True": Case(lambda: ief(power=True), TYPE, ("got power of type bool", "expected a number")),
    "power text": Case(lambda: ief(power="half"), TYPE, ("got power of type str", "expected a number")),
    "rank 0": Case(lambda: truncated(rank=0), ARGUMENT, ("TruncatedFisher: got rank=0", "expected 1 or more")),
    "rank 1.5": Case(lambda: truncated(rank=1.5), TYPE, ("got rank of type float", "an integer")),
    "rank True": Case(lambda: truncated(rank=True), TYPE, ("got rank of type bool", "an integer")),
    "rank and tolerance": Case(lambda: truncated(rank=2, tolerance=0.1), ARGUMENT,
        ("got rank=2 and tolerance=0.1", "expected one of them")),
    "tolerance 1.5": Case(lambda: truncated(tolerance=1.5), ARGUMENT, ("got tolerance=1.5", "0 to below 1")),
    "tolerance -0.1": Case(lambda: truncated(tolerance=-0.1), ARGUMENT, ("got tolerance=-0.1", "0 to below 1")),
    "tolerance NaN": Case(lambda: truncated(tolerance=float("nan")), ARGUMENT, ("got tolerance=nan", "0 to below 1")),
    "tolerance text": Case(lambda: truncated(tolerance="low"), TYPE, ("got tolerance of type str", "a number")),
    "shifted labels without positions": Case(lambda: ef(shift_labels=True), fk.DataError,
        ("labels of shape [", "shift_labels")),
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
    "unknown name": Case(lambda: ef(params=["0.weight", "1.weight"]), fk.UnknownParameterError,
        (CHOICE, "unknown parameter names ['1.weight']", "some of ['0.weight', '0.bias'",
            "Try: dict(model.named_parameters())")),
    "unknown single name": Case(lambda: ef(params="head"), fk.UnknownParameterError,
        (CHOICE, "unknown parameter names ['head']", "Try:")),
    "a module's name": Case(lambda: ef(params="0"), fk.UnknownParameterError,
        (CHOICE, "unknown parameter names ['0']", 'Try: "0.*" for all of that module')),
    "a module": Case(lambda: ef(params=nn.Linear(4, 3)), fk.InvalidTypeError,
        (CHOICE, "params of type Linear", "expected names, or a predicate", "Try: [name for name, _ in")),
    "second name of a tied parameter": Case(lambda: ef(tied(), params=["2.weight"]), fk.UnknownParameterError,
        ("unknown parameter names ['2.weight']",
            "A tied parameter has only the name of the first module that holds it")),
    "empty list": Case(lambda: ef(params=[]), ARGUMENT,
        (CHOICE, "no parameter", "The model has 4 parameters", "Try: pass params=")),
    "predicate that chooses nothing": Case(lambda: ef(params=lambda name, p: p.ndim > 2), ARGUMENT,
        (CHOICE, "no parameter", "expected at least one")),
    "nothing requires grad": Case(lambda: ef(no_grad_mlp()), ARGUMENT,
        ("no parameter that requires grad", "Try: pass params=", "requires_grad_(True)")),
    "model without parameters": Case(lambda: ef(nn.Tanh()), ARGUMENT,
        ("no parameter that requires grad", "The model has 0 parameters")),
    "integer parameter": Case(
        lambda: ef(with_extra(nn.Parameter(torch.ones(2, dtype=torch.long), requires_grad=False)), params=every),
        ARGUMENT,
        ("parameters ['extra'] that are not floating point", "real floating-point parameters",
            "Try: leave them out with params=")),
    "complex parameter": Case(lambda: ef(with_extra(nn.Parameter(torch.ones(2, dtype=torch.complex128)))), ARGUMENT,
        ("parameters ['extra'] that are not floating point", "real floating-point parameters")),
    "two dtypes": Case(lambda: ef(half_and_half()), fk.ModelError,
        (CHOICE, "'cpu torch.float32'", "'cpu torch.float64'", "expected one device and one dtype", "Try: params=")),
    "number": Case(lambda: ef(params=3), TYPE, (CHOICE, "int", "names", "predicate")),
    "parameters instead of names": Case(lambda: ef(model := mlp().eval(), params=list(model.parameters())), TYPE,
        (CHOICE, "Parameter", "names")),
}  # fmt: skip


@pytest.mark.parametrize("name", ids(ARGUMENTS))
def test_construction__refuses_bad_arguments(name: str) -> None:
    check(ARGUMENTS[name])


@pytest.mark.parametrize("name", ids(PARAMS))
def test_construction__refuses_bad_parameters(name: str) -> None:
    check(PARAMS[name])
