"""What construction and operations refuse, with which message."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from tests.bad_input import F64, Case, D, X, Y, check, ef, ids, mlp, normal, wrapped

ARGUMENT, TYPE, UNKNOWN = fk.InvalidArgumentError, fk.InvalidTypeError, fk.UnknownParameterError


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
    "chunk_size 0": Case(lambda: ef(chunk_size=0), ARGUMENT, ("got chunk_size=0", "an integer, 1 or more, or None")),
    "chunk_size -1": Case(lambda: ef(chunk_size=-1), ARGUMENT, ("got chunk_size=-1", "1 or more, or None")),
    "chunk_size True": Case(lambda: ef(chunk_size=True), TYPE, ("got chunk_size of type bool", AN_INTEGER)),
    "chunk_size 1.5": Case(lambda: ef(chunk_size=1.5), TYPE, ("got chunk_size of type float", AN_INTEGER)),
    "memory_budget 0": Case(lambda: ef(memory_budget=0), ARGUMENT, ("got memory_budget=0", "1 or more, or None")),
    "memory_budget text": Case(lambda: ef(memory_budget="1GB"), TYPE, ("memory_budget of type str", AN_INTEGER)),
    "memory_budget infinite": Case(lambda: ef(memory_budget=float("inf")), TYPE,
        ("memory_budget of type float", AN_INTEGER)),
    "integer as generator": Case(lambda: sf(generator=3), TYPE,
        ("SampledFisher: got an int as generator", "a torch.Generator or None")),
    "draws 0": Case(lambda: sf(draws=0), ARGUMENT, ("SampledFisher: got draws=0", "expected an integer, 1 or more")),
    "draws 1.5": Case(lambda: sf(draws=1.5), TYPE, ("SampledFisher: got draws of type float", "an integer")),
    "draws True": Case(lambda: sf(draws=True), TYPE, ("got draws of type bool", "an integer")),
    "seed text": Case(lambda: sf(seed="a"), TYPE, ("SampledFisher: got seed of type str", "an integer")),
    "seed None": Case(lambda: sf(seed=None), TYPE, ("got seed of type NoneType", "an integer")),
    "power 2": Case(lambda: ief(power=2), ARGUMENT, ("ImprovedEmpiricalFisher: got power=2", "from 0 to 1")),
    "power -0.5": Case(lambda: ief(power=-0.5), ARGUMENT, ("got power=-0.5", "a number from 0 to 1")),
    "power NaN": Case(lambda: ief(power=float("nan")), ARGUMENT, ("got power=nan", "a number from 0 to 1")),
    "power True": Case(lambda: ief(power=True), TYPE, ("got power of type bool", "expected a number")),
    "power text": Case(lambda: ief(power="half"), TYPE, ("got power of type str", "expected a number")),
    "rank 0": Case(lambda: truncated(rank=0), ARGUMENT, ("TruncatedFisher: got rank=0", "an integer, 1 or more")),
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
        (CHOICE, "no parameter", "The model has 4 parameters", "Try: params=")),
    "predicate that chooses nothing": Case(lambda: ef(params=lambda name, p: p.ndim > 2), ARGUMENT,
        (CHOICE, "no parameter", "expected at least one")),
    "nothing requires grad": Case(lambda: ef(no_grad_mlp()), ARGUMENT,
        ("no parameter that requires grad", "Try: params=", "requires_grad_(True)")),
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


# -- bad vectors -------------------------------------------------------------------------------------------------------


SINGULAR, BUDGET, NO_FORM = fk.SingularMatrixError, fk.MemoryBudgetError, fk.NoClosedFormError
V = normal(D)


@cache
def built(structure: str = "full", budget: int | None = None) -> fk.EmpiricalFisher:
    return ef(structure=structure, memory_budget=budget)


def named(**changes: Any) -> dict[str, Any]:
    """A vector as a dict, with changes to ``bias`` (of the last layer), or with more entries."""
    tensors: dict[str, Any] = dict(built().space.unflatten(V))
    if "bias" in changes:
        tensors["2.bias"] = changes.pop("bias")
    return {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}


FLAT = "expected [D] or [D, K] with D = 43"

VECTORS: dict[str, Case] = {
    "too short": Case(lambda: built() @ V[1:], ARGUMENT, ("EmpiricalFisher.matvec: got shape [42]", FLAT, "Try:")),
    "rows instead of columns": Case(lambda: built().solve(normal(2, D)), ARGUMENT,
        ("EmpiricalFisher.solve: got shape [2, 43]", "columns last")),
    "a gradient's own shape": Case(lambda: built().quadratic_form(normal(5, 4, 1)), ARGUMENT,
        ("quadratic_form: got shape [5, 4, 1]", FLAT)),
    "float32": Case(lambda: built() @ V.float(), TYPE,
        ("got a vector of torch.float32", "expected torch.float64", "Nothing is cast silently",
            "Try: v.to(torch.float64)")),
    "integers": Case(lambda: built("kfac") @ V.long(), TYPE, ("a vector of torch.int64", "Try: v.to(torch.float64)")),
    "NaN": Case(lambda: built("diagonal") @ (V / 0 * 0), fk.NonFiniteError,
        ("EmpiricalFisher.matvec: got a vector with NaN or infinite entries", "finite numbers",
            "Try: torch.isfinite(v).all()")),
    "infinity": Case(lambda: built().solve(V / 0), fk.NonFiniteError, ("EmpiricalFisher.solve", "finite")),
    "another device": Case(lambda: built() @ V.to("meta"), ARGUMENT,
        ("a vector on meta", "expected cpu", 'Try: v.to("cpu")')),
    "list": Case(lambda: built() @ V.tolist(), TYPE, ("EmpiricalFisher.matvec: got a list", "Try: torch.as_tensor")),
    "array": Case(lambda: built().solve(V.numpy()), TYPE, ("got a ndarray", "a tensor [D] or [D, K], or a dict")),
    "module": Case(lambda: built() @ mlp(), TYPE, ("got a Sequential", "or a dict")),
    "missing name": Case(lambda: built() @ named(bias=None), UNKNOWN,
        ("missing names ['2.bias']", "exactly the 4 names of space.names",
            "Try: {name: ... for name in fisher.space.names}")),
    "unknown name": Case(lambda: built() @ named(head=V), UNKNOWN, ("unknown names ['head']", "Try:")),
    "wrong shape in a dict": Case(lambda: built() @ named(bias=V[:4]), ARGUMENT,
        ("got shape [4] for '2.bias'", "expected [3], or [3, 'K']")),
    "another dtype in a dict": Case(lambda: built() @ named(bias=V[:3].float()), TYPE,
        ("torch.float32", "torch.float64", "Nothing is cast silently")),
    "another device in a dict": Case(lambda: built() @ named(bias=V[:3].to("meta")), ARGUMENT, ("meta", "cpu")),
    "list in a dict": Case(lambda: built() @ named(bias=[1.0, 2.0, 3.0]), TYPE, ("list", "'2.bias'")),
    "number in a dict": Case(lambda: built().space.flatten(named(bias=1.0)), TYPE, ("float", "'2.bias'")),
}  # fmt: skip

NOT_NEGATIVE = "expected a finite number, 0 or more"

NUMBERS: dict[str, Case] = {
    "negative damping": Case(lambda: built().solve(V, damping=-1e-3), ARGUMENT,
        ("(damping=-0.001): got damping -0.001", NOT_NEGATIVE, "must stay positive semi-definite")),
    "NaN damping": Case(lambda: built("kfac").logdet(float("nan")), ARGUMENT, ("got damping nan", NOT_NEGATIVE)),
    "damping by name": Case(lambda: built().factorize("auto"), TYPE,
        ("got damping of type str", "a float or fk.RelativeDamping")),
    "damping as a tensor": Case(lambda: built().solve(V, torch.tensor(0.1)), TYPE,
        ("got damping of type Tensor", "Try: float(damping)")),
    "negative relative damping": Case(lambda: built().solve(V, damping=fk.RelativeDamping(-1)), ARGUMENT,
        ("RelativeDamping", "got damping -1", NOT_NEGATIVE)),
    "singular, fewer rows than parameters": Case(lambda: built().solve(V, damping=0.0), SINGULAR,
        ("EmpiricalFisher.solve(damping=0)", "R = 6 rows < D = 43 parameters", "Try: damping > 0")),
    "singular, inverse": Case(lambda: built().factorize(0), SINGULAR,
        ("R = 6 rows < D = 43 parameters", "Try:", "amping")),
    "singular, log determinant": Case(lambda: built().logdet(damping=0), SINGULAR,
        ("singular", "R = 6 rows < D = 43", "Try:")),
    "singular, more rows than parameters": Case(
        lambda: fk.ExactFisher(nn.Linear(4, 3).double(), (X[:, :1].expand(-1, 4).repeat(3, 1), Y.repeat(3))).solve(
            normal(15), 0.0), SINGULAR, ("singular", "Try:", "amping")),
    "singular block": Case(lambda: built("block").solve(V, damping=0.0), SINGULAR,
        ("['0.weight', '0.bias']", "singular")),
    "singular diagonal": Case(
        lambda: ef(data=(X * torch.tensor([1.0, 0, 1, 1]), Y), structure="diagonal").solve(V, 0.0), SINGULAR,
        ("singular", "Try:", "amping")),
    "singular factors": Case(lambda: ef(data=(X[:2], Y[:2]), structure="kfac").solve(V, 0.0), SINGULAR,
        ("singular", "amping")),
    "no eigenvalue": Case(lambda: built().eigenvalues(0), ARGUMENT,
        ("EmpiricalFisher.eigenvalues: got k=0", "an integer from 1 to 43")),
    "more eigenvalues than parameters": Case(lambda: built("ekfac").eigenvalues(44), ARGUMENT,
        ("got k=44", "an integer from 1 to 43")),
    "eigenvalues by flag": Case(lambda: built().eigenvalues(True), TYPE, ("got k of type bool", "an integer")),
    "negative multiple": Case(lambda: -1.0 * built(), ARGUMENT,
        ("EmpiricalFisher * scale: got scale=-1.0", "expected a finite number, 0 or more")),
    "sum with a number": Case(lambda: built() + 1e-3, TYPE,
        ("EmpiricalFisher + other: got a float", "expected a FisherOperator")),
    "sum over other parameters": Case(lambda: built() + ef(params=["0.weight"]), ARGUMENT,
        ("operators over different parameters", "only the first has ['0.bias', '2.weight', '2.bias']",
            "the same names, shapes")),
    "sum over other shapes": Case(lambda: built("kfac") + ef(mlp(outputs=4).eval(), structure="kfac"), ARGUMENT,
        ("shapes differ in '2.weight': [3, 5] and [4, 5]", "Try: build both with the same params=")),
    "sum of two dtypes": Case(lambda: built() + ef(mlp().float().eval(), (X.float(), Y)), TYPE,
        ("torch.float64 and torch.float32", "one dtype")),
    "Gram of a structure without rows": Case(lambda: built("kfac").gram(), NO_FORM,
        ("gram", "D = 43 parameters", 'Try: structure="full"')),
}  # fmt: skip


def wide() -> nn.Module:
    return nn.Linear(300, 200, dtype=F64)


def of_wide(structure: str, budget: int) -> object:
    """A layer of 60,200 parameters; its activation factor alone takes 0.7 MB."""
    return ef(wide(), (normal(3, 300), Y[:3]), structure=structure, memory_budget=budget)


NOTHING_YET = "Nothing has been computed yet"

MEMORY: dict[str, Case] = {
    "kfac": Case(lambda: of_wide("kfac", 100_000), BUDGET,
        ('structure="kfac": got a need of 1.04 MB', "at most 100 kB, the memory budget", NOTHING_YET,
            'Try: structure="diagonal"')),
    "ekfac of three vectors": Case(lambda: of_wide("ekfac", 10_000), BUDGET,
        ('structure="ekfac": got a need of 12.1 kB', "at most 10 kB, the memory budget", NOTHING_YET, "Try:")),
    "block": Case(lambda: of_wide("block", 5_000), BUDGET,
        ('structure="block": got a need of', NOTHING_YET, 'Try: structure="kfac"')),
    "diagonal": Case(lambda: of_wide("diagonal", 1_000), BUDGET,
        ('structure="diagonal": got a need of', NOTHING_YET, "Try:")),
    "Gram": Case(lambda: built(budget=400).gram(), BUDGET,
        (".gram: got a R × R matrix of", "with R = 6", ", the memory budget",
            "Try: fisher.matvec and fk.estimators")),
    "dense": Case(lambda: built(budget=400).to_dense(), BUDGET,
        (".to_dense: got a D × D matrix", "with D = 43", "Try: fisher.matvec")),
    "eigenvalues": Case(lambda: built(budget=400).eigenvalues(3), NO_FORM,
        ("Neither the Gram nor the dense matrix fits the memory budget", "D = 43 parameters",
            "Try: fk.estimators.lanczos_eigenvalues")),
    "log determinant": Case(lambda: built(budget=400).logdet(0.1), NO_FORM,
        ("iteratively", "Try: fk.estimators.lanczos_logdet")),
}  # fmt: skip


@pytest.mark.parametrize("name", ids(VECTORS))
def test_operations__refuse_bad_vectors(name: str) -> None:
    check(VECTORS[name])


@pytest.mark.parametrize("name", ids(NUMBERS))
def test_operations__refuse_bad_numbers_and_sums(name: str) -> None:
    check(NUMBERS[name])


@pytest.mark.parametrize("name", ids(MEMORY))
def test_memory_budget__what_does_not_fit_is_refused_with_its_size(name: str) -> None:
    check(MEMORY[name])


def test_save__of_streamed_rows_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    says = ("save", "Its rows are streamed from the data", "Try:", "a larger memory_budget")
    check(Case(lambda: built(budget=400).save(tmp_path / "f"), NO_FORM, says))
    missing = ("a folder that does not exist", "an existing folder", "Try:")
    check(Case(lambda: built().save(tmp_path / "no" / "f"), ARGUMENT, missing))
    assert list(tmp_path.iterdir()) == []


def test_solve__a_singular_fisher_with_damping_is_fine() -> None:
    solution = built().solve(V, damping=1e-3)
    assert isinstance(solution, Tensor)
    assert bool(torch.isfinite(solution).all())


FIRST_CONTACT: dict[str, tuple[Callable[[], object], type[fk.FisherkitError], tuple[str, ...]]] = {
    "space of no model": (lambda: fk.ParameterSpace.of(None), fk.InvalidTypeError, ("a NoneType as model",)),
    "flatten": (lambda: ef().space.flatten([X]), fk.InvalidTypeError, ("a list", "name -> tensor")),
    "unflatten": (lambda: ef().space.unflatten([1.0]), fk.InvalidTypeError, ("a list", "[D] or [D, K]")),
    "a seed as generator": (lambda: ef().factorize(0.1).sample(3), fk.InvalidTypeError, ("an int as generator",)),
    "no device": (lambda: fk.load("f.safetensors", device=None), fk.InvalidArgumentError, ("device='None'", "cpu")),
    "an empty path": (lambda: fk.load(""), fk.MissingFileError, ("no such file",)),
    "tables": (lambda: fk.evaluation.average("x"), fk.InvalidTypeError, ("a str", "compare()")),
    "a fisher by name": (lambda: fk.merging.merge_layers([mlp(), mlp()], [(X, Y)] * 2, fisher="kfac"),
        fk.InvalidTypeError, ("fisher='kfac'", "structure=")),
    "free": (lambda: fk.continual.EWC(m := mlp()).consolidate(ef(m.eval()), free=3), fk.InvalidTypeError,
        ("params of type int",)),
}  # fmt: skip


@pytest.mark.parametrize("name", ids(FIRST_CONTACT))
def test_first_contact__raises_no_raw_error(name: str) -> None:
    call, error, says = FIRST_CONTACT[name]
    with pytest.raises(error) as caught:
        call()
    assert all(piece in str(caught.value) for piece in says), str(caught.value)
