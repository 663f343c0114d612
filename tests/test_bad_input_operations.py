"""Bad vectors, dampings, budgets and files for a Fisher that was built from a model.

`test_operator_errors` asks the operators themselves; here it is the built object's own name and its numbers that count.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from tests.bad_input import F64, Case, D, X, Y, check, ef, ids, mlp, normal

ARGUMENT, TYPE, UNKNOWN = fk.InvalidArgumentError, fk.InvalidTypeError, fk.UnknownParameterError
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
        ("eigenvalues(k=0): got k = 0", "an integer from 1 to D = 43")),
    "more eigenvalues than parameters": Case(lambda: built("ekfac").eigenvalues(44), ARGUMENT,
        ("got k = 44", "an integer from 1 to D = 43")),
    "eigenvalues by flag": Case(lambda: built().eigenvalues(True), ARGUMENT, ("got k = True", "an integer")),
    "negative multiple": Case(lambda: -1.0 * built(), ARGUMENT,
        ("EmpiricalFisher * -1.0: got scale -1.0", "expected a finite number, 0 or more")),
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
        ('structure="kfac": got a need of 1.04 MB', "at most memory_budget = 100 kB", NOTHING_YET,
            'Try: structure="diagonal"')),
    "ekfac": Case(lambda: of_wide("ekfac", 100_000), BUDGET,
        ('structure="ekfac": got a need of 1.53 MB', "memory_budget = 100 kB", "Try:")),
    "block": Case(lambda: of_wide("block", 5_000), BUDGET,
        ('structure="block": got a need of', NOTHING_YET, 'Try: structure="kfac"')),
    "diagonal": Case(lambda: of_wide("diagonal", 1_000), BUDGET,
        ('structure="diagonal": got a need of', NOTHING_YET, "Try:")),
    "Gram": Case(lambda: built(budget=400).gram(), BUDGET,
        (".gram: got a R × R matrix of", "with R = 6", "at most memory_budget = ",
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
