"""Kronecker structures, and every operation of every structure, against the reference."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit import EmpiricalFisher, ExactFisher, SingularMatrixError
from fisherkit.structures.kronecker import SMALL_BLOCK
from fisherkit.testing import check_fisher
from tests.conformance_cases import (
    STRUCTURES,
    annotations_checked,
    build,
    cells,
    check,
    entry,
    reference_dense,
    reference_rows,
    relative_error,
)
from tests.kronecker_cases import RECURRENT, captured, expected_matrix
from tests.reference import fisher as reference
from tests.reference.fisher import Problem
from tests.reference.kronecker import Sharing
from tests.reference.models import FAMILIES
from tests.reference.outputs import EF
from tests.tolerances import CONFORMANCE

Record = Callable[[str, Any], None]

METHODS = ("kfac", "ekfac")
SHARING: dict[str, Sharing] = {"kfac": "expand", "ekfac": "expand", "kfac_reduce": "reduce", "ekfac_reduce": "reduce"}


@pytest.mark.parametrize(
    ("family", "kind", "structure", "dtype"),
    [c for c in cells(METHODS, reduced=("kfac_reduce", "ekfac_reduce")) if c.values[0] not in RECURRENT],
)
def test_every_operation__is_the_reference_s(
    family: str, kind: str, structure: str, dtype: torch.dtype, record_property: Record
) -> None:
    method, sharing = structure.removesuffix("_reduce"), SHARING[structure]
    with annotations_checked(dtype == torch.float32):
        fisher = build(family, kind, method, dtype, kfac_positions=sharing)
    entries = fisher.coverage().entries
    assert {e.parameters for e in entries if e.structure == method} == set(captured(family, kind))
    assert sorted(name for e in entries for name in e.parameters) == sorted(fisher.space.names)
    assert {e.structure for e in entries} <= {method, "exact block"}
    expected = expected_matrix(family, kind, method, sharing, fisher)
    with annotations_checked(dtype == torch.float32):
        report = check(fisher, expected, family, kind, dtype)
    record_property(*entry(report, family, kind, structure, dtype))
    assert report.refused == ("gram",)
    if method == "ekfac":
        trace = reference.full(reference_rows(family, kind)).trace()
        assert relative_error(fisher.trace(), trace) < CONFORMANCE[dtype]


def test_units_without_a_rule__get_a_block_if_small_and_a_diagonal_if_not() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(70, 4), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3)).double()
        ids, y = torch.randint(70, (5, 2)), torch.randint(3, (5,))
    rows = reference.rows(Problem(model, ids, y), EF)
    exact = reference.full(rows)
    assert model[0].weight.numel() > SMALL_BLOCK
    for method in METHODS:
        fisher = EmpiricalFisher(model, (ids, y), structure=method)
        found = {entry.parameters: entry.structure for entry in fisher.coverage().entries}
        assert found == {
            ("0.weight",): "exact diagonal",
            ("2.weight", "2.bias"): "exact block",
            ("3.weight", "3.bias"): method,
        }
        dense = fisher.to_dense()
        table, norm = rows.layout["0.weight"], slice(rows.layout["2.weight"].start, rows.layout["2.bias"].stop)
        assert_same(dense[table, table], exact[table, table].diagonal().diag())
        assert_same(dense[norm, norm], exact[norm, norm])
        assert float(dense[norm, table].abs().max()) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["mlp", "token_mlp_by_token", "conv2d"])
def test_sum_normalization__scales_every_block(family: str, method: str) -> None:
    fisher = build(family, "exact", method, normalization="sum")
    expected = reference_rows(family, "exact").count * expected_matrix(family, "exact", method, "expand", fisher)
    check_fisher(fisher, expected, tolerance=CONFORMANCE[torch.float64])


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert relative_error(got, expected) < CONFORMANCE[torch.float64]


def test_ekfac__with_rounding_for_eigenvalues_is_singular_without_damping() -> None:
    """Squares of rounding in a null space are not eigenvalues that anything could be divided by."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3))
    for dtype in (torch.float32, torch.float64):
        model, x, y = model.to(dtype), torch.randn(60, 6, dtype=dtype), torch.randint(0, 3, (60,))
        fisher = ExactFisher(model, (x, y), structure="ekfac")
        with pytest.raises(SingularMatrixError, match="singular"):
            fisher.solve(torch.ones(fisher.size, dtype=dtype), damping=0.0)


# -- every operation of kinds × structures × model families ------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind", "structure", "dtype"), cells(STRUCTURES))
def test_every_operation_of_all_structures__is_the_reference_s(
    family: str, kind: str, structure: str, dtype: torch.dtype, record_property: Record
) -> None:
    expected = reference_dense(family, kind, structure)
    with annotations_checked(dtype == torch.float32):
        fisher = build(family, kind, structure, dtype)
        report = check(fisher, expected, family, kind, dtype)
    record_property(*entry(report, family, kind, structure, dtype))
    assert report.refused == (() if structure == "full" else ("gram",))


on_an_accelerator = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_an_accelerator
@pytest.mark.parametrize("structure", [*STRUCTURES, "kfac", "ekfac"])
@pytest.mark.parametrize("dtype", CONFORMANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_operation__is_the_reference_s_on_an_accelerator(
    structure: str, dtype: torch.dtype, record_property: Record
) -> None:
    for family, kind in itertools.product(FAMILIES, ("ef", "ief", "sf5", "exact", "truncated2")):
        fisher = build(family, kind, structure, dtype, device="cuda")
        if structure in STRUCTURES:
            expected = reference_dense(family, kind, structure)
        else:
            expected = expected_matrix(family, kind, structure, "expand", fisher)
        report = check_fisher(fisher, expected, tolerance=CONFORMANCE[dtype])
        record_property(*entry(report, family, kind, structure, dtype, "cuda"))


@pytest.mark.gpu
@on_an_accelerator
def test_vector_on_another_device__is_refused() -> None:
    fisher = build("mlp", "ef", "full", device="cuda")
    with pytest.raises(fk.InvalidArgumentError, match=r"a vector on cpu; expected cuda"):
        fisher @ torch.zeros(fisher.size, dtype=torch.float64)
