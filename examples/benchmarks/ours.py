"""fisherkit's way to every operation: what a user would write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import fisherkit as fk
from examples.benchmarks.contestants import DAMPING, Case, Contestant, Values

NAME = "fisherkit"


def contestants(case: Case) -> dict[str, Contestant]:
    """By operation."""
    ef, ief, exact = fk.EmpiricalFisher, fk.ImprovedEmpiricalFisher, fk.ExactFisher
    found = {
        "ef_product_cached": _cached_product(case, ef),
        "ief_product_cached": _cached_product(case, ief),
        "sf_product_cached": _cached_product(case, fk.SampledFisher),
        "ef_product": _product(case, ef),
        "exact_product": _product(case, exact),
        "exact_product_unkept": _product(case, exact, storage="stream"),
        "exact_product_cached": _cached_product(case, exact, storage="rows"),
        "exact_product_streamed": _cached_product(case, exact, storage="stream"),
        "ef_diagonal": _diagonal(case, ef),
        "exact_diagonal": _diagonal(case, exact),
        "ef_gram": _timed("gram()", lambda: build(case, ef).gram(), lambda m: {"gram": m}),
        "ief_solve": _solve(case, ief, "full"),
        "kfac_ef": _kronecker(case, ef, "kfac"),
        "kfac_ef_product": _product(case, ef, structure="kfac"),
        "kfac_exact": _kronecker(case, exact, "kfac"),
        "kfac_solve": _solve(case, ef, "kfac"),
        "ekfac_ef": _kronecker(case, ef, "ekfac"),
    }
    if case.workload.sequence:
        found["ef_token_product"] = _product(case, ef, example="token")
    return found


def build(case: Case, kind: type[fk.FisherApproximation], **options: Any) -> fk.FisherApproximation:
    """A Fisher of the case."""
    return kind(case.workload.model, case.workload.data, params=None if case.whole else case.names, **options)


def _timed(how: str, run: Callable[[], Any], values: Callable[[Any], Values]) -> Contestant:
    return Contestant(NAME, how, lambda: run, values)


def _product(case: Case, kind: type[fk.FisherApproximation], **options: Any) -> Contestant:
    own = "".join(f', {name}="{value}"' for name, value in options.items())
    how = f"fk.{kind.__name__}(model, data{own}) @ v"
    return _timed(how, lambda: build(case, kind, **options) @ case.vector, lambda product: {"product": product})


def _cached_product(case: Case, kind: type[fk.FisherApproximation], **options: Any) -> Contestant:
    def prepare() -> Callable[[], Any]:
        fisher = build(case, kind, **options)
        return lambda: fisher @ case.vector

    return Contestant(NAME, "fisher @ v", prepare, lambda product: {"product": product})


def _diagonal(case: Case, kind: type[fk.FisherApproximation]) -> Contestant:
    how = f'fk.{kind.__name__}(model, data, structure="diagonal").diagonal()'
    return _timed(how, lambda: build(case, kind, structure="diagonal").diagonal(), lambda d: {"diagonal": d})


def _solve(case: Case, kind: type[fk.FisherApproximation], structure: str) -> Contestant:
    damping = case.damping if structure == "full" else DAMPING

    def run() -> Tensor:
        return build(case, kind, structure=structure).solve(case.gradient, damping=damping)

    how = f'fk.{kind.__name__}(model, data, structure="{structure}").solve(g, damping)'
    return _timed(how, run, lambda solution: {"solution": solution})


def _kronecker(case: Case, kind: type[fk.FisherApproximation], structure: str) -> Contestant:
    def values(fisher: fk.FisherApproximation) -> Values:
        linear = linear_weights(case)
        weights = {n: t if n in linear else t * 0 for n, t in case.unflatten(case.vector).items()}
        product = case.unflatten(fisher @ case.flatten(weights))
        return {
            "product": fisher @ case.vector,
            "linear layers": case.flatten({n: t if n in linear else t * 0 for n, t in product.items()}),
            "trace": fisher.trace(),
        }

    how = f'fk.{kind.__name__}(model, data, structure="{structure}")'
    return _timed(how, lambda: build(case, kind, structure=structure), values)


def linear_weights(case: Case) -> set[str]:
    """Weights of linear layers: where all conventions for Kronecker factors are one."""
    own = dict(case.workload.model.named_parameters())
    return {name for name in case.names if name in case.workload.layered and own[name].ndim == 2}
