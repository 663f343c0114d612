"""What the Fisher of a large language model takes: numbers, bytes and operations, by formula, without the model.

    python -m examples.large_models                                  # Llama-3-8B
    python -m examples.large_models --hidden 8192 --feedforward 28672 --layers 80 --heads 64   # its 70B sister
    python -m examples.large_models --processes 8 --budget 80

Counts the linear layers of a decoder's body: attention's q, k, v, o and the feed-forward network's gate, up, down. The
embedding and the head, whose factors of V² numbers nobody wants, are left out, as they are with ``params=``. Nothing is
measured: the counts are those of docs/costs.md, and the tests compare them with what fisherkit builds for a small model
of the same shape.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from examples.shared.results import markdown

WIDTHS = {"bfloat16": 2, "float32": 4, "float64": 8}
EIGEN = (
    9  # operations of a symmetric eigendecomposition with vectors, in n³ (Golub and Van Loan, Matrix Computations, 8.3)
)


@dataclass(frozen=True)
class Layer:
    """A linear layer.

    Args:
        reads: what it reads, alike for layers that read the same tensor.
        inputs: I.
        outputs: O.
    """

    reads: str
    inputs: int
    outputs: int


def block_layers(hidden: int, feedforward: int, heads: int, key_value_heads: int) -> list[Layer]:
    """The seven linear layers of one block of a Llama-like decoder."""
    narrow = hidden // heads * key_value_heads
    return [
        Layer("attention's input", hidden, hidden), Layer("attention's input", hidden, narrow),
        Layer("attention's input", hidden, narrow), Layer("attention's result", hidden, hidden),
        Layer("network's input", hidden, feedforward), Layer("network's input", hidden, feedforward),
        Layer("network's result", feedforward, hidden),
    ]  # fmt: skip


def numbers(layers: list[Layer], structure: str, *, shared: bool = False) -> int:
    """Numbers that a structure keeps of some layers.

    Args:
        layers: with repetitions.
        structure: "diagonal", "kfac" or "ekfac".
        shared: one factor of the inputs for layers that read the same tensor, which fisherkit does not do.
    """
    weights = sum(layer.inputs * layer.outputs for layer in layers)
    if structure == "diagonal":
        return weights
    inputs = {layer.reads: layer.inputs for layer in layers}.values() if shared else [each.inputs for each in layers]
    factors = sum(size**2 for size in inputs) + sum(layer.outputs**2 for layer in layers)
    return factors + (weights if structure == "ekfac" else 0)


def operations(layers: list[Layer], structure: str) -> float:
    """Operations a token of one build with one vector an example, as a multiple of a training step's.

    A training step is forward, backward to inputs, backward to weights: 6 operations a weight. A build leaves the last
    out, 4 a weight, and adds what the structure sums up; ekfac reads the data twice where rows are not kept.
    """
    weights = sum(layer.inputs * layer.outputs for layer in layers)
    products = 2 * numbers(layers, "kfac")
    adds = {
        "diagonal": 2 * weights,  # the gradient of each example, written out and squared
        "kfac": products,
        "ekfac": 2 * products + 4 * weights + 2 * weights,  # the second pass rotates and writes out
    }
    return (4 * weights + adds[structure]) / (6 * weights)


def owners(sizes: list[int], processes: int) -> list[int]:
    """The load of each process where the largest is given first, each to who has least."""
    loads = [0] * processes
    for size in sorted(sizes, reverse=True):
        loads[loads.index(min(loads))] += size
    return loads


def parts(sizes: list[int], budget: int) -> int:
    """How many parts of whole layers, in order, of at most so many bytes each."""
    count, held = 1, 0
    for size in sizes:
        if held + size > budget and held:
            count, held = count + 1, 0
        held += size
    return count


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096, help="width of the body (default: %(default)s)")
    parser.add_argument("--feedforward", type=int, default=14336, help="width of the networks (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="blocks (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=32, help="heads of the queries (default: %(default)s)")
    parser.add_argument(
        "--key-value-heads", type=int, default=8, help="heads of keys and values (default: %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=8, help="processes that share the work (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=80, help="GB of one accelerator (default: %(default)s)")
    asked = parser.parse_args()
    block = block_layers(asked.hidden, asked.feedforward, asked.heads, asked.key_value_heads)
    weights = asked.layers * numbers(block, "diagonal")
    free = asked.budget * 1e9 - 2 * weights
    print(f"{weights / 1e9:.2f}·10⁹ weights, {2 * weights / 1e9:.1f} GB in bfloat16; {free / 1e9:.1f} GB are free\n")
    rows = []
    for structure in ("diagonal", "kfac", "ekfac"):
        count = numbers(block, structure)
        for name in ("float32", "bfloat16"):
            each = [WIDTHS[name] * numbers([layer], structure) for layer in block] * asked.layers
            sums = [WIDTHS["float32"] * numbers([layer], structure) for layer in block] * asked.layers
            rows.append([
                structure, name, f"{asked.layers * count / 1e9:.2f}", f"{sum(each) / 1e9:.1f}",
                str(parts(sums, int(free))) if free > max(sums) else "-",
                f"{max(owners(each, asked.processes)) / 1e9:.1f}", f"{operations(block, structure):.2f}",
            ])  # fmt: skip
    head = ["structure", "dtype", "10⁹ numbers", "GB", "parts", f"GB a process of {asked.processes}", "steps a pass"]
    print(markdown(head, rows))
    whole, once = (asked.layers * numbers(block, "kfac", shared=shared) for shared in (False, True))
    cubes = EIGEN * asked.layers * sum(layer.inputs**3 + layer.outputs**3 for layer in block)
    print(
        f"\nOne factor for layers that read the same tensor: {once / 1e9:.2f} instead of {whole / 1e9:.2f}·10⁹ numbers."
    )
    print(f"Eigendecompositions: about {cubes:.1e} operations, as {cubes / (6 * weights):.1e} tokens of training.")


if __name__ == "__main__":
    main()
