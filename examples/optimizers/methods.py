"""What is compared: each way of training with its own grid of learning rates, and all else as it comes.

Owns the grids, the optimizers and their schedule. Knows neither tasks nor results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fisherkit as fk
from examples.paper.optimisation_methods import Stepper
from examples.shared.tasks import trained_parameters

WARM_UP = 0.05
"""Of all steps, with a learning rate that grows linearly; then it falls to 0 as a cosine."""

Start = Callable[[nn.Module, float], tuple[Sequence[torch.optim.Optimizer], fk.optim.Preconditioner | None]]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        name: in tables.
        rates: the grid of learning rates.
        make: for a model and a learning rate, the optimizers and what stands before them.
    """

    name: str
    rates: tuple[float, ...]
    make: Start

    def start(self, model: nn.Module, rate: float, steps: int) -> Stepper:
        """Ready to train a model for so many steps."""
        optimizers, preconditioner = self.make(model, rate)
        schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: share(step, steps)) for one in optimizers]
        return Stepper(optimizers, preconditioner, schedules)


def share(step: int, steps: int) -> float:
    """Of the learning rate, at a step."""
    warm = max(1, round(WARM_UP * steps))
    return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


class Matrices(torch.optim.Muon):
    """Muon for weights of any shape, each taken as a matrix with a row an output."""

    def __init__(self, weights: Sequence[nn.Parameter], lr: float) -> None:
        self.weights = weights
        flat = [nn.Parameter(w.detach().flatten(1)) for w in weights]  # views
        super().__init__(flat, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the weights."""
        for weight in self.weights:
            weight.grad = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # without a closure
        """With the weights' gradients."""
        for weight, flat in zip(self.weights, self.param_groups[0]["params"], strict=True):
            flat.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step()  # type: ignore[no-untyped-call]  # torch's


def muon(model: nn.Module, rate: float) -> tuple[Sequence[torch.optim.Optimizer], None]:
    """Muon for hidden matrices, AdamW for the rest: embeddings, the last layer, what is no matrix."""
    own = trained_parameters(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = [p for p in own.values() if p.ndim > 1 and id(p) not in embeddings][:-1]
    hidden = {id(p) for p in weights}
    rest = [p for p in own.values() if id(p) not in hidden]
    return [Matrices(weights, rate), torch.optim.AdamW(rest, lr=rate, weight_decay=0.0)], None


def _plain(cls: Callable[..., torch.optim.Optimizer], **options: Any) -> Start:
    return lambda model, rate: ([cls(trained_parameters(model).values(), lr=rate, **options)], None)


def _trained(_: str, parameter: Tensor) -> bool:
    return parameter.requires_grad


def natural(**options: Any) -> Start:
    """`fisherkit.optim.NaturalGradient`."""
    return lambda model, rate: ([fk.optim.NaturalGradient(model, lr=rate, params=_trained, **options)], None)


def preconditioned(**options: Any) -> Start:
    """`fisherkit.optim.Preconditioner`, whose defaults have momentum, before SGD."""

    def make(model: nn.Module, rate: float) -> tuple[Sequence[torch.optim.Optimizer], fk.optim.Preconditioner]:
        sgd = torch.optim.SGD(trained_parameters(model).values(), lr=rate)
        return [sgd], fk.optim.Preconditioner(model, params=_trained, **options)

    return make


STRUCTURES, KINDS = ("kfac", "ekfac"), {"ef": "EF", "ief": "iEF", "sf": "SF", "exact": "exact", "truncated:2": "rank 2"}

METHODS: Mapping[str, Method] = {
    "sgd": Method("SGD, momentum", (0.01, 0.03, 0.1, 0.3), _plain(torch.optim.SGD, momentum=0.9)),
    "adamw": Method("AdamW", (0.001, 0.003, 0.01, 0.03), _plain(torch.optim.AdamW, weight_decay=0.0)),
    "muon": Method("Muon", (0.003, 0.01, 0.03, 0.1), muon),
    "natural-ief": Method("NaturalGradient, iEF", (0.3, 1.0, 3.0, 10.0), natural(kind="ief", gram_damping=1e-2)),
    "natural-rows": Method(
        "NaturalGradient, rank 2, row damping 0.1", (0.1, 0.3, 1.0, 3.0),
        natural(kind=fk.optim.RowDamped("truncated:2", 0.1), damping=1e-2, trust_region=0.3),
    ),
    **{
        f"{structure}-{kind.replace(':', '')}": Method(
            f"Preconditioner, {structure} of {name}", (0.003, 0.01, 0.03, 0.1),
            preconditioned(kind=kind, structure=structure),
        )
        for structure in STRUCTURES
        for kind, name in KINDS.items()
    },
}  # fmt: skip
"""By name; grids are of one size, the package's `Preconditioner` has the same for all kinds."""
