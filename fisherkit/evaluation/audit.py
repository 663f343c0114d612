"""What a Fisher that someone else computed is, beside the exact one: how alike, and by which factor larger.

Accuracy alone does not show a Fisher on the wrong scale, because a penalty's strength is tuned until it works: squared
gradients of batches, which much code uses, are too small by about the batch's size. Owns the comparison; knows
operators by their diagonals and blocks only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arguments import check_count
from fisherkit.arithmetic import without_autocast
from fisherkit.errors import (
    FisherkitError,
    InvalidArgumentError,
    InvalidTypeError,
    MemoryBudgetError,
    UnknownParameterError,
)
from fisherkit.evaluation.explanations import ALIGNED, explanations
from fisherkit.operators import DiagonalOperator, FisherOperator, split

LARGEST_BLOCK = 4096
"""Parameters of a block that is still written out to be compared: 134 MB in float64."""


@dataclass(frozen=True)
class Likeness:
    """How one matrix, or one parameter's part of it, compares with the exact one.

    Args:
        name: the parameter or block; "all" for the whole.
        cosine: ⟨A, F⟩/(‖A‖‖F‖), by Frobenius; 1 if A is a multiple of F, nan if either is zero.
        scale: the s that makes ‖A − sF‖ least, ⟨A, F⟩/⟨F, F⟩.
        trace_ratio: tr A / tr F.
    """

    name: str
    cosine: float
    scale: float
    trace_ratio: float


@dataclass(frozen=True)
class Audit:
    """What `audit` found.

    Args:
        compared: "diagonal" or "matrix".
        total: over all parameters.
        parts: a parameter (diagonals) or a block (matrices) each.
        explanations: factors near the scale that common code brings about, the nearest first. They are candidates: a
            scale alone cannot tell apart those that are near one another. None where the cosine is below 0.9, since
            then no factor makes one of the other.
    """

    compared: str
    total: Likeness
    parts: tuple[Likeness, ...]
    explanations: tuple[str, ...]

    @property
    def strength_ratio(self) -> float:
        """What a strength tuned for the exact Fisher is multiplied by to do the same with the other one: 1/scale."""
        return 1 / self.total.scale if self.total.scale else math.inf

    def __str__(self) -> str:
        t = self.total
        lines = [
            f"{self.compared}: cosine {t.cosine:.4f}, scale {t.scale:.4g}, trace ratio {t.trace_ratio:.4g}",
            f"a strength for the exact Fisher must be multiplied by {self.strength_ratio:.4g} with this one",
        ]
        lines += [f"near {text}" for text in self.explanations]
        if len(self.explanations) > 1:
            lines.append("several candidates: the scale alone does not tell which")
        if t.cosine < ALIGNED:
            lines.append(f"the direction differs (cosine below {ALIGNED}): no factor explains the scale")
        return "\n".join(lines)


@without_autocast()
def audit(
    other: FisherOperator | Tensor | Mapping[str, Tensor],
    exact: FisherOperator,
    *,
    compare: str | None = None,
    batch_size: int | None = None,
) -> Audit:
    """Compare a Fisher of any origin with an exact one.

    Args:
        other: an operator; or a diagonal alone, flat ``[D]`` or a dict of named tensors of the parameters' shapes, as
            most code for elastic weight consolidation keeps it.
        exact: usually `fisherkit.ExactFisher`, or `fisherkit.EmpiricalFisher` where that is what the other should be.
        compare: "diagonal"; or "matrix", block by block over the blocks that neither couples to others. None: the
            diagonal if that is all there is of either, else the matrix.
        batch_size: of the batches that the other was computed from, to recognise squared batch gradients.

    Returns:
        An `Audit`; ``str()`` of it says what was found. Its numbers are Python floats computed in float64.

    Raises:
        InvalidTypeError: neither an operator, a tensor nor a dict.
        UnknownParameterError: a dict without some of the exact Fisher's parameters, or with others.
        InvalidArgumentError: another parameter space, negative or not finite entries, a Fisher that is zero, or a
            matrix to be compared where there is only a diagonal.
        MemoryBudgetError: a block with more than 4,096 parameters would have to be written out.
    """
    call = "audit"
    if not isinstance(exact, FisherOperator):
        raise InvalidTypeError(call=call, got=f"a {type(exact).__name__} as exact", expected="a FisherOperator")
    check_count(call, "batch_size", batch_size, optional=True)
    operator = other if isinstance(other, FisherOperator) else _diagonal(other, exact, call)
    if operator.space != exact.space:
        raise InvalidArgumentError(
            call=call,
            got=f"{operator.size:,} parameters {_names(operator)} beside {exact.size:,} {_names(exact)}",
            expected="the same names, shapes and order",
            try_="build the exact one with params=other.space.names",
        )
    chosen = compare or ("diagonal" if operator.is_diagonal or exact.is_diagonal else "matrix")
    if chosen not in {"diagonal", "matrix"}:
        raise InvalidArgumentError(call=call, got=f"compare={compare!r}", expected='"diagonal", "matrix" or None')
    products = _of_diagonals(operator, exact) if chosen == "diagonal" else _of_matrices(operator, exact, call)
    total = _Products("all", *(sum(values) for values in zip(*(p.values for p in products), strict=True)))
    for norm, which in ((total.exact, "an exact Fisher"), (total.other, "a Fisher")):
        if norm == 0:
            raise InvalidArgumentError(
                call=call, got=f"{which} that is zero", expected="one that is not",
                why="zero has no direction and is no multiple of anything",
                try_="looking whether gradients were zeroed before they were squared, or the loss is exactly 0",
            )  # fmt: skip
    found = total.likeness()
    examples = int(exact.metadata.get("examples", 0))
    why = explanations(found.cosine, found.scale, examples, batch_size)
    return Audit(chosen, found, tuple(p.likeness() for p in products), why)


@dataclass(frozen=True)
class _Products:
    """⟨A, F⟩, ⟨A, A⟩, ⟨F, F⟩, tr A and tr F of one part."""

    name: str
    mixed: float
    other: float
    exact: float
    other_trace: float
    exact_trace: float

    @classmethod
    def of(cls, name: str, a: Tensor, f: Tensor, traces: tuple[Tensor, Tensor]) -> _Products:
        a, f = a.double(), f.double()
        values = torch.stack([(a * f).sum(), a.square().sum(), f.square().sum(), *traces])
        return cls(name, *values.tolist())

    @property
    def values(self) -> tuple[float, ...]:
        return self.mixed, self.other, self.exact, self.other_trace, self.exact_trace

    def likeness(self) -> Likeness:
        norms = math.sqrt(self.other) * math.sqrt(self.exact)
        return Likeness(
            self.name,
            self.mixed / norms if norms else math.nan,
            self.mixed / self.exact if self.exact else math.nan,
            self.other_trace / self.exact_trace if self.exact_trace else math.nan,
        )


def _of_diagonals(other: FisherOperator, exact: FisherOperator) -> list[_Products]:
    """One a parameter."""
    a, f = other.diagonal().double(), exact.diagonal().to(other.device).double()
    slices = exact.space.slices.items()
    return [_Products.of(n, a[place], f[place], (a[place].sum(), f[place].sum())) for n, place in slices]


def _of_matrices(other: FisherOperator, exact: FisherOperator, call: str) -> list[_Products]:
    """One a block of the coarsest partition that either couples; what lies outside of both's blocks is 0 in both."""
    blocks = exact.space.joined_blocks([part.space.names for f in (other, exact) for part in split(f)])
    found = []
    for names in blocks:
        space = exact.space.restrict(names)
        if space.size > LARGEST_BLOCK:
            raise MemoryBudgetError(
                call=call, got=f"a block of {space.size:,} parameters to be written out",
                expected=f"at most {LARGEST_BLOCK:,}", try_='compare="diagonal"',
            )  # fmt: skip
        a, f = (_dense(operator, set(names)) for operator in (other, exact))
        f = f.to(a.device)
        found.append(_Products.of(", ".join(names), a, f, (a.trace().double(), f.trace().double())))
    return found


def _dense(operator: FisherOperator, names: set[str]) -> Float[Tensor, "d d"]:
    """The parts of an operator over some names, as one matrix."""
    parts = [part for part in split(operator) if set(part.space.names) <= names]
    if len(parts) == 1:
        return parts[0].to_dense()
    space = operator.space.restrict(names)
    whole = torch.zeros(space.size, space.size, dtype=operator.dtype, device=operator.device)
    for part in parts:
        index = space.take(torch.arange(space.size, device=whole.device), part.space.names)
        whole[index.unsqueeze(1), index] = part.to_dense()
    return whole


def _diagonal(diagonal: object, exact: FisherOperator, call: str) -> FisherOperator:
    """A diagonal alone as an operator.

    Raises:
        InvalidTypeError: neither a tensor nor a dict.
        UnknownParameterError, InvalidArgumentError: a dict of other names or shapes, or what is no diagonal.
    """
    if not isinstance(diagonal, (Mapping, Tensor)):
        raise InvalidTypeError(
            call=call, got=f"a {type(diagonal).__name__}", expected="a FisherOperator, a diagonal [D] or a dict"
        )
    if isinstance(diagonal, Mapping):
        _check_names(diagonal, exact, call)
    try:
        flat = diagonal if isinstance(diagonal, Tensor) else exact.space.flatten(diagonal)
        return DiagonalOperator(exact.space, flat.detach())
    except FisherkitError as error:
        raise error.at(call) from error


def _check_names(diagonal: Mapping[str, Tensor], exact: FisherOperator, call: str) -> None:
    space = exact.space
    missing = [name for name in space.names if name not in diagonal]
    extra = [str(name) for name in diagonal if name not in space.slices]
    if missing or extra:
        lacking = [f"without {_some(missing)}"] * bool(missing) + [f"with {_some(extra)} beside"] * bool(extra)
        raise UnknownParameterError(
            call=call, got=f"a dict {' and '.join(lacking)}",
            expected=f"the {len(space.names)} names of the exact Fisher", try_=_advice(missing, extra),
        )  # fmt: skip
    for name, shape in zip(space.names, space.shapes, strict=True):
        if isinstance(diagonal[name], Tensor) and tuple(diagonal[name].shape) != shape:
            raise InvalidArgumentError(
                call=call, got=f"{name!r} of shape {list(diagonal[name].shape)}",
                expected=f"{list(shape)}, as the parameter", why="a diagonal has one number for each of its entries",
                try_="the exact Fisher of the very model that it was computed from",
            )  # fmt: skip


def _advice(missing: list[str], extra: list[str]) -> str:
    if missing and (prefix := _prefix(missing[0], extra)):
        return f"{{name.removeprefix({prefix!r}): tensor for name, tensor in other.items()}}"
    if extra:
        return "a dict of the exact Fisher's names alone, or the exact Fisher built with params=list(other)"
    return "the exact Fisher of that part, built with params=list(other)"


def _prefix(name: str, others: list[str]) -> str:
    """What stands before a name where a wrapper has renamed it; "" if nothing does."""
    return next((other.removesuffix(name) for other in others if other.endswith(f".{name}")), "")


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _names(operator: FisherOperator) -> str:
    names = operator.space.names
    return f"[{names[0]} … {names[-1]}]"
