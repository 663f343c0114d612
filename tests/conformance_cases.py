"""Kinds × families: the package's Fisher beside the reference's rows, each made once a process.

Owns the list of kinds, which cells of kinds × families × structures are tested, and what the conformance tables count;
knows no structure's algebra.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from fisherkit import (
    EmpiricalFisher,
    ExactFisher,
    FisherApproximation,
    ImprovedEmpiricalFisher,
    SampledFisher,
    TruncatedFisher,
    likelihoods,
)
from fisherkit.randomness import keyed_uniform
from fisherkit.testing import ConformanceReport, check_fisher
from tests.conftest import check_annotations
from tests.reference import fisher as reference
from tests.reference.fisher import Problem, Rows, forward_one
from tests.reference.models import EVERY_FORM, FAMILIES
from tests.reference.outputs import EF, EXACT, IEF, SAMPLED, Kind, truncated_kind
from tests.tolerances import CONFORMANCE

SEED = 3


@dataclass(frozen=True)
class KindCase:
    """One kind on both sides.

    Attributes:
        make: The package's class.
        kind: The reference's.
        options: Of the package's class.
    """

    make: type[FisherApproximation]
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=dict)


KINDS: dict[str, KindCase] = {
    "ef": KindCase(EmpiricalFisher, EF),
    "ief": KindCase(ImprovedEmpiricalFisher, IEF),
    "ief_half": KindCase(ImprovedEmpiricalFisher, Kind("ief", power=0.5), {"power": 0.5}),
    "sf1": KindCase(SampledFisher, SAMPLED, {"draws": 1, "seed": SEED}),
    "sf5": KindCase(SampledFisher, SAMPLED, {"draws": 5, "seed": SEED}),
    "exact": KindCase(ExactFisher, EXACT),
    "truncated1": KindCase(TruncatedFisher, truncated_kind(1), {"rank": 1}),
    "truncated2": KindCase(TruncatedFisher, truncated_kind(2), {"rank": 2}),
    "truncated_tolerance": KindCase(TruncatedFisher, truncated_kind(tolerance=0.1), {"tolerance": 0.1}),
}

STRUCTURES: dict[str, Callable[[Rows], Tensor]] = {
    "full": reference.full,
    "block": reference.block,
    "diagonal": lambda rows: reference.diagonal(rows).diag(),
}
"""The structures that are parts of F, as the reference makes them."""

EVERY_KIND_IN = (
    "mlp", "conv2d_groups", "tied_head_parameter", "token_attention_by_token", "gaussian_tokens", "bernoulli_by_token",
)  # fmt: skip
"""Families in which every kind is tested, in every structure: each likelihood, layers, sequences and tokens."""

TWO_KINDS = ("ef", "exact")
"""Of the other families: one vector an example from the labels, and several from the outputs.

A kind knows outputs only, a layer's rule knows no kind, and a structure knows neither.
"""

SINGLE_PRECISION_IN = EVERY_FORM[:12]

SHARED_POSITIONS = (
    "conv1d", "conv2d_groups", "conv_gaussian_positions", "linear_3d", "linear_4d", "reused_module", "hf_conv1d",
    "attention_batch_first", "attention_cross", "attention_cross_widths", "lstm", "tied_head_parameter", "token_mlp",
    "token_attention_by_token", "gaussian_tokens", "bernoulli_by_token", "sequence_first_layout",
)  # fmt: skip
"""Families with layers that see several positions of an example, where expanding and reducing differ."""


def cells(structures: Iterable[str], reduced: Iterable[str] = ()) -> list[Any]:
    """Parameters ``family, kind, structure, dtype``, the structure changing fastest: neighbours share reference rows.

    Args:
        structures: tested in every family, and in float32 in a dozen with either kind.
        reduced: tested where positions are shared.
    """
    structures = tuple(structures)
    found = [
        (family, kind, structure, torch.float64)
        for family in FAMILIES
        for kind in (KINDS if family in EVERY_KIND_IN else TWO_KINDS)
        for structure in structures
    ]
    found += itertools.product(SHARED_POSITIONS, TWO_KINDS, reduced, [torch.float64])
    found += [
        (family, TWO_KINDS[number % 2], structure, torch.float32)
        for number, family in enumerate(SINGLE_PRECISION_IN)
        for structure in structures
    ]
    return [pytest.param(*cell, id="-".join(map(str, cell)).replace("torch.", "") + "-cpu") for cell in found]


@cache
def problem(family: str, dtype: torch.dtype = torch.float64) -> Problem:
    """A family's problem, the same weights and data in every dtype; shared, so never to be changed."""
    return FAMILIES[family].problem(dtype)


@cache
def reference_rows(family: str, kind: str) -> Rows:
    """The reference's rows in float64."""
    return reference.rows(problem(family), KINDS[kind].kind, drawn(family, kind))


def reference_dense(family: str, kind: str, structure: str) -> Tensor:
    """The reference's matrix of a structure, "mean" normalization."""
    return STRUCTURES[structure](reference_rows(family, kind))


def drawn(family: str, kind: str) -> Tensor | None:
    """The targets that the sampled kind draws, ``[M, B, ...]``: from the package's own numbers and sampler."""
    case, of = KINDS[kind], problem(family)
    if case.make is not SampledFisher:
        return None
    z = torch.stack([forward_one(of, n).detach() for n in range(len(of.targets))])
    likelihood = likelihoods.resolve(of.likelihood)
    z, _, _ = likelihood.prepare(z, of.targets, "drawn")
    draws, (batch, positions, outputs) = case.options["draws"], z.shape
    keys = torch.arange(batch)[:, None] * (1 << 24) + torch.arange(positions)
    uniform = keyed_uniform(case.options["seed"], keys, draws=draws, channels=likelihood.channels(outputs))
    labels = likelihood.sample(z.unsqueeze(1).expand(-1, draws, -1, -1), uniform)
    return labels.transpose(0, 1).reshape(draws, *of.targets.shape)


def build(
    family: str,
    kind: str,
    structure: str,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    data: Any = None,
    **options: Any,
) -> FisherApproximation:
    """The package's Fisher of a family, on other data if given."""
    of = problem(family, dtype)
    if device != "cpu":
        of = replace(of, model=deepcopy(of.model).to(device))
    conventions = {"likelihood": of.likelihood, "example": of.example, "structure": structure}
    data = (of.inputs, of.targets) if data is None else data
    return KINDS[kind].make(of.model, data, **conventions, **KINDS[kind].options, **options)


@contextmanager
def annotations_checked(check: bool) -> Iterator[None]:
    """Whether the shape annotations of the package are enforced."""
    before = not jaxtyping.config.jaxtyping_disable
    check_annotations(check)
    try:
        yield
    finally:
        check_annotations(before)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖."""
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def check(
    fisher: FisherApproximation, expected: Tensor, family: str, kind: str, dtype: torch.dtype
) -> ConformanceReport:
    """Compare with the matrix: every operation, or, where other cells have the same operators, products and solves.

    What an operation does depends on the operator, which knows no kind, and of layers only the rows know, which
    `EVERY_FORM` has all of.
    """
    of_rows = {e.structure.partition(",")[0] for e in fisher.coverage().entries} == {"full"}
    if kind in TWO_KINDS and (family in (EVERY_FORM if of_rows else EVERY_KIND_IN) or dtype != torch.float64):
        return check_fisher(fisher, expected, tolerance=CONFORMANCE[dtype])
    v = torch.randn(fisher.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = {
        "to_dense": relative_error(fisher.to_dense(), expected),
        "diagonal": relative_error(fisher.diagonal(), expected.diagonal()),
        "matvec": relative_error(fisher @ v.to(dtype), expected @ v),
        "solve": relative_error(
            fisher.solve(v.to(dtype), damping=1.0), torch.linalg.solve(expected + torch.eye(len(v), dtype=v.dtype), v)
        ),
    }
    assert all(error < CONFORMANCE[dtype] for error in errors.values()), errors
    return ConformanceReport(errors, () if of_rows else ("gram",), CONFORMANCE[dtype])


def entry(
    report: ConformanceReport, family: str, kind: str, structure: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[str, dict[str, Any]]:
    """What a test records as a user property, for the table after the tests; plain data, to cross processes."""
    worst, error = report.worst
    return "conformance", {
        "structure": structure,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "kind": kind,
        "family": family,
        "operations": len(report.errors),
        "refused": len(report.refused),
        "error": error,
        "where": f"{worst}, {kind}, {family}",
    }
