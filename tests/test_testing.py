"""`check_fisher` as a user meets it: it accepts a right operator, and says what is wrong with any other."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fisherkit import FisherkitError, FisherOperator, InvalidArgumentError, InvalidTypeError, NoClosedFormError
from fisherkit.io import State
from fisherkit.operators import DenseOperator
from fisherkit.operators.factorization import Factorization
from fisherkit.testing import TOLERANCES, ConformanceError, check_fisher
from tests.operator_cases import CASES, LAYER, TOLERANCE, Pair, positive

ALWAYS = (
    *("matvec", "@", "quadratic_form", "diagonal", "trace", "to_dense", "to_scipy", "symmetry"),
    *("terms", "blocks", "average"),
    *("solve", "factorize", "sample", "scale", "sum", "save"),
)
MAYBE = ("gram", "eigenvalues", "eigenvectors", "effective_dimension", "logdet", "norm")


def test_tolerances__are_those_that_the_documentation_promises() -> None:
    assert {torch.float64: 1e-8, torch.float32: 1e-4} == TOLERANCES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_check_fisher__accepts_every_structure(name: str, dtype: torch.dtype) -> None:
    report = check_fisher(*CASES[name](dtype), tolerance=TOLERANCE[dtype])
    assert set(ALWAYS) <= set(report.errors)
    assert {*ALWAYS, *MAYBE} <= set(report.errors) | set(report.refused) <= {*ALWAYS, *MAYBE, "factors", "eigenbases"}
    assert report.tolerance == TOLERANCE[dtype] <= TOLERANCES[dtype]
    assert report.worst[1] == max(report.errors.values()) < report.tolerance
    assert all(line in str(report) for line in ("matvec", "gram                no closed form"))


def test_check_fisher__accepts_the_zero_matrix() -> None:
    operator = DenseOperator(LAYER, torch.zeros(15, 15, dtype=torch.float64))
    assert check_fisher(operator, torch.zeros(15, 15, dtype=torch.float64)).worst[1] < 1e-15


def test_check_fisher__draws_from_the_generator() -> None:
    operator, matrix = CASES["dense"](torch.float64)
    generator = torch.Generator().manual_seed(5)
    first = check_fisher(operator, matrix, generator=generator)
    second = check_fisher(operator, matrix, generator=generator)
    again = check_fisher(operator, matrix, generator=torch.Generator().manual_seed(5))
    assert first.errors == again.errors != second.errors
    assert first.tolerance == TOLERANCES[torch.float64]


def test_check_fisher__leaves_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    check_fisher(*CASES["block_diagonal"](torch.float64))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[:-1], r"check_fisher\(dense\): got shape \[14, 15\]; expected \[15, 15\]"),
        (lambda m: m / 0, "NaN or infinite entries"),
        (lambda m: m.tril(), "not symmetric"),
    ],
)
def test_check_fisher__refuses_a_reference_that_cannot_be_one(change: Callable[[Tensor], Tensor], message: str) -> None:
    operator, matrix = CASES["dense"](torch.float64)
    with pytest.raises(InvalidArgumentError, match=message):
        check_fisher(operator, change(matrix))


def test_check_fisher__refuses_other_arguments() -> None:
    operator, matrix = CASES["dense"](torch.float64)
    with pytest.raises(InvalidTypeError, match="expected a FisherOperator"):
        check_fisher(matrix, matrix)  # type: ignore[arg-type]
    for tolerance in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidArgumentError, match="a finite number above 0, or None"):
            check_fisher(operator, matrix, tolerance=tolerance)


# -- operators with one thing wrong ------------------------------------------------------------------------------------


class Honest(FisherOperator):
    """A user's operator: the contract's hooks and nothing else, around a matrix."""

    tag = "honest"

    def __init__(self, space: Any, matrix: Tensor) -> None:
        super().__init__(space, dtype=matrix.dtype, device=matrix.device)
        self.matrix = matrix

    def _matmat(self, columns: Tensor) -> Tensor:
        return self.matrix @ columns

    def _diagonal(self) -> Tensor:
        return self.matrix.diagonal().clone()

    def _factorize(self, damping: float, tolerance: float, max_steps: int | None) -> Factorization:
        return Inverse(self, damping)

    def _draw(self, generator: torch.Generator | None, count: int) -> Tensor:
        noise = torch.randn(self.size, count, generator=generator, dtype=self.dtype)
        return torch.linalg.cholesky(self.matrix) @ noise

    def _scaled(self, scale: float) -> FisherOperator:
        return type(self)(self.space, scale * self.matrix)

    def _state(self) -> State:
        return State(self.tag, self.space.names, {"matrix": self.matrix})

    @classmethod
    def _from_state(cls, space: Any, state: State) -> FisherOperator:
        return cls(space, state.tensors["matrix"])


class Inverse(Factorization):
    def _solve(self, columns: Tensor) -> Tensor:
        return torch.linalg.solve(self._shifted(), columns)

    def _logdet(self) -> Tensor:
        return torch.linalg.slogdet(self._shifted()).logabsdet.double()

    def _shifted(self) -> Tensor:
        return self.operator.matrix + self.damping * torch.eye(self.operator.size, dtype=self.operator.dtype)  # type: ignore[attr-defined]


def user_operator(**hooks: Callable[..., Any]) -> Pair:
    """The honest operator with hooks replaced, and its matrix."""
    # A tag of its own, as two classes of one tag could not be told apart in a file.
    made = type("Broken", (Honest,), {"tag": f"broken_{'_'.join(hooks)}", **hooks}) if hooks else Honest
    matrix = positive(LAYER.size, 1, torch.float64)
    return made(LAYER, matrix), matrix


def test_check_fisher__accepts_a_user_s_operator() -> None:
    report = check_fisher(*user_operator())
    assert report.refused == ("effective_dimension", "eigenvalues", "eigenvectors", "gram", "usual_damping")


def refuse(*_: Any) -> Any:
    raise NoClosedFormError(call="Broken.hook", got="a call", try_="something else")


def refuse_curtly(*_: Any) -> Any:
    raise NoClosedFormError(call="Broken.hook", got="a call")


WRONG: dict[str, tuple[dict[str, Callable[..., Any]], str]] = {
    "product": ({"_matmat": lambda s, c: 1.001 * (s.matrix @ c)},
        r"matvec\(\[D, K\]\): got a relative error of 1.00e-03"),
    "transposed_product": ({"_matmat": lambda s, c: s.matrix.triu() @ c}, "matvec"),
    "diagonal": ({"_diagonal": lambda s: s.matrix.diagonal() + 1}, "Broken.diagonal: got a relative error"),
    "trace": ({"_trace": lambda s: 2 * s.matrix.trace()}, "Broken.trace: got a relative error of 1.00e"),
    "trace_dtype": ({"_trace": lambda s: s.matrix.trace().float()},
        "torch.float32, on cpu; expected shape .* torch.float64"),
    "dense": ({"_to_dense": lambda s: s.matrix.sqrt()}, r"Broken.to_dense: got a relative error"),
    "dense_shape": ({"_to_dense": lambda s: s.matrix[:1]}, r"Broken.to_dense: got shape \[1, 15\]"),
    "dense_refused": ({"_to_dense": refuse}, "Broken.to_dense: got NoClosedFormError.*; expected an answer"),
    "eigenvalues": ({"_eigenvalues": lambda s, k: torch.linalg.eigvalsh(s.matrix)[:k]}, r"eigenvalues\(k=None\)"),
    "eigenvectors": ({"_eigenvectors": lambda s, k: torch.linalg.eigh(s.matrix)[1][:, :k].contiguous()},
        r"eigenvectors\(k=1\), F times them: got a relative error"),
    "eigenvectors_norm": ({"_eigenvectors": lambda s, k: 2 * torch.linalg.eigh(s.matrix)[1].flip(1)[:, :k]},
        r"eigenvectors\(k=1\), their inner products"),
    "eigenvectors_shape": ({"_eigenvectors": lambda s, k: s.matrix[:k]}, r"eigenvectors\(k=1\): got \[1, 15\]"),
    "effective_dimension": ({"_effective_dimension": lambda s, damping: (s.matrix / (s.matrix + damping)).trace()},
        r"effective_dimension\(damping=.*: got a relative error"),
    "draws": ({"_draw": lambda s, g, n: Honest._draw(s, g, 1).expand(-1, n)}, r"sample: got draws of \d+\.\d\d times"),
    "eigenvalues_curt": ({"_eigenvalues": refuse_curtly},
        "eigenvalues: got .*; expected a message that says what to use"),
    "gram": ({"_gram": lambda s: s.matrix[:9, :9].contiguous()}, r"gram\(\) eigenvalues"),
    "gram_shape": ({"_gram": lambda s: s.matrix[:9]}, r"gram: got \[9, 15\]; expected a square matrix"),
    "graph": ({"_diagonal": lambda s: s.matrix.clone().requires_grad_().diagonal()}, "an autograd graph behind it"),
    "scale": ({"_scaled": lambda s, f: type(s)(s.space, f**2 * s.matrix)},
        r"scale.matvec: got a relative error of 5.00e-01"),
    "sum": ({"_plus": lambda s, o: type(s)(s.space, s.matrix)}, "sum.matvec"),
    "draw": ({"_draw": lambda s, g, n: torch.zeros(15, n, dtype=torch.float64)}, r"sample: got draws of 0\.\d\d times"),
    "draw_seed": ({"_draw": lambda s, g, n: torch.randn(15, n, dtype=torch.float64)}, "sample.* of the same seed"),
    "save": ({"_state": lambda s: State("nobody's", s.space.names)}, "save: got a file that load refuses"),
    "load": ({"_from_state": classmethod(lambda c, s, t: c(s, 3 * t.tensors["matrix"]))}, "save and load, matvec"),
    "alias": ({"_diagonal": lambda s: s.matrix.diagonal()}, "after a result was changed in place"),
    "in_place": ({"_matmat": lambda s, c: c.copy_(s.matrix @ c)}, "argument that was changed in place"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_check_fisher__names_what_is_wrong(name: str) -> None:
    hooks, message = WRONG[name]
    with pytest.raises(ConformanceError, match=message) as caught:
        check_fisher(*user_operator(**hooks))
    assert isinstance(caught.value, AssertionError)
    assert isinstance(caught.value, FisherkitError)


@pytest.mark.parametrize(
    ("hook", "wrong", "message"),
    [
        ("_solve", lambda s, c: Inverse._solve(s, c) * 1.01,
            r"solve\(\[D, K\], damping=.*: got a relative error of 1.00e-02"),
        ("_solve", lambda s, c: torch.linalg.solve(s.operator.matrix, c), "solve"),
        ("_logdet", lambda s: Inverse._logdet(s) / 2, r"logdet\(damping=.*: got a relative error of [1-9]"),
        ("_logdet", refuse_curtly, "logdet: got .*; expected a message that says what to use"),
    ],
)  # fmt: skip
def test_check_fisher__names_what_is_wrong_with_an_inverse(
    hook: str, wrong: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = type("BrokenInverse", (Inverse,), {hook: wrong})
    operator, matrix = user_operator()
    monkeypatch.setattr(type(operator), "_factorize", lambda s, damping, *_: broken(s, damping))
    with pytest.raises(ConformanceError, match=message):
        check_fisher(operator, matrix)
