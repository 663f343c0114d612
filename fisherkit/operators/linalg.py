"""What several structures need of a small matrix: checks when it is handed in, its eigenpairs, damped solves.

Decompositions and reciprocals are in float64, whatever the operator's dtype: with small damping they decide the digits
of a solve.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arithmetic import all_finite, together
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError, SingularMatrixError

FIRST, LATER, MORE = 4, 1, 16
"""Subspace iterations from random vectors, of which there are so many more, and from the last eigenvectors."""


def check_tensor(
    tensor: Tensor, shape: Sequence[int], call: str, *, dtypes: tuple[torch.dtype, ...] = (),
    device: torch.device | None = None, nonnegative: bool = False,
) -> Tensor:  # fmt: skip
    """A tensor that an operator is made of, without its graph; kept, not copied; refused where it does not fit."""
    if not isinstance(tensor, Tensor):
        raise InvalidTypeError(call, f"a {type(tensor).__name__}", "a torch tensor")
    if not tensor.is_floating_point() or (dtypes and tensor.dtype not in dtypes):
        wanted = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes)) or "a real floating-point dtype"
        raise InvalidTypeError(call, f"a tensor of {tensor.dtype}", wanted)
    if tuple(tensor.shape) != tuple(shape):
        raise InvalidArgumentError(call, f"shape {list(tensor.shape)}", str(list(shape)))
    if device is not None and tensor.device != device:
        raise InvalidArgumentError(call, f"a tensor on {tensor.device}", str(device))
    lows = [tensor.min()] if nonnegative and tensor.numel() else []
    _look(tensor, lows, functools.partial(_check_values, tensor, call, nonnegative))
    return tensor.detach()


class _Look(NamedTuple):
    """What is to be looked at: a tensor that must be finite, numbers that must not be negative, and what refuses."""

    tensor: Tensor
    lows: Sequence[Tensor]
    refuse: Callable[[], None]


_PENDING: ContextVar[list[_Look] | None] = ContextVar("pending", default=None)


def _look(tensor: Tensor, lows: Sequence[Tensor], refuse: Callable[[], None]) -> None:
    """Look at numbers now, or together with others where `checked_together` is about."""
    pending, look = _PENDING.get(), _Look(tensor, lows, refuse)
    if pending is None:
        _look_at([look])
    else:
        pending.append(look)


@contextmanager
def checked_together(*, alone: bool = False) -> Iterator[None]:
    """Operators and spectra that are made in here have their numbers looked at in the end, with one wait.

    Until then their tensors are kept; ``alone``, not for longer where this is within another one.
    """
    if _PENDING.get() is not None and not alone:
        yield
        return
    with checked_before() as pending:
        yield
    _look_at(pending)


@contextmanager
def checked_before() -> Iterator[list[_Look]]:
    """Operators that are made in here have numbers that have been looked at."""
    pending: list[_Look] = []
    token = _PENDING.set(pending)
    try:
        yield pending
    finally:
        _PENDING.reset(token)


def _look_at(pending: Sequence[_Look]) -> None:
    if not pending:
        return
    norms = torch._foreach_norm([look.tensor for look in pending])  # which may overflow where no entry does
    lows = [low for look in pending for low in look.lows]
    found = together([*norms, *lows]).tolist()
    if not all(map(math.isfinite, found)) or any(low < 0 for low in found[len(norms) :]):
        for look in pending:
            look.refuse()


def _check_values(tensor: Tensor, call: str, nonnegative: bool) -> None:
    check_finite(tensor, call)
    if nonnegative and tensor.numel() and float(tensor.min()) < 0:
        raise InvalidArgumentError(
            call, f"{int((tensor < 0).sum())} negative entries, the lowest {float(tensor.min()):.3g}",
            "numbers that are 0 or more", why="a Fisher matrix is positive semi-definite",
        )  # fmt: skip


def check_finite(tensor: Tensor, call: str) -> None:
    """Refuse NaN and infinity."""
    if not all_finite(tensor):
        raise NonFiniteError(call, "NaN or infinite entries", "finite numbers")


def check_symmetric(matrix: Float[Tensor, "n n"], call: str) -> Float[Tensor, "n n"]:
    """The matrix, if it is symmetric up to what a product aᵀa computed in its dtype may leave; else it is refused."""
    skew = float((matrix - matrix.mT).max())  # its least entry is the opposite
    if skew > torch.finfo(matrix.dtype).eps ** 0.5 * float(torch.stack(matrix.aminmax()).abs().max()):
        raise InvalidArgumentError(
            call, f"a matrix that differs from its transpose by up to {skew:.3g}", "a symmetric one",
            why="a Fisher matrix is symmetric",
        )  # fmt: skip
    return matrix


class Spectrum(NamedTuple):
    """A symmetric matrix as Q diag(values) Qᵀ + rest · (I − QQᵀ), Q the orthonormal columns of ``basis``.

    ``rest`` None stands for 0.
    """

    values: Float[Tensor, "r"]
    basis: Float[Tensor, "w r"]
    rest: Float[Tensor, ""] | None = None

    @property
    def others(self) -> Float[Tensor, ""]:
        """The eigenvalue of what the basis does not span."""
        return self.values.new_zeros(()) if self.rest is None else self.rest

    def scaled(self, scale: float) -> Spectrum:
        """Of a multiple of the matrix."""
        if scale == 1:
            return self
        return Spectrum(scale * self.values, self.basis, None if self.rest is None else scale * self.rest)

    def to(self, dtype: torch.dtype) -> Spectrum:
        """With the basis in a dtype, in one piece."""
        return self._replace(basis=self.basis.to(dtype).contiguous())

    def dense(self) -> Float[Tensor, "w w"]:
        """Q diag(values) Qᵀ, in the basis's dtype."""
        return (self.basis * self.values.to(self.basis.dtype)) @ self.basis.mT

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What a file must hold; ``name`` is the matrix's."""
        return {f"{name}_values": self.values, f"{name}_basis": self.basis, f"{name}_rest": self.others}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> Spectrum:
        """The inverse of `tensors`."""
        rest = tensors[f"{name}_rest"]
        return cls(tensors[f"{name}_values"], tensors[f"{name}_basis"], rest if bool(rest) else None)


def spectrum(matrix: Float[Tensor, "n n"], call: str) -> Spectrum:
    """All eigenpairs, values in ascending order, those within rounding of 0 as 0; float64."""

    def refuse() -> None:
        if not math.isfinite(float(size)):
            raise NonFiniteError(call, "a matrix with NaN or infinite entries", "finite numbers")
        if float(slack) < 0:
            raise InvalidArgumentError(
                call, f"a matrix with eigenvalue {float(least):.3g} beside {float(largest):.3g}",
                "no negative eigenvalue", why="a Fisher matrix is positive semi-definite",
            )  # fmt: skip

    size, slack = torch.linalg.vector_norm(matrix, math.inf), torch.zeros(())
    values, vectors = _decomposed(matrix.double(), refuse)
    least, largest = values.aminmax()
    slack = torch.add(least, largest, alpha=torch.finfo(matrix.dtype).eps ** 0.5)
    _look(size, [slack], refuse)  # and not the matrix, which need not live until it is looked at
    # Below this even a float64 decomposition only returns noise, half of it negative.
    noise = len(values) * torch.finfo(torch.float64).eps * largest
    return Spectrum(torch.where(values > noise, values, 0), vectors)


def _decomposed(matrix: Float[Tensor, "n n"], refuse: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; of a matrix that is not finite, for which the algorithm fails, the refusal."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        refuse()
        raise
    return values, vectors


def leading_spectrum(
    matrix: Float[Tensor, "w w"], rank: int | None, start: Float[Tensor, "w r"] | None, call: str
) -> Spectrum:
    """The leading eigenpairs, all if ``rank`` is None; what they do not span gets the mean of what is left.

    So the trace is kept. By subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061) from ``start``, the last
    basis, or from random vectors of a fixed seed. Kronecker factors of low rank: Puiu, arXiv 2206.15397.

    Raises:
        NonFiniteError: NaN or infinite entries.
    """
    width = len(matrix)
    if rank is None or rank >= width:
        return spectrum(matrix, call).to(matrix.dtype)

    def refuse() -> None:
        if not all_finite(matrix):
            raise NonFiniteError(
                call, "Kronecker factors with NaN or infinite entries", "finite ones",
                why="activations or gradients have grown out of range", try_="a smaller lr, or a trust_region",
            )  # fmt: skip

    _look(matrix, [], refuse)
    if start is not None and start.shape == (width, rank):
        q, iterations = start, LATER
    else:
        shape, generator = (width, min(width, rank + MORE)), torch.Generator().manual_seed(0)
        q, iterations = torch.randn(shape, generator=generator, dtype=torch.float64).to(matrix), FIRST
    for _ in range(iterations):
        q = torch.linalg.qr(matrix @ q)[0]
    small = (q.mT @ (matrix @ q)).double()
    values, turn = _decomposed((small + small.mT) / 2, refuse)
    values, turn = values[-rank:].clamp_min(0), turn[:, -rank:]
    rest = (matrix.diagonal().double().sum() - values.sum()).clamp_min(0) / (width - rank)
    return Spectrum(values, q @ turn.to(q.dtype), rest)


def nearest_semidefinite(matrix: Float[Tensor, "n n"], call: str) -> tuple[Float[Tensor, "n n"], Spectrum]:
    """The nearest positive semi-definite matrix in float64, and its eigenpairs.

    In float32 a matrix that is semi-definite has eigenvalues down to minus 1e-7 of its largest. With a damping below
    that, a sum of such matrices would have no minimiser.
    """
    found = spectrum((matrix + matrix.mT) / 2, call)
    nearest = (found.basis * found.values) @ found.basis.mT
    return (nearest + nearest.mT) / 2, found


def orthonormal(columns: Float[Tensor, "n m"], k: int) -> Float[Tensor, "n k"]:
    """Nearly orthogonal float64 columns, none 0, made orthonormal, each against those before it, filled up to k."""
    missing = k - columns.shape[1]
    # From the CPU, so that all devices see the same numbers.
    added = torch.randn(len(columns), missing, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = columns / columns.norm(dim=0)
    basis, triangle = torch.linalg.qr(torch.cat([given, added.to(columns.device)], dim=1))
    return basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)


def nearest_orthonormal(basis: Float[Tensor, "w r"]) -> Float[Tensor, "w r"]:
    """The orthonormal columns nearest to columns that are nearly so, by Newton's iteration for the polar factor.

    Source: Higham, "Computing the polar decomposition", 1986; the form without inverses, which squares the error.
    """
    identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    for _ in range(4):
        skew = basis.mT @ basis - identity
        if float(skew.norm()) <= 4 * torch.finfo(basis.dtype).eps * len(identity) ** 0.5:
            break
        basis = basis - basis @ (skew / 2)
    return basis


def damped_reciprocal(values: Tensor, damping: float, dtype: torch.dtype, call: str) -> Tensor:
    """1 / (values + damping) in float64; one that is infinite in ``dtype`` is a `SingularMatrixError`."""
    result = (values.double() + damping).reciprocal()
    # Of a damping that is no denormal number none is, and the host need not wait to see it.
    infinite = 0 if damping >= torch.finfo(dtype).tiny else int(result.to(dtype).isinf().sum())
    if infinite:
        why = f"{infinite:,} of its {result.numel():,} eigenvalues are 0, or too small for {dtype}"
        raise singular(call, damping, why)
    return result


def singular(call: str, damping: float, why: str) -> SingularMatrixError:
    """The error of F + damping·I, in the words that all structures share."""
    return SingularMatrixError(
        f"{call}(damping={damping})", "a singular matrix", "a positive definite one",
        why=f"{why}, so F + damping·I has no inverse and its log det is -inf",
        try_="damping > 0, or damping=fk.RelativeDamping(1e-6)",
    )  # fmt: skip
