"""What lower precision costs: results in float32, with TF32, and of a bfloat16 model, against float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

import fisherkit as fk
from examples.benchmarks.contestants import DAMPING
from examples.benchmarks.measure import Record
from examples.benchmarks.workloads import Workload

PRECISIONS: dict[str, tuple[torch.dtype, bool]] = {
    "float32": (torch.float32, False),
    "float32, TF32 matmuls": (torch.float32, True),
    "bfloat16 model": (torch.bfloat16, False),
}
EXAMPLES = 64
"""At most: float64 is slow on many devices."""


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Matmuls and convolutions with TF32 or without; no effect on devices that have no TF32."""
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    try:
        matmul.allow_tf32 = convolution.allow_tf32 = allowed
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def results(workload: Workload, vector: Tensor) -> dict[str, Tensor]:
    """Product, Gram, solve and diagonal of the empirical Fisher, product of the exact one."""
    data = workload.data
    ef = fk.EmpiricalFisher(workload.model, data)
    v = vector.to(ef.dtype)
    exact = fk.ExactFisher(workload.model, data)
    return {
        "EF product": ef @ v,
        "exact product": exact @ v,
        "EF Gram": ef.gram(),
        "EF solve": ef.solve(ef @ v, damping=DAMPING),
        "EF diagonal": fk.EmpiricalFisher(workload.model, data, structure="diagonal").diagonal(),
    }


def accuracy(workload: Workload) -> list[Record]:
    """Relative errors by precision and result."""
    small = workload.take(EXAMPLES)
    generator = torch.Generator().manual_seed(2)
    vector = torch.randn(workload.size, generator=generator, dtype=torch.float64).to(small.inputs.device)
    with tf32(False):
        reference = results(small.to(small.inputs.device, torch.float64), vector)
    found = []
    for name, (dtype, allowed) in PRECISIONS.items():
        record: Record = {"workload": workload.name, "precision": name, "device": small.inputs.device.type}
        with tf32(allowed):
            try:
                record["errors"] = _errors(reference, results(small.to(small.inputs.device, dtype), vector))
            except (fk.FisherkitError, RuntimeError) as error:
                record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        found.append(record)
    return found


def _errors(reference: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        name: float((found[name].double() - expected.double()).norm() / expected.double().norm())
        for name, expected in reference.items()
    }
