"""Second moments and inner products: sums without copies, and their digits."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fisherkit as fk
from fisherkit.fisher import _asked
from fisherkit.rows.base import inner_products, second_moment
from fisherkit.structures import structures
from fisherkit.structures.base import LayerSums
from fisherkit.structures.kronecker import RotatedSquares, SecondMoment
from tests import by_hand


def chunks(width: int, sizes: Sequence[int] = (700, 300, 41)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)
    return [torch.randn(n, 2, width, generator=generator, dtype=torch.float64) for n in sizes]


@pytest.mark.parametrize("width", [3, 300, 513, 1030])
@pytest.mark.parametrize("transposed", [True, False])
def test_second_moment__adds_up_whatever_comes_in_between(width: int, transposed: bool) -> None:
    first, second, third = (x.mT.contiguous().mT if transposed else x for x in chunks(width))
    sums = SecondMoment(width).add(first)
    early = sums.dense().clone()
    whole = sums.add(second, third).scaled(0.5).merge(SecondMoment(width).add(first)).add(third)
    moments = [torch.einsum("nti,ntj->ij", x, x) for x in (first, second, third)]
    torch.testing.assert_close(early, moments[0])
    torch.testing.assert_close(whole.dense(), 1.5 * moments[0] + 0.5 * moments[1] + 1.5 * moments[2])
    # To rounding: blocks below a size are as symmetric as the processor's product of a matrix with itself is.
    torch.testing.assert_close(whole.dense(), whole.dense().mT, rtol=1e-15, atol=1e-12)


def test_second_moment__adds_to_no_tensor_of_others() -> None:
    width, given = 600, torch.eye(600, dtype=torch.float64)
    one, two = SecondMoment(width, (), given), SecondMoment(width, thin=False).add(*chunks(width))
    before = two.dense().clone()
    for other in (one, two, two.scaled(1.0)):
        SecondMoment(width).merge(other).add(*chunks(width))
    one.add(*chunks(width))
    two.merge(SecondMoment(width).add(*chunks(width, (5,))))
    assert torch.equal(given, torch.eye(width, dtype=torch.float64))
    assert torch.equal(two.dense(), before)


def test_second_moment__makes_no_other_matrix_and_copies_nothing_to_add_more() -> None:
    class Made(TorchDispatchMode):
        entries = copies = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            self.copies += func is torch.ops.aten.copy_.default
            if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in known:
                self.entries = max(self.entries, found.numel())
            return found

    width = 1030
    first, *more = chunks(width, (700, 40, 40))
    sums = SecondMoment(width).add(first)
    known = [x.untyped_storage().data_ptr() for x in (sums.dense(), *more)]
    with Made() as made:
        sums.add(*more)
    assert made.copies == 0
    assert made.entries <= 40 * 2 * width


def test_second_moment__of_its_own_becomes_the_factor_in_place_and_an_average_stays() -> None:
    given = chunks(600, (700,))
    moment = torch.einsum("nti,ntj->ij", given[0], given[0])
    own, average = (SecondMoment(600, thin=False).add(*given) for _ in range(2))
    average = average.scaled(0.5)
    place = own.dense()
    for sums, expected in ((own, moment / 8), (average, moment / 16), (average, moment / 16)):
        factor, _ = sums.at(1 / 8)
        torch.testing.assert_close(factor, expected)
        assert (factor.data_ptr() == place.data_ptr()) == (sums is own)


@pytest.mark.parametrize("width", [5, 600])
@pytest.mark.parametrize(
    "used", [lambda sums: sums.add(*chunks(sums.width)), lambda sums: sums.at(0.5)], ids=["add", "at"]
)
@pytest.mark.parametrize(
    "again",
    [
        lambda sums: sums.add(*chunks(sums.width)), lambda sums: sums.at(0.5), lambda sums: sums.dense(),
        lambda sums: sums.scaled(2.0), lambda sums: sums.merge(SecondMoment(sums.width).add(*chunks(sums.width))),
        lambda sums: SecondMoment(sums.width).merge(sums),
    ],
    ids=["add", "at", "dense", "scaled", "merge", "merged"],
)  # fmt: skip
def test_second_moment__that_was_written_to_is_not_asked_again(width: int, used: Any, again: Any) -> None:
    sums = SecondMoment(width, thin=False).add(*chunks(width))
    sums.dense()
    used(sums)
    with pytest.raises(RuntimeError, match="go on with what came of it"):
        again(sums)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "nkp", "diagonal", "block", "full"])
def test_fisher__in_inference_mode_is_the_same(structure: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    data = [(torch.randn(n, 3, dtype=torch.float64), torch.randint(3, (n,))) for n in (20, 20, 7)]
    expected = fk.EmpiricalFisher(model, data, structure=structure).to_dense()
    with torch.inference_mode():
        found = fk.EmpiricalFisher(model, data, structure=structure).to_dense()
    torch.testing.assert_close(found, expected)


def test_ekfac__sums_that_grow_in_place_are_no_one_elses() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 4).double(), torch.randn(60, 3, dtype=torch.float64)
    builder = _asked("test", model, [(x, torch.arange(60) % 4)], "ef", {"structure": "ekfac"}).builder
    structure = builder._chosen(structures()["ekfac"])
    chunks = list(builder.problem.chunks("rows"))
    (factors,) = structure.empty(builder.problem).added(chunks).units.values()
    names = ("weight", "bias")
    start = LayerSums(structure, {names: RotatedSquares.zeros(factors, torch.float64, names)}, {})
    one = start.added(chunks)
    before = one.units[names].total.clone()
    three = one.added([*chunks, *chunks])
    assert torch.equal(one.units[names].total, before)
    assert not start.units[names].total.any()
    torch.testing.assert_close(three.units[names].total, 3 * before)


# -- what float32 leaves of a solve ------------------------------------------------------------------------------------


def case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 64), nn.Tanh(), nn.Linear(64, 10))
    return model, torch.randn(100, 50), torch.randint(10, (100,))


@pytest.mark.parametrize("relative", [1e-1, 1e-3, 1e-5, 1e-7])
def test_float32_solve__meets_its_equation_at_any_damping(relative: float) -> None:
    """The gradient lies in the span of the rows, where Woodbury's difference cancels most."""
    model, x, y = case()
    fisher = fk.ImprovedEmpiricalFisher(model, (x, y))
    v = by_hand.gradient(F.cross_entropy(model(x), y), model)
    damping = relative * float(fisher.trace())
    factorization = fisher.factorize(damping)
    solution, info = factorization.matvec(v, return_info=True)
    assert info.method == "woodbury"
    assert float(info.residual.max()) <= 3e-5
    assert all(slot.rows.tensors()["gradients"].dtype == torch.float32 for slot in factorization._rows.slots)
    # What is left is the conditioning: rounding of v alone moves the solution by eps · λ_max / λ.
    wide = fk.ImprovedEmpiricalFisher(copy.deepcopy(model).double(), (x.double(), y))
    expected = wide.solve(v.double(), damping=damping)
    condition = 1 + float(wide.eigenvalues(1)[0]) / damping
    assert (solution - expected).norm() <= 10 * condition * torch.finfo(torch.float32).eps * expected.norm()


@pytest.mark.parametrize("shape", [(3, 0), (5, 300), (40, 1024), (300, 700)])
@pytest.mark.parametrize("precise", [True, False])
def test_inner_products__have_the_digits_that_are_asked_for(shape: tuple[int, int], precise: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=generator) for _ in range(2))
    for other in (x, y):
        expected = x.double() @ other.double().mT
        error = (inner_products(x, other, precise) - expected).abs().max() if shape[1] else torch.zeros(())
        scale = x.norm(dim=1).max() * other.norm(dim=1).max()
        assert error <= (1e-13 if precise else 1e-6) * scale


@pytest.mark.parametrize("width", [3, 1030])
@pytest.mark.parametrize("transposed", [True, False])
def test_second_moment__is_the_sum_over_all_vectors(width: int, transposed: bool) -> None:
    x = torch.randn(4, 700, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = x.mT.contiguous().mT if transposed else x
    torch.testing.assert_close(second_moment(given), torch.einsum("nti,ntj->ij", x, x))
