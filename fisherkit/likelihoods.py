"""Likelihoods p(y | z): the loss a model was trained with, seen from its outputs.

A likelihood owns the gradient and Hessian of ℓ = −log p in the outputs, how targets are shaped and checked, and how
labels are drawn. It knows nothing of parameters. A new one supplies `gradient`, `hessian_factor` and `sample`; the
other methods have defaults that follow from these and are overridden where a closed form is cheaper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherkit.errors import DataError, InvalidArgumentError, InvalidTypeError
from fisherkit.positions import as_positions, label_advice, shape_text

Prepared = tuple[Float[Tensor, "B P C"], Tensor | None, Bool[Tensor, "B P"]]


class Likelihood(ABC):
    """p(y | z) for targets of z's own shape; `Categorical` overrides the shapes for labels."""

    name: str
    ignore_index = -100
    """Label of positions that do not count, for likelihoods of labels."""
    gradient_scale_free = False
    """Whether `target_from_gradient` takes any positive multiple of the gradient."""
    labels_mask = False
    """Whether targets say which positions count, and so matter to kinds that do not use them otherwise."""

    @abstractmethod
    def gradient(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "... C"]:
        """∂ℓ/∂z, elementwise over leading axes; accurate also where it is tiny."""

    @abstractmethod
    def hessian_factor(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C M"]:
        """S with S Sᵀ = ∂²ℓ/∂z², the output Fisher of one position; M at least its rank."""

    def hessian_rank(self, z: Float[Tensor, "n C"]) -> int:
        """M, the columns of `hessian_factor`."""
        return self.hessian_factor(z[:1]).shape[-1]

    def hessian_columns(self, z: Float[Tensor, "n C"], index: Int[Tensor, "n"]) -> Float[Tensor, "n C"]:
        """One column of each position's `hessian_factor`."""
        return self.hessian_factor(z).mT[torch.arange(len(z), device=z.device), index]

    @property
    def columnwise(self) -> bool:
        """Whether columns can be asked for one by one at O(C) each: `hessian_columns` is as specific as the factor."""
        order = type(self).__mro__
        columns, factor = (
            next(i for i, base in enumerate(order) if name in vars(base))
            for name in ("hessian_columns", "hessian_factor")
        )
        return columns <= factor

    @abstractmethod
    def sample(self, z: Float[Tensor, "... C"], uniform: Float[Tensor, "... channels"]) -> Tensor:
        """Targets drawn from p(y | z), one for each leading index, by inverse distribution functions.

        Args:
            z: outputs.
            uniform: numbers in (0, 1), `channels(C)` of them for each draw.
        """

    def channels(self, outputs: int) -> int:
        """How many uniform numbers `sample` uses for one draw of C outputs."""
        return outputs

    def hessian_matmul(self, z: Float[Tensor, "... C"], w: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """(∂²ℓ/∂z²) w for each position."""
        s = self.hessian_factor(z)
        return (s @ (s.mT @ w.unsqueeze(-1))).squeeze(-1)

    def hessian_diagonal(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """diag ∂²ℓ/∂z² for each position."""
        return self.hessian_factor(z).square().sum(-1)

    def hessian_inverse_form(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        """uᵀ H⁺ u with u the gradient and H⁺ the pseudo-inverse, for each position."""
        s, u = self.hessian_factor(z), self.gradient(z, target)
        return (u * (torch.linalg.pinv(s @ s.mT, hermitian=True) @ u.unsqueeze(-1)).squeeze(-1)).sum(-1)

    def target_from_gradient(self, z: Float[Tensor, "... C"], gradient: Float[Tensor, "... C"]) -> Tensor | None:
        """The target whose loss has this gradient; None if the likelihood does not say."""
        return None

    def prepare(self, z: Tensor, target: Tensor | None, call: str) -> Prepared:
        """Raw model outputs and targets as ``[B, P, C]``, targets and a mask of the positions that count.

        Raises:
            DataError: shapes or values that do not fit.
        """
        raw = z
        z = as_positions(z.unsqueeze(-1) if z.ndim == 1 else z, call)
        mask = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        if target is None:
            return z, None, mask
        if target.shape[:1] != z.shape[:1] or target.numel() != z.numel():
            raise DataError(
                call=call,
                got=f"targets of shape {shape_text(target)} for outputs {shape_text(raw)}",
                expected="targets of the outputs' shape",
                why=f"the likelihood is {self.name}",
            )
        target = target.reshape(z.shape).to(z.dtype)
        self.check_values(target, call)
        return z, target, mask

    def check_values(self, target: Float[Tensor, "B P C"], call: str) -> None:
        """Refuse targets outside the likelihood's support.

        Raises:
            DataError: NaN, infinite or outside the support.
        """
        if not bool(torch.isfinite(target).all()):
            raise DataError(call=call, got="targets with NaN or infinite entries", expected="finite numbers")


class Gaussian(Likelihood):
    """ℓ = ½‖z − y‖², unit variance, so that the output Fisher is I (F = JᵀJ is the identity-output Gauss-Newton)."""

    name = "gaussian"

    def gradient(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "... C"]:
        """Z − y."""
        return z - target

    def target_from_gradient(self, z: Float[Tensor, "... C"], gradient: Float[Tensor, "... C"]) -> Tensor:
        """Z minus the gradient."""
        return z - gradient

    def hessian_factor(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C M"]:
        """I."""
        return torch.eye(z.shape[-1], dtype=z.dtype, device=z.device).expand(*z.shape, z.shape[-1])

    def hessian_rank(self, z: Float[Tensor, "n C"]) -> int:
        """C."""
        return z.shape[-1]

    def hessian_columns(self, z: Float[Tensor, "n C"], index: Int[Tensor, "n"]) -> Float[Tensor, "n C"]:
        """Unit vectors."""
        return torch.zeros_like(z).scatter(-1, index.unsqueeze(-1), 1.0)

    def sample(self, z: Float[Tensor, "... C"], uniform: Float[Tensor, "... C"]) -> Tensor:
        """Z + a standard normal number."""
        return z + torch.special.ndtri(uniform).to(z.dtype)

    def hessian_matmul(self, z: Float[Tensor, "... C"], w: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """W."""
        return w

    def hessian_diagonal(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """Ones."""
        return torch.ones_like(z)

    def hessian_inverse_form(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        """‖z − y‖²."""
        return (z - target).square().sum(-1)


class Bernoulli(Likelihood):
    """ℓ = Σ_c binary cross-entropy with logits; targets in [0, 1]."""

    name = "bernoulli"
    gradient_scale_free = True

    def gradient(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "... C"]:
        """σ(z) − y, written so that nothing cancels when the fit is nearly perfect."""
        return torch.sigmoid(z) * (1 - target) - torch.sigmoid(-z) * target

    def target_from_gradient(self, z: Float[Tensor, "... C"], gradient: Float[Tensor, "... C"]) -> Tensor:
        """1 where it is negative: of targets that are 0 or 1."""
        return (gradient < 0).to(z.dtype)

    def hessian_factor(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C M"]:
        """diag √(p(1 − p))."""
        return torch.diag_embed(self.hessian_diagonal(z).sqrt())

    def hessian_rank(self, z: Float[Tensor, "n C"]) -> int:
        """C."""
        return z.shape[-1]

    def hessian_columns(self, z: Float[Tensor, "n C"], index: Int[Tensor, "n"]) -> Float[Tensor, "n C"]:
        """Multiples of unit vectors."""
        place = index.unsqueeze(-1)
        return torch.zeros_like(z).scatter(-1, place, self.hessian_diagonal(z.gather(-1, place)).sqrt())

    def sample(self, z: Float[Tensor, "... C"], uniform: Float[Tensor, "... C"]) -> Tensor:
        """1 with probability σ(z)."""
        return (uniform < torch.sigmoid(z.double())).to(z.dtype)

    def hessian_matmul(self, z: Float[Tensor, "... C"], w: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """p(1 − p) w."""
        return self.hessian_diagonal(z) * w

    def hessian_diagonal(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """p(1 − p)."""
        return torch.sigmoid(z) * torch.sigmoid(-z)

    def hessian_inverse_form(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        """Σ u² / (p(1 − p)): nothing from an output that is certain and right, infinite for one certain and wrong."""
        u, h = self.gradient(z, target), self.hessian_diagonal(z)
        ratio = torch.where(u == 0, torch.zeros_like(u), u.abs() / h.sqrt())
        return ratio.square().sum(-1)

    def check_values(self, target: Float[Tensor, "B P C"], call: str) -> None:
        """Refuse targets outside [0, 1]."""
        super().check_values(target, call)
        if bool(((target < 0) | (target > 1)).any()):
            raise DataError(
                call=call,
                got=f"targets from {target.min().item():.4g} to {target.max().item():.4g}",
                expected="probabilities between 0 and 1",
                why="the likelihood is bernoulli",
            )


class Categorical(Likelihood):
    """ℓ = −log softmax(z)_y, summed over an example's positions that are not ignored.

    Args:
        ignore_index: the label that marks a position as not counting.
    """

    name = "categorical"
    gradient_scale_free = True
    labels_mask = True

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    def gradient(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "... C"]:
        """P − e_y, with p_y − 1 computed as minus the others' mass, which does not cancel as p_y → 1."""
        label = self._valid(target).unsqueeze(-1)
        p = torch.softmax(z, -1).scatter(-1, label, 0.0)
        return p.scatter(-1, label, -p.sum(-1, keepdim=True))

    def target_from_gradient(self, z: Float[Tensor, "... C"], gradient: Float[Tensor, "... C"]) -> Tensor:
        """The class whose entry, p_y − 1, is the least; the likeliest if rounding left several at 0."""
        least = gradient == gradient.amin(-1, keepdim=True)
        return z.masked_fill(~least, float("-inf")).argmax(-1)

    def hessian_factor(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C M"]:
        """The exact Cholesky factor of diag(p) − p pᵀ, C − 1 columns (Tanabe and Sagae, 1992).

        Column k is √(p_k q_{k+1} / q_k) (e_k − p_{>k} / q_{k+1}) with q_k the mass of the classes from k on; in
        logarithms, so that it is accurate for probabilities near 0 and 1.
        """
        c = z.shape[-1]
        index = torch.arange(c - 1, device=z.device).expand(*z.shape[:-1], c - 1)
        rows = z.unsqueeze(-2).expand(*z.shape[:-1], c - 1, c)
        return self.hessian_columns(rows.reshape(-1, c), index.reshape(-1)).reshape(rows.shape).mT

    def hessian_rank(self, z: Float[Tensor, "n C"]) -> int:
        """C − 1."""
        return z.shape[-1] - 1

    def hessian_columns(self, z: Float[Tensor, "n C"], index: Int[Tensor, "n"]) -> Float[Tensor, "n C"]:
        """As in `hessian_factor`, O(C) each."""
        place = index.unsqueeze(-1)
        log_p = torch.log_softmax(z, -1)
        classes = torch.arange(z.shape[-1], device=z.device)
        later = log_p.masked_fill(classes <= place, float("-inf"))
        chosen, log_rest = log_p.gather(-1, place), torch.logsumexp(later, -1, keepdim=True)
        scale = (0.5 * (chosen + log_rest - torch.logaddexp(chosen, log_rest))).exp()
        return scale * (-(later - log_rest).exp()).scatter(-1, place, 1.0)

    def sample(self, z: Float[Tensor, "... C"], uniform: Float[Tensor, "... 1"]) -> Tensor:
        """The class whose interval of the cumulative distribution holds the number."""
        cumulative = torch.softmax(z.double(), -1).cumsum(-1)
        cumulative = cumulative / cumulative[..., -1:]
        return (cumulative < uniform).sum(-1).clamp_max(z.shape[-1] - 1)

    def channels(self, outputs: int) -> int:
        """One."""
        return 1

    def hessian_matmul(self, z: Float[Tensor, "... C"], w: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """p ∘ w − p (pᵀ w).

        Constants in w drop out, so w is taken relative to its entry at the likeliest class: what is left of pᵀ w then
        comes from the other classes and nothing cancels as one probability goes to 1.
        """
        p, likeliest = torch.softmax(z, -1), z.argmax(-1, keepdim=True)
        relative = w - w.gather(-1, likeliest.expand(*w.shape[:-1], 1))
        return p * (relative - (p * relative).sum(-1, keepdim=True))

    def hessian_diagonal(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """p(1 − p), with 1 − p of the likeliest class as the others' mass."""
        p, likeliest = torch.softmax(z, -1), z.argmax(-1, keepdim=True)
        others = p.scatter(-1, likeliest, 0.0).sum(-1, keepdim=True)
        return p * (1 - p).scatter(-1, likeliest, others)

    def hessian_inverse_form(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        """(1 − p_y) / p_y."""
        label = self._valid(target).unsqueeze(-1)
        log_p = torch.log_softmax(z, -1)
        others = torch.logsumexp(log_p.scatter(-1, label, float("-inf")), -1)
        return (others - log_p.gather(-1, label).squeeze(-1)).exp()

    def prepare(self, z: Tensor, target: Tensor | None, call: str) -> Prepared:
        """Outputs ``(B, C)`` with labels ``(B)``, or ``(B, T, C)`` with labels ``(B, T)``."""
        if z.ndim == 1:
            raise DataError(
                call=call,
                got="outputs of shape (B,)",
                expected="(B, C) or (B, T, C)",
                why="a categorical likelihood needs one output for each class",
                try_='likelihood="bernoulli" for one logit',
            )
        raw = z
        z = as_positions(z, call)
        if z.shape[-1] < 2:
            raise DataError(
                call=call,
                got="one output a position",
                expected="at least two classes",
                try_='likelihood="bernoulli" for one logit',
            )
        if target is None:
            return z, None, torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        if target.is_floating_point() or target.dtype == torch.bool:
            raise DataError(
                call=call,
                got=f"labels of {target.dtype}",
                expected="integers",
                why="a categorical likelihood takes class indices",
                try_="labels.long(), or probs.argmax(-1)",
            )
        if target.shape != raw.shape[:-1]:
            raise DataError(
                call=call,
                got=f"labels of shape {shape_text(target)} for outputs {shape_text(raw)}",
                expected=f"{shape_text(raw[..., 0])}",
                why="the last axis of the outputs holds the classes",
                try_=label_advice(raw, target),
            )
        target = target.reshape(z.shape[:2]).long()
        mask = target != self.ignore_index
        if bool((mask & ((target < 0) | (target >= z.shape[-1]))).any()):
            raise DataError(
                call=call,
                got=f"labels from {int(target[mask].min())} to {int(target[mask].max())}",
                expected=f"0 to {z.shape[-1] - 1}, or ignore_index = {self.ignore_index}",
                try_="fk.likelihoods.Categorical(ignore_index=...) if another label means 'ignored'",
            )
        return z, target, mask

    def _valid(self, target: Tensor) -> Tensor:
        return torch.where(target == self.ignore_index, torch.zeros_like(target), target)


_NAMED: dict[str, type[Categorical] | type[Gaussian] | type[Bernoulli]] = {
    "categorical": Categorical,
    "gaussian": Gaussian,
    "bernoulli": Bernoulli,
}


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """A likelihood by name, or the object itself.

    Raises:
        InvalidArgumentError: an unknown name.
        InvalidTypeError: neither a name nor a `Likelihood`.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if not isinstance(likelihood, str):
        raise InvalidTypeError(
            call="likelihood",
            got=f"a {type(likelihood).__name__}",
            expected=f"one of {sorted(_NAMED)} or an instance of fk.likelihoods.Likelihood",
        )
    if likelihood not in _NAMED:
        raise InvalidArgumentError(
            call="likelihood",
            got=repr(likelihood),
            expected=f"one of {sorted(_NAMED)}",
            try_="an object of fk.likelihoods for anything else",
        )
    return _NAMED[likelihood]()
