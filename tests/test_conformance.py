"""Every operation of kinds × structures × model families against the brute-force reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fisherkit.testing import check_fisher
from tests.conformance_cases import STRUCTURES, annotations_checked, build, cells, entry, reference_dense
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
        report = check_fisher(fisher, expected, tolerance=CONFORMANCE[dtype])
    record_property(*entry(report, family, kind, structure, dtype))
    assert report.refused == (() if structure == "full" else ("gram",))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", CONFORMANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_operation__is_the_reference_s_on_an_accelerator(
    structure: str, dtype: torch.dtype, record_property: Record
) -> None:
    for family, kind in itertools.product(FAMILIES, ("ef", "exact", "truncated2")):
        fisher = build(family, kind, structure, dtype, device="cuda")
        report = check_fisher(fisher, reference_dense(family, kind, structure), tolerance=CONFORMANCE[dtype])
        record_property(*entry(report, family, kind, structure, dtype, "cuda"))
