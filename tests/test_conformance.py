"""Every kind × structure × operation × model family against the brute-force reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fisherkit.testing import check_fisher
from tests.conformance_cases import DEVICES, KINDS, STRUCTURES, build, entry, reference_dense
from tests.reference.models import FAMILIES
from tests.tolerances import CONFORMANCE

Record = Callable[[str, Any], None]


def cells(
    kinds: tuple[str, ...], structures: tuple[str, ...], dtype: torch.dtype, devices: list[Any] = DEVICES[:1]
) -> Iterator[Any]:
    """Parameters, the structure changing fastest so that neighbours share the reference's rows."""
    name = str(dtype).removeprefix("torch.")
    for device in devices:
        for family in FAMILIES:
            for kind in kinds:
                for structure in structures:
                    label = f"{family}-{kind}-{structure}-{name}-{device.id}"
                    yield pytest.param(family, kind, structure, dtype, *device.values, id=label, marks=device.marks)


GPU_KINDS = ("ef", "sf5", "exact", "truncated2")


@pytest.mark.parametrize(
    ("family", "kind", "structure", "dtype", "device"),
    [
        *cells(tuple(KINDS), tuple(STRUCTURES), torch.float64),
        *cells(("ef", "exact", "truncated2"), ("full", "diagonal"), torch.float32),
    ],
)
def test_every_operation__is_the_reference_s(
    family: str, kind: str, structure: str, dtype: torch.dtype, device: str, record_property: Record
) -> None:
    fisher = build(family, kind, structure, dtype, device)
    report = check_fisher(fisher, reference_dense(family, kind, structure), tolerance=CONFORMANCE[dtype])
    record_property(*entry(report, family, kind, structure, dtype, device))
    assert "save" not in report.refused
    assert "eigenvalues" not in report.refused
    assert "logdet" not in report.refused
    assert ("gram" in report.errors) == (structure == "full")
