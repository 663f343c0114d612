"""The paper's updates on one full batch, made with fisherkit: SGD, EF, iEF, NGD and Gauss-Newton.

Sum convention throughout, as in the paper: L = Σ ℓ_n, and no 1/N anywhere. With J the N × D matrix of the examples'
loss gradients and s_n = ‖∂ℓ_n/∂z_n‖², EF's update is Jᵀ(JJᵀ + λI)⁻¹1 (equation 5) and iEF's Jᵀ(JJᵀ + λI)⁻¹s (equation
8). Both are a weighted sum of gradients, so that one small solve with the empirical Fisher's Gram matrix and one
backward pass are all they take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

import fisherkit as fk

Kind = Callable[..., fk.FisherApproximation]

DAMPING = 1e-12
"""λ of every update: near zero, as in the paper's evaluation."""

_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "gaussian": lambda z, y: 0.5 * (z - y).square().sum(1),
    "bernoulli": lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(1),
}
"""ℓ_n by likelihood, as fisherkit defines it."""


@dataclass(frozen=True)
class Task:
    """A model that is trained in place on one batch.

    Args:
        model: its parameters are θ.
        inputs: N examples.
        targets: as the likelihood wants them.
        likelihood: "categorical", "gaussian" or "bernoulli".
    """

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    likelihood: str

    def losses(self) -> Float[Tensor, " N"]:
        """ℓ_n, with its graph."""
        return _LOSSES[self.likelihood](self.model(self.inputs), self.targets)

    def asked(self) -> Float[Tensor, " N"]:
        """s_n = ‖∂ℓ_n/∂z_n‖², the loss reduction that iEF asks of each example."""
        z = self.model(self.inputs).detach().requires_grad_()
        (u,) = torch.autograd.grad(_LOSSES[self.likelihood](z, self.targets).sum(), z)
        return u.square().flatten(1).sum(1)

    def weighted_gradient(self, weights: Float[Tensor, " N"]) -> Float[Tensor, " D"]:
        """Jᵀw = ∂(Σ w_n ℓ_n)/∂θ."""
        grads = torch.autograd.grad((weights * self.losses()).sum(), list(self.model.parameters()))
        return torch.cat([g.reshape(-1) for g in grads])

    def gradient(self) -> Float[Tensor, " D"]:
        """∇L = Jᵀ1."""
        return self.weighted_gradient(torch.ones(len(self.inputs), dtype=self.inputs.dtype))

    def fisher(
        self, kind: Callable[..., fk.FisherApproximation], likelihood: str | None = None
    ) -> fk.FisherApproximation:
        """A Fisher of the batch in the paper's convention.

        Args:
            kind: which.
            likelihood: another output metric than the task's own: "gaussian" for Gauss-Newton in the outputs.
        """
        data = (self.inputs, self.targets)
        return kind(self.model, data, likelihood=likelihood or self.likelihood, normalization="sum")

    def gram(self) -> Float[Tensor, "N N"]:
        """JJᵀ."""
        return self.fisher(fk.EmpiricalFisher).gram()

    def direction(self, method: str) -> Float[Tensor, " D"]:
        """What the method subtracts from θ, at learning rate 1.

        Args:
            method: one of `METHODS`.
        """
        return METHODS[method](self)

    def step(self, direction: Float[Tensor, " D"], size: float) -> None:
        """θ ← θ − size · direction."""
        parameters = list(self.model.parameters())
        flat = nn.utils.parameters_to_vector(parameters)
        nn.utils.vector_to_parameters((flat - size * direction).detach(), parameters)


def _by_gram(task: Task, request: Float[Tensor, " N"]) -> Float[Tensor, " D"]:
    """Jᵀ(JJᵀ + λI)⁻¹ request: every example's loss falls by what is requested of it, to first order."""
    gram = task.gram()
    gram.diagonal().add_(DAMPING)
    return task.weighted_gradient(torch.linalg.solve(gram, request))


METHODS: dict[str, Callable[[Task], Tensor]] = {
    "SGD": Task.gradient,
    "EF": lambda task: _by_gram(task, torch.ones(len(task.inputs), dtype=task.inputs.dtype)),
    "iEF": lambda task: _by_gram(task, task.asked()),
    "NGD": lambda task: task.fisher(fk.ExactFisher).solve(task.gradient(), damping=DAMPING),
    "GN": lambda task: task.fisher(fk.ExactFisher, "gaussian").solve(task.gradient(), damping=DAMPING),
}
"""Updates: the gradient, equations 5 and 8, the natural gradient, and Gauss-Newton with the outputs' metric I."""
