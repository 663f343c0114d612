"""KFAC and EKFAC by brute force.

Owns the dense matrices made of captured inputs and output gradients. Layers without a Kronecker rule keep their exact
block.
"""

from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tests.reference.capture import Captured, capture
from tests.reference.fisher import Problem, block, rows
from tests.reference.outputs import Kind

Sharing = Literal["expand", "reduce"]
Method = Literal["kfac", "ekfac"]


def factors(layer: Captured, sharing: Sharing = "expand") -> tuple[Float[Tensor, "I I"], Float[Tensor, "O O"]]:
    """The activations' factor A and the output gradients' factor G of a layer, G ⊗ A on F's scale ("mean").

    expand: A = mean over (n, t) of a aᵀ, G = (1/N) Σ_{r,t} g gᵀ. reduce: A = mean over n of ā āᵀ with ā = mean_t a,
    G = (1/N) Σ_r ḡ ḡᵀ with ḡ = Σ_t g. n runs over counted examples, so that a batch element's inputs weigh as much
    as it has examples. Source: Eschenhagen et al., NeurIPS 2023.
    """
    count = len(layer.inputs)
    inputs, gradients = layer.inputs, layer.gradients
    if sharing == "reduce":
        inputs = [a.mean(0, keepdim=True) for a in inputs]
        gradients = [g.sum(0, keepdim=True) for g in gradients]
    a, g = torch.cat(inputs), torch.cat(gradients)
    return a.T @ a / len(a), g.T @ g / count


def ekfac_block(
    weight_rows: Float[Tensor, "R O I"], a_basis: Float[Tensor, "I I"], g_basis: Float[Tensor, "O O"], count: int
) -> Float[Tensor, "d d"]:
    """(U_G ⊗ U_A) diag(Λ) (U_G ⊗ U_A)ᵀ with Λ = (1/N) Σ_r (U_Gᵀ W_r U_A)², W_r row r's gradient of [weight | bias].

    Source: George et al., NeurIPS 2018.
    """
    values = (g_basis.T @ weight_rows @ a_basis).square().sum(0) / count
    basis = torch.kron(g_basis.contiguous(), a_basis.contiguous())
    return (basis * values.reshape(-1)) @ basis.T


def kronecker(
    problem: Problem,
    kind: Kind,
    method: Method = "kfac",
    sharing: Sharing = "expand",
    draws: Shaped[Tensor, "M B *Y"] | None = None,
) -> Float[Tensor, "D D"]:
    """The dense KFAC or EKFAC matrix in flat order, "mean"; modules without a Kronecker rule keep their exact block."""
    exact = rows(problem, kind, draws)
    dense = block(exact)
    for layer in capture(problem, kind, draws=draws).values():
        a, g = factors(layer, sharing)
        values = torch.kron(g, a)
        if method == "ekfac":
            bases = torch.linalg.eigh(a).eigenvectors, torch.linalg.eigh(g).eigenvectors
            values = ekfac_block(exact.matrix[:, layer.index], *bases, exact.count)
        index = layer.index.reshape(-1)
        dense[index] = 0.0
        dense[:, index] = 0.0
        dense[index[:, None], index] = values
    return dense
