"""BackPACK: extensions of the backward pass. Only layers that it knows are extended."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from backpack import backpack, extend, extensions
from torch import Tensor, nn

from examples.benchmarks.contestants import Case, Contestant, Values
from examples.benchmarks.ours import linear_weights

NAME = "BackPACK"


def contestants(case: Case) -> dict[str, Contestant]:
    """By operation; layers alone."""
    if not case.layered or case.workload.sequence:
        return {}
    return {
        "ef_diagonal": _diagonal(case, extensions.SumGradSquared(), "sum", first_order=True),
        "exact_diagonal": _diagonal(case, extensions.DiagGGNExact(), "mean", first_order=False),
        "ef_gram": _gram(case),
        "ief_solve": _solve(case),
        "kfac_ef": _monte_carlo(case),
        "kfac_exact": _kflr(case),
    }


def _extended(case: Case, first_order: bool) -> nn.Module:
    """A copy with the scope's layers extended, or everything: second-order quantities pass through every module."""
    own = copy.deepcopy(case.workload.model)
    if not first_order:
        return extend(own)
    for prefix, module in own.named_modules():
        if f"{prefix}.weight" in case.names:
            extend(module)
    return own


def _backward(case: Case, model: nn.Module, loss: nn.Module, extension: Any) -> None:
    with warnings.catch_warnings(), backpack(extension):
        warnings.simplefilter("ignore")  # on hooks of modules whose input has no gradient
        model.zero_grad(set_to_none=True)
        loss(model(case.workload.inputs), case.workload.targets).backward()


def _contestant(
    case: Case,
    extension: Any,
    reduction: str,
    finish: Callable[[dict[str, Any]], Any],
    values: Callable[[Any], Values],
    *,
    first_order: bool = False,
    how: str | None = None,
    bounds: Mapping[str, float] | None = None,
    why: str = "",
) -> Contestant:
    def prepare() -> Callable[[], Any]:
        own = _extended(case, first_order)
        loss = nn.CrossEntropyLoss(reduction=reduction)
        loss = loss if first_order else extend(loss)

        def run() -> Any:
            _backward(case, own, loss, extension)
            found = {}
            for name, p in own.named_parameters():
                if name in case.names:
                    found[name] = getattr(p, extension.savefield)
                    delattr(p, extension.savefield)
            return finish(found)

        return run

    return Contestant(NAME, how or type(extension).__name__, prepare, values, bounds or {}, why)


def _diagonal(case: Case, extension: Any, reduction: str, *, first_order: bool) -> Contestant:
    scale = case.workload.examples if reduction == "sum" else 1
    return _contestant(
        case, extension, reduction, lambda found: found, lambda d: {"diagonal": case.flatten(d) / scale},
        first_order=first_order,
    )  # fmt: skip


def _gram(case: Case) -> Contestant:
    def finish(rows: dict[str, Tensor]) -> Tensor:
        return sum((g.flatten(1) @ g.flatten(1).mT for g in rows.values()), torch.zeros(()))

    return _contestant(
        case, extensions.BatchGrad(), "sum", finish, lambda gram: {"gram": gram / case.workload.examples},
        first_order=True, how="BatchGrad, then G Gᵀ",
    )  # fmt: skip


def _solve(case: Case) -> Contestant:
    norm = case.output_gradient.flatten(1).norm(dim=1)
    return _contestant(
        case, extensions.BatchGrad(), "sum", lambda rows: woodbury(case, rows, norm), lambda x: {"solution": x},
        first_order=True, how="BatchGrad, then Woodbury",
    )  # fmt: skip


def woodbury(case: Case, gradients: dict[str, Tensor], norm: Tensor) -> Tensor:
    """(F + λI)⁻¹ g of the improved empirical Fisher from written-out gradients, as one writes it by hand."""
    n, rows = case.workload.examples, {}
    for name in list(gradients):
        # in place: the gradients may take most of the memory
        rows[name] = gradients.pop(name).flatten(1).div_(norm[:, None])
    gram = sum((r @ r.mT for r in rows.values()), torch.zeros((), device=norm.device)).double()
    v = {name: t.flatten() for name, t in case.unflatten(case.gradient).items()}
    pushed = sum((rows[name] @ v[name] for name in rows), torch.zeros((), device=norm.device)).double()
    shifted = gram + n * case.damping * torch.eye(n, dtype=gram.dtype, device=gram.device)
    weights = torch.cholesky_solve(pushed[:, None], torch.linalg.cholesky(shifted))[:, 0].float()
    return case.flatten({name: (v[name] - rows[name].mT @ weights) / case.damping for name in rows})


def _product(case: Case, factors: dict[str, list[Tensor]]) -> Values:
    """The Kronecker product of linear layers' weights with a vector: convolutions follow other conventions."""
    linear, v = linear_weights(case), case.unflatten(case.vector)
    return {
        "linear layers": case.flatten(
            {name: factors[name][0] @ v[name] @ factors[name][1] if name in linear else 0 * v[name] for name in v}
        )
    }


def _kflr(case: Case) -> Contestant:
    return _contestant(
        case, extensions.KFLR(), "mean", lambda found: found, lambda factors: _product(case, factors), how="KFLR"
    )


def _monte_carlo(case: Case) -> Contestant:
    """It has no empirical KFAC; one draw an example costs the same."""
    return _contestant(
        case, extensions.KFAC(mc_samples=1), "mean", lambda found: found, lambda factors: _product(case, factors),
        how="KFAC(mc_samples=1)", bounds={"linear layers": 2.0},
        why="it has no empirical KFAC: drawn labels instead of the observed ones, at the same cost",
    )  # fmt: skip
