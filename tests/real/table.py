"""The table of architectures: whether each is exact, which of its parameters have a rule, and what a build costs.

    python -m tests.real.table [name ...]

Costs are counted, not timed, in gradients: one forward and one backward pass of the same 32 examples. The first build
also verifies the rules; later ones find them known.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jaxtyping
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import fisherkit as fk
from tests.real.test_real import case, logits
from tests.real.zoo import ARCHITECTURES, Architecture, Inputs

EXAMPLES = 32


class Cost(NamedTuple):
    """Of some work: floating-point operations of matrix products and convolutions, and kernel calls."""

    flops: float
    kernels: float


class Counting(TorchDispatchMode):
    """Counts while it is active. Unlike torch's own counter it sets no hook, which parametrized weights refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.kernels = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kernels += 1
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def cost(work: Callable[[], object]) -> Cost:
    with Counting() as counter:
        work()
    return Cost(counter.flops, counter.kernels)


def gradient(architecture: Architecture, model: nn.Module, inputs: Inputs, labels: Tensor) -> None:
    """One gradient of the batch's loss."""
    z, y = logits(model, inputs), labels
    if architecture.task == "causal":
        z, y = z[:, :-1], y[:, 1:]
    F.cross_entropy(z.flatten(0, -2), y.flatten()).backward()
    model.zero_grad()


def builds(name: str) -> list[Cost]:
    """The first build of the empirical Fisher's diagonal and the next one, in gradients."""
    architecture = ARCHITECTURES[name]
    model, data = architecture.model(), architecture.batch(EXAMPLES)
    unit = cost(lambda: gradient(architecture, model, *data))
    found = [cost(lambda: fk.EmpiricalFisher(model, data, structure="diagonal")) for _ in range(2)]
    return [Cost(one.flops / unit.flops, one.kernels / unit.kernels) for one in found]


def row(name: str) -> str:
    """One architecture's line."""
    family = ARCHITECTURES[name].family
    try:
        found = case(name)
    except fk.FisherkitError as error:
        return f"| {name} | {family} | refused: {str(error)[:120]} |"
    errors = [
        float((fisher.diagonal() - right).norm() / right.norm())
        for fisher, right in zip(found.fishers, found.expected, strict=True)
    ]
    rules = found.rules()
    generic = {parameter: rule for parameter, rule in rules.items() if rule in ("loop", "torch.func")}
    exact = "yes" if max(errors) <= found.tolerance else "**no**"
    counted = Counter(generic.values())
    how = ", ".join(f"{number} {rule}" for rule, number in counted.items()) or "-"
    cells = [
        name, family, f"{exact} ({errors[0]:.0e}, {errors[1]:.0e})", f"{len(rules) - len(generic)} / {len(rules)}", how,
        *(f"{one.flops:.1f} / {one.kernels:.1f}" for one in builds(name)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


HEADER = [
    "architecture", "family", "exact (errors: EF, exact)", "parameters with a rule", "others",
    "first build of EF: flops / kernel calls, in gradients", "next build",
]  # fmt: skip


def main(names: list[str]) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    jaxtyping.config.update("jaxtyping_disable", True)
    print(f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|", sep="\n")
    for name in names or ARCHITECTURES:
        print(row(name), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
