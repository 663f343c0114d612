"""Iterative solution of ``(A + damping I) x = rhs`` for a positive semi-definite ``A`` known only by its products.

Owns the loop of conjugate gradients, whose formulas are in `fisherkit.conjugate`, and `SolveInfo`, the report that
every solve of the package gives, direct ones included. Knows neither operators nor Fishers: ``A`` is a plain callable
on tensors [D, K].
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from fisherkit.arithmetic import without_autocast
from fisherkit.checkpoint import Checkpoint
from fisherkit.conjugate import MatMat, Recursion, State, System, column_scale, norm, product
from fisherkit.errors import InvalidArgumentError, NonFiniteError, NotConvergedWarning

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


@without_autocast()
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
    scale = column_scale(rhs)
    residual = (rhs - product(matmat, solution) - damping * solution) / scale
    return norm(residual) / torch.where((size := norm(rhs / scale)) > 0, size, 1)


@without_autocast()
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
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 60.0,
) -> tuple[Float[Tensor, "D K"], SolveInfo]:
    """Solve ``(A + damping I) x = rhs`` by preconditioned conjugate gradients, all columns at once.

    Each column has its own step sizes and stops by itself. In finite precision the residual that the recursion carries
    drifts from the true one; when the recursion is done, the true residual is computed, and a column that does not meet
    the tolerance after all is restarted from it for as long as that halves it. Solutions are not differentiable.

    With ``checkpoint``, an interrupted solve goes on where it was: call again with the same arguments. The file is
    written every ``checkpoint_every`` seconds, and when an exception (Ctrl-C is one) ends the solve, after the last
    complete step; a process that is killed loses what came after the last writing. The iterates are those of a solve
    without interruption, bit for bit where products are. ``tolerance`` and ``max_steps`` may be others: a solve that
    ran out of steps goes on with more. The file stays when the solve is done, and the same call then returns its
    solution after the one product that recognises the matrix.

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
        progress: show a progress bar with the largest relative residual among the columns.
        checkpoint: the file to go on from, if it exists, and to keep.
        checkpoint_every: seconds between two writings of the file; 0 for every step.

    Returns:
        x [D, K], in the dtype and on the device of ``rhs``, and a `SolveInfo`. Zero columns of rhs give zero columns.
        If a column misses the tolerance, a `NotConvergedWarning` says so.

    Raises:
        InvalidArgumentError: an argument cannot be used, or the checkpoint is the file of another problem, by its
            shape, dtype, damping, rhs, initial, matrix or preconditioner. The file is left as it is.
        FileFormatError: the checkpoint is damaged or no checkpoint. The file is left as it is.
        NonFiniteError: rhs or initial is not finite.

    Cost: one product with A a step, and one a restart; with ``checkpoint`` one a call. About ten [D, K] tensors, five
    of them in the file.
    """
    _check_arguments(rhs, damping, initial, tolerance, max_steps)
    max_steps = min(10 * rhs.shape[0], 1000) if max_steps is None else max_steps
    # Columns of any magnitude become columns of norm about 1, whose squares neither overflow nor underflow.
    scale = column_scale(rhs)
    target = rhs.detach() / scale
    system = System(matmat, preconditioner, float(damping), target, tolerance)
    start = torch.zeros_like(target)
    if initial is not None:
        start = torch.where(norm(target) > 0, initial.detach() / scale, 0)
    file = None
    if checkpoint is not None:
        file = Checkpoint(checkpoint, every=checkpoint_every, device=rhs.device, dtype=rhs.dtype)
        _recognise(file, system, rhs.detach(), start)
    solve = _Solve(system, max_steps, file)
    solve.begin(start, from_zero=initial is None)
    state = solve.run(progress=progress)
    error = norm(state.residual)
    info = SolveInfo("conjugate_gradient", state.steps, system.relative(error), solve.met, float(damping))
    if not info.converged:
        _warn(info, tolerance, max_steps, exhausted=state.spent >= max_steps)
    return state.best * scale, info


class _Solve:
    """The loop around the steps: when to stop, what to show and what to write. `state` is always a whole one."""

    def __init__(self, system: System, max_steps: int, file: Checkpoint | None) -> None:
        self.system, self.max_steps, self.file = system, max_steps, file
        self.check_every = _CHECK_EVERY["cpu" if system.target.device.type == "cpu" else "accelerator"]
        self.state: State

    def begin(self, start: Float[Tensor, "D K"], *, from_zero: bool) -> None:
        """Begin where the file ends, or at the start.

        Raises:
            FileFormatError: the file is not whole.
        """
        if self.file is not None and self.file.found:
            tensors, numbers = self.file.load()
            try:
                same = numbers.pop("tolerance") == self.system.tolerance
                state = State.unpack(tensors, numbers)
            except (LookupError, TypeError) as error:
                raise self.file.damaged(error) from error
            self.state = state if same else state.for_tolerance(self.system)
        else:
            self.state = State(start, self.system.target if from_zero else self.system.residual(start))
            self.save(self.state)  # a file that cannot be written is found out before the work

    def run(self, *, progress: bool) -> State:
        """Step until every column meets its goal, none gains, or the steps are spent."""
        try:
            with tqdm(
                total=self.max_steps, initial=self.state.total, desc="conjugate_gradient", disable=not progress
            ) as bar:
                while self.state.recursion is not None or not self.over:
                    self._recursion(bar)
        except BaseException:
            self.save(self.state)
            raise
        return self.state

    @property
    def met(self) -> bool:
        """Whether the true residual of every column meets its goal."""
        return bool((norm(self.state.residual) <= self.system.goal).all())

    @property
    def over(self) -> bool:
        """Whether another recursion would be of no use."""
        return self.state.spent >= self.max_steps or self.state.stalled or self.met

    def save(self, state: State) -> None:
        """Write a state to the file, if there is one."""
        if self.file is not None:
            tensors, numbers = state.pack()
            self.file.save(tensors, numbers | {"tolerance": self.system.tolerance})

    def _recursion(self, bar: tqdm) -> None:
        """One recursion to its end, from wherever it stands."""
        if self.state.recursion is None:
            self.state = self.state.begin(self.system)
        while (recursion := self.state.recursion) is not None and not self._ended(recursion):
            self.state = replace(self.state, recursion=recursion.step(self.system))
            self._show(bar)
            if self.file is not None and self.file.due():
                self.save(self.state)
        last, self.state = self.state, self.state.end(self.system)
        # Out of steps in the middle of a recursion, its place in it is what a call with more steps needs.
        self.save(self.state if self.met or self.state.spent < self.max_steps else last)

    def _ended(self, recursion: Recursion) -> bool:
        if self.state.total >= self.max_steps:
            return True
        return recursion.spent % self.check_every == 0 and not bool(recursion.active.any())

    def _show(self, bar: tqdm) -> None:
        recursion = self.state.recursion
        if recursion is not None and not bar.disable and recursion.spent % self.check_every == 0:
            residual = float(self.system.relative(norm(recursion.residual)).max())
            bar.set_postfix(residual=f"{residual:.1e}", goal=f"{self.system.tolerance:.0e}", refresh=False)
        bar.update(1)


def _recognise(file: Checkpoint, system: System, rhs: Float[Tensor, "D K"], start: Float[Tensor, "D K"]) -> None:
    """Compare the problem with the file's, what costs nothing first."""
    file.match("shape", list(rhs.shape))
    file.match("dtype", str(rhs.dtype))
    file.match("damping", system.damping)
    file.match_columns("right-hand side", rhs)
    file.match_columns("initial", start)
    file.match_columns("matrix or preconditioner", product(system.matmat, system.precondition(system.target)))


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
        stacklevel=4,  # the caller of conjugate_gradient, behind its decorator
    )
