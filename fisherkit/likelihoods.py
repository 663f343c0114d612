"""The losses that people train with, each by its gradient and Hessian in the outputs, and how to name one.

Owns the package's likelihoods and the reading of torch's own loss modules. A loss of an example is that loss summed
over the example's positions and outputs; the reduction of a module never enters. It knows nothing of parameters. The
base class and what follows from what are in `fisherkit.likelihood`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fisherkit.arguments import check_number, is_integer
from fisherkit.errors import DataError, InvalidArgumentError, InvalidTypeError, listed
from fisherkit.likelihood import Derived, Likelihood, Prepared, setting_text, shape_text
from fisherkit.model_inputs import is_causal

__all__ = [
    "Bernoulli", "Categorical", "Gaussian", "GaussianNLL", "Likelihood", "LogProbabilities", "Poisson", "Prepared",
    "is_known_loss", "resolve",
]  # fmt: skip

Numbers = float | Sequence[float] | Tensor
"""One number, or one for each output."""

AT_ONCE = 1 << 19
"""Outputs of which labels are drawn together."""

WEIGHTED = "a weighted loss is no −log p: its exponential does not sum to one over the labels"


class _Separate(Likelihood):
    """Sums over outputs of w (A(z) − y z): the gradient is w (μ − y) and H = diag(w μ′) with μ = A′, the mean of y."""

    def _mean(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        raise NotImplementedError

    def _slope(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """The mean's derivative μ′."""
        raise NotImplementedError

    def _weight(self, z: Float[Tensor, "... C"]) -> Tensor | float:
        """The outputs' weight w."""
        return 1.0

    def _curvature(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """The Hessian's diagonal, without what the target adds."""
        return self._slope(z) * self._weight(z)

    def gradient(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "... C"]:
        """∂ℓ/∂z = w (μ − y)."""
        return (self._mean(z) - target) * self._weight(z)

    def target_from_gradient(self, z: Float[Tensor, "... C"], gradient: Float[Tensor, "... C"]) -> Tensor | None:
        """The target with this gradient, μ − u / w."""
        return self._mean(z) - gradient / self._weight(z)

    def hessian_factor(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C M"]:
        """The diagonal matrix of √h."""
        return torch.diag_embed(self._curvature(z).sqrt())

    def hessian_rank(self, z: Float[Tensor, "n C"]) -> int:
        return z.shape[-1]

    def hessian_columns(self, z: Float[Tensor, "n C"], index: Int[Tensor, "n"]) -> Float[Tensor, "n C"]:
        place = index.unsqueeze(-1)
        return torch.zeros_like(z).scatter(-1, place, self._curvature(z).sqrt().gather(-1, place))

    def hessian_matmul(self, z: Float[Tensor, "... C"], w: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        return self._curvature(z) * w

    def hessian_diagonal(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        return self._curvature(z)

    def hessian_sum(self, z: Float[Tensor, "n C"], root: Float[Tensor, "n #C"] | None = None) -> Float[Tensor, "C C"]:
        h = self._curvature(z)
        return torch.diag((h if root is None else h * root.square()).sum(0))

    def hessian_inverse_form(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        """Σ u² / h: nothing from an output that is certain and right, infinite for one certain and wrong."""
        u, h, scale = self.gradient(z, target), self._curvature(z), self.hessian_scale(z, target)
        h = h if scale is None else h * scale
        ratio = torch.where(u == 0, torch.zeros_like(u), u.abs() / h.sqrt())
        return ratio.square().sum(-1)

    def positions(self, z: Float[Tensor, "B ..."], call: str) -> Float[Tensor, "B P C"]:
        """The model's outputs as positions by outputs, for which settings of each output must fit.

        Raises:
            DataError: they do not.
        """
        there = self.class_axis == -1 or z.ndim > -self.class_axis
        found = super().positions(z, call) if there else z
        for name in self.arguments:
            value = getattr(self, name)
            if isinstance(value, Tensor) and not (there and value.numel() in (1, found.shape[-1])):
                raise DataError(
                    call,
                    f"outputs of shape {shape_text(z)} and a {name} of {value.numel()} for axis {self.class_axis}",
                    "one number, or one for each output; all examples share them",
                )  # fmt: skip
        return found


class Gaussian(_Separate):
    """ℓ = ½ Σ (z − y)² / σ², so that H = I / σ²: with σ² = 1, F = JᵀJ is the identity-output Gauss-Newton.

    Args:
        variance: σ², one number or one for each output. ½ is ``nn.MSELoss``, which lacks the ½ of −log p.
    """

    name = "gaussian"
    variance: Tensor | float = 1.0
    arguments = ("variance",)

    def __init__(self, variance: Numbers = 1.0) -> None:
        found = _numbers("Gaussian", "variance", variance, positive=True)
        self.variance = found.flatten() if isinstance(found, Tensor) else found

    def _mean(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        return z

    def _slope(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        return torch.ones_like(z)

    def _weight(self, z: Float[Tensor, "... C"]) -> Tensor | float:
        return 1 / _like(self.variance, z)

    def loss(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        return (0.5 * (z - self.fitting(z, target)).square() * self._weight(z)).sum(-1)

    def sample(self, z: Float[Tensor, "... C"], uniform: Float[Tensor, "... C"]) -> Tensor:
        """Targets z + σ times a standard normal number."""
        return z + torch.special.ndtri(uniform).to(z.dtype) * _like(self.variance, z) ** 0.5


class GaussianNLL(Gaussian):
    """ℓ = ½ Σ ((z − y)² / σ² + log σ²) with a variance for each number, which is part of the data: H = diag(1 / σ²).

    What ``nn.GaussianNLLLoss`` is where the variance is known, as a measurement's is. Targets hold both, the variance
    behind the observed number: ``torch.stack([y, variance], -1)``, of the outputs' shape and a last axis of 2. For a
    variance that the model predicts see the docs' recipe of a mean-variance head.

    Args:
        eps: the least variance, as in torch.
    """

    name = "gaussian_nll"
    eps = 1e-6
    arguments = ("eps",)

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = check_number("GaussianNLL", "eps", eps)

    def loss(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        y, variance = self.fitting(z, target, 2).chunk(2, -1)
        return F.gaussian_nll_loss(z, y, variance, eps=self.eps, reduction="none").sum(-1)

    def gradient(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "... C"]:
        """∂ℓ/∂z = (z − y) / σ²."""
        y, variance = target.chunk(2, -1)
        return (z - y) / variance.clamp_min(self.eps)

    def hessian_scale(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        """The whole of H, 1 / σ²."""
        return 1 / target.chunk(2, -1)[1].clamp_min(self.eps)

    def target_from_gradient(self, z: Float[Tensor, "... C"], gradient: Float[Tensor, "... C"]) -> Tensor | None:
        """None: the variance is in no gradient."""
        return None

    def sample(self, z: Float[Tensor, "... C"], uniform: Float[Tensor, "... C"]) -> Tensor:
        """An error: there is no label without its variance.

        Raises:
            DataError: always.
        """
        raise DataError(
            "SampledFisher", "no targets", "targets with their variances",
            why="the labels' variance is part of the data",
        )  # fmt: skip

    def sample_given(self, z: Float[Tensor, "... C"], uniform: Float[Tensor, "... C"], target: Tensor) -> Tensor:
        """Targets z + σ times a standard normal number, with the observed variance."""
        variance = target.chunk(2, -1)[1].clamp_min(self.eps)
        drawn = z + torch.special.ndtri(uniform).to(z.dtype) * variance.sqrt()
        return torch.cat([drawn, variance.expand_as(drawn)], -1)

    def prepare(self, z: Tensor, target: Tensor | None, call: str) -> Prepared:
        """Targets (…, 2) of observed numbers and their variances as ``[B, P, 2C]``, all numbers first.

        Raises:
            DataError: another shape, or variances that are none.
        """
        out, _, mask = super().prepare(z, None, call)
        if target is None:
            return out, None, mask
        if target.shape != (*z.shape, 2):
            raise DataError(
                call, f"targets of shape {shape_text(target)} for outputs {shape_text(z)}",
                "the outputs' shape and a last axis of 2: the observed number and its variance",
                why="the loss divides by a variance for each number, which is part of the data here",
                try_="torch.stack([y, variance.expand_as(y)], -1); fk.likelihoods.Gaussian(variance=...) for one that "
                "all examples share; a likelihood of your own for one that the model predicts",
            )  # fmt: skip
        y, variance = (self.positions(part, call).to(out.dtype) for part in target.unbind(-1))
        self.check_values(y, call)
        if not bool((torch.isfinite(variance) & (variance >= 0)).all()):
            raise DataError(call, "variances below 0, NaN or infinite", "finite ones, 0 or more")
        return out, torch.cat([y, variance], -1), mask


class Poisson(_Separate):
    """ℓ = Σ exp(z) − y z, counts with log-rates as outputs: H = diag(exp z)."""

    name = "poisson"
    support = (0, math.inf, "counts, 0 or more")

    def _mean(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        return z.exp()

    _slope = _mean

    def loss(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        return (z.exp() - self.fitting(z, target) * z).sum(-1)

    def sample(self, z: Float[Tensor, "... C"], uniform: Float[Tensor, "... C"]) -> Tensor:
        """The least count k with P(Y ≤ k) ≥ the number, by bisection of the incomplete gamma function."""
        rate, wanted = z.double().exp(), uniform.double()
        # Eight standard deviations are beyond what a number below 1 can ask for, and thirty counts where those are few.
        low, high = torch.full_like(rate, -1.0), (rate + 12 * rate.sqrt() + 30).ceil()
        while bool((high - low > 1).any()):
            middle = ((low + high) / 2).floor()
            enough = torch.special.gammaincc(middle.clamp_min(0) + 1, rate) >= wanted
            enough = enough & (middle >= 0)
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return high.to(z.dtype)


class Bernoulli(_Separate):
    """ℓ = Σ w (binary cross-entropy with logits, its positive part times pos_weight); targets in [0, 1].

    H = diag(w c p(1 − p)) with c = 1 − y + pos_weight y: with weights of positives the Gauss-Newton matrix of that
    loss, and no Fisher matrix.

    Args:
        pos_weight: of the positive part, one number or one for each output.
        weight: of the outputs, one number or one for each.
    """

    name = "bernoulli"
    link = "sigmoid"
    gradient_scale_free = True
    support = (0, 1, "probabilities between 0 and 1")
    pos_weight: Tensor | float | None = None
    weight: Tensor | float | None = None
    arguments = ("pos_weight", "weight")

    def __init__(self, pos_weight: Numbers | None = None, weight: Numbers | None = None) -> None:
        for name, value in (("pos_weight", pos_weight), ("weight", weight)):
            if value is None:
                continue
            found = _numbers("Bernoulli", name, value)
            if isinstance(found, Tensor):  # (C, 1, 1), as torch has weights of outputs (B, C, H, W)
                self.class_axis, found = min(self.class_axis, -found.ndim), found.flatten()
            setattr(self, name, found)

    @Derived
    def unlikely(self) -> str:
        return "" if self.pos_weight is self.weight is None else WEIGHTED

    @Derived
    def hessian_of_targets(self) -> bool:
        return self.pos_weight is not None

    def loss(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        target = self.fitting(z, target)
        positive = None if self.pos_weight is None else torch.as_tensor(self.pos_weight).to(z)
        losses = F.binary_cross_entropy_with_logits(z, target, pos_weight=positive, reduction="none")
        return (losses * self._weight(z)).sum(-1)

    def gradient(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "... C"]:
        """∂ℓ/∂z = w (σ(z)(1 − y) − pos_weight y σ(−z)); nothing cancels when the fit is nearly perfect."""
        positive = torch.sigmoid(-z) * target
        if self.pos_weight is not None:
            positive = positive * _like(self.pos_weight, z)
        return (torch.sigmoid(z) * (1 - target) - positive) * self._weight(z)

    def _slope(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        return torch.sigmoid(z) * torch.sigmoid(-z)

    def _weight(self, z: Float[Tensor, "... C"]) -> Tensor | float:
        return 1.0 if self.weight is None else _like(self.weight, z)

    def hessian_scale(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."] | None:
        """The positives' weight, 1 − y + pos_weight y."""
        return None if self.pos_weight is None else 1 - target + _like(self.pos_weight, z) * target

    def target_from_gradient(self, z: Float[Tensor, "... C"], gradient: Float[Tensor, "... C"]) -> Tensor | None:
        """1 where the gradient is negative: right for targets that are 0 or 1."""
        if _some_zero(self.weight) or _some_zero(self.pos_weight):
            return None
        return (gradient < 0).to(z.dtype)

    def sample(self, z: Float[Tensor, "... C"], uniform: Float[Tensor, "... C"]) -> Tensor:
        """1 with probability σ(z), else 0."""
        return (uniform < torch.sigmoid(z.double())).to(z.dtype)


class Categorical(Likelihood):
    """ℓ = −Σ_c w_c q_c log softmax(z)_c over an example's positions that are not ignored; q is e_y for a label y.

    With t = w ∘ ((1 − ε) q + ε / C) and s = Σ t, the gradient is s p − t and H = s (diag p − p pᵀ). Without weights s
    is 1 and H the Fisher of the softmax, smoothed or not, whatever the label; with weights it is the Gauss-Newton
    matrix of the weighted loss, which depends on the label, and no Fisher matrix.

    Args:
        ignore_index: the label that marks a position as not counting.
        class_axis: which axis of the outputs holds the classes: -1, or 1 as in torch's own losses, for outputs
            (B, C, L) with labels (B, L) and (B, C, H, W) with labels (B, H, W). None for -1, and an error that asks
            where the first batch's labels fit outputs (B, A, A) both ways, or are missing, and the inputs' positions
            are not on axis 1.
        weight: of the classes, ``[C]``.
        label_smoothing: ε.
    """

    name = "categorical"
    link = "softmax"
    gradient_scale_free = True
    labels_mask = True
    weight: Tensor | None = None
    label_smoothing = 0.0
    arguments = ("ignore_index", "class_axis", "weight", "label_smoothing")
    _chosen: str = ""
    _settled = False

    def __init__(
        self,
        ignore_index: int = -100,
        class_axis: int | None = None,
        weight: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        call = "Categorical"
        if not is_integer(ignore_index):
            got = f"ignore_index of type {type(ignore_index).__name__}"
            raise InvalidTypeError(call, got, "an integer, the label of positions that do not count")
        self.ignore_index = ignore_index
        self.label_smoothing = check_number(call, "label_smoothing", label_smoothing, most=1)
        if class_axis is not None:
            if not is_integer(class_axis) or class_axis not in (-1, 1):
                raise InvalidArgumentError(call, f"class_axis={class_axis!r}", "-1 or 1")
            self.class_axis, self._chosen = class_axis, "by the user"
        if weight is not None:
            found = _numbers(call, "weight", weight)
            if not isinstance(found, Tensor) or found.ndim != 1:
                raise InvalidArgumentError(call, "weight of no axis or several", "[C]")
            self.weight = found

    @Derived
    def unlikely(self) -> str:
        return WEIGHTED if self.hessian_of_targets else ""

    @Derived
    def hessian_of_targets(self) -> bool:
        return self.weight is not None

    @property
    def hard(self) -> bool:
        """Whether a label alone is behind each position's loss: no smoothing."""
        return self.label_smoothing == 0

    def loss(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        """Weighted and smoothed cross-entropy; 0 at labels that are ignored."""
        target, weight = self.fitting(z, target, None), None if self.weight is None else self.weight.to(z)
        if not target.is_floating_point():
            self._refuse_others(z, target.long(), -1, f"{type(self).__name__}.loss")
        losses = F.cross_entropy(
            z.reshape(-1, z.shape[-1]), target.reshape(-1, z.shape[-1]) if target.is_floating_point()
            else target.long().flatten(), weight, reduction="none", ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return losses.reshape(z.shape[:-1])

    # -- derivatives ---------------------------------------------------------------------------------------------------

    def gradient(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "... C"]:
        """∂ℓ/∂z = s p − t, with p_y − 1 computed as minus the others' mass, which does not cancel as p_y → 1."""
        if self.hard and not target.is_floating_point():
            label = self._valid(target).unsqueeze(-1)
            u = torch.softmax(z, -1).scatter(-1, label, 0.0)
            u = u.scatter_(-1, label, -u.sum(-1, keepdim=True))  # in place: there may be a large vocabulary
            return u if self.weight is None else u * self.weight.to(z)[label]
        t = self._weighted(z, target)
        p = torch.softmax(z, -1)
        # p (s − t) − t (1 − p) is s p − t, and neither difference cancels at a target that is sure.
        return p * (t.sum(-1, keepdim=True) - t) - t * _complement(p)

    def hessian_scale(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."] | None:
        """The target's sum s, where it is not 1 for all."""
        if target.is_floating_point():
            return self._weighted(z, target).sum(-1, keepdim=True)
        if self.weight is None:
            return None
        weight = self.weight.to(z)
        of_labels = weight[self._valid(target)].unsqueeze(-1)
        return (1 - self.label_smoothing) * of_labels + self.label_smoothing * weight.mean()

    def hessian_factor(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C M"]:
        """The exact Cholesky factor of diag(p) − p pᵀ, C − 1 columns (Tanabe and Sagae, 1992).

        Column k is √(p_k q_{k+1} / q_k) (e_k − p_{>k} / q_{k+1}) with q_k the mass of the classes from k on; in
        logarithms, so that it is accurate for probabilities near 0 and 1.
        """
        log_p = torch.log_softmax(z, -1)
        # In float64, as sums of many terms one after the other.
        log_rest = log_p.flip(-1).double().logcumsumexp(-1).to(z.dtype).flip(-1)[..., 1:]
        scale = _column_scale(log_p[..., :-1], log_rest)
        below = (log_p.unsqueeze(-1) - log_rest.unsqueeze(-2)).exp_().tril_(-1)
        factor = below.mul_(-scale.unsqueeze(-2))
        factor.diagonal(dim1=-2, dim2=-1).copy_(scale)
        return factor

    def hessian_rank(self, z: Float[Tensor, "n C"]) -> int:
        return z.shape[-1] - 1

    def hessian_columns(self, z: Float[Tensor, "n C"], index: Int[Tensor, "n"]) -> Float[Tensor, "n C"]:
        """Columns of `hessian_factor`, O(C) each."""
        place, log_p = index.unsqueeze(-1), torch.log_softmax(z, -1)
        later = log_p.masked_fill(torch.arange(z.shape[-1], device=z.device) <= place, float("-inf"))
        chosen, log_rest = log_p.gather(-1, place), torch.logsumexp(later, -1, keepdim=True)
        return _column_scale(chosen, log_rest) * (-(later - log_rest).exp()).scatter(-1, place, 1.0)

    def hessian_matmul(self, z: Float[Tensor, "... C"], w: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """p ∘ w − p (pᵀ w).

        Constants in w drop out, so w is taken relative to its entry at the likeliest class: what is left of pᵀ w then
        comes from the other classes and nothing cancels as one probability goes to 1.
        """
        p, likeliest = torch.softmax(z, -1), z.argmax(-1, keepdim=True)
        relative = w - w.gather(-1, likeliest.expand(*w.shape[:-1], 1))
        return p * (relative - (p * relative).sum(-1, keepdim=True))

    def hessian_diagonal(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """The Hessian's diagonal, p(1 − p)."""
        p = torch.softmax(z, -1)
        return p * _complement(p)

    def hessian_form(self, z: Float[Tensor, "n C"], w: Float[Tensor, "C d"]) -> Float[Tensor, "n d d"]:
        """Σ_c p_c x_c x_cᵀ − x̄ x̄ᵀ with x_c the rows of W less that of the likeliest class, so that nothing cancels."""
        root = torch.softmax(z, -1).sqrt().unsqueeze(-1)
        x = (w - w[z.argmax(-1)].unsqueeze(1)).mul_(root)
        mean = (root.mT @ x).squeeze(1)
        return torch.baddbmm(mean.unsqueeze(2) * mean.unsqueeze(1), x.mT, x, beta=-1)

    def hessian_sum(self, z: Float[Tensor, "n C"], root: Float[Tensor, "n #C"] | None = None) -> Float[Tensor, "C C"]:
        """diag Σ p − Σ p pᵀ, one matmul; the diagonal as p(1 − p), which does not cancel."""
        p, diagonal = torch.softmax(z, -1), self.hessian_diagonal(z)
        if root is not None:
            p, diagonal = root * p, root.square() * diagonal
        total = -(p.mT @ p)
        total.diagonal().copy_(diagonal.sum(0))
        return total

    def hessian_inverse_form(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        """w_y (1 − p_y) / p_y for labels; Σ u² / (s p) for other targets."""
        log_p = torch.log_softmax(z, -1)
        if self.hard and not target.is_floating_point():
            label = self._valid(target).unsqueeze(-1)
            others = torch.logsumexp(log_p.scatter(-1, label, float("-inf")), -1)
            form = (others - log_p.gather(-1, label).squeeze(-1)).exp()
            return form if self.weight is None else form * self.weight.to(z)[label.squeeze(-1)]
        u, s = Categorical.gradient(self, z, target), self._weighted(z, target).sum(-1)
        terms = torch.where(u == 0, torch.zeros_like(u), (2 * u.abs().log() - log_p).exp())
        return torch.where(s > 0, terms.sum(-1) / s, torch.zeros_like(s))

    # -- labels --------------------------------------------------------------------------------------------------------

    def sample(self, z: Float[Tensor, "... C"], uniform: Float[Tensor, "... k"]) -> Tensor:
        """The class whose interval of the cumulative distribution holds the number.

        Of the model, whatever the observed targets were softened or smoothed with: then E[v vᵀ] is H, as for labels.
        """
        axis = next((axis for axis, size in enumerate(z.shape[:-1]) if size > 1), None)
        if z.numel() > AT_ONCE and axis is not None:  # a large vocabulary, which float64 would hold several times
            halves = zip(z.chunk(2, axis), uniform.chunk(2, axis), strict=True)
            return torch.cat([Categorical.sample(self, *half) for half in halves], axis)
        cumulative = torch.softmax(z.double(), -1).cumsum_(-1)
        cumulative /= cumulative[..., -1:].clone()
        return (cumulative < uniform[..., :1]).sum(-1).clamp_max(z.shape[-1] - 1)

    def channels(self, outputs: int) -> int:
        return 1

    def drawn_gradient(self, z: Float[Tensor, "... C"], label: Tensor) -> Float[Tensor, "... C"]:
        """p − e_y, without smoothing: drawn labels are the model's."""
        return Categorical.gradient(_PLAIN, z, label)

    def target_from_gradient(self, z: Float[Tensor, "... C"], gradient: Float[Tensor, "... C"]) -> Tensor | None:
        """The class whose entry, p_y − 1, is the least; the likeliest if rounding left several at 0.

        With smoothing the class whose gradient, known up to the one factor, has the largest cosine with this one.

        Raises:
            DataError: two classes' gradients are the same but for a factor.
        """
        if _some_zero(self.weight):
            return None
        if self.hard:
            return z.masked_fill(gradient != gradient.amin(-1, keepdim=True), float("-inf")).argmax(-1)
        # u(y) = s_y p − (ε / C) w − (1 − ε) w_y e_y for each y; its products need O(C) together.
        z, found, e, c = z.double(), gradient.double(), self.label_smoothing, z.shape[-1]
        if c == 2 or e == 1:
            return None
        p = torch.softmax(z, -1)
        w = z.new_ones(c) if self.weight is None else self.weight.to(z)
        s, own = (1 - e) * w + e * w.mean(), (1 - e) * w
        base = e / c * w
        dots = s * (found * p).sum(-1, keepdim=True) - (found * base).sum(-1, keepdim=True) - own * found
        squares = (
            s.square() * p.square().sum(-1, keepdim=True) + base.square().sum() + own.square()
            - 2 * s * (p * base).sum(-1, keepdim=True) - 2 * s * own * p + 2 * own * base
        )  # fmt: skip
        cosines = dots / (squares.clamp_min(1e-300).sqrt() * found.norm(dim=-1, keepdim=True).clamp_min(1e-300))
        best = cosines.topk(2, -1)
        present = (found != 0).any(-1)
        close = 1e-9 if gradient.dtype == torch.float64 else 1e-5
        if bool((present & (best.values[..., 1] > 1 - close)).any()):
            raise DataError(
                "target_from_gradient", "a gradient that two labels could have", "one",
                why="under label smoothing the loss gradients of two classes can differ by a factor alone",
                try_="a loss without label smoothing in the steps of the optimizer",
            )  # fmt: skip
        return best.indices[..., 0]

    # -- shapes --------------------------------------------------------------------------------------------------------

    @property
    def few_axes(self) -> bool:
        return not self._chosen

    def check_reading(self, z: Tensor, target: Tensor | None, inputs: list[Tensor], call: str) -> None:
        """Where labels leave it open whether (B, A, A') has its classes last, only the inputs' positions can tell."""
        if z.ndim != 3 or self._settled or self._chosen == "by the user":
            return
        labelled = target is not None and not target.is_floating_point()
        if target is not None and labelled and (self._chosen or z.shape[1] != z.shape[2]):
            self._settled = z.shape[1] != z.shape[2] and target.shape == self.positions(z, call).shape[:2]
            return
        first = any(x.ndim > 1 and x.shape[1] == z.shape[1] for x in inputs)
        last = any(x.ndim > 2 and x.shape[-1] == z.shape[-1] for x in inputs)
        if not (last or not first if self._chosen else first and not last):
            beside = "no labels" if target is None else f"targets {shape_text(target)}"
            raise DataError(
                call, f"outputs of shape {shape_text(z)} and {beside}", "outputs that say where the classes are",
                why="the classes may be the last axis or, as in torch's own losses, axis 1",
                try_="fk.likelihoods.Categorical(class_axis=-1) if they are the last axis, or class_axis=1",
            )  # fmt: skip
        self._settled = True

    def prepare(self, z: Tensor, target: Tensor | None, call: str) -> Prepared:
        """Outputs ``(B, C)`` with labels ``(B)``, or ``(B, T, C)`` with labels ``(B, T)``; see `class_axis`.

        Targets of floating point and of the outputs' shape are class probabilities.

        Raises:
            DataError: shapes or values that do not fit.
        """
        raw, z = z, self.positions(z, call)
        c = z.shape[-1]
        if c < 2:
            raise DataError(
                call, f"outputs of shape {shape_text(raw)}", "(B, C) or (B, T, C) with at least two classes",
                why="a categorical likelihood needs one output for each class",
                try_='likelihood="bernoulli" for one logit',
            )  # fmt: skip
        if self.weight is not None and len(self.weight) != c:
            raise DataError(
                call, f"{c} classes and {len(self.weight)} weights", "a weight for each class",
                why=f"the outputs are {shape_text(raw)} and the classes their axis {self.class_axis}",
                try_="fk.likelihoods.Categorical(class_axis=-1 or 1, weight=...)" if raw.ndim > 2 else f"{c} weights",
            )  # fmt: skip
        if target is None:
            return z, None, torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        if target.is_floating_point() and target.shape == raw.shape and not self.strict:
            return z, self._probabilities(target, call).to(z.dtype), torch.ones_like(z[..., 0], dtype=torch.bool)
        if target.is_floating_point() or target.dtype == torch.bool:
            raise DataError(
                call, f"labels of {target.dtype}", "integers", why="a categorical likelihood takes class indices",
                try_="labels.long(), or probs.argmax(-1); likelihood=nn.MSELoss() for regression" + (
                "; likelihood=nn.CrossEntropyLoss() takes class probabilities, too"
                if target.shape == raw.shape else ""
                ),
            )  # fmt: skip
        axis = self.class_axis % raw.ndim
        wanted = raw.shape[:axis] + raw.shape[axis + 1 :]
        if target.shape != wanted:
            if target.shape == raw.shape[:-1]:
                advice = "fk.likelihoods.Categorical(class_axis=-1), for classes on the last axis"
            elif target.shape == raw.shape:
                advice = "labels.argmax(-1) if they are one-hot"
            elif target.shape == (*raw.shape[:-1], 1):
                advice = "labels.squeeze(-1)"
            else:
                advice = "fk.likelihoods.Categorical(class_axis=1), or logits.movedim(1, -1) in the model, if classes "
                advice += "come second"
            raise DataError(
                call, f"labels of shape {shape_text(target)} for outputs {shape_text(raw)}",
                shape_text(z.new_empty(wanted)), why="the last axis of the outputs holds the classes"
                if axis == raw.ndim - 1
                else "the classes are on axis 1 of the outputs", try_=advice,
            )  # fmt: skip
        target = target.reshape(z.shape[:2]).long()
        least, most = torch.stack(target.aminmax()).tolist() if target.numel() else (0, 0)
        if least < 0 or most >= c:
            self._refuse_others(raw, target, self.class_axis, call)
        return z, target, target != self.ignore_index

    def _refuse_others(self, z: Tensor, target: Int[Tensor, "..."], axis: int, call: str) -> None:
        """Refuse labels that are no class of outputs z, with the classes on an axis, and not to be ignored."""
        c = z.shape[axis]
        wrong = (target != self.ignore_index) & ((target < 0) | (target >= c))
        if bool(wrong.any()):
            bad = target[wrong].unique().tolist()
            raise DataError(
                call, f"label{'s' if len(bad) > 1 else ''} {listed(map(str, bad))}",
                f"0 to {c - 1}, or ignore_index = {self.ignore_index}",
                why=f"the outputs {shape_text(z)} have {c} classes on axis {axis}",
                try_="fk.likelihoods.Categorical(ignore_index=...) if another label means 'ignored'",
            )  # fmt: skip

    def _probabilities(self, target: Tensor, call: str) -> Float[Tensor, "B P C"]:
        q = self.positions(target, call)
        # NaN fails both comparisons.
        if not bool(((q >= 0) & (q <= 1)).all()) or not bool(((q.sum(-1) - 1).abs() < 1e-2).all()):
            raise DataError(
                call, "class probabilities outside [0, 1] or of another sum than 1", "distributions",
                why=f"targets of {target.dtype} and of the outputs' shape are class probabilities",
                try_="targets.softmax(...) if they are logits",
            )  # fmt: skip
        return q

    def _weighted(self, z: Tensor, target: Tensor) -> Float[Tensor, "... C"]:
        """t = w ∘ ((1 − ε) q + ε / C)."""
        if target.is_floating_point():
            q = target.to(z.dtype)
        else:
            q = torch.zeros_like(z).scatter(-1, self._valid(target).unsqueeze(-1), 1.0)
        t = (1 - self.label_smoothing) * q + self.label_smoothing / z.shape[-1]
        return t if self.weight is None else t * self.weight.to(z)

    def _valid(self, target: Tensor) -> Tensor:
        ignored = self.ignore_index
        return target.clamp_min(0) if ignored < 0 else target.masked_fill(target == ignored, 0)


class LogProbabilities(Categorical):
    """``nn.NLLLoss``: the categorical loss of outputs that are log-probabilities, whose own softmax they are."""

    name = "nll"
    link = ""

    def prepare(self, z: Tensor, target: Tensor | None, call: str) -> Prepared:
        """Log-probabilities and labels as for logits; of outputs that are not normalised the loss has no curvature."""
        found = super().prepare(z, target, call)
        if bool((torch.logsumexp(found[0], -1)[found[2]].abs() > 1e-2).any()):
            raise DataError(
                call, "outputs that are no log-probabilities", "a model that ends in log_softmax",
                why="the likelihood is nn.NLLLoss", try_="nn.CrossEntropyLoss() for logits",
            )  # fmt: skip
        return found

    def gradient_at(self, z: Float[Tensor, "... C"], gradient: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """−w e_y at log-probabilities is w (p − e_y) in front of the log-softmax, whose Jacobian takes p with it."""
        return gradient - z.exp() * gradient.sum(-1, keepdim=True)


_PLAIN = Categorical()


def _complement(p: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
    """1 − p, with that of the likeliest class as the others' mass."""
    likeliest = p.argmax(-1, keepdim=True)
    others = p.scatter(-1, likeliest, 0.0).sum(-1, keepdim=True)
    return (1 - p).scatter(-1, likeliest, others)


def _column_scale(chosen: Tensor, log_rest: Tensor) -> Tensor:
    """√(p q / (p + q)) of a class and the rest behind it, by their logarithms."""
    return (0.5 * (chosen + log_rest - torch.logaddexp(chosen, log_rest))).exp()


# -- numbers that users give -------------------------------------------------------------------------------------------


def _numbers(call: str, name: str, value: Numbers, *, positive: bool = False) -> Tensor | float:
    """A number, or a tensor that nobody else writes to, without leading axes of size 1."""
    try:
        found = value.detach().clone() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    except OverflowError:  # of an integer
        found = torch.tensor(math.inf)
    except (TypeError, ValueError) as error:
        raise InvalidTypeError(
            call, f"{name} of type {type(value).__name__}", "a number, a tensor or a list of numbers", why=str(error)
        ) from error
    while found.ndim > 1 and found.shape[0] == 1:
        found = found[0]
    good = not found.is_complex() and bool((torch.isfinite(found) & (found > 0 if positive else found >= 0)).all())
    if not good or not found.numel() or found.shape[1:].numel() > 1:
        values = f" with values {setting_text(found)}" if not good else ""
        raise InvalidArgumentError(
            call, f"{name} of shape {list(found.shape)}{values}",
            f"finite numbers {'above 0' if positive else 'from 0 on'}, one or one for each output",
            why="all examples share them",
        )  # fmt: skip
    return float(found) if found.ndim == 0 else found


def _like(value: Tensor | float, z: Tensor) -> Tensor | float:
    return value.to(z) if isinstance(value, Tensor) else value


def _some_zero(value: Tensor | float | None) -> bool:
    """Whether some gradients say nothing of their targets."""
    return value is not None and bool((torch.as_tensor(value) == 0).any())


# -- names and torch's own modules -------------------------------------------------------------------------------------


def _as_torch_reads(likelihood: Categorical) -> Categorical:
    """With classes on axis 1, until a batch says otherwise."""
    likelihood._chosen = "by torch"
    return likelihood


def _poisson(module: Any) -> Likelihood:
    if not module.log_input:
        raise InvalidArgumentError(
            "likelihood", "nn.PoissonNLLLoss(log_input=False)", "log_input=True",
            why="with rates as outputs the loss is no exponential family's in its natural parameter",
            try_="a model that returns log-rates, or a class of fk.likelihoods of your own",
        )  # fmt: skip
    return Poisson()


NAMED: dict[str, type[Categorical] | type[Gaussian] | type[Bernoulli] | type[Poisson]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
}

_MODULES: dict[type[nn.Module], Callable[[Any], Likelihood]] = {
    nn.CrossEntropyLoss: lambda module: _as_torch_reads(
        Categorical(module.ignore_index, 1, module.weight, module.label_smoothing)
    ),
    nn.NLLLoss: lambda module: _as_torch_reads(LogProbabilities(module.ignore_index, 1, module.weight)),
    nn.BCEWithLogitsLoss: lambda module: Bernoulli(module.pos_weight, module.weight),
    nn.MSELoss: lambda module: Gaussian(variance=0.5),
    nn.GaussianNLLLoss: lambda module: GaussianNLL(module.eps),
    nn.PoissonNLLLoss: _poisson,
}
"""Torch's losses, by exactly these classes: a subclass may be another loss."""

_ADVICE: dict[type[nn.Module], str] = {
    nn.BCELoss: "a model without its last sigmoid, and nn.BCEWithLogitsLoss()",
    nn.L1Loss: "a class of fk.likelihoods of your own, which says what its Fisher is: |z − y| has no curvature",
}
_OWN = "a subclass of fk.likelihoods.Likelihood with its gradient, hessian_factor and sample"


def is_known_loss(loss: object) -> bool:
    """Whether it is a loss module of torch's that `resolve` reads."""
    return type(loss) in _MODULES


def resolve(likelihood: str | Likelihood | nn.Module, model: nn.Module | None = None) -> Likelihood:
    """A likelihood by name, the object itself, or the one that a loss module of torch's is; for a model, if known.

    Raises:
        InvalidArgumentError: an unknown name, or a module with settings that are no likelihood's here; or classes on
            axis 1 of a causal language model's outputs.
        InvalidTypeError: none of these.
    """
    found = _resolved(likelihood)
    if found.class_axis == 1 and model is not None and is_causal(model):
        raise InvalidArgumentError(
            "likelihood", f"{found.recorded}, with classes on axis 1", "the last axis",
            why="a causal language model's outputs are [B, T, V]; its own loss flattens them first",
            try_='likelihood="categorical", or fk.likelihoods.Categorical(class_axis=-1, ...) with settings',
        )  # fmt: skip
    return found


def _resolved(likelihood: str | Likelihood | nn.Module) -> Likelihood:
    name = getattr(likelihood, "__name__", "")  # of a class or a function
    if isinstance(likelihood, Categorical) and not likelihood._settled:
        return copy.copy(likelihood)  # the first batch settles where classes are, of one model's outputs
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, nn.Module):
        make = _MODULES.get(type(likelihood))
        if make is None:
            raise InvalidTypeError(
                "likelihood", f"a {type(likelihood).__name__} as loss",
                f"one of {[f'nn.{kind.__name__}' for kind in _MODULES]}",
                why="the Hessian of other losses in the outputs is not known here",
                try_=_ADVICE.get(type(likelihood), _OWN),
            )  # fmt: skip
        found = make(likelihood)
        reduction = str(getattr(likelihood, "reduction", "none"))
        found.reduction = None if reduction == "none" else reduction
        return found
    if not isinstance(likelihood, str):
        raise InvalidTypeError(
            "likelihood", f"the class or function {name}" if name else f"a {type(likelihood).__name__}",
            f"one of {sorted(NAMED)} or an instance of fk.likelihoods.Likelihood",
            try_="an object, as in nn.CrossEntropyLoss(), instead of its class or a function; for a loss of your own, "
            f"{_OWN}",
        )  # fmt: skip
    if likelihood not in NAMED:
        raise InvalidArgumentError(
            "likelihood", repr(likelihood), f"one of {sorted(NAMED)}",
            try_="an object of fk.likelihoods, or a loss module of torch's, for anything else",
        )  # fmt: skip
    named = NAMED[likelihood]()
    named.strict = True
    return named


def resolve_recorded(name: str) -> Likelihood:
    """The likelihood that a file names; where its classes are was settled when the Fisher was built.

    Raises:
        InvalidArgumentError: the name says less than the likelihood had.
    """
    found = resolve(name)
    if isinstance(found, Categorical):
        found._settled = True
    return found
