"""`RowDamped`: any kind with a floor under the curvature along each example's own loss gradient."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fisherkit.arguments import check_number
from fisherkit.outputs import Columns, OutputRule, Outputs, OutputVectors, vectors_of
from fisherkit.vectors import ImprovedVectors, rule_of


class RowDamped(OutputRule):
    """F + ε F_iEF: to each example's output Fisher, ε ûûᵀ is added, û its loss gradient divided by its norm.

        kind = fk.optim.RowDamped("truncated:2", 0.1)
        optimizer = fk.optim.NaturalGradient(model, lr=1.0, kind=kind, damping=1e-2, trust_region=0.3)

    A softmax's Hessian goes to zero with p(1 − p) at both ends: an example that is surely right can be moved at no
    cost, one that is surely wrong asks for a step of 1/p. λI is the same for all examples. With ε no example asks its
    outputs to move along û by more than ‖∂ℓ/∂z‖/ε, and one that is fit holds its place, as in iEF.
    ε is on the scale of the output Fisher, whose largest eigenvalue is at most 1/2 for a softmax. For the exact kind
    ε ûûᵀ is added position by position.

    Args:
        kind: as for `NaturalGradient`.
        row_damping: ε.
        options: of the kind: ``rank`` and so on.

    Raises:
        InvalidTypeError, InvalidArgumentError: an argument that does not fit.

    Cost: nothing for kinds whose first vector is a multiple of the loss gradient (EF, iEF, truncated); one more row an
        example for the others.
    """

    needs_targets: ClassVar[bool] = True

    def __init__(self, kind: str | OutputRule, row_damping: float, **options: Any) -> None:
        call = "RowDamped"
        self.row_damping = check_number(call, "row_damping", row_damping, above=True)
        self.rule = rule_of(kind, call=call, options=options)
        self.kind_name = f"row-damped {self.rule.kind_name}"  # type: ignore[misc]  # what a class has is an object's own here
        self.positionwise = self.rule.positionwise  # type: ignore[misc]

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """The kind's vectors, the first of them lengthened or one more."""
        found = vectors_of(self.rule, outputs)
        units = torch.arange(len(outputs.z), device=outputs.z.device)
        direction = ImprovedVectors().output_vectors(outputs).select(units, torch.zeros_like(units)).unsqueeze(1)
        there = direction.flatten(2).ne(0).any(-1)
        if isinstance(found.v, Tensor) and (self.along_gradient or _parallel(found.v[:, 0], direction[:, 0])):
            size = (found.v[:, :1].flatten(2).square().sum(-1) + self.row_damping).sqrt()
            v = torch.cat([direction * size[:, :, None, None], found.v[:, 1:]], 1)
            keep = None if found.keep is None else torch.cat([there, found.keep[:, 1:]], 1)
            return OutputVectors(v, keep, found.dropped)
        number, more = found.number, direction[:, 0] * self.row_damping**0.5

        def columns(unit: Tensor, vector: Tensor) -> Tensor:
            own = found.select(unit, vector.clamp_max(number - 1))
            return torch.where((vector < number)[:, None, None], own, more[unit])

        keep = None if found.keep is None else torch.cat([found.keep, there], 1)
        return OutputVectors(Columns(number + 1, columns), keep, found.dropped)

    @property
    def along_gradient(self) -> bool:
        """Whether the damped kind's vector is."""
        return self.rule.along_gradient

    def kind_options(self) -> dict[str, str]:
        """The kind's, and ε."""
        return {**self.rule.kind_options(), "row_damping": str(self.row_damping)}


def _parallel(a: Tensor, b: Tensor) -> bool:
    """Whether the vectors are along each other in every example, zero ones to zero ones."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return bool(((a * b).sum(1).abs() >= (1 - 1e-9) * a.norm(dim=1) * b.norm(dim=1)).all()) and torch.equal(
        a.any(1), b.any(1)
    )
