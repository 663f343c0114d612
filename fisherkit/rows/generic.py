"""Rows of parameters that no rule covers, by automatic differentiation of one example at a time.

Two ways, both exact: ``torch.func`` vectorised over examples, and, for models that it cannot trace (recurrent kernels,
data-dependent control flow), a loop of ordinary backward passes on the model itself. The plan finds out which one
works.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from fisherkit.data import Batch


def vectorised_rows(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, v: Float[Tensor, "k B ..."]
) -> Float[Tensor, "k B d"]:
    """Rows by ``vmap`` over examples and output vectors.

    Args:
        model: the model.
        parameters: the parameters to differentiate, detached; d entries in all.
        batch: B examples.
        v: k vectors for each example, in the shape of the model's outputs.
    """
    leaves, rebuild = batch.leaves()

    def one(example: list[Tensor], vectors: Float[Tensor, "k ..."]) -> Float[Tensor, "k d"]:
        single = rebuild([leaf.unsqueeze(0) for leaf in example])

        def forward(values: Mapping[str, Tensor]) -> Tensor:
            return single.call(lambda *a, **kw: functional_call(model, dict(values), a, kw))[0]

        pull = vjp(forward, dict(parameters))[1]
        (gradients,) = vmap(pull)(vectors)
        flat = [gradients[name].reshape(-1, p.numel()) for name, p in parameters.items()]
        # A parameter that the outputs do not depend on has one zero gradient, whatever the number of vectors.
        return torch.cat([g.expand(len(vectors), -1) for g in flat], 1)

    with warnings.catch_warnings():
        # torch asks for reports on operations that it does not vectorise; `coverage` says what matters to the user.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        found = vmap(one, out_dims=1)(leaves, v.transpose(0, 1))
    # The rest of the model still requires grad, so the rows come with a graph that nobody needs.
    return found.detach()


def looped_rows(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, v: Float[Tensor, "k B ..."]
) -> Float[Tensor, "k B d"]:
    """Rows by one forward pass an example and one backward pass a row; the parameters are the model's own."""
    rows = []
    for n in range(batch.size):
        z = batch.take(slice(n, n + 1)).call(model)[0]
        found = (gradients(z, list(parameters.values()), vector) for vector in v[:, n])
        rows.append(torch.stack([torch.cat([g.flatten() for g in parts]) for parts in found]))
    return torch.stack(rows, 1)


def gradients(z: Tensor, parameters: list[Tensor], vector: Tensor) -> list[Tensor]:
    """Jᵀ v of one example by parameter; zero for those that the outputs do not depend on."""
    if not z.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(z, parameters, vector.to(z.dtype), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
