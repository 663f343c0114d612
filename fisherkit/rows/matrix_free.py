"""Products with a batch's F without any row: push forward, apply the output metric, pull back.

F_batch u = Jᵀ (Σ_m v vᵀ) J u costs one forward-mode and one reverse pass whatever the number of vectors, and no layer
rule. It needs ``torch.func`` to see through the model, which `agrees` finds out. The metric is a function; no kind is
known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherkit.data import Batch
from fisherkit.randomness import untouched_rng
from fisherkit.rows.base import spans
from fisherkit.rows.plan import TOLERANCE, Plan, differentiable
from fisherkit.space import ParameterSpace

Metric = Callable[[Float[Tensor, "B ..."], Float[Tensor, "K B ..."]], Float[Tensor, "K B ..."]]
"""Outputs and K directions in output space to the metric's product with each direction."""


def product(
    plan: Plan, space: ParameterSpace, batch: Batch, u: Float[Tensor, "D K"], metric: Metric
) -> Float[Tensor, "D K"]:
    """Jᵀ M J U over a batch.

    Args:
        plan: the model.
        space: the parameters of u, some or all of the plan's.
        batch: the examples.
        u: columns.
        metric: product with Σ_m v vᵀ of each example.
    """
    forward, parameters = _forward(plan, space, batch)
    # The fused attention kernels have no forward-mode derivative.
    with untouched_rng([u.device]), differentiable(()), sdpa_kernel(SDPBackend.MATH):
        z, pull = vjp(forward, parameters)[:2]
        parts = []
        for span in spans(u.shape[1], z.numel()):
            tangents = {name: t.movedim(-1, 0) for name, t in space.unflatten(u[:, span]).items()}
            pushed = vmap(lambda t: jvp(forward, (parameters,), (t,))[1])(tangents)
            (pulled,) = vmap(pull)(metric(z.detach(), pushed).to(z.dtype))
            parts.append(space.flatten({name: g.movedim(0, -1) for name, g in pulled.items()}))
    return torch.cat(parts, 1)


def agrees(
    plan: Plan, space: ParameterSpace, batch: Batch, rows_product: Callable[[Tensor], Tensor], metric: Metric
) -> bool:
    """Whether the product is the one that the verified rows give, on a random direction.

    Args:
        plan: the model.
        space: the parameters.
        batch: a few examples.
        rows_product: JᵀJ u of the same examples from their rows.
        metric: as in `product`.
    """
    like = plan.example_parameter
    direction = torch.randn(space.size, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)
    expected = rows_product(direction)
    try:
        found = product(plan, space, batch, direction, metric)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        # An operation without forward-mode derivative or batching rule; rows do without both.
        return False
    return bool((found - expected).norm() <= TOLERANCE.get(like.dtype, 5e-2) * expected.norm())


def _forward(
    plan: Plan, space: ParameterSpace, batch: Batch
) -> tuple[Callable[[Mapping[str, Tensor]], Tensor], dict[str, Tensor]]:
    parameters = {name: plan.parameters[name].detach() for name in space.names}

    def forward(values: Mapping[str, Tensor]) -> Tensor:
        return batch.call(lambda *args, **kwargs: functional_call(plan.model, dict(values), args, kwargs))

    return forward, parameters
