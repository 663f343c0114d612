"""Training steps: fisherkit's optimizers beside SGD, AdamW and the iEF step that a user writes with torch.func.

A step is forward, backward, update and zero_grad on one minibatch; SGD's is the unit. Every contestant has a model of
its own and a rate so small that it stays where it is. What is new in a step that refreshes is spread over the steps
until the next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fisherkit as fk
from examples.benchmarks.contestants import DisagreementError, plain_attention
from examples.benchmarks.measure import Record
from examples.benchmarks.timing import Clock, TookTooLongError, limit, race
from examples.benchmarks.workloads import Workload

RATE = 1e-6
DAMPING = 1.0
TOLERANCE = 2e-3
REFRESH = 10
TARGETS = {
    ("W1", "iEF"): 1.8, ("W2", "iEF"): 2.2, ("W3", "iEF"): 2.2,
    **{(name, "ieKFAC, every 10"): 1.3 for name in ("W1", "W2", "W3")},
    **{(name, "ieKFAC, rank 128, every 10"): 1.3 for name in ("W1", "W2", "W3")},
}  # fmt: skip
"""The most that a step may cost, in steps of SGD."""


@dataclass(frozen=True)
class Stepper:
    """Somebody's training step.

    Args:
        step: one step on the minibatch.
        model: its own.
        steps: how many make a period.
    """

    step: Callable[[], None]
    model: nn.Module
    steps: int = 1

    def period(self) -> None:
        """All steps until things repeat."""
        for _ in range(self.steps):
            self.step()


def _optimizer(workload: Workload, make: Callable[[nn.Module], torch.optim.Optimizer]) -> Stepper:
    model = copy.deepcopy(workload.model).train()
    optimizer = make(model)

    def step() -> None:
        workload.loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Stepper(step, model)


def _preconditioned(workload: Workload, structure: str, rank: int | None = None) -> Stepper:
    model = copy.deepcopy(workload.model).train()
    preconditioner = fk.optim.Preconditioner(
        model, structure=structure, damping=DAMPING, update_every=REFRESH, max_rank=rank
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def step() -> None:
        workload.loss(model).backward()
        preconditioner.step()
        optimizer.step()
        optimizer.zero_grad()

    return Stepper(step, model, REFRESH)


def _by_hand(workload: Workload) -> Stepper:
    """Per-example gradients by ``vmap(grad)``, then Jᵀ(JJᵀ + λI)⁻¹ s."""
    model = copy.deepcopy(workload.model).train()
    own = dict(model.named_parameters())

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = functional_call(model, params, (x.unsqueeze(0),))[0]
        return F.cross_entropy(z, y), z

    def step() -> None:
        with plain_attention(workload):
            rows, z = vmap(grad(loss, has_aux=True), in_dims=(None, 0, 0))(
                {name: p.detach() for name, p in own.items()}, workload.inputs, workload.targets
            )
        s = (z.softmax(1) - F.one_hot(workload.targets, z.shape[1])).square().sum(1)
        gram = sum((r.flatten(1) @ r.flatten(1).mT for r in rows.values()), torch.zeros((), device=z.device))
        w = torch.linalg.solve(gram + DAMPING * torch.eye(len(s), device=z.device), s)
        with torch.no_grad():
            for name, r in rows.items():
                own[name].sub_((w @ r.flatten(1)).reshape(own[name].shape), alpha=RATE)

    return Stepper(step, model)


def steppers(workload: Workload) -> dict[str, Callable[[], Stepper]]:
    """By name."""
    natural = fk.optim.NaturalGradient
    return {
        "SGD": lambda: _optimizer(workload, lambda m: torch.optim.SGD(m.parameters(), lr=RATE)),
        "AdamW": lambda: _optimizer(workload, lambda m: torch.optim.AdamW(m.parameters(), lr=RATE)),
        "iEF": lambda: _optimizer(workload, lambda m: natural(m, RATE, gram_damping=DAMPING)),
        "iEF, (F + λI)⁻¹∇L": lambda: _optimizer(workload, lambda m: natural(m, RATE, damping=DAMPING)),
        "truncated, rank 2": lambda: _optimizer(
            workload, lambda m: natural(m, RATE, kind="truncated", rank=2, damping=DAMPING)
        ),
        "ieKFAC, every step": lambda: _optimizer(
            workload, lambda m: natural(m, RATE, structure="kfac", damping=DAMPING)
        ),
        "ieKFAC, every 10": lambda: _preconditioned(workload, "kfac"),
        "ieEKFAC, every 10": lambda: _preconditioned(workload, "ekfac"),
        "ieKFAC, rank 128, every 10": lambda: _preconditioned(workload, "kfac", 128),
        "iEF by torch.func": lambda: _by_hand(workload),
    }


def check(workload: Workload) -> float:
    """That our iEF step is the one by hand; the relative difference of the two.

    Raises:
        DisagreementError: it is not.
    """
    moved = []
    for name in ("iEF", "iEF by torch.func"):
        stepper = steppers(_precise(workload))[name]()
        before = [p.detach().clone() for p in stepper.model.parameters()]
        stepper.step()
        after = stepper.model.parameters()
        moved.append(torch.cat([(p.detach() - q).flatten() for p, q in zip(after, before, strict=True)]))
    difference = float((moved[0] - moved[1]).norm() / moved[1].norm())
    if not difference <= TOLERANCE:
        raise DisagreementError(f"{workload.name}, iEF step: differs by {difference:.2e}")
    return difference


def _precise(workload: Workload) -> Workload:
    """A few examples in float64, so that a small rate loses no digits."""
    return workload.take(min(16, workload.examples)).to(workload.inputs.device, torch.float64)


def measure_steps(workload: Workload, device: torch.device, *, rounds: int, slow: float, patience: float) -> Record:
    """Seconds a step of everybody, in turn, and in steps of SGD."""
    clock, runs, first, errors = Clock(device), {}, {}, {}
    difference = check(workload)
    for name, make in steppers(workload).items():
        stepper = make()
        try:
            with limit(patience):
                stepper.step()  # what is verified once
                first[name] = clock.once(stepper.period)[0]
            runs[name] = stepper.period
        except (TookTooLongError, RuntimeError, fk.FisherkitError) as error:
            errors[name] = str(error).split("\n")[0][:200]
    lengths = {name: REFRESH if name.endswith("every 10") else 1 for name in runs}
    timings = race(runs, first, clock, rounds=rounds, slow=slow)
    seconds = {name: timing.seconds / lengths[name] for name, timing in timings.items()}
    units = {name: value / seconds["SGD"] for name, value in seconds.items()}
    targets = {name: TARGETS[workload.name, name] for name in units if (workload.name, name) in TARGETS}
    return {
        "workload": workload.name, "seconds": seconds, "units": units, "errors": errors, "difference": difference,
        "targets": targets, "met": {name: units[name] <= target for name, target in targets.items()},
    }  # fmt: skip
