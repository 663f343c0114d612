"""Iterative solution of ``(A + damping I) x = rhs`` for a positive semi-definite ``A`` known only by its products.

Owns conjugate gradients, the file from which an interrupted solve goes on, and `SolveInfo`, the report that every solve
of the package gives, direct ones included. Knows neither operators nor Fishers: ``A`` is a plain callable on tensors
[D, K].
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from fisherkit import io
from fisherkit.arguments import check_count, check_number, is_integer
from fisherkit.arithmetic import MatMat, checked_product, without_autocast
from fisherkit.errors import FileFormatError, InvalidArgumentError, NonFiniteError, NotConvergedWarning, warn

# Asking "are all columns done?" makes the host wait for an accelerator, which then idles while the next kernels are
# launched. A CPU has nothing to wait for, and a superfluous product there costs a full pass over the data.
_CHECK_EVERY = {"cpu": 1, "accelerator": 5}
EVERY = 60.0
"""Seconds between two writings of the file of a solve."""


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

    @classmethod
    def of_parts(cls, infos: Sequence[SolveInfo], residual: Float[Tensor, " K"], damping: float) -> SolveInfo:
        """Of a solve in parts, of which each has its info; the residual is of the whole."""
        method = " + ".join(sorted({info.method for info in infos}))
        steps, converged = max(info.steps for info in infos), all(info.converged for info in infos)
        return cls(method, steps, residual, converged, damping)


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
    scale = _column_scale(rhs)
    residual = (rhs - checked_product(matmat, solution) - damping * solution) / scale
    return _norm(residual) / torch.where((size := _norm(rhs / scale)) > 0, size, 1)


@without_autocast()
def conjugate_gradient(
    matmat: MatMat, rhs: Float[Tensor, "D K"], *, damping: float = 0.0, preconditioner: MatMat | None = None,
    tolerance: float = 1e-6, max_steps: int | None = None, progress: bool = False,
    checkpoint: str | Path | None = None,
) -> tuple[Float[Tensor, "D K"], SolveInfo]:  # fmt: skip
    """Solve ``(A + damping I) x = rhs`` by preconditioned conjugate gradients, all columns at once.

    Each column has its own step sizes and stops by itself. In finite precision the residual that the recursion carries
    drifts from the true one; when the recursion is done, the true residual is computed, and a column that does not meet
    the tolerance after all is restarted from it for as long as that halves it. Solutions are not differentiable.

    With ``checkpoint``, an interrupted solve goes on from its last iterate: call again with the same arguments. The
    file is written once a minute, and when an exception (Ctrl-C is one) ends the solve, after the
    last complete step; a process that is killed loses what came after the last writing. The search directions begin
    anew, which may cost some steps. ``tolerance``, ``max_steps`` and the preconditioner may be others: a solve that ran
    out of steps goes on with more. The file stays when the solve is done, and the same call then returns its solution
    after two products, which recognise the matrix and check the solution.

    Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.

    Args:
        matmat: product with A, [D, K] -> [D, K]; A symmetric positive semi-definite.
        rhs: right-hand sides [D, K].
        damping: λ ≥ 0.
        preconditioner: product with an approximate inverse of A + λI, [D, K] -> [D, K], positive definite.
        tolerance: largest accepted ‖residual‖₂ / ‖rhs‖₂ of a column. Much less than cond(A + λI) times the dtype's
            machine epsilon may be out of reach.
        max_steps: most products within the recursion, those before an interruption included; min(10 D, 1000) by
            default.
        progress: show a progress bar with the largest relative residual among the columns.
        checkpoint: the file to go on from, if it exists, and to keep.

    Returns:
        x [D, K], in the dtype and on the device of ``rhs``, and a `SolveInfo`. Zero columns of rhs give zero columns.
        If a column misses the tolerance, a `NotConvergedWarning` says so.

    Raises:
        InvalidArgumentError: an argument cannot be used, or the checkpoint is the file of another problem, by its
            shape, dtype, damping, rhs or matrix. The file is left as it is.
        FileFormatError: the checkpoint is damaged or no checkpoint. The file is left as it is.
        NonFiniteError: rhs is not finite.

    Cost: one product with A a step, and one a restart; with ``checkpoint`` one or two a call. About ten [D, K] tensors;
    three in the file.
    """
    _check_arguments(rhs, damping, tolerance, max_steps)
    max_steps = min(10 * rhs.shape[0], 1000) if max_steps is None else max_steps
    # Columns of any magnitude become columns of norm about 1, whose squares neither overflow nor underflow.
    scale = _column_scale(rhs)
    target = rhs.detach() / scale
    file = None if checkpoint is None else _File(checkpoint, float(damping), rhs.detach())
    solve = _Solve(matmat, preconditioner, float(damping), target, tolerance, max_steps, file)
    residual = solve.run(progress=progress)
    info = SolveInfo(
        "conjugate_gradient", int(solve.steps), solve.relative(residual), solve.met(residual), float(damping)
    )
    if not info.converged:
        _warn(info, tolerance, max_steps, exhausted=solve.spent >= max_steps)
    return solve.x * scale, info


class _Solve:
    """(A + λI) x = target by recursions that each begin at the true residual; `x` is the last complete iterate."""

    def __init__(
        self, matmat: MatMat, preconditioner: MatMat | None, damping: float, target: Float[Tensor, "D K"],
        tolerance: float, max_steps: int, file: _File | None,
    ) -> None:  # fmt: skip
        self.matmat, self.preconditioner, self.damping, self.target = matmat, preconditioner, damping, target
        self.tolerance, self.max_steps, self.file = tolerance, max_steps, file
        self.check_every = _CHECK_EVERY["cpu" if target.device.type == "cpu" else "accelerator"]
        self.goal = tolerance * _norm(target)
        self.base = self.update = torch.zeros_like(target)
        self.steps = torch.zeros((), dtype=torch.int64, device=target.device)  # products that moved a column
        self.spent = 0
        kept = None if file is None else file.load(lambda: checked_product(matmat, target))
        if kept is None:
            self.save()  # a file that cannot be written is found out before the work
        else:
            self.base, steps, self.spent = kept
            self.steps = self.steps + steps

    @property
    def x(self) -> Float[Tensor, "D K"]:
        # Apart until the recursion ends, or many small steps would be lost in the rounding of a large solution.
        return self.base + self.update

    def run(self, *, progress: bool) -> Float[Tensor, "D K"]:
        """Recursions until every column meets its goal, none gains, or the steps are spent; the true residual."""
        try:
            with tqdm(total=self.max_steps, initial=self.spent, desc="conjugate_gradient", disable=not progress) as bar:
                residual = self.residual() if bool(self.base.any()) else self.target
                first, stalled = True, False
                while not (stalled or self.spent >= self.max_steps or self.met(residual)):
                    self._recursion(residual, bar)
                    found = self.residual()
                    old, new = _norm(residual), _norm(found)
                    # The error in the norm of A falls with every step, the residual need not: the first pass is kept
                    # even where it ends on a larger residual. A restart only refines. NaN, from a broken product, is
                    # never kept.
                    kept = torch.isfinite(new) if first else new < old
                    stalled, first = not bool(((new < 0.5 * old) & (old > self.goal)).any()), False
                    self.base, self.update = torch.where(kept, self.x, self.base), torch.zeros_like(self.base)
                    residual = torch.where(kept, found, residual)
        finally:
            self.save()
        return residual

    def residual(self) -> Float[Tensor, "D K"]:
        return self.target - checked_product(self.matmat, self.x) - self.damping * self.x

    def relative(self, residual: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
        """Norms relative to the target's; where that is 0, as they are."""
        scale = _norm(self.target)
        return _norm(residual) / torch.where(scale > 0, scale, 1)

    def met(self, residual: Float[Tensor, "D K"]) -> bool:
        return bool((_norm(residual) <= self.goal).all())

    def save(self) -> None:
        if self.file is not None:
            self.file.save(self.x, int(self.steps), self.spent)

    def _recursion(self, residual: Float[Tensor, "D K"], bar: tqdm) -> None:
        direction, last = torch.zeros_like(residual), torch.ones_like(residual[0])
        active, count = _norm(residual) > self.goal, 0
        while self.spent < self.max_steps and (count % self.check_every or bool(active.any())):
            step = residual if self.preconditioner is None else checked_product(self.preconditioner, residual)
            energy = (residual * step).sum(dim=0)
            active = active & (energy > 0)
            # An idle column has its old direction kept.
            direction = torch.where(active, step + energy / last * direction, direction)
            image = checked_product(self.matmat, direction) + self.damping * direction
            curvature = (direction * image).sum(dim=0)
            length = energy / curvature
            # No curvature along a direction: rhs lies outside the range of a singular A, or A is not semi-definite, or
            # a product is not finite. The column stays at its last sound iterate, and the true residual tells.
            active = active & (curvature > 0) & torch.isfinite(length)
            length = torch.where(active, length, 0)
            self.update = self.update + length * direction
            residual = torch.where(active, residual - length * image, residual)
            last = torch.where(active, energy, last)
            self.steps, self.spent, count = self.steps + active.any(), self.spent + 1, count + 1
            active = active & (_norm(residual) > self.goal)
            if not bar.disable and count % self.check_every == 0:
                largest = float(self.relative(residual).max())
                bar.set_postfix(residual=f"{largest:.1e}", goal=f"{self.tolerance:.0e}", refresh=False)
            bar.update(1)
            if self.file is not None and self.file.due():
                self.save()


class _File:
    """The file of one solve: its last iterate, and what the problem is recognised by, up to rounding."""

    FORMAT, VERSION = "fisherkit-solve", 2

    def __init__(self, path: str | Path, damping: float, rhs: Float[Tensor, "D K"]) -> None:
        self.call = f"solve(checkpoint={str(path)!r})"
        self.path = io.as_path(path, "solve(checkpoint)")
        io.check_folder(self.path, self.call)
        self.settings: dict[str, Any] = {"shape": list(rhs.shape), "dtype": str(rhs.dtype), "damping": damping}
        self.known = {"right-hand side": rhs}
        self.rounding = torch.finfo(rhs.dtype).eps ** 0.5
        self._last = time.monotonic()

    def load(self, product: Callable[[], Tensor]) -> tuple[Float[Tensor, "D K"], int, int] | None:
        """Solution, steps and products of the file's last writing, for the same problem; None if there is no file."""
        if not self.path.exists():
            self.known["matrix"] = product()
            return None
        tensors, settings, numbers = self._read()
        for name, value in self.settings.items():
            kept: Any = settings.get(name)
            floats = isinstance(value, float) and isinstance(kept, float)
            if value != kept and not (floats and math.isclose(value, kept, rel_tol=self.rounding)):
                raise self._other(f"with {name} = {kept}", f"{name} = {value}")
        self._compare("right-hand side", tensors)
        self.known["matrix"] = product()
        self._compare("matrix", tensors)
        return tensors["solution"], numbers["steps"], numbers["products"]

    def due(self) -> bool:
        return time.monotonic() - self._last >= EVERY

    def save(self, solution: Float[Tensor, "D K"], steps: int, products: int) -> None:
        """Write where the solve stands; an interruption meanwhile leaves the file before it."""
        header = {
            "format": self.FORMAT, "version": str(self.VERSION), "settings": json.dumps(self.settings),
            "numbers": json.dumps({"steps": steps, "products": products}),
        }  # fmt: skip
        io.replace_checked_file(self.path, {"solution": solution, **self.known}, header)
        self._last = time.monotonic()

    def _read(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, int]]:
        header, tensors = io.read_tensors(self.path, self.known["right-hand side"].device, self.call, "a solve")
        if header.get("format") != self.FORMAT:
            got, expected = "a file of another kind, which has been left as it is", "no file yet, or one of a solve"
            raise FileFormatError(self.call, got, expected, try_="another path")
        version, instead = header.get("version", ""), "another path, or delete the file"
        if version.isdecimal() and int(version) != self.VERSION:
            got, expected = f"format version {version}", f"version {self.VERSION}"
            try_ = "a newer fisherkit" if int(version) > self.VERSION else instead
            raise FileFormatError(self.call, got, expected, try_=try_)
        try:
            if not version.isdecimal():
                raise ValueError(f"version {version!r}")
            settings, numbers = (dict(io.parse(header[key])) for key in ("settings", "numbers"))
            if not all(is_integer(numbers[name]) for name in ("steps", "products")):
                raise ValueError(f"numbers {numbers}")
            if len({(tensors[name].shape, tensors[name].dtype) for name in ("solution", *self.known, "matrix")}) > 1:
                raise ValueError("tensors of different shapes or types")
        except (LookupError, ValueError, TypeError) as error:
            got = f"a file that cannot be read ({error})"
            raise FileFormatError(self.call, got, "one written by a solve", try_=instead) from error
        return tensors, settings, numbers

    def _compare(self, name: str, tensors: dict[str, Tensor]) -> None:
        value = self.known[name]
        scale = _column_scale(value)
        difference = _norm((tensors[name] - value) / scale)
        if not bool((difference <= self.rounding * _norm(value / scale)).all()):
            raise self._other(f"with another {name}", f"the {name} of this call")

    def _other(self, got: str, expected: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            self.call, f"the file of another solve, {got}", f"no file yet, or that of a solve with {expected}",
            why="going on from there would mix two problems; the file has been left as it is",
            try_="another path, or delete the file if that solve is no longer wanted",
        )  # fmt: skip


def _norm(columns: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
    found: Tensor = torch.linalg.vector_norm(columns, dim=0)
    return found


def _column_scale(rhs: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
    """Largest magnitude of each column, 1 for a zero column."""
    largest = rhs.detach().abs().amax(dim=0)
    return torch.where(largest > 0, largest, 1)


def _check_arguments(rhs: Tensor, damping: float, tolerance: float, max_steps: int | None) -> None:
    """Raise for arguments that would end as NaN or as a wrong answer."""
    call = "conjugate_gradient"
    if rhs.ndim != 2 or rhs.numel() == 0:
        advice = "rhs.unsqueeze(1) for one column"
        raise InvalidArgumentError(f"{call}(rhs)", f"shape {list(rhs.shape)}", "a non-empty [D, K]", try_=advice)
    check_number(call, "damping", damping)
    check_number(call, "tolerance", tolerance, most=1, above=True, below=True, why="it is relative to the norm of rhs")
    check_count(call, "max_steps", max_steps, optional=True)
    if count := int((~torch.isfinite(rhs)).sum()):
        raise NonFiniteError(
            "conjugate_gradient(rhs)", f"{count} NaN or infinite of {rhs.numel()} entries", "finite numbers",
            try_="check the loss or gradient that it came from",
        )  # fmt: skip


def _warn(info: SolveInfo, tolerance: float, max_steps: int, *, exhausted: bool) -> None:
    """Say which residual was reached and what would help."""
    missed = int((~(info.residual <= tolerance)).sum())
    cause = (
        f"max_steps={max_steps} ran out. Try: more steps, a preconditioner"
        if exhausted
        else f"{info.residual.dtype} allows no better, or rhs is not in the range of a singular matrix. Try: float64"
    )
    warn(
        f"conjugate_gradient: {missed} of {info.residual.numel()} columns missed tolerance={tolerance:g} after "
        f"{info.steps} steps; the largest relative residual is {float(info.residual.max()):.3g}: {cause}, "
        f"a damping above {info.damping:g}, or a larger tolerance.",
        NotConvergedWarning,
    )
