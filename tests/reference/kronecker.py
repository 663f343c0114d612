"""KFAC and EKFAC by brute force.

Owns the dense matrices made of captured inputs and output gradients. Layers without a Kronecker rule keep their exact
block or diagonal.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tests.reference.capture import Captured, capture, kronecker_layers
from tests.reference.fisher import Normalization, Problem, Rows, block, block_indices, diagonal, rows
from tests.reference.outputs import Kind

Sharing = Literal["expand", "reduce"]
Method = Literal["kfac", "ekfac"]
Fallback = Literal["block", "diagonal"]


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
    dense: Tensor = (basis * values.reshape(-1)) @ basis.T
    return dense


def layer_blocks(
    problem: Problem,
    kind: Kind,
    method: Method = "kfac",
    sharing: Sharing = "expand",
    layers: list[str] | None = None,
    draws: Shaped[Tensor, "M B *Y"] | None = None,
) -> dict[str, tuple[Int[Tensor, " d"], Float[Tensor, "d d"]]]:
    """Each Kronecker layer's flat indices and its dense block over them, "mean" normalization."""
    exact = rows(problem, kind, draws)
    found = {}
    for name, layer in capture(problem, kind, layers, draws).items():
        a, g = factors(layer, sharing)
        dense = torch.kron(g, a)
        if method == "ekfac":
            dense = ekfac_block(exact.matrix[:, layer.index], _eigenbasis(a), _eigenbasis(g), exact.count)
        found[name] = layer.index.reshape(-1), dense
    return found


def kronecker(
    problem: Problem,
    kind: Kind,
    method: Method = "kfac",
    sharing: Sharing = "expand",
    fallback: Fallback = "block",
    normalization: Normalization = "mean",
    layers: list[str] | None = None,
    draws: Shaped[Tensor, "M B *Y"] | None = None,
) -> Float[Tensor, "D D"]:
    """The dense KFAC or EKFAC matrix in flat order; modules outside ``layers`` keep their exact block or diagonal."""
    exact = rows(problem, kind, draws)
    dense = block(exact) if fallback == "block" else torch.diag(diagonal(exact))
    for index, values in layer_blocks(problem, kind, method, sharing, layers, draws).values():
        dense[index] = 0.0
        dense[:, index] = 0.0
        dense[index[:, None], index] = values
    return dense * (1 if normalization == "mean" else exact.count)


def determined_layers(
    problem: Problem,
    kind: Kind,
    sharing: Sharing = "expand",
    layers: list[str] | None = None,
    draws: Shaped[Tensor, "M B *Y"] | None = None,
) -> list[str]:
    """Names of the layers whose EKFAC block is one matrix, whichever eigenvectors span a repeated eigenvalue's space.

    Others are defined only up to that choice ("reduce" with fewer examples than inputs, say): compare their trace.
    """
    exact, found = rows(problem, kind, draws), []
    for name, layer in capture(problem, kind, layers, draws).items():
        a, g = factors(layer, sharing)
        plain, rotated = (
            ekfac_block(exact.matrix[:, layer.index], _eigenbasis(a, rotate), _eigenbasis(g, rotate), exact.count)
            for rotate in (False, True)
        )
        if (plain - rotated).norm() <= 1e-9 * plain.norm():
            found.append(name)
    return found


def uncovered(problem: Problem, exact: Rows, layers: list[str] | None = None) -> list[str]:
    """Names of the modules with chosen parameters and no Kronecker rule."""
    names = kronecker_layers(problem) if layers is None else layers
    return [name for name in block_indices(exact) if name not in names]


def _eigenbasis(factor: Float[Tensor, "P P"], rotate: bool = False) -> Float[Tensor, "P P"]:
    """Eigenvectors of a factor, those of (almost) repeated eigenvalues in another basis of their space if asked."""
    values: Tensor
    basis: Tensor
    values, basis = torch.linalg.eigh(factor)
    if rotate:
        apart = values.diff() > 1e-6 * values[-1]
        cluster = torch.cat([apart.new_zeros(1), apart]).cumsum(0)
        for group in range(int(cluster[-1]) + 1):
            members = cluster == group
            size = int(members.sum())
            # Any fixed matrix without structure will do: its Q mixes the group.
            mixing = torch.linspace(-1, 2, size * size, dtype=factor.dtype).cos().reshape(size, size)
            mixing = torch.linalg.qr(mixing + torch.eye(size, dtype=factor.dtype)).Q
            basis[:, members] = basis[:, members] @ mixing
    return basis
