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
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherkit.data import Batch
from fisherkit.randomness import untouched_rng
from fisherkit.rows.base import spans
from fisherkit.rows.differentiable import differentiable
from fisherkit.rows.plan import TOLERANCE, Plan
from fisherkit.rows.whole import functional_call
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
    one = u.shape[1] == 1
    # The fused attention kernels have no forward-mode derivative.
    with untouched_rng([u.device]), differentiable(plan.model, ()), sdpa_kernel(SDPBackend.MATH):
        return (_one_column if one else _columns)(plan, space, batch, u, metric)


def _one_column(
    plan: Plan, space: ParameterSpace, batch: Batch, u: Float[Tensor, "D 1"], metric: Metric
) -> Float[Tensor, "D 1"]:
    """One forward pass carries the tangents and leaves the graph to go back through."""
    forward, parameters = _forward(plan, space, batch)
    leaves = {name: p.requires_grad_() for name, p in parameters.items()}
    with forward_ad.dual_level():
        tangents = space.unflatten(u[:, 0])
        z = forward({name: forward_ad.make_dual(p, tangents[name]) for name, p in leaves.items()})
        tangent = forward_ad.unpack_dual(z).tangent
        pushed = torch.zeros_like(z) if tangent is None else tangent.detach().clone()
    # Outside of the dual level, where going back would carry tangents too.
    weighed = metric(z.detach(), pushed.unsqueeze(0)).squeeze(0).to(z.dtype)
    found = torch.autograd.grad(z, list(leaves.values()), weighed, allow_unused=True, materialize_grads=True)
    return space.flatten(dict(zip(leaves, found, strict=True))).unsqueeze(1)


def _columns(
    plan: Plan, space: ParameterSpace, batch: Batch, u: Float[Tensor, "D K"], metric: Metric
) -> Float[Tensor, "D K"]:
    """Tangents and cotangents vectorised over the columns."""
    forward, parameters = _forward(plan, space, batch)
    z, pull = vjp(forward, parameters)[:2]
    parts = []
    for span in spans(u.shape[1], z.numel()):
        tangents = {name: t.movedim(-1, 0) for name, t in space.unflatten(u[:, span]).items()}
        pushed = vmap(lambda t: jvp(forward, (parameters,), (t,))[1])(tangents)
        (pulled,) = vmap(pull)(metric(z.detach(), pushed).to(z.dtype))
        parts.append(space.flatten({name: g.movedim(0, -1) for name, g in pulled.items()}))
    return torch.cat(parts, 1)


def agrees(plan: Plan, space: ParameterSpace, batch: Batch, row_products: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether products are those of the verified rows, for one column and for two.

    Both sides are asked for Jᵀ r (rᵀ J u) with random output vectors r, which takes one row of each example, however
    many vectors the kind has.

    Args:
        plan: the model.
        space: the parameters.
        batch: a few examples.
        row_products: vectors ``[1, *outputs]`` of each example and u to JᵀJ u of the one row that each then has.
    """
    like, generator = plan.example_parameter, torch.Generator().manual_seed(0)
    u = torch.randn(space.size, 2, generator=generator, dtype=torch.float64).to(like)
    with untouched_rng([u.device]), torch.no_grad():
        z = batch.call(plan.model)
    r = torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z)

    def metric(_: Tensor, w: Float[Tensor, "K B ..."]) -> Float[Tensor, "K B ..."]:
        inner = (r * w).flatten(2).sum(2)
        return r * inner.reshape(*inner.shape, *[1] * (w.ndim - 2))

    expected = row_products(r.unsqueeze(0), u)
    try:
        one, two = (product(plan, space, batch, columns, metric) for columns in (u[:, :1], u))
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        # An operation without forward-mode derivative or batching rule; rows do without both.
        return False
    tolerance = TOLERANCE.get(like.dtype, 5e-2) * expected.norm()
    return bool((two - expected).norm() <= tolerance) and bool((one - expected[:, :1]).norm() <= tolerance)


def _forward(
    plan: Plan, space: ParameterSpace, batch: Batch
) -> tuple[Callable[[Mapping[str, Tensor]], Tensor], dict[str, Tensor]]:
    parameters = {name: plan.parameters[name].detach() for name in space.names}

    def forward(values: Mapping[str, Tensor]) -> Tensor:
        return batch.call(lambda *args, **kwargs: functional_call(plan.model, values, args, kwargs))

    return forward, parameters
