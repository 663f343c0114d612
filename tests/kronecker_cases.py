"""What KFAC and EKFAC of a family must be: the reference's factors for every unit that the package covers.

Owns three things that the reference leaves open. Attention is a black box to hooks, so that it is replaced by an
equivalent module of plain layers. The reference averages inputs over all positions of an example; here positions that
do not count are left out where a layer's positions are the outputs' own. And where eigenvectors are not determined, any
eigenbasis will do, so that the package's is checked and then used.
"""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherkit import FisherApproximation
from fisherkit.operators import BlockDiagonalOperator, EigenKroneckerOperator, unwrap
from tests.conformance_cases import KINDS, drawn, problem, reference_rows
from tests.reference import fisher as reference
from tests.reference.capture import Captured, capture, kronecker_layers
from tests.reference.fisher import Problem, Rows, forward_one
from tests.reference.kronecker import Sharing, ekfac_block, factors
from tests.reference.outputs import counted_positions
from tests.tolerances import EIGENBASIS, ROUNDING, SEPARATE_EIGENVALUES

Unit = tuple[str, ...]

USED_TWICE = {"reused_module": ["body"], "shared_module": ["0"]}
"""Layers that the reference leaves out, and that have a rule: their uses are positions of one use."""

RECURRENT = ("gru_sequence_first", "lstm", "rnn")
"""Families whose linear maps no hook of the reference sees: `tests/test_recurrent.py` has their factors by hand."""


class Held(nn.Module):
    """Parameters with their names and no function."""

    def __init__(self, **parameters: nn.Parameter) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, value)


class ExplicitAttention(nn.Module):
    """An ``nn.MultiheadAttention`` in its flat order, of plain layers wherever a whole parameter acts linearly.

    Self-attention has one map to queries, keys and values; attention with other widths has three without bias, and the
    bias by itself; the fused weight of attention from one sequence to another is cut up and gets no layer.
    """

    def __init__(self, attention: nn.MultiheadAttention, to_itself: bool) -> None:
        super().__init__()
        self.heads, self.sequence_first, self.batch_first = attention.num_heads, not attention.batch_first, False
        width = attention.embed_dim
        if attention.in_proj_weight is None:
            for name in "qkv":
                weight = getattr(attention, f"{name}_proj_weight")
                layer = nn.Linear(weight.shape[1], width, bias=False)
                layer.weight = weight
                self.add_module(f"{name}_proj", layer)
            self.in_proj = Held(bias=attention.in_proj_bias)
        elif to_itself:
            layer = nn.Linear(width, 3 * width)
            layer.weight, layer.bias = attention.in_proj_weight, attention.in_proj_bias
            self.in_proj = layer
        else:
            self.in_proj = Held(weight=attention.in_proj_weight, bias=attention.in_proj_bias)
        self.out_proj = nn.Linear(width, width)
        self.out_proj.weight, self.out_proj.bias = attention.out_proj.weight, attention.out_proj.bias

    def _projected(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.in_proj, nn.Linear):
            return self.in_proj(q).chunk(3, -1)
        biases = self.in_proj.bias.chunk(3)
        if hasattr(self, "q_proj"):
            products = self.q_proj(q), self.k_proj(k), self.v_proj(v)
            return tuple(product + bias for product, bias in zip(products, biases, strict=True))
        weights = self.in_proj.weight.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((q, k, v), weights, biases, strict=True))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **_: object) -> tuple[Tensor, None]:
        if self.sequence_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self._projected(q, k, v))
        scores = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        mixed = self.out_proj((scores @ v).transpose(1, 2).flatten(2))
        return mixed.transpose(0, 1) if self.sequence_first else mixed, None


@cache
def explicit(family: str) -> Problem:
    """The problem with every attention made explicit; the same function, the same flat order, other names."""
    of = problem(family)
    model = deepcopy(of.model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, ExplicitAttention(module, "cross" not in family))
    changed = replace(of, model=model.eval())
    assert torch.allclose(forward_one(changed, 0), forward_one(of, 0), rtol=1e-12)
    assert [p.shape for p in changed.chosen().values()] == [p.shape for p in of.chosen().values()]
    return changed


@cache
def captured(family: str, kind: str) -> dict[Unit, Captured]:
    """Inputs and output gradients of every layer with a rule, by the names of its parameters."""
    of = explicit(family)
    names = kronecker_layers(of) + USED_TWICE.get(family, [])
    own = dict(zip(of.chosen(), problem(family).chosen(), strict=True))
    found = {}
    for name, layer in capture(of, KINDS[kind].kind, names, drawn(family, kind)).items():
        unit = tuple(own[n] for n in (f"{name}.weight".lstrip("."), f"{name}.bias".lstrip(".")) if n in own)
        found[unit] = replace(layer, inputs=_that_count(of, layer.inputs))
    return found


def _that_count(of: Problem, inputs: list[Tensor]) -> list[Tensor]:
    """Of each example's inputs those at positions that count, if the layer's positions are the outputs'.

    A token counts at its own position, a sequence at its labelled ones. The reference keeps every position: padding
    would then change the mean of a aᵀ, and a token's product be off F's scale by what the other positions hold.
    """
    result: list[Tensor] = []
    for n in range(len(of.targets)):
        z = forward_one(of, n)
        positions = z.shape[0] if z.ndim > 1 else 1
        counted = counted_positions(of.targets[n], positions, of.likelihood)
        examples = [[t] for t in counted] if of.example == "token" else [counted] if counted else []
        for own in examples:
            a = inputs[len(result)]
            result.append(a[own] if len(a) == positions else a)
    assert len(result) == len(inputs)
    return result


def expected_matrix(family: str, kind: str, method: str, sharing: Sharing, fisher: FisherApproximation) -> Tensor:
    """The dense matrix in flat order: Kronecker blocks, and exact blocks or diagonals as `coverage` says."""
    rows = reference_rows(family, kind)
    exact, result = reference.full(rows), torch.zeros(rows.matrix.shape[1], rows.matrix.shape[1], dtype=torch.float64)
    layers = captured(family, kind)
    for entry in fisher.coverage().entries:
        index = torch.cat([torch.arange(rows.layout[n].start, rows.layout[n].stop) for n in entry.parameters])
        if entry.structure == method:
            layer = layers[entry.parameters]
            index = layer.index.reshape(-1)
            values = kronecker_block(layer, method, sharing, rows, block_of(fisher, entry.parameters))
        else:
            values = exact[index[:, None], index]
            values = values if entry.structure == "exact block" else values.diagonal().diag()
        result[index[:, None], index] = values
    return result


def kronecker_block(layer: Captured, method: str, sharing: Sharing, rows: Rows, operator: object) -> Tensor:
    """A layer's block over `layer.index`."""
    a, g = factors(layer, sharing)
    if method == "kfac":
        return torch.kron(g, a)
    assert isinstance(operator, EigenKroneckerOperator)
    scales = [factor.norm() for factor in factors(layer, "expand")]
    bases = [operator.activation_basis.cpu().double(), operator.gradient_basis.cpu().double()]
    for i, (factor, scale, basis) in enumerate(zip((a, g), scales, bases, strict=True)):
        # Sums over positions may vanish (of keys' gradients, say): any basis is one of rounding's eigenbases.
        scale = torch.maximum(factor.norm(), ROUNDING * scale)
        rotated, tolerance = basis.T @ factor @ basis, EIGENBASIS[operator.dtype]
        assert (rotated - rotated.diagonal().diag()).norm() <= tolerance * scale
        assert (basis.T @ basis - torch.eye(basis.shape[1], dtype=torch.float64)).norm() <= tolerance * len(basis)
        # A basis without the null space spans all of the rest.
        assert (basis @ (basis.T @ factor) - factor).norm() <= tolerance * scale * len(basis)
        values, own = torch.linalg.eigh(factor)
        if operator.dtype == torch.float64 and bool((values.diff() > SEPARATE_EIGENVALUES * scale).all()):
            bases[i] = own
    return ekfac_block(rows.matrix[:, layer.index], bases[0], bases[1], rows.count)


def block_of(fisher: FisherApproximation, unit: Unit) -> object:
    """The operator of one unit."""
    whole = unwrap(fisher)
    assert isinstance(whole, BlockDiagonalOperator)
    return next(block for block in whole.blocks if block.space.names == unit)
