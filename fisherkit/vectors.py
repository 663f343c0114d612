"""The kinds in output space: five rules that say which vectors v an example has, and nothing else.

Models, layers, structures and solvers never see the difference. `fisherkit.kinds` makes a Fisher of each, the
optimizers take them as they are.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arguments import check_positive, is_integer, is_number
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.outputs import OutputRule, Outputs, OutputVectors
from fisherkit.randomness import keyed_uniform
from fisherkit.truncation import Stop, truncated_vectors


class EmpiricalVectors(OutputRule):
    """v = ∂ℓ/∂z at the observed label."""

    kind_name = "ef"

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """The loss gradient."""
        return OutputVectors(outputs.gradient().unsqueeze(1))

    @property
    def along_gradient(self) -> bool:
        """Yes."""
        return True

    @property
    def gradient_power(self) -> float:
        """0."""
        return 0.0


class ImprovedVectors(OutputRule):
    """v = u / ‖u‖^power with u = ∂ℓ/∂z.

    Args:
        power: from 0 (EF) to 1 (iEF).

    Raises:
        InvalidTypeError: not a number.
        InvalidArgumentError: outside 0 to 1.
    """

    kind_name = "ief"

    def __init__(self, power: float = 1.0) -> None:
        call = "ImprovedEmpiricalFisher"
        if not is_number(power):
            raise InvalidTypeError(call=call, got=f"power of type {type(power).__name__}", expected="a number")
        if not 0 <= power <= 1:
            raise InvalidArgumentError(call=call, got=f"power={power}", expected="a number from 0 to 1")
        self.power = float(power)

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """The loss gradient over a power of its norm."""
        u = outputs.gradient()
        # The largest entry goes first: the square of a tiny gradient would underflow, the ratio does not.
        largest = u.flatten(1).abs().amax(1)[:, None, None]
        safe = torch.where(largest > 0, largest, torch.ones_like(largest))
        direction = u / safe
        norm = direction.flatten(1).norm(dim=1)[:, None, None].clamp_min(1)  # at least 1 unless the gradient is zero
        return OutputVectors((direction / norm**self.power * safe ** (1 - self.power)).unsqueeze(1))

    @property
    def along_gradient(self) -> bool:
        """Yes."""
        return True

    @property
    def gradient_power(self) -> float:
        """The power."""
        return self.power

    def kind_options(self) -> dict[str, str]:
        """The power."""
        return {"power": str(self.power)}


class SampledVectors(OutputRule):
    """v = ∂ℓ(ŷ_m)/∂z / √draws at labels drawn from the model.

    Args:
        draws: labels an example.
        seed: of the draws.

    Raises:
        InvalidTypeError: not integers.
        InvalidArgumentError: no draw.
    """

    kind_name = "sf"
    needs_targets: ClassVar[bool] = False

    def __init__(self, draws: int = 1, seed: int = 0) -> None:
        call = "SampledFisher"
        for name, value in (("draws", draws), ("seed", seed)):
            if not is_integer(value):
                raise InvalidTypeError(call=call, got=f"{name} of type {type(value).__name__}", expected="an integer")
        if draws < 1:
            raise InvalidArgumentError(call=call, got=f"draws={draws}", expected="1 or more")
        self.draws, self.seed = draws, seed

    def seed_from(self, generator: torch.Generator | None) -> None:
        """One number of the generator is the seed."""
        if generator is not None:
            self.seed = int(torch.randint(1 << 62, (1,), generator=generator, device=generator.device))

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """Gradients at drawn labels, repeats merged.

        Raises:
            InvalidArgumentError: the loss is no −log p to draw labels from.
        """
        likelihood, z = outputs.likelihood, outputs.z
        likelihood.refuse_sampling()
        channels = likelihood.channels(z.shape[2])
        uniform = keyed_uniform(self.seed, outputs.keys, draws=self.draws, channels=channels)
        repeated = z.unsqueeze(1).expand(-1, self.draws, -1, -1)
        if outputs.target is None:
            labels = likelihood.sample(repeated, uniform)
        else:
            labels = likelihood.sample_given(repeated, uniform, outputs.target.unsqueeze(1))
        mask = outputs.mask[:, None, :, None]
        v = torch.where(
            mask, likelihood.drawn_gradient(repeated, labels), torch.zeros((), dtype=z.dtype, device=z.device)
        )
        weight = _repeats(labels.masked_fill(~(mask if labels.ndim == 4 else mask.squeeze(-1)), 0))
        return OutputVectors(v * (weight / self.draws).sqrt().to(z.dtype)[:, :, None, None], weight > 0)

    @property
    def label_source(self) -> str:
        """The model."""
        return "sampled"

    def kind_options(self) -> dict[str, str]:
        """Draws and seed."""
        return {"draws": str(self.draws), "seed": str(self.seed)}


class ExactVectors(OutputRule):
    """v the columns of S, S Sᵀ = ∂²ℓ/∂z²."""

    kind_name = "exact"
    positionwise: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """Columns of a square root of the output Hessian."""
        return OutputVectors(outputs.hessian_vectors())

    @property
    def of_hessian(self) -> bool:
        """Yes, unless a subclass has other vectors."""
        return type(self).output_vectors is ExactVectors.output_vectors

    def output_product(self, outputs: Outputs, w: Float[Tensor, "K n P C"]) -> Float[Tensor, "K n P C"]:
        """The output Hessian's own product, O(C) an output."""
        return outputs.hessian_matmul(w)


class TruncatedVectors(OutputRule):
    """The loss gradient's largest multiple below the output Fisher, then pivots of what is left.

    Args:
        rank: vectors an example; 2 if neither is given.
        tolerance: instead of a rank, the largest share of its output Fisher's trace that an example may lack.

    Raises:
        InvalidTypeError: not numbers.
        InvalidArgumentError: both, or outside their range.
    """

    kind_name = "truncated"

    def __init__(self, rank: int | None = None, tolerance: float | None = None) -> None:
        call = "TruncatedFisher"
        if rank is not None and tolerance is not None:
            raise InvalidArgumentError(call=call, got=f"rank={rank} and tolerance={tolerance}", expected="one of them")
        check_positive(call, "rank", rank)
        if tolerance is not None and not is_number(tolerance):
            raise InvalidTypeError(call=call, got=f"tolerance of type {type(tolerance).__name__}", expected="a number")
        if tolerance is not None and not 0 <= tolerance < 1:
            raise InvalidArgumentError(call=call, got=f"tolerance={tolerance}", expected="a number from 0 to below 1")
        self.rank = 2 if rank is None and tolerance is None else rank
        self.tolerance = tolerance

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """Gradient first, then pivots."""
        return truncated_vectors(outputs, self.stop)

    @property
    def stop(self) -> Stop:
        """When no vector is added any more."""
        return Stop(self.rank, self.tolerance or 0.0)

    @property
    def along_gradient(self) -> bool:
        """For rank 1."""
        return self.rank == 1

    def kind_options(self) -> dict[str, str]:
        """Rank or tolerance."""
        return {"rank": str(self.rank)} if self.tolerance is None else {"tolerance": str(self.tolerance)}


RULES: dict[str, type[OutputRule]] = {
    rule.kind_name: rule for rule in (EmpiricalVectors, ImprovedVectors, SampledVectors, ExactVectors, TruncatedVectors)
}
"""The rules by their kinds' short names."""


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
