"""A Fisher for each of the five kinds, whose rules are in `fisherkit.vectors`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fisherkit.data import Data
from fisherkit.fisher import FisherApproximation
from fisherkit.vectors import EmpiricalVectors, ExactVectors, ImprovedVectors, SampledVectors, TruncatedVectors


class EmpiricalFisher(FisherApproximation):
    """The empirical Fisher: v = ∂ℓ/∂z at the observed label, F = (1/N) Σ ∇ℓ_n ∇ℓ_nᵀ.

    Close to the exact Fisher only where the model's distribution is the data's; its preconditioned steps are biased
    towards examples that are already fit (Kunstner, Hennig, Balles, arXiv 1905.12558).

    Args:
        model: as in `FisherApproximation`.
        data: as in `FisherApproximation`, with targets.
        options: the keywords of `FisherApproximation`.
    """

    def __init__(self, model: nn.Module, data: Data, **options: Any) -> None:
        super().__init__(model, data, "ef", **options)


class ImprovedEmpiricalFisher(FisherApproximation):
    """The improved empirical Fisher: v = u / ‖u‖^power with u = ∂ℓ/∂z, at the price of the empirical one.

    Dividing each example's gradient by the norm of its logit gradient removes EF's inversely-scaled projection (Wu, Yu,
    Zhang, Woodland, NeurIPS 2024, arXiv 2406.06420, eq. 14). An exactly zero gradient gives a zero row. The matrix is
    not on the Fisher's scale: its trace does not vanish as the fit becomes perfect.

    Args:
        model: as in `FisherApproximation`.
        data: as in `FisherApproximation`, with targets.
        power: 1 for the paper's matrix, 0 for EF; ½ is a cheap cousin of the truncated Fisher of rank 1.
        options: the keywords of `FisherApproximation`.
    """

    def __init__(self, model: nn.Module, data: Data, *, power: float = 1.0, **options: Any) -> None:
        super().__init__(model, data, "ief", power=power, **options)


class SampledFisher(FisherApproximation):
    """The Monte Carlo Fisher: labels drawn from the model, v = ∂ℓ(ŷ_m)/∂z / √draws; unbiased for the exact Fisher.

    A label depends on the seed and on the example's place in the data alone, so that the same seed gives the same
    matrix in every pass and for any batch split. Draws of one example that fell on the same label become one weighted
    row, exactly.

    Args:
        model: as in `FisherApproximation`.
        data: as in `FisherApproximation`; targets may be None.
        draws: labels an example.
        seed: of the draws; ``generator=`` overrides it with a number drawn from the generator.
        options: the keywords of `FisherApproximation`.
    """

    def __init__(self, model: nn.Module, data: Data, *, draws: int = 1, seed: int = 0, **options: Any) -> None:
        super().__init__(model, data, "sf", draws=draws, seed=seed, **options)

    @property
    def seed(self) -> int:
        """The seed that was used, also where it came from a generator."""
        return int(self.metadata["seed"])


class ExactFisher(FisherApproximation):
    """The exact (type-2) Fisher, equal to the generalized Gauss-Newton of the loss: v the columns of S, S Sᵀ = ∂²ℓ/∂z².

    With ``likelihood="gaussian"`` it is JᵀJ, the identity-output Gauss-Newton, whatever the model was trained with.

    Args:
        model: as in `FisherApproximation`.
        data: as in `FisherApproximation`; targets may be None unless the loss weighs examples by them.
        options: the keywords of `FisherApproximation`.
    """

    def __init__(self, model: nn.Module, data: Data, **options: Any) -> None:
        super().__init__(model, data, "exact", **options)


class TruncatedFisher(FisherApproximation):
    """The exact Fisher's output metric truncated to a few vectors, the loss gradient first.

    F₁ ≼ F₂ ≼ … ≼ F_exact in the Loewner order, equal at full rank; on F's own scale, without sampling;
    `dropped_trace` says what each example lacks. See `fisherkit.truncation` for the construction and its sources.

    Args:
        model: as in `FisherApproximation`.
        data: as in `FisherApproximation`, with targets.
        rank: vectors an example.
        tolerance: instead of a rank, the largest share of its output Fisher's trace that an example may lack.
        options: the keywords of `FisherApproximation`.
    """

    def __init__(
        self, model: nn.Module, data: Data, *, rank: int | None = None, tolerance: float | None = None, **options: Any
    ) -> None:
        super().__init__(model, data, "truncated", rank=rank, tolerance=tolerance, **options)


KINDS: dict[str, type[FisherApproximation]] = {
    EmpiricalVectors.kind_name: EmpiricalFisher,
    ImprovedVectors.kind_name: ImprovedEmpiricalFisher,
    SampledVectors.kind_name: SampledFisher,
    ExactVectors.kind_name: ExactFisher,
    TruncatedVectors.kind_name: TruncatedFisher,
}
"""Kinds by their short names."""


def _list_keywords(kind: type[FisherApproximation]) -> None:
    """Have ``help`` of a kind list the keywords that all kinds have, with what they mean."""
    base = inspect.signature(FisherApproximation.__init__).parameters
    signature = inspect.signature(kind.__init__)
    own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    shared = [p for name, p in base.items() if name not in ("kind", "options", *signature.parameters)]
    kind.__init__.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    text, whole = kind.__doc__ or "", FisherApproximation.__doc__ or ""
    first, last = whole.find("        likelihood:"), whole.find("    Attributes:")
    if 0 <= first < last:  # not under -OO
        options = "        options: the keywords of `FisherApproximation`.\n"
        kind.__doc__ = text.replace(options, whole[first:last].rstrip() + "\n")


for _kind in KINDS.values():
    _list_keywords(_kind)
