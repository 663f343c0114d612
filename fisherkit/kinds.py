"""The kinds: five rules in output space, and nothing else.

Each says which vectors v an example has; models, layers, structures and solvers never see the difference. A new kind
is one more class here or in a user's own code.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherkit.data import Data
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.fisher import FisherApproximation
from fisherkit.outputs import Columns, Outputs, OutputVectors
from fisherkit.randomness import keyed_uniform
from fisherkit.truncation import Stop, truncated_vectors


class EmpiricalFisher(FisherApproximation):
    """The empirical Fisher: v = ∂ℓ/∂z at the observed label, F = (1/N) Σ ∇ℓ_n ∇ℓ_nᵀ.

    Close to the exact Fisher only where the model's distribution is the data's; its preconditioned steps are biased
    towards examples that are already fit (Kunstner, Hennig, Balles, arXiv 1905.12558). Arguments are those of
    `FisherApproximation`.
    """

    kind_name = "ef"

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """The loss gradient."""
        return OutputVectors(outputs.gradient().unsqueeze(1))


class ImprovedEmpiricalFisher(FisherApproximation):
    """The improved empirical Fisher: v = u / ‖u‖^power with u = ∂ℓ/∂z, at the price of the empirical one.

    Dividing each example's gradient by the norm of its logit gradient removes EF's inversely-scaled projection (Wu, Yu,
    Zhang, Woodland, NeurIPS 2024, arXiv 2406.06420, eq. 14). An exactly zero gradient gives a zero row. The matrix is
    not on the Fisher's scale: its trace does not vanish as the fit becomes perfect.

    Args:
        power: 1 for the paper's matrix, 0 for EF; ½ is a cheap cousin of the truncated Fisher of rank 1.
        options: the keywords of `FisherApproximation`.
    """

    kind_name = "ief"

    def __init__(self, model: nn.Module, data: Data, *, power: float = 1.0, **options: Any) -> None:
        if isinstance(power, bool) or not isinstance(power, (int, float)):
            raise InvalidTypeError(
                call=type(self).__name__, got=f"power of type {type(power).__name__}", expected="a number"
            )
        if not 0 <= power <= 1:
            raise InvalidArgumentError(call=type(self).__name__, got=f"power={power}", expected="a number from 0 to 1")
        self.power = float(power)
        super().__init__(model, data, **options)

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """The loss gradient over a power of its norm."""
        u = outputs.gradient()
        # The largest entry goes first: the square of a tiny gradient would underflow, the ratio does not.
        largest = u.flatten(1).abs().amax(1)[:, None, None]
        safe = torch.where(largest > 0, largest, torch.ones_like(largest))
        direction = u / safe
        norm = direction.flatten(1).norm(dim=1)[:, None, None].clamp_min(1)  # at least 1 unless the gradient is zero
        return OutputVectors((direction / norm**self.power * safe ** (1 - self.power)).unsqueeze(1))

    def kind_options(self) -> dict[str, str]:
        """The power."""
        return {"power": str(self.power)}


class SampledFisher(FisherApproximation):
    """The Monte Carlo Fisher: labels drawn from the model, v = ∂ℓ(ŷ_m)/∂z / √draws; unbiased for the exact Fisher.

    A label depends on the seed and on the example's place in the data alone, so that the same seed gives the same
    matrix in every pass and for any batch split. Draws of one example that fell on the same label become one weighted
    row, exactly.

    Args:
        draws: labels an example.
        seed: of the draws; ``generator=`` overrides it with a number drawn from the generator.
        options: the keywords of `FisherApproximation`.
    """

    kind_name = "sf"
    needs_targets: ClassVar[bool] = False

    def __init__(self, model: nn.Module, data: Data, *, draws: int = 1, seed: int = 0, **options: Any) -> None:
        for name, value in (("draws", draws), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidTypeError(
                    call=type(self).__name__, got=f"{name} of type {type(value).__name__}", expected="an integer"
                )
        if draws < 1:
            raise InvalidArgumentError(call=type(self).__name__, got=f"draws={draws}", expected="1 or more")
        self.draws, self.seed = draws, seed
        super().__init__(model, data, **options)

    def seed_from(self, generator: torch.Generator | None) -> None:
        """One number of the generator is the seed."""
        if generator is not None:
            self.seed = int(torch.randint(1 << 62, (1,), generator=generator, device=generator.device))

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """Gradients at drawn labels, repeats merged."""
        likelihood, z = outputs.likelihood, outputs.z
        channels = likelihood.channels(z.shape[2])
        uniform = keyed_uniform(self.seed, outputs.keys, draws=self.draws, channels=channels)
        repeated = z.unsqueeze(1).expand(-1, self.draws, -1, -1)
        labels = likelihood.sample(repeated, uniform)
        mask = outputs.mask[:, None, :, None]
        v = torch.where(mask, likelihood.gradient(repeated, labels), torch.zeros((), dtype=z.dtype, device=z.device))
        weight = _repeats(labels.masked_fill(~(mask if labels.ndim == 4 else mask.squeeze(-1)), 0))
        return OutputVectors(v * (weight / self.draws).sqrt().to(z.dtype)[:, :, None, None], weight > 0)

    def kind_options(self) -> dict[str, str]:
        """Draws and seed."""
        return {"draws": str(self.draws), "seed": str(self.seed)}


class ExactFisher(FisherApproximation):
    """The exact (type-2) Fisher, equal to the generalized Gauss-Newton of the loss: v the columns of S, S Sᵀ = ∂²ℓ/∂z².

    With ``likelihood="gaussian"`` it is JᵀJ, the identity-output Gauss-Newton, whatever the model was trained with.
    Arguments are those of `FisherApproximation`.
    """

    kind_name = "exact"
    positionwise: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """Columns of a square root of the output Hessian."""
        z, likelihood = outputs.z[:, 0], outputs.likelihood

        def columns(unit: Tensor, vector: Tensor) -> Tensor:
            return likelihood.hessian_columns(z[unit], vector).unsqueeze(1)

        if likelihood.columnwise:
            return OutputVectors(Columns(likelihood.hessian_rank(z), columns))
        return OutputVectors(likelihood.hessian_factor(z).transpose(1, 2).unsqueeze(2))

    def output_product(self, outputs: Outputs, w: Float[Tensor, "K n P C"]) -> Float[Tensor, "K n P C"]:
        """The output Hessian's own product, O(C) an output."""
        return outputs.likelihood.hessian_matmul(outputs.z, w)


class TruncatedFisher(FisherApproximation):
    """The exact Fisher's output metric truncated to a few vectors, the loss gradient first.

    F₁ ≼ F₂ ≼ … ≼ F_exact in the Loewner order, equal at full rank; on F's own scale, without sampling;
    `dropped_trace` says what each example lacks. See `fisherkit.truncation` for the construction and its sources.

    Args:
        rank: vectors an example.
        tolerance: instead of a rank, the largest share of its output Fisher's trace that an example may lack.
        options: the keywords of `FisherApproximation`.
    """

    kind_name = "truncated"

    def __init__(
        self, model: nn.Module, data: Data, *, rank: int | None = None, tolerance: float | None = None, **options: Any
    ) -> None:
        call = type(self).__name__
        if rank is not None and tolerance is not None:
            raise InvalidArgumentError(call=call, got=f"rank={rank} and tolerance={tolerance}", expected="one of them")
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
            raise InvalidTypeError(call=call, got=f"rank of type {type(rank).__name__}", expected="an integer")
        if rank is not None and rank < 1:
            raise InvalidArgumentError(call=call, got=f"rank={rank}", expected="1 or more")
        if tolerance is not None and (isinstance(tolerance, bool) or not isinstance(tolerance, (int, float))):
            raise InvalidTypeError(call=call, got=f"tolerance of type {type(tolerance).__name__}", expected="a number")
        if tolerance is not None and not 0 <= tolerance < 1:
            raise InvalidArgumentError(call=call, got=f"tolerance={tolerance}", expected="a number from 0 to below 1")
        self.rank = 2 if rank is None and tolerance is None else rank
        self.tolerance = tolerance
        super().__init__(model, data, **options)

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """Gradient first, then pivots."""
        return truncated_vectors(outputs, Stop(self.rank, 0.0 if self.tolerance is None else self.tolerance))

    def kind_options(self) -> dict[str, str]:
        """Rank or tolerance."""
        return {"rank": str(self.rank)} if self.tolerance is None else {"tolerance": str(self.tolerance)}


KINDS: dict[str, type[FisherApproximation]] = {
    kind.kind_name: kind
    for kind in (EmpiricalFisher, ImprovedEmpiricalFisher, SampledFisher, ExactFisher, TruncatedFisher)
}
"""Kinds by their short names."""


def _repeats(labels: Tensor) -> Tensor:
    """How often each draw of an example occurs, at its first occurrence; 0 at the others; ``[n, draws]``."""
    n, draws = labels.shape[:2]
    flat = labels.reshape(n, draws, -1).double()
    example = torch.arange(n, device=labels.device, dtype=torch.float64).view(n, 1, 1).expand(n, draws, 1)
    _, group = torch.unique(torch.cat([example, flat], 2).flatten(0, 1), dim=0, return_inverse=True)
    counts = torch.bincount(group)
    first = torch.full_like(counts, n * draws).scatter_reduce(
        0, group, torch.arange(n * draws, device=labels.device), "amin"
    )
    weight = torch.zeros(n * draws, dtype=torch.float64, device=labels.device)
    weight[first] = counts.double()
    return weight.reshape(n, draws)
