"""Every operation of kinds × structures × model families against the brute-force reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fisherkit as fk
from fisherkit.testing import check_fisher
from tests.conformance_cases import STRUCTURES, annotations_checked, build, cells, check, entry, reference_dense
from tests.kronecker_cases import expected_matrix
from tests.reference.models import FAMILIES
from tests.tolerances import CONFORMANCE

Record = Callable[[str, Any], None]


@pytest.mark.parametrize(("family", "kind", "structure", "dtype"), cells(STRUCTURES))
def test_every_operation__is_the_reference_s(
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
