"""What `examples.paper.optimisation` compares: methods, the grid each is tuned over, and how one takes its steps.

Owns the grids, all of six configurations, and the building of optimizers. Knows neither tasks nor results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn

import fisherkit as fk

Settings = dict[str, float]


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        name: in tables.
        family: "sgd", "adamw", "natural" (`fisherkit.optim.NaturalGradient`) or "preconditioner"
            (`fisherkit.optim.Preconditioner` before SGD with momentum).
        axes: the grid: values by argument.
        fixed: arguments that all configurations share.
        decay: the learning rate falls linearly to 0 at the end, as the paper does for EF and SF; else it is constant.
    """

    name: str
    family: str
    axes: Mapping[str, tuple[float, ...]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    decay: bool = False

    def grid(self, coarse: bool = False) -> list[Settings]:
        """All configurations; coarse: every other one, which keeps the first value of a second axis."""
        every = [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]
        return every[::2] if coarse else every

    def to_dict(self) -> dict[str, Any]:
        """What a file needs to tell it from another."""
        axes = {name: list(values) for name, values in self.axes.items()}
        fixed = dict(self.fixed)
        return {"name": self.name, "family": self.family, "axes": axes, "fixed": fixed, "decay": self.decay}


@dataclass(frozen=True)
class Stepper:
    """What follows a backward pass.

    Args:
        optimizers: take the step, each of parameters of its own.
        preconditioner: sees the gradients before.
        schedules: of learning rates, after.
    """

    optimizers: Sequence[torch.optim.Optimizer]
    preconditioner: fk.optim.Preconditioner | None = None
    schedules: Sequence[torch.optim.lr_scheduler.LRScheduler] = ()

    def zero_grad(self) -> None:
        """Before a backward pass."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """One step."""
        if self.preconditioner is not None:
            self.preconditioner.step()
        for optimizer in self.optimizers:
            optimizer.step()
        for schedule in self.schedules:
            schedule.step()


def start(method: Method, settings: Settings, model: nn.Module, steps: int) -> Stepper:
    """A method at one configuration, ready to train a model for so many steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    preconditioner = None
    arguments: dict[str, Any] = {**method.fixed, **settings}
    if "row_damping" in arguments:
        options = {name: arguments.pop(name) for name in ("rank",) if name in arguments}
        arguments["kind"] = fk.optim.RowDamped(arguments["kind"], arguments.pop("row_damping"), **options)
    if method.family == "natural":
        optimizer: torch.optim.Optimizer = fk.optim.NaturalGradient(
            model, params=lambda _, p: p.requires_grad, **arguments
        )
    else:
        own: dict[str, Any] = {name: arguments.pop(name) for name in ("lr", "momentum") if name in arguments}
        kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "preconditioner": torch.optim.SGD,
        }  # fmt: skip
        optimizer = kinds[method.family](parameters, **own, **({} if method.family == "preconditioner" else arguments))
    if method.family == "preconditioner":
        group = optimizer.param_groups[0]
        preconditioner = fk.optim.Preconditioner(
            model, params=lambda _, p: p.requires_grad, lr=lambda: float(group["lr"]), **arguments
        )
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / steps)] if method.decay else []
    return Stepper([optimizer], preconditioner, schedules)


def _gram(name: str, kind: str, lr: tuple[float, ...], *, decay: bool = False, **fixed: Any) -> Method:
    """The paper's update; normalized where it decays."""
    axes = {"lr": lr, "gram_damping": (1e-2, 10.0)}
    return Method(name, "natural", axes, {"kind": kind, "normalize_update": decay, **fixed}, decay)


def _trust(name: str, kind: str, **fixed: Any) -> Method:
    """(F + λI)⁻¹ ∇L in full, shortened where the quadratic model of the kind's own F says that it is too long."""
    axes = {"trust_region": (0.01, 0.03, 0.1), "damping": (1e-2, 1e-3)}
    return Method(name, "natural", axes, {"kind": kind, "lr": 1.0, **fixed})


def _rows(name: str, kind: str, trust_region: tuple[float, ...] = (0.1, 0.3, 1.0), **fixed: Any) -> Method:
    """The same with a damping for every row, `fisherkit.optim.RowDamped`."""
    axes = {"trust_region": trust_region, "row_damping": (0.1, 0.3)}
    return Method(name, "natural", axes, {"kind": kind, "lr": 1.0, "damping": 1e-2, **fixed})


def _layers(name: str, kind: str, structure: str, **fixed: Any) -> Method:
    """Kronecker factors averaged over batches, before SGD with momentum."""
    axes = {"trust_region": (1e-5, 1e-4, 1e-3), "damping": (1e-2, 1e-3)}
    shared = {"kind": kind, "structure": structure, "update_every": 10, "lr": 0.1, "momentum": 0.9}
    return Method(name, "preconditioner", axes, {**shared, **fixed})


METHODS: Mapping[str, Method] = {
    "sgd": Method("SGD", "sgd", {"lr": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)}),
    "sgd-momentum": Method("SGD, momentum", "sgd", {"lr": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)}, {"momentum": 0.9}),
    "adamw": Method("AdamW", "adamw", {"lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}, {"weight_decay": 0.0}),
    "ef": _gram("EF", "ef", (0.03, 0.3, 3.0), decay=True),
    "sf": _gram("SF", "sf", (0.3, 1.0, 3.0), decay=True),
    "ief": _gram("iEF", "ief", (1.0, 3.0, 10.0)),
    "ief-half": _gram("iEF, power ½", "ief", (1.0, 3.0, 10.0), power=0.5),
    "ief-momentum": _gram("iEF, momentum", "ief", (0.1, 0.3, 1.0), momentum=0.9),
    "ief-trust": Method(
        "iEF, λ beside F, trust region", "natural", {"lr": (3.0, 10.0, 30.0), "trust_region": (1.0, 0.3)},
        {"kind": "ief", "damping": 1e-3},
    ),
    "truncated-1": _trust("truncated, rank 1, trust region", "truncated", rank=1),
    "truncated-2": _trust("truncated, rank 2, trust region", "truncated", rank=2),
    "truncated-2-free": Method(
        "truncated, rank 2, no trust region", "natural", {"lr": (0.1, 0.3, 1.0), "damping": (1e-1, 1e-2)},
        {"kind": "truncated", "rank": 2},
    ),
    "truncated-2-momentum": Method(
        "truncated, rank 2, trust region, momentum", "natural",
        {"trust_region": (3e-4, 1e-3, 3e-3), "damping": (1e-2, 1e-3)},
        {"kind": "truncated", "rank": 2, "lr": 0.1, "momentum": 0.9},
    ),
    "rows-1": _rows("truncated, rank 1, row damping", "truncated", rank=1),
    "rows-2": _rows("truncated, rank 2, row damping", "truncated", rank=2),
    "rows-2-momentum": _rows(
        "truncated, rank 2, row damping, momentum", "truncated", (1e-3, 3e-3, 1e-2), rank=2, lr=0.1, momentum=0.9
    ),
    "kfac-ief": _layers("ieKFAC, momentum", "ief", "kfac"),
    "ekfac-ief": _layers("ieEKFAC, momentum", "ief", "ekfac"),
    "kfac-ef": _layers("KFAC of EF, momentum", "ef", "kfac"),
    "kfac-truncated-2": _layers("KFAC of truncated, rank 2, momentum", "truncated", "kfac", rank=2),
    "kfac-rows-2": Method(
        "KFAC of truncated, rank 2, row damping, momentum", "preconditioner",
        {"trust_region": (1e-5, 1e-4, 1e-3), "row_damping": (0.3, 1.0)},
        {
            "kind": "truncated", "rank": 2, "structure": "kfac", "update_every": 10, "lr": 0.1, "momentum": 0.9,
            "damping": 1e-3,
        },
    ),
    "kfac-ief-plain": Method(
        "ieKFAC", "preconditioner", {"trust_region": (1e-4, 1e-3, 1e-2), "damping": (1e-2, 1e-3)},
        {"kind": "ief", "structure": "kfac", "update_every": 10, "lr": 0.1},
    ),
    "truncated-3": _trust("truncated, rank 3, trust region", "truncated", rank=3),
    "rows-exact": _rows("exact, row damping", "exact"),
    "exact": _trust("exact, trust region", "exact"),
    "truncated-tolerance": _trust("truncated, 1e-2, trust region", "truncated", tolerance=1e-2),
}  # fmt: skip
"""By key; those that take longest come last."""
