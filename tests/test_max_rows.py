"""Fishers of their rows of largest norm: against dense rows by autograd, and what must not change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.operators import LowRankOperator, unwrap
from fisherkit.rows.base import StoredRows
from fisherkit.rows.collection import LargestRows, Rows, UnitSlot
from fisherkit.space import ParameterSpace
from fisherkit.testing import check_fisher
from tests.conformance_cases import KINDS, build, problem, reference_rows, relative_error
from tests.reference.models import EVERY_FORM
from tests.test_invariances import batches
from tests.tolerances import CONFORMANCE

F64 = torch.float64
SOME = ["mlp", "residual", "conv2d", "linear_3d", "token_mlp", "mapping_batch_by_token"]
every_form = pytest.mark.parametrize("family", EVERY_FORM)


def separate(rows: Tensor) -> int:
    """How many rows to keep, about half, so that no other row is as large as the last one."""
    squares = rows.square().sum(1).sort(descending=True).values
    gaps = squares[:-1] - squares[1:] > 1e-6 * squares[0]
    middle = len(rows) // 2
    found = [i for i in range(1, len(rows)) if gaps[i - 1]]
    return min(found, key=lambda i: abs(i - middle)) if found else len(rows)


def largest(rows: Tensor, count: int) -> Tensor:
    return rows[rows.square().sum(1).topk(count).indices.sort().values]


def rows_of(fisher: fk.FisherApproximation) -> Rows:
    operator = unwrap(fisher)
    assert isinstance(operator, LowRankOperator)
    assert isinstance(operator.row_source, Rows)
    return operator.row_source


def up_to_sign(got: Tensor, expected: Tensor) -> float:
    """The relative error of rows whose sign is a matter of taste: only their products with themselves count."""
    assert got.shape == expected.shape
    signs = (got * expected).sum(1, keepdim=True).sign()
    return relative_error(got * signs, expected)


class Softmax:
    """A small perceptron and its exact Fisher's rows, by autograd from the Cholesky factor S of diag(p) − p pᵀ."""

    def __init__(self, examples: int = 24) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 3)).double()
        self.data = 3 * torch.randn(examples, 5).double(), torch.randint(3, (examples,))
        found = []
        for x in self.data[0]:
            z = self.model(x)
            p = z.detach().softmax(0)
            most = torch.linalg.cholesky((torch.diag(p) - torch.outer(p, p))[:-1, :-1])
            for v in torch.cat([most, -most.sum(0, keepdim=True)]).mT:  # S's columns add up to 0
                grads = torch.autograd.grad((z * v).sum(), list(self.model.parameters()), retain_graph=True)
                found.append(torch.cat([g.flatten() for g in grads]))
        self.rows = torch.stack(found)

    def build(self, **options: Any) -> fk.ExactFisher:
        return fk.ExactFisher(self.model, self.data, **options)

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*(part.split(size) for part in self.data), strict=True))


@pytest.fixture(scope="module")
def softmax() -> Softmax:
    return Softmax()


# -- against the reference ---------------------------------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("kind", ["ief", "truncated2"])
def test_max_rows__are_the_reference_s_largest_in_its_order(family: str, kind: str) -> None:
    reference = reference_rows(family, kind).matrix
    count = separate(reference)
    kept = largest(reference, count)
    fisher = build(family, kind, "full", max_rows=count)
    assert fisher.rows == count
    assert up_to_sign(rows_of(fisher).dense(), kept) < CONFORMANCE[F64]
    left_out = 1 - float(kept.square().sum() / reference.square().sum())
    assert fisher.dropped_share == pytest.approx(left_out, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("kind", ["ef", "truncated2"])
def test_every_operation__of_the_largest_rows_is_the_reference_s(family: str, kind: str) -> None:
    reference = reference_rows(family, kind)
    kept = largest(reference.matrix, separate(reference.matrix))
    fisher = build(family, kind, "full", max_rows=len(kept))
    report = check_fisher(fisher, kept.mT @ kept / reference.count, tolerance=CONFORMANCE[F64])
    assert report.refused == ()


@pytest.mark.parametrize("normalization", ["mean", "sum"])
def test_exact__is_that_of_its_largest_rows(softmax: Softmax, normalization: str) -> None:
    kept = largest(softmax.rows, 20)
    fisher = softmax.build(max_rows=20, normalization=normalization)
    expected = kept.mT @ kept / (24 if normalization == "mean" else 1)
    assert check_fisher(fisher, expected).refused == ()
    assert (fisher.rows, fisher.examples) == (20, 24)
    assert fisher.dropped_share == pytest.approx(1 - float(kept.square().sum() / softmax.rows.square().sum()))


# -- what it is --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("mlp", kind) for kind in KINDS), ("conv2d", "ef"), ("conv2d", "exact"), ("token_mlp", "sf5")],
)
def test_more_rows__come_closer_from_below(family: str, kind: str) -> None:
    """F_r ≼ F_s ≼ F for r < s in the Loewner order, and tr F_r = (1 − dropped_share) tr F."""
    whole = build(family, kind, "full")
    exact = whole.to_dense()
    below, room = torch.zeros_like(exact), 1e-12 * float(exact.trace())
    for count in sorted({1, whole.rows // 2 + 1, whole.rows}):
        fisher = build(family, kind, "full", max_rows=count)
        assert fisher.rows == count
        now = fisher.to_dense()
        for difference in (exact - now, now - below):
            assert float(torch.linalg.eigvalsh(difference).min()) >= -room
        share = 1 - float(fisher.trace() / whole.trace())
        assert fisher.dropped_share == pytest.approx(share, rel=1e-9, abs=1e-12)
        below = now


@pytest.mark.parametrize("kind", KINDS)
def test_max_rows__of_at_least_all_changes_nothing(kind: str) -> None:
    whole = build("mlp", kind, "full")
    for count in (whole.rows, 10 * whole.rows):
        fisher = build("mlp", kind, "full", max_rows=count)
        assert torch.equal(fisher.to_dense(), whole.to_dense())
        assert (fisher.rows, fisher.dropped_share) == (whole.rows, 0.0)
        assert "trace" not in f"{fisher!r} {fisher.coverage()}"


@pytest.mark.parametrize("family", SOME)
def test_batch_split__keeps_the_same_rows(family: str) -> None:
    reference = reference_rows(family, "truncated2").matrix
    count = separate(reference)
    whole = rows_of(build(family, "truncated2", "full", max_rows=count)).dense()
    for data in (batches(problem(family), 1, 2), batches(problem(family), 1, 1, 1)):
        for chunk_size in (None, 1, 5):
            fisher = build(family, "truncated2", "full", data=data, max_rows=count, chunk_size=chunk_size)
            assert relative_error(rows_of(fisher).dense(), whole) < CONFORMANCE[F64]


@pytest.mark.parametrize(
    ("size", "chunk_size", "count"), [(1, None, 7), (5, None, 1), (5, 1, 30), (5, 4, 7), (24, 1, 7), (24, 4, 30)]
)
def test_batch_split_and_chunks__keep_the_same_exact_rows(
    softmax: Softmax, size: int, chunk_size: int | None, count: int
) -> None:
    fisher = fk.ExactFisher(softmax.model, softmax.batches(size), max_rows=count, chunk_size=chunk_size)
    assert relative_error(rows_of(fisher).dense(), largest(softmax.rows, count)) < CONFORMANCE[F64]


def stored(values: Tensor) -> Rows:
    space = ParameterSpace.of(nn.Linear(values.shape[1], 1, bias=False), None)
    return Rows(space, [UnitSlot(space.names, StoredRows(values))])


@pytest.mark.parametrize("pieces", [1, 2, 3, 10])
def test_equal_norms__leave_the_earlier_rows(pieces: int) -> None:
    norms = torch.tensor([1.0, 2, 3, 2, 1, 2, 2, 3, 1, 2])
    for most, expected in {
        1: [2],
        2: [2, 7],
        4: [1, 2, 3, 7],
        6: [1, 2, 3, 5, 6, 7],
        8: [0, 1, 2, 3, 5, 6, 7, 9],
    }.items():
        found = LargestRows(most)
        for piece in torch.diag(norms).tensor_split(pieces):
            found.add(stored(piece))
        rows, share = found.result()
        assert rows.dense().argmax(1).tolist() == expected
        assert share == pytest.approx(1 - float(norms[expected].square().sum() / norms.square().sum()))


def test_largest__holds_few_rows() -> None:
    found, most = LargestRows(10), 0
    for piece in torch.randn(1000, 4, generator=torch.Generator().manual_seed(0)).split(5):
        found.add(stored(piece))
        most = max(most, sum(rows.count for rows in found._held))
    assert most <= 20
    assert found.seen == 1000


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_budget__is_kept_by_rows_that_do_not_all_fit(softmax: Softmax) -> None:
    """What would be streamed is cut into pieces of a size that leaves room for the rows that are held."""
    wide = Softmax(200)
    whole = wide.build()
    budget = rows_of(whole).nbytes // 2
    assert wide.build(memory_budget=budget).coverage().entries[0].structure == "full, streamed rows"
    fisher = wide.build(memory_budget=budget, max_rows=40)
    assert rows_of(fisher).nbytes < budget
    torch.testing.assert_close(rows_of(fisher).dense(), largest(wide.rows, 40))
    assert not [e for e in fisher.coverage().entries if "streamed" in e.structure]


def test_memory_budget__below_the_largest_rows_is_refused(softmax: Softmax) -> None:
    budget = rows_of(softmax.build()).nbytes // 2
    with pytest.raises(fk.MemoryBudgetError, match="max_rows below 60") as caught:
        softmax.build(memory_budget=budget, max_rows=60)
    assert "Nothing has been computed" in str(caught.value)


def test_kept_rows__leave_the_activations_of_others_behind(softmax: Softmax) -> None:
    rows = rows_of(softmax.build(max_rows=3))
    for slot in rows.slots:
        examples = slot.rows.tensors()["activations"].shape[0]
        assert examples <= 3
    conv = build("conv2d", "ef", "full", max_rows=1)
    assert rows_of(conv).nbytes < rows_of(build("conv2d", "ef", "full")).nbytes


# -- reported, saved, refused ------------------------------------------------------------------------------------------


def test_what_is_left_out__is_reported_and_saved(softmax: Softmax, tmp_path: Path) -> None:
    fisher = softmax.build(max_rows=20)
    assert fisher.metadata["max_rows"] == "20"
    assert fisher.metadata["rows"] == "20"
    assert float(fisher.metadata["dropped_share"]) == fisher.dropped_share
    told = f"{100 * fisher.dropped_share:.3g}% of "
    assert told in repr(fisher)
    assert told in repr(0.5 * fisher)
    assert all(entry.reason.endswith(f"20 of 48 rows, {told}the trace left out") for entry in fisher.coverage().entries)
    fisher.save(tmp_path / "f.safetensors")
    loaded = fk.load(tmp_path / "f.safetensors")
    assert {key: loaded.metadata[key] for key in ("max_rows", "dropped_share")} == {
        key: fisher.metadata[key] for key in ("max_rows", "dropped_share")
    }
    assert told in repr(loaded)
    assert torch.equal(loaded.to_dense(), fisher.to_dense())


def test_without_max_rows__nothing_is_said(softmax: Softmax) -> None:
    fisher = softmax.build()
    assert fisher.dropped_share is None
    assert not {"max_rows", "dropped_share"} & set(fisher.metadata)


@pytest.mark.parametrize("structure", ["block", "diagonal", "kfac", "ekfac"])
def test_other_structures__refuse_max_rows(softmax: Softmax, structure: str) -> None:
    with pytest.raises(fk.InvalidArgumentError, match=f"max_rows=5 with structure='{structure}'.*expected.*full"):
        softmax.build(structure=structure, max_rows=5)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, fk.InvalidArgumentError),
        (-3, fk.InvalidArgumentError),
        (2.0, fk.InvalidTypeError),
        (True, fk.InvalidTypeError),
    ],
)
def test_max_rows__that_are_no_number_of_rows_are_refused(softmax: Softmax, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_rows"):
        softmax.build(max_rows=value)
