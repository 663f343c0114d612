"""How time and memory grow with N, D, C and T, beside what the arithmetic says.

    python -m examples.benchmarks.growth --out growth.json            # measure, some minutes
    python -m examples.benchmarks.growth --out growth.json --docs     # measure, then tables and pictures into docs/
    python -m examples.benchmarks.growth --out growth.json --docs --reuse   # tables and pictures of an earlier run

Along each axis the other sizes are fixed. An exponent is the slope of a least-squares line through log(cost) against
log(size), over the larger half of the sizes; the arithmetic's is that of a formula of floating-point operations (or of
bytes) at the same sizes, so lower-order terms count in both. Times are medians of three. Memory is the peak of the
process's resident size above what it was before, so small sizes are lost in the allocator's rounding.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherkit as fk

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "growth.md"
PICTURES = ROOT / "docs" / "assets" / "benchmarks"
BEGIN, END = "<!-- growth: begin -->", "<!-- growth: end -->"
REPEATS = 3
LONG = 5.0  # seconds: what takes this long is measured once, and not at larger sizes


@dataclass(frozen=True)
class Sizes:
    """One point: N examples of T positions through a perceptron with two hidden layers."""

    N: int = 256
    width: int = 160
    C: int = 10
    T: int = 1

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each linear layer."""
        return [(self.width, self.width), (self.width, self.width), (self.width, self.C)]

    @property
    def parameters(self) -> int:
        """D."""
        return sum(i * o + o for i, o in self.layers)

    def model(self) -> nn.Module:
        """The perceptron, applied to each position."""
        torch.manual_seed(0)
        (i, h), (_, k), (_, o) = self.layers
        return nn.Sequential(nn.Linear(i, h), nn.Tanh(), nn.Linear(h, k), nn.Tanh(), nn.Linear(k, o))

    def data(self) -> tuple[Tensor, Tensor]:
        """Random inputs and labels."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.N,) if self.T == 1 else (self.N, self.T)
        return (torch.randn(*shape, self.width, generator=generator), torch.randint(self.C, shape, generator=generator))


AXES: dict[str, tuple[str, list[tuple[int, Sizes]]]] = {
    "N": ("examples", [(n, Sizes(N=n)) for n in (32, 64, 128, 256, 512, 1024, 2048, 4096)]),
    "D": ("parameters", [((s := Sizes(N=128, width=w)).parameters, s) for w in (66, 120, 220, 400, 700, 1250, 2230)]),
    "C": ("outputs", [(c, Sizes(N=128, C=c)) for c in (2, 8, 32, 100, 320, 1000)]),
    "T": ("positions", [(t, Sizes(N=16, T=t)) for t in (8, 16, 32, 64, 128, 256, 512)]),
}
QUICK = {axis: (words, points[:2]) for axis, (words, points) in AXES.items()}


# -- operations, and their arithmetic ----------------------------------------------------------------------------------


def weights(s: Sizes) -> int:
    """Σ I·O."""
    return sum(i * o for i, o in s.layers)


def kept(s: Sizes) -> float:
    """Numbers of an example's EF rows as they are kept: factors, or written out where that is less."""
    return sum(min(s.T * (i + o), i * o) for i, o in s.layers)


def rows_product(s: Sizes) -> float:
    """Operations of J u or Jᵀ w for one EF vector."""
    return 2 * s.N * sum(min(s.T * i * o, i * o if s.T * (i + o) > i * o else math.inf) for i, o in s.layers)


def build_flops(s: Sizes) -> float:
    """Forward, backward to the layers' outputs, and writing out rows where they are kept so."""
    written = sum(i * o for i, o in s.layers if s.T * (i + o) > i * o)
    return 2 * s.N * s.T * (2 * weights(s) - s.layers[0][0] * s.layers[0][1] + written)


def gram_flops(s: Sizes) -> float:
    """Two small Gram matrices a layer without shared positions, else one of written-out rows."""
    if s.T == 1:
        return 2 * s.N**2 * sum(i + o for i, o in s.layers)
    factored = sum(i * o for i, o in s.layers if s.T * (i + o) <= i * o)
    return 2 * s.N**2 * weights(s) + 2 * s.N * s.T * factored


def squares_flops(s: Sizes) -> float:
    """Squares of factors without shared positions, else of written-out rows."""
    return 2 * s.N * weights(s) if s.T == 1 else 2 * s.N * (s.T + 1) * weights(s)


def kfac_flops(s: Sizes) -> float:
    """AᵀA and GᵀG."""
    return 2 * s.N * s.T * sum(i * i + o * o for i, o in s.layers)


@dataclass(frozen=True)
class Operation:
    """What is measured.

    Args:
        setup: what is not timed; its result is passed to ``run``.
        run: what is timed.
        flops: floating-point operations at some sizes, up to a factor.
        numbers: numbers that must be in memory, up to a factor.
    """

    setup: Callable[[nn.Module, tuple[Tensor, Tensor]], Any]
    run: Callable[[Any], Any]
    flops: Callable[[Sizes], float]
    numbers: Callable[[Sizes], float]


def _inputs(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return model, data


def _with_vector(make: Callable[..., Any]) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Any]:
    def setup(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[Any, Tensor]:
        fisher = make(model, data)
        return fisher, torch.randn(fisher.size, generator=torch.Generator().manual_seed(1))

    return setup


def _ief_solve(inputs: tuple[nn.Module, tuple[Tensor, Tensor]]) -> Tensor:
    fisher = fk.ImprovedEmpiricalFisher(*inputs)
    return fisher.solve(torch.ones(fisher.size), fk.RelativeDamping(1.0))


def _streamed(model: nn.Module, data: tuple[Tensor, Tensor]) -> Any:
    return fk.ExactFisher(model, data, storage="stream")


def _rows(s: Sizes) -> float:
    return s.N * kept(s)


OPERATIONS: dict[str, Operation] = {
    "EF build": Operation(_inputs, lambda i: fk.EmpiricalFisher(*i), build_flops, _rows),
    "EF product, cached": Operation(
        _with_vector(fk.EmpiricalFisher), lambda i: i[0] @ i[1], lambda s: 2 * rows_product(s), lambda s: s.parameters
    ),
    "EF Gram": Operation(fk.EmpiricalFisher, lambda f: f.gram(), gram_flops, lambda s: s.N**2),
    "iEF solve from nothing": Operation(
        _inputs,
        _ief_solve,
        lambda s: build_flops(s) + gram_flops(s) + s.N**3 / 3 + 2 * rows_product(s),
        lambda s: _rows(s) + 6 * s.N**2 + 3 * s.parameters,
    ),
    "EF diagonal": Operation(
        _inputs,
        lambda i: fk.EmpiricalFisher(*i, structure="diagonal"),
        lambda s: 2 * s.N * s.T * 2 * weights(s) + squares_flops(s),
        lambda s: s.N * s.T * sum(i + o for i, o in s.layers) + 2 * s.parameters,
    ),
    "exact product, streamed": Operation(
        _with_vector(_streamed),
        lambda i: i[0] @ i[1],
        lambda s: 12 * s.N * s.T * weights(s),
        lambda s: s.N * s.T * sum(i + o for i, o in s.layers) + 3 * s.parameters,
    ),
    "exact build, streamed": Operation(
        _inputs,
        lambda i: _streamed(*i),
        lambda s: 2 * s.N * s.T * weights(s),
        lambda s: s.N * s.T * sum(i + o for i, o in s.layers),
    ),
    "KFAC EF": Operation(
        _inputs,
        lambda i: fk.EmpiricalFisher(*i, structure="kfac"),
        lambda s: 2 * s.N * s.T * 2 * weights(s) + kfac_flops(s),
        lambda s: s.N * s.T * sum(i + o for i, o in s.layers) + sum(i * i + o * o for i, o in s.layers),
    ),
}


# -- measuring ---------------------------------------------------------------------------------------------------------


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _peak(run: Callable[[], object]) -> int | None:
    """Bytes of resident memory that a run takes at most above what there was; None where Linux does not tell."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        run()
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or memory freed earlier would be used again and not counted
    clear.write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def measure(operation: Operation, sizes: Sizes) -> tuple[float, int | None, bool]:
    """Median seconds, peak bytes, and whether a larger size would take too long."""
    begin = time.perf_counter()
    state = operation.setup(sizes.model(), sizes.data())
    prepared = time.perf_counter() - begin
    seconds: list[float] = []

    def timed() -> None:
        begin = time.perf_counter()
        operation.run(state)
        seconds.append(time.perf_counter() - begin)

    memory = _peak(timed)
    while seconds[0] < LONG and len(seconds) < REPEATS + 1:
        timed()
    # The first run also warms up.
    found = statistics.median(seconds[1:] or seconds)
    return found, memory, max(found, prepared) > LONG


def run(axes: dict[str, tuple[str, list[tuple[int, Sizes]]]], limit: float) -> dict[str, Any]:
    """All axes and operations; an axis begins nothing new after its share of ``limit`` seconds."""
    begin = time.perf_counter()
    found: dict[str, Any] = {}
    measure(OPERATIONS["EF build"], Sizes())  # threads, allocator, lazy imports
    for done, (axis, (_, points)) in enumerate(axes.items(), start=1):
        found[axis] = {}
        until = begin + limit * done / len(axes)
        for name, operation in OPERATIONS.items():
            series: list[dict[str, float | None]] = []
            for size, sizes in points:
                if time.perf_counter() > until:
                    print(f"{axis} {name}: out of time before {size:,}")
                    break
                seconds, memory, long = measure(operation, sizes)
                series.append({
                    "size": size, "seconds": seconds, "bytes": memory,
                    "flops": operation.flops(sizes), "numbers": operation.numbers(sizes),
                })  # fmt: skip
                if long:
                    break
            found[axis][name] = series
            print(f"{axis:>2} {name:<24}" + " ".join(f"{point['seconds']:9.2g}" for point in series), flush=True)
    return {
        "axes": found,
        "environment": {
            "fisherkit": fk.__version__, "torch": torch.__version__, "python": platform.python_version(),
            "machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "date": time.strftime("%Y-%m-%d"), "seconds": round(time.perf_counter() - begin),
        },
    }  # fmt: skip


# -- telling -----------------------------------------------------------------------------------------------------------


def exponent(series: list[dict[str, float | None]], key: str) -> float | None:
    """Slope of log cost against log size over the larger half of the sizes."""
    half = series[len(series) // 2 :]
    pairs = [(math.log(size), math.log(cost)) for p in half if (size := p["size"]) and (cost := p[key])]
    if len(pairs) < 2:
        return None
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _seconds(value: float) -> str:
    return f"{value * 1e3:,.2g} ms" if value < 0.1 else f"{value:,.2g} s"


def tables(result: dict[str, Any]) -> str:
    """Markdown: the environment, then a table for each axis."""
    env = result["environment"]
    lines = [
        f"fisherkit {env['fisherkit']}, torch {env['torch']}, {env['threads']} of {env['cores']} {env['machine']} "
        f"cores, {env['date']}; measured in {env['seconds']} s."
    ]
    for axis, operations in result["axes"].items():
        words, points = AXES[axis]
        low, high = points[0], points[-1]
        fixed = {"N": low[1].N, "D": low[1].parameters, "C": low[1].C, "T": low[1].T}
        others = ", ".join(f"{k} = {v:,}" for k, v in fixed.items() if k != axis and not (axis == "C" and k == "D"))
        lines += [
            "", f"### {axis}, {words}: {low[0]:,} to {high[0]:,}", "", f"With {others}.", "",
            f"![Time and memory against {axis}](../assets/benchmarks/growth-{axis}.png)", "",
            "| operation | smallest | largest | time ∝ | operations ∝ | memory ∝ | numbers ∝ |", "|---|" + 6 * "---|",
        ]  # fmt: skip
        for name, series in operations.items():
            if not series:
                continue
            reached = "" if series[-1]["size"] == high[0] else f" at {series[-1]['size']:,}"
            cells = [_number(exponent(series, key)) for key in ("seconds", "flops", "bytes", "numbers")]
            cells = [cell if cell == "–" else f"{axis}^{cell}" for cell in cells]
            lines.append(
                f"| {name} | {_seconds(series[0]['seconds'])} | {_seconds(series[-1]['seconds'])}{reached} | "
                + " | ".join(cells) + " |"
            )  # fmt: skip
    return "\n".join(lines)


def draw(result: dict[str, Any], folder: Path) -> None:
    """One picture an axis: time left, memory right."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for axis, operations in result["axes"].items():
        figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for color, (name, series) in enumerate(operations.items()):
            sizes = [point["size"] for point in series]
            for panel, key, unit in zip(panels, ("seconds", "bytes"), (1.0, 1e6), strict=True):
                values = [(point[key] or math.nan) / unit for point in series]
                panel.plot(sizes, values, marker="o", markersize=3, color=f"C{color}", label=name)
        for panel, label in zip(panels, ("seconds", "peak memory above the start, MB"), strict=True):
            panel.set(xscale="log", yscale="log", xlabel=f"{axis}, {AXES[axis][0]}", ylabel=label)
            panel.grid(alpha=0.3)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
        figure.savefig(folder / f"growth-{axis}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)


def write_docs(result: dict[str, Any], page: Path = PAGE, pictures: Path = PICTURES) -> None:
    """Replace what is between the page's markers, and the pictures."""
    head, rest = page.read_text("utf-8").split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{tables(result)}\n{END}{rest.split(END)[1]}", "utf-8")
    draw(result, pictures)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("growth.json"))
    parser.add_argument("--docs", action="store_true", help="write tables and pictures into docs/")
    parser.add_argument("--reuse", action="store_true", help="read --out instead of measuring")
    parser.add_argument("--quick", action="store_true", help="only the two smallest sizes of each axis")
    parser.add_argument("--limit", type=float, default=450, help="seconds to take at most, shared by the axes")
    options = parser.parse_args()
    if not options.reuse:
        options.out.write_text(json.dumps(run(QUICK if options.quick else AXES, options.limit), indent=1))
    result = json.loads(options.out.read_text())
    print(tables(result))
    if options.docs:
        write_docs(result)


if __name__ == "__main__":
    main()
