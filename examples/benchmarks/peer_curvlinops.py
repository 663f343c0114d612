"""curvlinops: linear operators by forward and reverse mode, KFAC and EKFAC by hooks.

Timed at its best: no determinism check at construction, the number of data given, weight and bias joined as here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import curvlinops
import torch
from torch import Tensor, nn

from examples.benchmarks.contestants import DAMPING, Case, Contestant, Values, plain_attention

NAME = "curvlinops"
EMPIRICAL, EXACT = "empirical", "type-2"


def contestants(case: Case) -> dict[str, Contestant]:
    """By operation; KFAC where all parameters of the case are those of layers it knows."""
    found: dict[str, Contestant] = {}
    if case.whole:
        ef, ggn = curvlinops.EFLinearOperator, curvlinops.GGNLinearOperator
        if case.workload.sequence:
            found |= {"ef_token_product": _product(case, ef)}  # every position is an example to it
        else:
            found |= {"ef_product": _product(case, ef), "ef_product_cached": _cached_product(case, ef)}
            found |= {"sf_product_cached": _monte_carlo(case)}
        found |= dict.fromkeys(("exact_product", "exact_product_unkept"), _product(case, ggn))
        found |= dict.fromkeys(("exact_product_cached", "exact_product_streamed"), _cached_product(case, ggn))
    if case.layered:
        found |= {
            "kfac_exact": _kronecker(case, curvlinops.KFACLinearOperator, EXACT),
            "kfac_ef": _kronecker(case, curvlinops.KFACLinearOperator, EMPIRICAL),
            "kfac_ef_product": _kronecker_product(case),
            "kfac_solve": _solve(case),
            "ekfac_ef": _kronecker(case, curvlinops.EKFACLinearOperator, EMPIRICAL),
        }
    return found


class _ClassesSecond(nn.Module):
    """Outputs ``[B, C, T]``, as torch's loss wants them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).movedim(-1, 1)


def _operator(case: Case, kind: Any, own: nn.Module | None = None, **options: Any) -> Any:
    workload = case.workload
    own = copy.deepcopy(workload.model) if own is None else own
    params = [p for name, p in own.named_parameters() if name in case.names]
    # The sum over positions is a sequence's loss here; a mean would divide by their number.
    loss = nn.CrossEntropyLoss(reduction="sum" if workload.sequence else "mean")
    model = _ClassesSecond(own) if workload.sequence else own
    return kind(model, loss, params, [workload.data], check_deterministic=False, num_data=workload.examples, **options)


def _scaled(case: Case, product: Tensor) -> Tensor:
    """From the sum over sequences, or over all their positions for the empirical one, to the mean."""
    return product / case.workload.examples if case.workload.sequence else product


def _product(case: Case, kind: Any) -> Contestant:
    def prepare() -> Callable[[], Tensor]:
        own = copy.deepcopy(case.workload.model)

        def run() -> Tensor:
            with plain_attention(case.workload):
                return _operator(case, kind, own) @ case.vector

        return run

    token = case.workload.targets[0].numel() if kind is curvlinops.EFLinearOperator else 1
    return Contestant(
        NAME, f"{kind.__name__}(…) @ v", prepare, lambda product: {"product": _scaled(case, product) / token}
    )


def _cached_product(case: Case, kind: Any) -> Contestant:
    def prepare() -> Callable[[], Tensor]:
        operator = _operator(case, kind)

        def run() -> Tensor:
            with plain_attention(case.workload):
                return operator @ case.vector

        return run

    return Contestant(NAME, f"{kind.__name__} @ v", prepare, lambda product: {"product": _scaled(case, product)})


def _monte_carlo(case: Case) -> Contestant:
    prepare = _cached_product(case, curvlinops.FisherMCLinearOperator).prepare
    return Contestant(
        NAME, "FisherMCLinearOperator @ v", prepare, lambda product: {"quadratic form": case.vector @ product},
        {"quadratic form": 0.6}, "other draws: an estimate of the same expectation",
    )  # fmt: skip


OPTIONS = {"separate_weight_and_bias": False, "num_per_example_loss_terms": 1}


def _kronecker(case: Case, kind: Any, fisher_type: str) -> Contestant:
    def prepare() -> Callable[[], Any]:
        own = copy.deepcopy(case.workload.model)
        terms = {"num_per_example_loss_terms": case.workload.targets[0].numel()}

        def run() -> Any:
            operator = _operator(case, kind, own, fisher_type=fisher_type, **{**OPTIONS, **terms})
            if kind is curvlinops.EKFACLinearOperator:
                operator.trace  # noqa: B018  its public way to have the eigenvalues computed
            else:
                operator.compute_kronecker_factors()
            return operator

        return run

    def values(operator: Any) -> Values:
        found = {"product": _scaled(case, operator @ case.vector)}
        if kind is curvlinops.EKFACLinearOperator:
            found["trace"] = _scaled(case, torch.as_tensor(operator.trace))
        return found

    return Contestant(NAME, f'{kind.__name__}(…, fisher_type="{fisher_type}")', prepare, values)


def _kronecker_product(case: Case) -> Contestant:
    def prepare() -> Callable[[], Tensor]:
        own, terms = copy.deepcopy(case.workload.model), case.workload.targets[0].numel()
        options = {**OPTIONS, "num_per_example_loss_terms": terms, "fisher_type": EMPIRICAL}
        return lambda: _operator(case, curvlinops.KFACLinearOperator, own, **options) @ case.vector

    how = f'KFACLinearOperator(…, fisher_type="{EMPIRICAL}") @ v'
    return Contestant(NAME, how, prepare, lambda product: {"product": _scaled(case, product)})


def _solve(case: Case) -> Contestant:
    """With exact damping: by default √λ goes to each factor, which damps another matrix."""

    def prepare() -> Callable[[], Tensor]:
        own = copy.deepcopy(case.workload.model)
        scale = case.workload.examples if case.workload.sequence else 1

        def run() -> Tensor:
            kfac = _operator(case, curvlinops.KFACLinearOperator, own, fisher_type=EMPIRICAL, **{
                **OPTIONS, "num_per_example_loss_terms": case.workload.targets[0].numel(),
            })  # fmt: skip
            inverse = curvlinops.KFACInverseLinearOperator(kfac, damping=scale * DAMPING, use_exact_damping=True)
            return scale * (inverse @ case.gradient)

        return run

    how = "KFACInverseLinearOperator(KFACLinearOperator(…), damping, use_exact_damping=True) @ g"
    return Contestant(NAME, how, prepare, lambda solution: {"solution": solution})
