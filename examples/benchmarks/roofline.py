"""How close to the machine's limits: arithmetic and bytes of each of our operations against measured rates.

Arithmetic is counted by dispatch mode with torch's own formulas (`torch.utils.flop_counter`), to which textbook counts
of factorizations are added. Bytes are a lower bound: what must be read or written once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fisherkit as fk
from examples.benchmarks.contestants import Case
from examples.benchmarks.measure import Record
from examples.benchmarks.ours import build, contestants
from examples.benchmarks.timing import Clock
from examples.benchmarks.workloads import Workload


def _cube(factor: float) -> Callable[..., float]:
    """Factor · n³ for a batch of n × n matrices."""
    return lambda a, *_, **__: factor * a.numel() * a.shape[-1]


def _triangular(a: Tensor, b: Tensor, *_: Any, **__: Any) -> float:
    """n² a right-hand side, and the smaller matrix is the triangular one."""
    return float(max(a.numel() * b.shape[-1], b.numel() * a.shape[-1]))


_aten = torch.ops.aten
TEXTBOOK: dict[Any, Callable[..., float]] = {
    _aten.linalg_cholesky_ex: _cube(1 / 3),
    _aten._linalg_eigh: _cube(6.0),  # tridiagonal form 4/3, its eigenvectors by divide and conquer 8/3, rotating back 2
    _aten.linalg_qr: _cube(4 / 3),
    _aten.cholesky_inverse: _cube(2 / 3),
    _aten.cholesky_solve: lambda b, factor, *_, **__: 2.0 * b.numel() * factor.shape[-1],
    _aten.linalg_solve_triangular: _triangular,
    _aten.triangular_solve: _triangular,
}
"""Floating-point operations of what torch's own counter leaves out."""


class WorkCounter(TorchDispatchMode):
    """Counts floating-point operations by dtype while active.

    Attributes:
        operations: by dtype.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: dict[torch.dtype, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, then count."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        dtype = next((a.dtype for a in args if isinstance(a, Tensor)), torch.float32)
        if packet in flop_registry:
            self.operations[dtype] += flop_registry[packet](*args, **kwargs, out_val=result)
        elif packet in TEXTBOOK:
            self.operations[dtype] += TEXTBOOK[packet](*args, **kwargs)
        return result


def count(run: Callable[[], Any]) -> dict[torch.dtype, float]:
    """Floating-point operations of a call by dtype."""
    counter = WorkCounter()
    with counter:
        run()
    return dict(counter.operations)


def machine_rates(device: torch.device, *, tiny: bool = False) -> Record:
    """Best matmul rate in float32 and float64, and the bandwidth of a copy (read and write).

    Args:
        device: where.
        tiny: small sizes; the rates mean nothing.
    """
    size = 128 if tiny else 8192 if device.type == "cuda" else 2048
    bandwidth_bytes = 1 << (20 if tiny else 28)
    clock, rates = Clock(device), {}
    for dtype in (torch.float32, torch.float64):
        best = 0.0
        for n in (size, size // 2, size // 4):  # the best of several sizes
            a, b = torch.randn(2, n, n, dtype=dtype, device=device)
            torch.mm(a, b)
            seconds = min(clock.seconds(lambda a=a, b=b: torch.mm(a, b), 3) for _ in range(5))  # type: ignore[misc]
            best = max(best, 2 * n**3 / seconds)
        rates[str(dtype).removeprefix("torch.") + "_flops"] = best
    source = torch.zeros(bandwidth_bytes // 4, device=device)
    target = torch.empty_like(source).copy_(source)
    seconds = min(clock.seconds(lambda: target.copy_(source)) for _ in range(5))
    return {**rates, "bytes_per_second": 2 * bandwidth_bytes / seconds}


def activation_bytes(workload: Workload) -> int:
    """Bytes of all outputs of modules without children in one forward pass."""
    total = 0

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal total
        first = output[0] if isinstance(output, tuple) else output
        total += first.numel() * first.element_size()

    handles = [m.register_forward_hook(hook) for m in workload.model.modules() if not list(m.children())]
    try:
        with torch.enable_grad():
            workload.model(workload.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return total


def least_bytes(case: Case, names: Collection[str]) -> dict[str, float]:
    """What operations must move at least, in bytes: parameters, activations, rows and results, once each way.

    Args:
        case: all parameters of a workload.
        names: of the operations, done before.
    """
    vector = 4.0 * case.vector.numel()
    passes = vector + 2 * activation_bytes(case.workload)  # read parameters, write activations and read them again
    rows, product, gram = _memory(build(case, fk.EmpiricalFisher)), 2 * vector, 8.0 * case.workload.examples**2
    exact = _memory(build(case, fk.ExactFisher, storage="rows")) if "exact_product_cached" in names else 0
    factors = _memory(build(case, fk.EmpiricalFisher, structure="kfac"))
    cached = rows + product
    needed = {
        "ef_product_cached": cached, "ief_product_cached": cached, "sf_product_cached": cached,
        "exact_product_cached": exact + product, "ef_product": passes + cached, "ef_token_product": passes + cached,
        "exact_product": passes + product, "exact_product_unkept": passes + product,
        "exact_product_streamed": passes + product,
        "ef_diagonal": passes + vector, "exact_diagonal": passes + vector,
        "ef_gram": passes + rows + gram, "ief_solve": passes + 2 * rows + gram + product,
        "kfac_ef": passes + factors, "kfac_exact": passes + factors, "kfac_solve": passes + 3 * factors + product,
        "ekfac_ef": 2 * passes + 3 * factors + vector,
    }  # fmt: skip
    return {name: needed[name] for name in names}


def _memory(fisher: fk.FisherApproximation) -> int:
    return sum(entry.memory for entry in fisher.coverage().entries)


def roofline(case: Case, seconds: Mapping[str, float], rates: Record) -> list[Record]:
    """For each of our operations: what it did, how long that takes at the machine's rates, and the fraction reached.

    Args:
        case: all parameters of a workload.
        seconds: what the operations took.
        rates: of `machine_rates`.
    """
    found, needed, mine = [], least_bytes(case, seconds), contestants(case)
    for name, took in seconds.items():
        operations = count(mine[name].prepare())
        single, double = operations.get(torch.float32, 0.0), operations.get(torch.float64, 0.0)
        arithmetic = single / rates["float32_flops"] + double / rates["float64_flops"]
        transfer = needed[name] / rates["bytes_per_second"]
        found.append({
            "workload": case.workload.name, "operation": name, "float32_operations": single,
            "float64_operations": double, "bytes": needed[name], "arithmetic_seconds": arithmetic,
            "transfer_seconds": transfer, "bound": "arithmetic" if arithmetic >= transfer else "bytes",
            "seconds": took, "fraction": max(arithmetic, transfer) / took,
        })  # fmt: skip
    return found
