"""What a user writes with torch.func: forward and reverse mode for products, ``vmap(grad)`` for rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, jvp, linearize, vjp, vmap

from examples.benchmarks.contestants import Case, Contestant, plain_attention
from examples.benchmarks.peer_backpack import woodbury

NAME = "torch.func"
Metric = Callable[[Tensor, Tensor], Tensor]
"""From outputs z and a direction w in output space to the output Fisher's product with w."""


def contestants(case: Case) -> dict[str, Contestant]:
    """By operation, for all parameters: a user has no reason to leave some out."""
    if not case.whole:
        return {}
    ef, ief = functools.partial(_rank_one, case, 0), functools.partial(_rank_one, case, 1)
    found = {
        "ef_product": _product(case, ef),
        "ef_product_cached": _cached_product(case, ef),
        "ief_product_cached": _cached_product(case, ief),
        "sf_product_cached": _cached_product(case, lambda _, w: _project(case.drawn_gradient, w)),
        "exact_product": _product(case, _softmax),
        "exact_product_unkept": _product(case, _softmax),
        "ef_diagonal": _rows(case, "squared", lambda rows: {n: r.square().sum(0) for n, r in rows.items()}),
        "ef_gram": _rows(case, "G Gᵀ", _gram),
        "ief_solve": _rows(case, "Woodbury", lambda rows: _woodbury(case, rows)),
    }
    return found | dict.fromkeys(("exact_product_cached", "exact_product_streamed"), _cached_product(case, _softmax))


def _project(u: Tensor, w: Tensor) -> Tensor:
    """U (u · w) for each example."""
    inner = (u * w).flatten(1).sum(1)
    return u * inner.reshape(-1, *[1] * (u.ndim - 1))


def _rank_one(case: Case, power: int, z: Tensor, w: Tensor) -> Tensor:
    """The empirical metric, improved with power 1."""
    u = z.softmax(-1) - F.one_hot(case.workload.targets, z.shape[-1])
    norm = u.flatten(1).norm(dim=1).reshape(-1, *[1] * (u.ndim - 1))
    return _project(u / norm**power, w)


def _softmax(z: Tensor, w: Tensor) -> Tensor:
    """The exact metric, (diag p − p pᵀ) w at every position."""
    p = z.softmax(-1)
    return p * w - p * (p * w).sum(-1, keepdim=True)


def _parameters(case: Case) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in case.workload.model.named_parameters()}


def _outputs(case: Case) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda params: functional_call(case.workload.model, params, (case.workload.inputs,))


def _product(case: Case, metric: Metric) -> Contestant:
    def run() -> Tensor:
        with plain_attention(case.workload):
            params, outputs = _parameters(case), _outputs(case)
            pushed = jvp(outputs, (params,), (case.unflatten(case.vector),))[1]
            z, pull, *_ = vjp(outputs, params)
            return case.flatten(pull(metric(z.detach(), pushed))[0])

    return _contestant(case, "vjp(H jvp(v))", lambda: run)


def _cached_product(case: Case, metric: Metric) -> Contestant:
    def prepare() -> Callable[[], Tensor]:
        with plain_attention(case.workload):
            params, outputs = _parameters(case), _outputs(case)
            z, push = linearize(outputs, params)
            pull = vjp(outputs, params)[1]

        def run() -> Tensor:
            return case.flatten(pull(metric(z, push(case.unflatten(case.vector))))[0])

        return run

    return _contestant(case, "linearize and vjp, made once", prepare)


def _contestant(case: Case, how: str, prepare: Callable[[], Callable[[], Tensor]]) -> Contestant:
    n = case.workload.examples
    return Contestant(NAME, how, prepare, lambda product: {"product": product / n})


def _gram(rows: dict[str, Tensor]) -> Tensor:
    return torch.stack([r.flatten(1) @ r.flatten(1).mT for r in rows.values()]).sum(0)


def _woodbury(case: Case, rows: dict[str, Tensor]) -> Tensor:
    return woodbury(case, rows, case.output_gradient.flatten(1).norm(dim=1))


def _rows(case: Case, then: str, finish: Callable[[dict[str, Tensor]], Tensor | dict[str, Tensor]]) -> Contestant:
    """Per-example gradients by ``vmap(grad)``, all at once."""

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z = functional_call(case.workload.model, params, (x.unsqueeze(0),))[0]
        return F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1), reduction="sum")

    def run() -> Tensor | dict[str, Tensor]:
        with plain_attention(case.workload):
            return finish(vmap(grad(loss), in_dims=(None, 0, 0))(_parameters(case), *case.workload.data))

    n = case.workload.examples
    values = {
        "squared": lambda squares: {"diagonal": case.flatten(squares) / n},
        "G Gᵀ": lambda gram: {"gram": gram / n},
        "Woodbury": lambda solution: {"solution": solution},
    }[then]
    # float32 sums over a vocabulary at every position, in theirs and in ours, lose digits that the solve divides by λ.
    bounds = {"solution": 2e-2} if then == "Woodbury" and case.workload.sequence else {}
    why = "both sum over the vocabulary in float32 and then divide by λ" if bounds else ""
    return Contestant(NAME, f"vmap(grad), then {then}", lambda: run, values, bounds, why)
