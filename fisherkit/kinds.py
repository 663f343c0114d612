"""The kinds: a Fisher for each of the five rules in output space.

The rules themselves are in `fisherkit.vectors`; models, layers, structures and solvers never see the difference. A new
kind is one more rule there and class here, or one class of a user's own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fisherkit.data import Data
from fisherkit.fisher import FisherApproximation
from fisherkit.vectors import EmpiricalVectors, ExactVectors, ImprovedVectors, SampledVectors, TruncatedVectors


class EmpiricalFisher(EmpiricalVectors, FisherApproximation):
    """The empirical Fisher: v = ∂ℓ/∂z at the observed label, F = (1/N) Σ ∇ℓ_n ∇ℓ_nᵀ.

    Close to the exact Fisher only where the model's distribution is the data's; its preconditioned steps are biased
    towards examples that are already fit (Kunstner, Hennig, Balles, arXiv 1905.12558). Arguments are those of
    `FisherApproximation`.
    """


class ImprovedEmpiricalFisher(ImprovedVectors, FisherApproximation):
    """The improved empirical Fisher: v = u / ‖u‖^power with u = ∂ℓ/∂z, at the price of the empirical one.

    Dividing each example's gradient by the norm of its logit gradient removes EF's inversely-scaled projection (Wu, Yu,
    Zhang, Woodland, NeurIPS 2024, arXiv 2406.06420, eq. 14). An exactly zero gradient gives a zero row. The matrix is
    not on the Fisher's scale: its trace does not vanish as the fit becomes perfect.

    Args:
        power: 1 for the paper's matrix, 0 for EF; ½ is a cheap cousin of the truncated Fisher of rank 1.
        options: the keywords of `FisherApproximation`.
    """

    def __init__(self, model: nn.Module, data: Data, *, power: float = 1.0, **options: Any) -> None:
        ImprovedVectors.__init__(self, power)
        FisherApproximation.__init__(self, model, data, **options)


class SampledFisher(SampledVectors, FisherApproximation):
    """The Monte Carlo Fisher: labels drawn from the model, v = ∂ℓ(ŷ_m)/∂z / √draws; unbiased for the exact Fisher.

    A label depends on the seed and on the example's place in the data alone, so that the same seed gives the same
    matrix in every pass and for any batch split. Draws of one example that fell on the same label become one weighted
    row, exactly.

    Args:
        draws: labels an example.
        seed: of the draws; ``generator=`` overrides it with a number drawn from the generator.
        options: the keywords of `FisherApproximation`.
    """

    def __init__(self, model: nn.Module, data: Data, *, draws: int = 1, seed: int = 0, **options: Any) -> None:
        SampledVectors.__init__(self, draws, seed)
        FisherApproximation.__init__(self, model, data, **options)


class ExactFisher(ExactVectors, FisherApproximation):
    """The exact (type-2) Fisher, equal to the generalized Gauss-Newton of the loss: v the columns of S, S Sᵀ = ∂²ℓ/∂z².

    With ``likelihood="gaussian"`` it is JᵀJ, the identity-output Gauss-Newton, whatever the model was trained with.
    Arguments are those of `FisherApproximation`.
    """


class TruncatedFisher(TruncatedVectors, FisherApproximation):
    """The exact Fisher's output metric truncated to a few vectors, the loss gradient first.

    F₁ ≼ F₂ ≼ … ≼ F_exact in the Loewner order, equal at full rank; on F's own scale, without sampling;
    `dropped_trace` says what each example lacks. See `fisherkit.truncation` for the construction and its sources.

    Args:
        rank: vectors an example.
        tolerance: instead of a rank, the largest share of its output Fisher's trace that an example may lack.
        options: the keywords of `FisherApproximation`.
    """

    def __init__(
        self, model: nn.Module, data: Data, *, rank: int | None = None, tolerance: float | None = None, **options: Any
    ) -> None:
        TruncatedVectors.__init__(self, rank, tolerance)
        FisherApproximation.__init__(self, model, data, **options)


KINDS: dict[str, type[FisherApproximation]] = {
    kind.kind_name: kind
    for kind in (EmpiricalFisher, ImprovedEmpiricalFisher, SampledFisher, ExactFisher, TruncatedFisher)
}
"""Kinds by their short names."""
