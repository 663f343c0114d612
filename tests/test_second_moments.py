"""Second moments that are added up: right in any order, in place, and in no one else's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fisherkit as fk
from fisherkit.fisher import _asked
from fisherkit.structures import structures
from fisherkit.structures.base import LayerSums
from fisherkit.structures.kronecker import RotatedSquares, SecondMoment


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
    assert torch.equal(whole.dense(), whole.dense().mT)


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
    start = LayerSums(structure, {names: RotatedSquares.zeros(factors, torch.float64)}, {})
    one = start.added(chunks)
    before = one.units[names].total.clone()
    three = one.added([*chunks, *chunks])
    assert torch.equal(one.units[names].total, before)
    assert not start.units[names].total.any()
    torch.testing.assert_close(three.units[names].total, 3 * before)
