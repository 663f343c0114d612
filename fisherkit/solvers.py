"""Iterative solution of ``(A + damping I) x = rhs`` for a positive semi-definite ``A`` known only by its products.

Owns conjugate gradients and `SolveInfo`, the report that every solve of the package gives, direct ones included. Knows
neither operators nor Fishers: ``A`` is a plain callable on tensors [D, K].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from fisherkit.errors import InvalidArgumentError, NonFiniteError, NotConvergedWarning

MatMat: TypeAlias = Callable[[Tensor], Tensor]
"""A linear map of columns, [D, K] -> [D, K]."""
# Asking "are all columns done?" makes the host wait for an accelerator, which then idles while the next kernels are
# launched. A CPU has nothing to wait for, and a superfluous product there costs a full pass over the data.
_CHECK_EVERY = {"cpu": 1, "accelerator": 5}


@dataclass(frozen=True, eq=False)  # a generated == would ask a tensor for its truth value
class SolveInfo:
    """How a linear solve went, whichever method did it.

    Args:
        method: name of the method, for example ``"conjugate_gradient"``.
        steps: products with the matrix that advanced a solution; 0 for a direct method.
        residual: ‖(A + damping I) x − rhs‖₂ / ‖rhs‖₂ of each column, recomputed from ``x``; 0 where rhs is 0.
        converged: whether every column's residual met the tolerance.
        damping: the damping that was used.
    """

    method: str
    steps: int
    residual: Float[Tensor, " K"]
    converged: bool
    damping: float


def relative_residual(
    matmat: MatMat, solution: Float[Tensor, "D K"], rhs: Float[Tensor, "D K"], *, damping: float = 0.0
) -> Float[Tensor, " K"]:
    """Residual norm of each column relative to its right-hand side: what `SolveInfo.residual` holds.

    Args:
        matmat: product with A, [D, K] -> [D, K].
        solution: x [D, K].
        rhs: right-hand sides [D, K].
        damping: λ of A + λI.

    Returns:
        ‖(A + λI) x − rhs‖₂ / ‖rhs‖₂ [K], in the dtype and on the device of ``rhs``; ‖(A + λI) x‖₂ where rhs is 0.

    Cost: one product with A.
    """
    scale = _column_scale(rhs)
    residual = (rhs - _product(matmat, solution) - damping * solution) / scale
    norm = _norm(rhs / scale)
    return _norm(residual) / torch.where(norm > 0, norm, 1)


def conjugate_gradient(
    matmat: MatMat,
    rhs: Float[Tensor, "D K"],
    *,
    damping: float = 0.0,
    preconditioner: MatMat | None = None,
    initial: Float[Tensor, "D K"] | None = None,
    tolerance: float = 1e-6,
    max_steps: int | None = None,
    progress: bool = False,
) -> tuple[Float[Tensor, "D K"], SolveInfo]:
    """Solve ``(A + damping I) x = rhs`` by preconditioned conjugate gradients, all columns at once.

    Each column has its own step sizes and stops by itself. In finite precision the residual that the recursion carries
    drifts from the true one; when the recursion is done, the true residual is computed, and a column that does not meet
    the tolerance after all is restarted from it for as long as that halves it. Solutions are not differentiable.

    Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.

    Args:
        matmat: product with A, [D, K] -> [D, K]; A symmetric positive semi-definite.
        rhs: right-hand sides [D, K].
        damping: λ ≥ 0.
        preconditioner: product with an approximate inverse of A + λI, [D, K] -> [D, K], positive definite.
        initial: where to start [D, K]; 0 by default.
        tolerance: largest accepted ‖residual‖₂ / ‖rhs‖₂ of a column. Much less than cond(A + λI) times the dtype's
            machine epsilon may be out of reach.
        max_steps: most products within the recursion; min(10 D, 1000) by default.
        progress: show a progress bar.

    Returns:
        x [D, K], in the dtype and on the device of ``rhs``, and a `SolveInfo`. Zero columns of rhs give zero columns.
        If a column misses the tolerance, a `NotConvergedWarning` says so.

    Cost: one product with A a step, and one a restart; five [D, K] tensors.
    """
    _check_arguments(rhs, damping, initial, tolerance, max_steps)
    max_steps = min(10 * rhs.shape[0], 1000) if max_steps is None else max_steps
    # Columns of any magnitude become columns of norm about 1, whose squares neither overflow nor underflow.
    scale = _column_scale(rhs)
    target = rhs.detach() / scale
    norm = _norm(target)
    best = torch.zeros_like(target) if initial is None else torch.where(norm > 0, initial.detach() / scale, 0)
    goal = tolerance * norm

    residual = target if initial is None else target - _product(matmat, best) - damping * best
    error, steps, spent, stalled = _norm(residual), 0, 0, False
    with tqdm(total=max_steps, desc="conjugate_gradient", disable=not progress) as bar:
        while spent < max_steps and not stalled and bool((active := error > goal).any()):
            update, advanced, products = _recursion(
                matmat, residual, damping, preconditioner, active, goal, max_steps - spent, bar.update
            )
            candidate = best + update
            new_residual = target - _product(matmat, candidate) - damping * candidate
            new_error = _norm(new_residual)
            # The error in the norm of A falls with every step, the residual need not: the first pass is kept even
            # where it ends on a larger residual. A restart only refines. NaN, from a broken product, is never kept.
            kept = torch.isfinite(new_error) if spent == 0 else new_error < error
            stalled = not bool(((new_error < 0.5 * error) & active).any())
            best, residual = torch.where(kept, candidate, best), torch.where(kept, new_residual, residual)
            error = torch.where(kept, new_error, error)
            steps, spent = steps + advanced, spent + products

    info = SolveInfo(
        "conjugate_gradient", steps, error / torch.where(norm > 0, norm, 1), bool((error <= goal).all()), float(damping)
    )
    if not info.converged:
        _warn(info, tolerance, max_steps, exhausted=spent >= max_steps)
    return best * scale, info


def _recursion(
    matmat: MatMat,
    residual: Float[Tensor, "D K"],
    damping: float,
    preconditioner: MatMat | None,
    active: Bool[Tensor, " K"],
    goal: Float[Tensor, " K"],
    max_steps: int,
    on_step: Callable[[int], object],
) -> tuple[Float[Tensor, "D K"], int, int]:
    """Run the recursion from 0; return the update of x, the steps that advanced it, and the products spent."""
    check_every = _CHECK_EVERY["cpu" if residual.device.type == "cpu" else "accelerator"]
    update = torch.zeros_like(residual)
    direction = torch.zeros_like(residual)
    previous = torch.ones_like(goal)
    advanced = torch.zeros((), dtype=torch.int64, device=residual.device)
    spent = 0
    while spent < max_steps:
        preconditioned = residual if preconditioner is None else _product(preconditioner, residual)
        energy = (residual * preconditioned).sum(dim=0)
        active = active & (energy > 0)
        # `direction` starts at 0, so that the first ratio does not matter; an idle column has its old direction kept.
        direction = torch.where(active, preconditioned + energy / previous * direction, direction)
        product = _product(matmat, direction) + damping * direction
        curvature = (direction * product).sum(dim=0)
        length = energy / curvature
        # No curvature along a direction: rhs lies outside the range of a singular A, or A is not semi-definite, or a
        # product is not finite. The column stays at its last sound iterate, and the true residual tells.
        active = active & (curvature > 0) & torch.isfinite(length)
        length = torch.where(active, length, 0)
        update = update + length * direction
        residual = torch.where(active, residual - length * product, residual)
        previous = torch.where(active, energy, previous)
        advanced = advanced + active.any()
        active = active & (_norm(residual) > goal)
        spent += 1
        on_step(1)
        if spent % check_every == 0 and not bool(active.any()):
            break
    return update, int(advanced), spent


def _product(matmat: MatMat, columns: Float[Tensor, "D K"]) -> Float[Tensor, "D K"]:
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


def _norm(columns: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
    """Euclidean norm of each column."""
    norm: Tensor = torch.linalg.vector_norm(columns, dim=0)
    return norm


def _column_scale(rhs: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
    """Largest magnitude of each column, 1 for a zero column."""
    largest = rhs.detach().abs().amax(dim=0)
    return torch.where(largest > 0, largest, 1)


def _check_arguments(
    rhs: Tensor, damping: float, initial: Tensor | None, tolerance: float, max_steps: int | None
) -> None:
    """Raise for arguments that would end as NaN or as a wrong answer."""

    def refuse(argument: str, got: str, expected: str, try_: str = "") -> InvalidArgumentError:
        return InvalidArgumentError(call=f"conjugate_gradient({argument})", got=got, expected=expected, try_=try_)

    if rhs.ndim != 2 or rhs.numel() == 0:
        raise refuse("rhs", f"shape {list(rhs.shape)}", "a non-empty [D, K]", "rhs.unsqueeze(1) for one column")
    if initial is not None and initial.shape != rhs.shape:
        raise refuse("initial", f"shape {list(initial.shape)}", f"the shape of rhs, {list(rhs.shape)}")
    if not (math.isfinite(damping) and damping >= 0):
        raise refuse(f"damping={damping}", str(damping), "a finite number >= 0")
    if not 0 < tolerance < 1:
        raise refuse(f"tolerance={tolerance}", str(tolerance), "0 < tolerance < 1, relative to the norm of rhs")
    if max_steps is not None and max_steps < 1:
        raise refuse(f"max_steps={max_steps}", str(max_steps), "an integer >= 1")
    for name, tensor in (("rhs", rhs), ("initial", initial)):
        if tensor is not None and (count := int((~torch.isfinite(tensor)).sum())):
            raise NonFiniteError(
                call=f"conjugate_gradient({name})",
                got=f"{count} NaN or infinite of {tensor.numel()} entries",
                expected="finite numbers",
                try_="check the loss or gradient that it came from",
            )


def _warn(info: SolveInfo, tolerance: float, max_steps: int, *, exhausted: bool) -> None:
    """Say which residual was reached and what would help."""
    missed = int((~(info.residual <= tolerance)).sum())
    cause = (
        f"max_steps={max_steps} ran out. Try: more steps, a preconditioner"
        if exhausted
        else f"{info.residual.dtype} allows no better, or rhs is not in the range of a singular matrix. Try: float64"
    )
    warnings.warn(
        f"conjugate_gradient: {missed} of {info.residual.numel()} columns missed tolerance={tolerance:g} after "
        f"{info.steps} steps; the largest relative residual is {float(info.residual.max()):.3g}: {cause}, "
        f"a damping above {info.damping:g}, or a larger tolerance.",
        NotConvergedWarning,
        stacklevel=3,  # the caller of conjugate_gradient
    )
