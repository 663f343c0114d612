"""What a Fisher that someone else computed is, beside the exact one: how alike, and by which factor larger.

Accuracy alone does not show a Fisher on the wrong scale, because a penalty's strength is tuned until it works: squared
gradients of batches, which much code uses, are too small by about the batch's size. Owns the comparison; knows
operators by their diagonals and blocks only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherkit.arguments import check_choice, check_count, check_type
from fisherkit.arithmetic import without_autocast
from fisherkit.errors import FisherkitError, InvalidArgumentError, InvalidTypeError, MemoryBudgetError
from fisherkit.operators import DiagonalOperator, FisherOperator, split
from fisherkit.operators.composite import join

LARGEST_BLOCK = 4096
"""Parameters of a block that is still written out to be compared: 134 MB in float64."""

CLOSE = 0.3
"""A factor explains a scale if it is within this part of it."""

ALIGNED = 0.9
"""Below this cosine no factor explains anything. Squared gradients that are averaged over K batches scatter about the
Fisher: where the entries of a batch's gradient are normal and of like size, their cosine with it is 1/√(1 + 2/K), 0.91
for ten batches. Another structure or kind is as a rule farther away, and is no multiple of the exact one."""


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
    check_type(call, "exact", exact, FisherOperator, "a FisherOperator")
    check_count(call, "batch_size", batch_size, optional=True)
    operator = other if isinstance(other, FisherOperator) else _diagonal(other, exact, call)
    if operator.space != exact.space:
        raise InvalidArgumentError(
            call, f"{operator.size:,} parameters {_names(operator)} beside {exact.size:,} {_names(exact)}",
            "the same names, shapes and order", try_="build the exact one with params=other.space.names",
        )  # fmt: skip
    check_choice(call, "compare", compare, ("diagonal", "matrix", None))
    chosen = compare or ("diagonal" if operator.is_diagonal or exact.is_diagonal else "matrix")
    products = _of_diagonals(operator, exact) if chosen == "diagonal" else _of_matrices(operator, exact, call)
    total = [sum(values) for values in zip(*products.values(), strict=True)]
    for square, which in ((total[2], "an exact Fisher"), (total[1], "a Fisher")):
        if square == 0:
            raise InvalidArgumentError(
                call, f"{which} that is zero", "one that is not",
                why="zero has no direction and is no multiple of anything",
                try_="looking whether gradients were zeroed before they were squared, or the loss is exactly 0",
            )  # fmt: skip
    found = _likeness("all", total)
    why = _explanations(found, int(exact.metadata.get("examples", 0)), batch_size)
    return Audit(chosen, found, tuple(_likeness(name, own) for name, own in products.items()), why)


def _products(a: Tensor, f: Tensor) -> list[float]:
    """⟨A, F⟩, ⟨A, A⟩, ⟨F, F⟩, tr A and tr F of matrices, or of diagonals."""
    a, f = a.double(), f.double()
    traces = [x.sum() if x.ndim == 1 else x.trace() for x in (a, f)]
    found: list[float] = torch.stack([(a * f).sum(), a.square().sum(), f.square().sum(), *traces]).tolist()
    return found


def _likeness(name: str, products: Sequence[float]) -> Likeness:
    mixed, other, exact, other_trace, exact_trace = products
    norms = math.sqrt(other) * math.sqrt(exact)
    return Likeness(
        name, mixed / norms if norms else math.nan, mixed / exact if exact else math.nan,
        other_trace / exact_trace if exact_trace else math.nan,
    )  # fmt: skip


def _of_diagonals(other: FisherOperator, exact: FisherOperator) -> dict[str, list[float]]:
    a, f = other.diagonal(), exact.diagonal().to(other.device)
    return {name: _products(a[place], f[place]) for name, place in exact.space.slices.items()}


def _of_matrices(other: FisherOperator, exact: FisherOperator, call: str) -> dict[str, list[float]]:
    """Those of each block of the coarsest partition that either couples; what lies outside is 0 in both."""
    blocks = exact.space.joined_blocks([part.space.names for f in (other, exact) for part in split(f)])
    found = {}
    for names in blocks:
        space = exact.space.restrict(names)
        if space.size > LARGEST_BLOCK:
            raise MemoryBudgetError(
                call, f"a block of {space.size:,} parameters to be written out", f"at most {LARGEST_BLOCK:,}",
                try_='compare="diagonal"',
            )  # fmt: skip
        parts = ([part for part in split(f) if set(part.space.names) <= set(names)] for f in (other, exact))
        a, f = (join(space, own).to_dense() for own in parts)
        found[", ".join(names)] = _products(a, f.to(a.device))
    return found


def _diagonal(diagonal: object, exact: FisherOperator, call: str) -> FisherOperator:
    if not isinstance(diagonal, (Mapping, Tensor)):
        raise InvalidTypeError(call, f"a {type(diagonal).__name__}", "a FisherOperator, a diagonal [D] or a dict")
    try:
        flat = diagonal if isinstance(diagonal, Tensor) else exact.space.flatten(diagonal)
        return DiagonalOperator(exact.space, flat.detach())
    except FisherkitError as error:
        raise error.at(call) from error


def _names(operator: FisherOperator) -> str:
    names = operator.space.names
    return f"[{names[0]} … {names[-1]}]"


def _explanations(found: Likeness, examples: int, batch_size: int | None) -> tuple[str, ...]:
    """Factors near the scale that common code brings about, the nearest first; N is 0 if it is not known."""
    scale = found.scale
    if not found.cosine >= ALIGNED:
        return ()
    near = [
        (abs(scale / factor - 1), f"{name}: {text}")
        for name, factor, text in [*_of_examples(examples), *_of_batches(examples, batch_size)]
        if abs(scale / factor - 1) <= CLOSE
    ]
    return tuple(text for _, text in sorted(near, key=lambda pair: pair[0]))


def _of_examples(N: int) -> list[tuple[str, float, str]]:
    found = [("1", 1.0, "the same normalization"), ("½", 0.5, "half the Fisher"), ("2", 2.0, "twice the Fisher")]
    if N > 1:
        found += [
            (f"N = {N:,}", float(N), "a sum over examples"),
            (f"1/N = 1/{N:,}", 1 / N, "divided by N once too often"),
        ]
    return found


def _of_batches(N: int, B: int | None) -> list[tuple[str, float, str]]:
    """Of N/B batches, whose mean losses' squared gradients are F/B each where single ones are independent of mean 0."""
    if B is None or B == 1:
        return []
    mean, summed = (f"squared gradients of batches (of {how} losses)" for how in ("mean", "summed"))
    found = [
        (f"1/B = 1/{B}", 1 / B, f"{mean}, averaged over batches"),
        (f"1/B² = 1/{B}²", 1 / B**2, f"{mean}, summed and divided by N"),
        (f"B = {B}", float(B), f"{summed}, averaged over batches"),
        ("1", 1.0, f"{summed}, summed and divided by N"),
    ]
    if N > B:
        found += [
            (f"N/B² = {N:,}/{B}²", N / B**2, f"{mean}, summed"),
            (f"N = {N:,}", float(N), f"{summed}, summed"),
            (f"N/B = {N:,}/{B}", N / B, "squared gradients of examples, averaged in batches and summed over them"),
        ]
    return found
