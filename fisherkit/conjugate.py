"""Conjugate gradients as values: where a solve stands, and the step from there to the next.

Owns the recursion's formulas. A state is never changed, only replaced, so that an interruption at any moment leaves a
whole one. Knows neither files nor progress bars, and does not decide when to stop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherkit.errors import InvalidArgumentError

MatMat: TypeAlias = Callable[[Tensor], Tensor]
"""A linear map of columns, [D, K] -> [D, K]."""


@dataclass(frozen=True, eq=False)  # a generated == would ask a tensor for its truth value
class System:
    """(A + λI) x = target, and what a solution must meet.

    Args:
        matmat: product with A.
        preconditioner: product with an approximate inverse of A + λI, or None.
        damping: λ.
        target: right-hand sides [D, K], of norm about 1.
        tolerance: largest accepted ‖residual‖₂ / ‖target‖₂.
    """

    matmat: MatMat
    preconditioner: MatMat | None
    damping: float
    target: Float[Tensor, "D K"]
    tolerance: float

    @property
    def goal(self) -> Float[Tensor, " K"]:
        """Largest accepted norm of each column's residual."""
        return self.tolerance * norm(self.target)

    def residual(self, x: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """Target − (A + λI) x."""
        return self.target - product(self.matmat, x) - self.damping * x

    def precondition(self, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
        """The preconditioner's product, or the columns themselves."""
        return columns if self.preconditioner is None else product(self.preconditioner, columns)

    def relative(self, error: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
        """Residual norms relative to the target's; where that is 0, as they are."""
        scale = norm(self.target)
        return error / torch.where(scale > 0, scale, 1)


@dataclass(frozen=True, eq=False)
class Recursion:
    """Where a recursion stands between two steps.

    Args:
        update: what it adds to the solution it began at.
        direction: the last direction.
        residual: the residual as the recursion carries it.
        energy: ⟨residual, preconditioned residual⟩ of the last step.
        active: columns that go on.
        advanced: steps that moved a column.
        spent: products.
    """

    update: Float[Tensor, "D K"]
    direction: Float[Tensor, "D K"]
    residual: Float[Tensor, "D K"]
    energy: Float[Tensor, " K"]
    active: Bool[Tensor, " K"]
    advanced: Int[Tensor, ""]
    spent: int

    @classmethod
    def first(cls, residual: Float[Tensor, "D K"], active: Bool[Tensor, " K"]) -> Recursion:
        """Before the first step; the direction starts at 0, so that the first ratio of energies does not matter."""
        zero, one = torch.zeros_like(residual), torch.ones_like(residual[0])
        advanced = torch.zeros((), dtype=torch.int64, device=residual.device)
        return cls(zero, zero, residual, one, active, advanced, 0)

    def step(self, system: System) -> Recursion:
        """One product further."""
        preconditioned = system.precondition(self.residual)
        energy = (self.residual * preconditioned).sum(dim=0)
        active = self.active & (energy > 0)
        # An idle column has its old direction kept.
        direction = torch.where(active, preconditioned + energy / self.energy * self.direction, self.direction)
        image = product(system.matmat, direction) + system.damping * direction
        curvature = (direction * image).sum(dim=0)
        length = energy / curvature
        # No curvature along a direction: rhs lies outside the range of a singular A, or A is not semi-definite, or a
        # product is not finite. The column stays at its last sound iterate, and the true residual tells.
        active = active & (curvature > 0) & torch.isfinite(length)
        length = torch.where(active, length, 0)
        residual = torch.where(active, self.residual - length * image, self.residual)
        return Recursion(
            update=self.update + length * direction,
            direction=direction,
            residual=residual,
            energy=torch.where(active, energy, self.energy),
            active=active & (norm(residual) > system.goal),
            advanced=self.advanced + active.any(),
            spent=self.spent + 1,
        )


@dataclass(frozen=True, eq=False)
class State:
    """Where a solve stands.

    Args:
        best: the best solution so far.
        residual: its true residual.
        steps: products that advanced a solution, of recursions that have ended.
        spent: products, of recursions that have ended.
        stalled: whether the last of them halved no column's residual.
        recursion: the one that refines ``best`` now, or None between two.
    """

    best: Float[Tensor, "D K"]
    residual: Float[Tensor, "D K"]
    steps: int = 0
    spent: int = 0
    stalled: bool = False
    recursion: Recursion | None = None

    @property
    def total(self) -> int:
        """Products so far."""
        return self.spent + (0 if self.recursion is None else self.recursion.spent)

    def begin(self, system: System) -> State:
        """Begin a recursion at the true residual."""
        active = norm(self.residual) > system.goal
        return replace(self, recursion=Recursion.first(self.residual, active))

    def end(self, system: System) -> State:
        """Compute the true residual of what the recursion found, and keep the better solution of each column."""
        if self.recursion is None:
            return self
        candidate = self.best + self.recursion.update
        residual = system.residual(candidate)
        old, new = norm(self.residual), norm(residual)
        # The error in the norm of A falls with every step, the residual need not: the first pass is kept even where it
        # ends on a larger residual. A restart only refines. NaN, from a broken product, is never kept.
        kept = torch.isfinite(new) if self.spent == 0 else new < old
        return State(
            best=torch.where(kept, candidate, self.best),
            residual=torch.where(kept, residual, self.residual),
            steps=self.steps + int(self.recursion.advanced),
            spent=self.spent + self.recursion.spent,
            stalled=not bool(((new < 0.5 * old) & (old > system.goal)).any()),
        )

    def for_tolerance(self, system: System) -> State:
        """The same place on the way to another goal: columns may have more to do, or less."""
        if self.recursion is None:
            return replace(self, stalled=False)
        active = norm(self.recursion.residual) > system.goal
        return replace(self, recursion=replace(self.recursion, active=active))

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers by name."""
        fields = {key: value for key, value in vars(self).items() if key != "recursion"}
        if self.recursion is not None:
            fields |= {f"recursion.{key}": value for key, value in vars(self.recursion).items()}
        tensors = {key: value for key, value in fields.items() if isinstance(value, Tensor)}
        return tensors, {key: value for key, value in fields.items() if key not in tensors}

    @classmethod
    def unpack(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> State:
        """The inverse of `pack`."""
        fields = tensors | numbers
        inner = {key: fields.pop(key) for key in list(fields) if key.startswith("recursion.")}
        if not inner:
            return cls(**fields)
        return cls(**fields, recursion=Recursion(**{key.removeprefix("recursion."): v for key, v in inner.items()}))


def product(matmat: MatMat, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
    """Apply a user's product, without its graph, and refuse one that would broadcast silently."""
    result = matmat(columns).detach()
    if result.shape != columns.shape or result.dtype != columns.dtype:
        raise InvalidArgumentError(
            call="matmat(columns)",
            got=f"a product of shape {list(result.shape)} and dtype {result.dtype}",
            expected=f"shape {list(columns.shape)} and dtype {columns.dtype}, those of its argument",
            why="matmat and preconditioner map columns [D, K] to columns [D, K]",
        )
    return result


def norm(columns: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
    """Euclidean norm of each column."""
    found: Tensor = torch.linalg.vector_norm(columns, dim=0)
    return found


def column_scale(rhs: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
    """Largest magnitude of each column, 1 for a zero column."""
    largest = rhs.detach().abs().amax(dim=0)
    return torch.where(largest > 0, largest, 1)
