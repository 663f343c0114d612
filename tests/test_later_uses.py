"""Uses of a parameter that the first two examples, or an earlier build of the same model, did not show."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from tests import by_hand
from tests.axes import pairwise

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randint(1, 6, (8, 4), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """A function of some parameters, and of settings that no comparison of models sees."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...], **settings: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.own = nn.ParameterList([torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes])
        self.function, self.settings = function, settings

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.own, **self.settings)


def check(model: nn.Module, x: Tensor, **options: Any) -> None:
    fisher = fk.ExactFisher(model, (x, None), likelihood="gaussian", **options)
    expected = by_hand.fisher(model, (x, None), "gaussian")
    eye = torch.eye(fisher.size, dtype=torch.float64)
    expected = torch.diag(expected.diagonal()) if options.get("structure") == "diagonal" else expected
    torch.testing.assert_close(fisher @ eye, expected)


@pytest.mark.parametrize("structure", ["full", "diagonal"])
@pytest.mark.parametrize("width", [3, 5])
def test_weight__in_two_einsums_of_opposite_orientation(width: int, structure: str) -> None:
    def tied(x: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("bo,io->bi", torch.einsum("bi,io->bo", x, w).tanh(), w)

    check(Model(tied, (3, width)), X, structure=structure)


@pytest.mark.parametrize("padded", [slice(0, 2), slice(2, None)])
def test_streamed_products__hold_the_padding_tokens_vector_constant(padded: slice) -> None:
    ids = TOKENS.clone()
    ids[padded, 3] = 0
    model = Model(lambda i, w: F.embedding(i, w, padding_idx=0).tanh().sum(1), (6, 3))
    check(model, ids, memory_budget=10)


def test_addmm__scaled_in_later_examples_alone() -> None:
    def scaled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.cat([torch.addmm(b, one, w, alpha=1.0 + float(one[0, 0] > 0)) for one in x.split(1)])

    x = X.clone()
    x[:, 0] = torch.tensor([-1, -1, 1, 1, 1, 1])
    check(Model(scaled, (3, 3), (3,)), x)


@pytest.mark.parametrize(
    ("function", "shapes", "x", "settings"),
    [
        (lambda x, w, b, scale: torch.addmm(b, x, w, alpha=scale), [(3, 3), (3,)], X, {"scale": (1.0, 2.0)}),
        (lambda x, w, b, scale: torch.addmm(b, x, w, beta=scale), [(3, 3), (3,)], X, {"scale": (1.0, 0.5)}),
        (lambda i, w, f: F.embedding(i, w, scale_grad_by_freq=f).tanh().sum(1), [(6, 3)], TOKENS, {"f": (False, True)}),
        (lambda x, w, k: (x @ w.permute(k)[0]).tanh(), [(3, 3, 3)], X, {"k": ((0, 1, 2), (0, 2, 1))}),
    ],
    ids=["alpha", "beta", "frequency", "permutation"],
)  # fmt: skip
def test_second_build__sees_what_the_first_did_not(
    function: Callable[..., Tensor], shapes: list[tuple[int, ...]], x: Tensor, settings: dict[str, tuple[Any, Any]]
) -> None:
    model = Model(function, *shapes, **{name: pair[0] for name, pair in settings.items()})
    check(model, x)
    model.settings.update({name: pair[1] for name, pair in settings.items()})
    check(model, x)


@pytest.mark.parametrize("options", [{}, {"structure": "diagonal"}, {"storage": "stream"}], ids=str)
def test_several_vectors__of_a_kernel_whose_vectorised_gradient_is_right_for_one(options: dict[str, Any]) -> None:
    def distances(x: Tensor, centres: Tensor, scale: Tensor) -> Tensor:
        return (-torch.cdist(x, centres).square() * scale.exp()).exp()

    check(Model(distances, (4, 3), (4,)), X, **options)


@pytest.mark.parametrize("options", [{}, {"structure": "diagonal"}, {"storage": "stream"}], ids=str)
@pytest.mark.parametrize("sizes", [[6], [1, 5], [1, 1, 4]], ids=str)
def test_several_vectors__of_a_kernel_that_takes_examples_for_vectors(
    sizes: list[int], options: dict[str, Any]
) -> None:
    """What torch.func says of linalg.solve is right for two examples and two vectors, and for one example twice it."""

    def solved(x: Tensor, w: Tensor) -> Tensor:
        return torch.linalg.solve(3 * torch.eye(3).to(w) + w, x.unsqueeze(2)).squeeze(2).tanh()

    model = Model(solved, (3, 3))
    fisher = fk.ExactFisher(model, [(x, None) for x in X.split(sizes)], likelihood="gaussian", **options)
    expected = by_hand.fisher(model, (X, None), "gaussian")
    expected = torch.diag(expected.diagonal()) if options.get("structure") == "diagonal" else expected
    torch.testing.assert_close(fisher @ torch.eye(fisher.size, dtype=torch.float64), expected)


@pytest.mark.parametrize("options", [{}, {"structure": "diagonal"}, {"storage": "stream"}], ids=str)
def test_table__indexed_from_its_end_in_later_examples_alone(options: dict[str, Any]) -> None:
    ids = TOKENS.clone()
    ids[2:, 0] = torch.tensor([-1, -1, -6, -2, -1, 5])
    check(Model(lambda i, w: w[i].tanh().sum(1), (6, 3)), ids, **options)


@pytest.mark.parametrize("options", [{}, {"structure": "diagonal"}, {"storage": "stream"}], ids=str)
def test_embedding__by_frequency_with_repeats_in_later_examples_alone(options: dict[str, Any]) -> None:
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [1, 1, 2], [3, 3, 3], [0, 2, 2]])
    check(Model(lambda i, w: F.embedding(i, w, scale_grad_by_freq=True).tanh().sum(1), (6, 3)), ids, **options)


class _Squared(torch.autograd.Function):
    """Has no derivative forwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * gradients[0]


@pytest.mark.parametrize("columns", [1, 4])
def test_streamed_products__of_a_function_without_forward_derivative_in_a_later_batch(columns: int) -> None:
    def branching(x: Tensor, w: Tensor) -> Tensor:
        pairs = zip(x, (x @ w).split(1), strict=True)
        return torch.cat([_Squared.apply(h) if float(one[0]) > 9 else h.tanh() for one, h in pairs])

    model, x = Model(branching, (3, 4)), torch.cat([X, X])
    x[-1, 0] = 10
    fisher = fk.ExactFisher(model, [(X, None), (x[6:], None)], likelihood="gaussian", storage="stream")
    v = torch.randn(12, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(fisher @ v, by_hand.fisher(model, (x, None), "gaussian") @ v)


# -- layers of no consequence in some batch ----------------------------------------------------------------------------


class Sometimes(nn.Module):
    """A layer that is always used, and of consequence only where the first input is positive.

    Args:
        in_place: its output is overwritten where it is not; else it is left alone.
    """

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.body, self.extra, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 5)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        h, e = self.body(x).tanh(), self.extra(x)
        if bool(x[0, 0] > 0):
            return self.head(h + e)
        return self.head(h + e.zero_().add(1.0) if self.in_place else h)


def batches(*signs: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for sign in signs:
        x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        x[:, 0] = sign * x[:, 0].abs()
        found.append((x, torch.randint(5, (6,), generator=generator)))
    return found


@pytest.mark.parametrize(
    ("structure", "signs", "in_place"),
    pairwise(["diagonal", "ekfac", "full", "block"], [(1, -1, 1), (-1, 1), (1, 1)], [False, True]),
    ids=str,
)
def test_build__of_a_layer_that_is_silent_in_some_batch(structure: str, signs: tuple[int, ...], in_place: bool) -> None:
    torch.manual_seed(0)
    model, data = Sometimes(in_place).double(), batches(*signs)
    expected = by_hand.rows(model, data).square().mean(0)
    whole = fk.EmpiricalFisher(model, data, structure=structure)
    if structure == "ekfac":
        torch.testing.assert_close(whole.trace(), expected.sum())
    else:
        torch.testing.assert_close(whole.diagonal(), expected)


@pytest.mark.parametrize("structure", ["ekfac", "nkp"])
def test_build__in_parts_of_a_layer_that_is_silent_in_a_later_batch(structure: str) -> None:
    torch.manual_seed(0)
    model, data = Sometimes(False).double(), batches(1, -1, 1)
    budget = fk.plan(model, batches(1, 1), structure=structure).result_bytes
    found = fk.EmpiricalFisher(model, data, structure=structure, memory_budget=budget)
    torch.manual_seed(0)
    fresh = Sometimes(False).double()
    whole = fk.EmpiricalFisher(fresh, data, structure=structure)
    torch.testing.assert_close(found.to_dense(), whole.to_dense())


class Mixing(nn.Module):
    """Positions that are apart only where the first input is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).tanh()
        return self.head(h if bool(x[0, 0, 0] > 0) else h + h.mean(1, keepdim=True))


@pytest.mark.parametrize("in_parts", [False, True])
def test_build__of_positions_that_are_mixed_in_a_later_batch(in_parts: bool) -> None:
    torch.manual_seed(0)
    model, generator = Mixing().double(), torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 6, 3, generator=generator, dtype=torch.float64), torch.zeros(4, 6).long()) for _ in "ab"]
    for (x, _), sign in zip(data, (1, -1), strict=True):
        x[..., 0] = sign * x[..., 0].abs()
    options = {"structure": "ekfac"}
    if in_parts:
        options["memory_budget"] = fk.plan(model, data, "exact", **options).result_bytes
        assert len(fk.plan(model, data, "exact", **options).parts) > 1
    found = fk.ExactFisher(model, data, **options)
    torch.testing.assert_close(found.trace(), fk.ExactFisher(model, data, storage="rows").trace())
