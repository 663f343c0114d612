"""Solve (F + λI) x = g for a Fisher of 50,000 examples and a million parameters, with Ctrl-C and resume.

    python examples/large_solve.py solve/                    # streamed: rows are made anew for every product
    python examples/large_solve.py solve/ --rows stored      # rows lie in memory, as factors
    python examples/large_solve.py solve/ --kind exact --max-steps 20

Everything is kept in the folder: the data, which are read by memory map and never loaded as a whole, the model, and the
solve's checkpoint. Stop it at any time with Ctrl-C, and run the same line again: it goes on where it was. When it is
done, the same line returns the solution at once. Own data: ``inputs.npy`` ``[N, ...]`` float32 and ``labels.npy``
``[N]`` int64 in the folder, before the first run; a model of one's own instead of the perceptron: `make_model`.

Prints N, D, R, seconds a product, steps, residual, and the process's peak memory.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fisherkit as fk
from fisherkit.evaluation import loss_gradient

CLASSES = 10
BATCH = 500


class MemoryMapped(Dataset[tuple[Tensor, Tensor]]):
    """Examples of two .npy files, of which only the batch at hand is in memory.

    Args:
        folder: of ``inputs.npy`` and ``labels.npy``.
    """

    def __init__(self, folder: Path) -> None:
        self.inputs = np.load(folder / "inputs.npy", mmap_mode="r")
        self.labels = np.load(folder / "labels.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One example."""
        return torch.from_numpy(self.inputs[index].copy()), torch.tensor(int(self.labels[index]))

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch in one read; the loader prefers this to a call for each example."""
        return torch.from_numpy(self.inputs[indices]), torch.from_numpy(self.labels[indices])


def as_it_is(batch: Any) -> Any:
    """What to do with a batch that `MemoryMapped` has already put together."""
    return batch


def make_data(folder: Path, examples: int, side: int = 28) -> None:
    """Smooth random images around ten class means, one label in ten wrong."""
    generator = torch.Generator().manual_seed(0)

    def smooth(count: int, cells: int) -> Tensor:
        coarse = torch.randn(count, 1, cells, cells, generator=generator)
        return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").flatten(1)

    means = smooth(CLASSES, 6)
    shape = (examples, side * side)
    inputs = np.lib.format.open_memmap(folder / "inputs.npy", mode="w+", dtype=np.float32, shape=shape)
    labels = np.lib.format.open_memmap(folder / "labels.npy", mode="w+", dtype=np.int64, shape=(examples,))
    for start in range(0, examples, BATCH):
        size = min(BATCH, examples - start)
        true = torch.randint(CLASSES, (size,), generator=generator)
        noise = 0.3 * torch.randn(size, side * side, generator=generator)
        inputs[start : start + size] = (0.7 * means[true] + smooth(size, 8) + noise).numpy()
        wrong = torch.rand(size, generator=generator) < 0.1
        labels[start : start + size] = torch.where(wrong, torch.randint(CLASSES, (size,), generator=generator), true)
    inputs.flush()
    labels.flush()


def make_model(inputs: int) -> nn.Module:
    """A perceptron with about a million parameters for 28 × 28 inputs."""
    return nn.Sequential(
        nn.Linear(inputs, 800), nn.ReLU(), nn.Linear(800, 450), nn.ReLU(), nn.Linear(450, CLASSES)
    )  # fmt: skip


def train(model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]], steps: int = 100) -> None:
    """A little, so that gradients and outputs are those of a network that has learnt something."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _, (x, y) in zip(range(steps), loader, strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()


def peak_memory() -> str:
    """The largest resident size of this process so far, as Linux tells it."""
    report = Path("/proc/self/status")
    lines = report.read_text().splitlines() if report.exists() else []
    return next((f"{int(line.split()[1]) / 1e6:.2f} GB" for line in lines if line.startswith("VmHWM")), "unknown")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=["ief", "ef", "exact"], default="ief")
    parser.add_argument("--rows", choices=["streamed", "stored"], default="streamed")
    parser.add_argument("--examples", type=int, default=50_000, help="to generate, if the folder has no data")
    parser.add_argument("--budget", type=float, default=200, help="MB for the operator if streamed")
    parser.add_argument("--damping", type=float, default=0.1, help="times the mean eigenvalue")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--max-steps", type=int, default=1000)
    return parser.parse_args()


def main() -> None:
    """Build, solve, report."""
    options = arguments()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "inputs.npy").exists():
        make_data(folder, options.examples)
    dataset = MemoryMapped(folder)
    loader = DataLoader(dataset, BATCH, collate_fn=as_it_is)
    torch.manual_seed(0)
    model = make_model(int(np.prod(dataset.inputs.shape[1:])))
    weights = folder / "model.safetensors"
    if weights.exists():
        # Training again would give the same weights only up to rounding, and the checkpoint would be another model's.
        load_model(model, weights)
    else:
        train(model, loader)
        save_model(model, str(weights))

    kinds = {"ief": fk.ImprovedEmpiricalFisher, "ef": fk.EmpiricalFisher, "exact": fk.ExactFisher}
    budget = int(options.budget * 1e6) if options.rows == "streamed" else None
    begin = time.perf_counter()
    fisher = kinds[options.kind](model, loader, memory_budget=budget)
    built = time.perf_counter() - begin
    kept = fisher.coverage().entries[0]
    print(f"N = {fisher.examples:,}, D = {fisher.size:,}, R = {fisher.rows:,}; built in {built:.1f} s")
    print(f"{kept.structure}: {kept.reason}")

    gradient = loss_gradient(model, loader)
    begin = time.perf_counter()
    fisher.matvec(gradient)
    print(f"a product takes {time.perf_counter() - begin:.2f} s", flush=True)

    name = f"{options.kind}-{options.rows}"
    begin = time.perf_counter()
    try:
        solution, info = fisher.solve(
            gradient, fk.RelativeDamping(options.damping), tolerance=options.tolerance, max_steps=options.max_steps,
            checkpoint=folder / f"{name}.checkpoint", progress=True, return_info=True,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\ninterrupted after {time.perf_counter() - begin:.0f} s; the same command goes on from here")
        raise SystemExit(130) from None
    save_file({"solution": solution}, folder / f"{name}.solution")
    print(f"{info.method}: {info.steps} steps, residual {float(info.residual):.1e}, converged: {info.converged}")
    print(f"λ = {info.damping:.3g}; {time.perf_counter() - begin:.1f} s in this run; peak memory {peak_memory()}")


if __name__ == "__main__":
    main()
