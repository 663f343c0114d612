"""Fisher matrices by brute force: one forward per batch element, one autograd call per row.

Owns the step from output-space vectors to rows in parameter space and the dense full, block and diagonal matrices. It
must not know how a vector was made, nor share code with the package.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tests.reference.outputs import Example, Kind, Likelihood, example_vectors

Normalization = Literal["mean", "sum"]
Inputs = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A model with its data: everything that a Fisher matrix depends on, except the kind.

    Attributes:
        model: In eval mode, batch first at its interface.
        inputs: ``[B, ...]``, or a mapping of such tensors that the model takes as keywords.
        targets: ``[B, ...]``.
        likelihood: Likelihood of the targets given the outputs.
        example: What one example is.
        params: Chosen parameter names; None means all that require grad.
    """

    model: nn.Module
    inputs: Inputs
    targets: Shaped[Tensor, "B *Y"]
    likelihood: Likelihood = "categorical"
    example: Example = "sequence"
    params: tuple[str, ...] | None = None

    def chosen(self) -> dict[str, nn.Parameter]:
        """Chosen parameters in flat order, tied ones once under their first name."""
        named = dict(self.model.named_parameters())
        if self.params is not None:
            return {name: p for name, p in named.items() if name in self.params}
        return {name: p for name, p in named.items() if p.requires_grad}


@dataclass(frozen=True)
class Rows:
    """The rows J_nᵀ v_nm of a problem.

    Attributes:
        matrix: The rows.
        count: N, the number of counted examples.
        example: Each row's counted example, 0..N-1.
        element: Each counted example's batch element.
        layout: Each chosen parameter's place in the flat order.
    """

    matrix: Float[Tensor, "R D"]
    count: int
    example: Int[Tensor, " R"]
    element: Int[Tensor, " N"]
    layout: dict[str, slice]


def layout(problem: Problem) -> dict[str, slice]:
    """Each chosen parameter's place in the flat order."""
    places, start = {}, 0
    for name, parameter in problem.chosen().items():
        places[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return places


def forward_one(problem: Problem, n: int) -> Float[Tensor, "*Z"]:
    """Outputs of batch element n from a batch of one, without the batch dimension, with the autograd graph."""
    if isinstance(problem.inputs, Mapping):
        output: Any = problem.model(**{key: value[n : n + 1] for key, value in problem.inputs.items()})
    else:
        output = problem.model(problem.inputs[n : n + 1])
    z: Tensor = getattr(output, "logits", output)
    return z[0]


def elements(
    problem: Problem, kind: Kind, draws: Shaped[Tensor, "M B *Y"] | None = None
) -> Iterator[tuple[int, Float[Tensor, "*Z"], list[Float[Tensor, "M *Z"]]]]:
    """Each batch element's index, outputs with graph, and the vectors of every example in it, in ``z``'s dtype."""
    for n in range(len(problem.targets)):
        z = forward_one(problem, n)
        drawn = None if draws is None else draws[:, n]
        found = example_vectors(kind, z.detach(), problem.targets[n], problem.likelihood, problem.example, drawn)
        yield n, z, [v.to(z.dtype) for v in found]


def rows(problem: Problem, kind: Kind, draws: Shaped[Tensor, "M B *Y"] | None = None) -> Rows:
    """All rows of a problem, ordered by batch element, then position (token examples), then vector.

    Args:
        problem: Model and data.
        kind: Fisher kind.
        draws: Sampled kind only, targets of every draw.

    Cost:
        One forward per batch element, one backward per row, R·D numbers.
    """
    parameters = list(problem.chosen().values())
    found: list[Tensor] = []
    owner: list[int] = []
    element: list[int] = []
    for n, z, examples in elements(problem, kind, draws):
        for v in examples:
            for row in v:
                grads = torch.autograd.grad(
                    z, parameters, row, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                found.append(torch.cat([g.reshape(-1) for g in grads]))
                owner.append(len(element))
            element.append(n)
    places = layout(problem)
    size = sum(p.numel() for p in parameters)
    matrix = torch.stack(found) if found else parameters[0].new_zeros(0, size)
    index = torch.tensor(owner, dtype=torch.int64), torch.tensor(element, dtype=torch.int64)
    return Rows(matrix, len(element), *index, places)


def full(rows: Rows, normalization: Normalization = "mean") -> Float[Tensor, "D D"]:
    """F = (1/N) Σ row rowᵀ, without the 1/N for "sum"."""
    return rows.matrix.T @ rows.matrix / _divisor(rows, normalization)


def block_indices(rows: Rows) -> dict[str, Int[Tensor, " d"]]:
    """Flat indices of every module's own parameters, keyed by the module's name ("" for the model itself)."""
    pieces: dict[str, list[Tensor]] = {}
    for name, place in rows.layout.items():
        module = name.rpartition(".")[0]
        pieces.setdefault(module, []).append(torch.arange(place.start, place.stop))
    return {module: torch.cat(indices) for module, indices in pieces.items()}


def block(rows: Rows, normalization: Normalization = "mean") -> Float[Tensor, "D D"]:
    """F with everything between the parameters of two modules set to zero."""
    dense = full(rows, normalization)
    kept = torch.zeros_like(dense)
    for index in block_indices(rows).values():
        kept[index[:, None], index] = dense[index[:, None], index]
    return kept


def diagonal(rows: Rows, normalization: Normalization = "mean") -> Float[Tensor, " D"]:
    """The diagonal of F."""
    return full(rows, normalization).diagonal().clone()


def _divisor(rows: Rows, normalization: Normalization) -> int:
    return rows.count if normalization == "mean" else 1
