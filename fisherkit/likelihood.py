"""What a likelihood is: a loss seen from the model's outputs, and what follows from the little that it must say.

Owns the base class, which of its methods follow from which, and the check of a class of a user's own against its own
gradient. Knows no particular loss, no parameters and no torch module; `fisherkit.likelihoods` has the losses.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherkit.arguments import check_type
from fisherkit.arithmetic import all_finite
from fisherkit.errors import DataError, InvalidArgumentError, listed

Prepared = tuple[Float[Tensor, "B P C"], Tensor | None, Bool[Tensor, "B P"]]

FOLLOWS: dict[str, tuple[str, ...]] = {
    "loss": ("gradient",),
    "gradient": ("loss", "hessian_inverse_form", "target_from_gradient", "drawn_gradient"),
    "hessian_factor": (
        "hessian_rank", "hessian_columns", "hessian_matmul", "hessian_diagonal", "hessian_sum", "hessian_form",
        "hessian_inverse_form",
    ),
    "hessian_scale": ("hessian_inverse_form", "hessian_of_targets"),
    "sample": ("channels", "sample_given"),
}  # fmt: skip
"""A class that changes a method on the left has the derived forms of those on the right, unless it has its own."""


class Derived:
    """A property that a subclass, or an object in its `__init__`, may replace by a plain attribute."""

    def __init__(self, rule: Callable[[Any], Any]) -> None:
        self.rule, self.__doc__ = rule, rule.__doc__

    def __get__(self, owner: Any, cls: Any = None) -> Any:
        """What follows for an object; the rule itself for a class."""
        return self if owner is None else self.rule(owner)


class Likelihood(ABC):
    """A loss ℓ(z, y) as a function of the outputs z; where it is −log p(y | z), labels can be drawn from it too.

    A new one supplies `gradient`, `hessian_factor` and `sample`; the other methods have defaults that follow from these
    and are overridden where a closed form is cheaper. A subclass of another likelihood that changes one of the three
    never keeps a closed form that followed from what it changed; where it changes `loss` alone, its gradient is the
    loss's, by automatic differentiation.
    """

    name: str
    """In errors, metadata and files; a class that sets none has its own name."""
    ignore_index = -100
    """Label of positions that do not count, for likelihoods of labels."""
    class_axis = -1
    """Which axis of the model's outputs holds the C outputs of a position."""
    gradient_scale_free = False
    """Whether `target_from_gradient` takes any positive multiple of the gradient."""
    labels_mask = False
    """Whether targets say which positions count, and so matter to kinds that do not use them otherwise."""
    link = ""
    """What makes probabilities of outputs, "softmax" or "sigmoid", where outputs are logits."""
    support: ClassVar[tuple[float, float, str]] = (-math.inf, math.inf, "")
    """Least and largest target, and what they are; no words where all numbers are targets."""
    strict = False
    """Whether outputs and targets of unusual form are taken for mistakes, as where the likelihood is a bare word."""
    arguments: ClassVar[tuple[str, ...]] = ()
    """Attributes that `settings` records, whose defaults are the class's."""
    reduction: str | None = None
    """"mean" over all outputs or "sum", as the torch module says that the likelihood was read off; else None."""
    _confirmed = False
    built_in: ClassVar[bool] = False
    """Whether the class is the package's own, whose closed forms are tested against its loss."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Put derived forms in the place of inherited closed ones that no longer follow."""
        super().__init_subclass__(**options)
        cls.built_in = cls.__module__ == "fisherkit.likelihoods"
        if "name" not in vars(cls):
            cls.name = cls.__name__
        if cls.built_in:
            return
        lost = [
            name for base in cls.__mro__[1:] if vars(base).get("built_in") for name in vars(base).get("arguments", ())
        ]
        for name in set(lost).intersection(vars(cls)):
            raise InvalidArgumentError(
                f"class {cls.__name__}", f"{name} as an attribute of the class", "an argument of __init__",
                why="the inherited __init__ sets it anew on every object",
                try_=f"def __init__(self): super().__init__({name}=...)",
            )  # fmt: skip
        for changed, followers in FOLLOWS.items():
            if vars(cls.__mro__[_place(cls, changed)]).get("built_in"):
                continue  # one of the package's own classes, whose forms belong together
            for follower in followers:
                if _place(cls, changed) < _place(cls, follower):
                    setattr(cls, follower, _gradient_of_loss if follower == "gradient" else vars(Likelihood)[follower])

    @Derived
    def hessian_of_targets(self) -> bool:
        """Whether ∂²ℓ/∂z² depends on the target, by `hessian_scale`: the exact kind then needs targets."""
        return type(self).hessian_scale is not Likelihood.hessian_scale

    @Derived
    def unlikely(self) -> str:
        """Why ℓ is no −log p(y | z) that labels can be drawn from; empty where it is."""
        return ""

    # -- what a likelihood says ----------------------------------------------------------------------------------------

    @abstractmethod
    def gradient(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "... C"]:
        """∂ℓ/∂z, elementwise over leading axes; accurate also where it is tiny."""

    @abstractmethod
    def hessian_factor(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C M"]:
        """S with S Sᵀ = ∂²ℓ/∂z², the output Fisher of one position; M at least its rank.

        Without what `hessian_scale` says of the target.
        """

    @abstractmethod
    def sample(self, z: Float[Tensor, "... C"], uniform: Float[Tensor, "... channels"]) -> Tensor:
        """Targets drawn from p(y | z), one for each leading index, by inverse distribution functions of the numbers.

        These lie in (0, 1), `channels(C)` of them for each draw.
        """

    def loss(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        """ℓ of each position, without constants of the targets. Fishers need none: reports of examples do.

        Raises:
            InvalidArgumentError: a class of one's own that does not say it.
        """
        raise InvalidArgumentError(
            "the loss of each example", f"a {type(self).__name__} as likelihood", "one with a loss",
            why="it says gradients, not the loss itself", try_=f"loss(z, target) in {type(self).__name__}",
        )  # fmt: skip

    # -- what follows from it, overridden where a closed form is cheaper -----------------------------------------------

    def hessian_scale(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."] | None:
        """D where the loss's Hessian depends on the target as D^½ S Sᵀ D^½ with D diagonal; None where it does not.

        One number for each output, or one for all outputs of a position.
        """
        return None

    def hessian_rank(self, z: Float[Tensor, "n C"]) -> int:
        """M, the columns of `hessian_factor`."""
        return self.hessian_factor(z[:1]).shape[-1]

    def hessian_columns(self, z: Float[Tensor, "n C"], index: Int[Tensor, "n"]) -> Float[Tensor, "n C"]:
        """One column of each position's `hessian_factor`."""
        return self.hessian_factor(z).mT[torch.arange(len(z), device=z.device), index]

    @property
    def columnwise(self) -> bool:
        """Whether columns can be asked for one by one at O(C) each: `hessian_columns` has a closed form."""
        return type(self).hessian_columns is not Likelihood.hessian_columns

    def channels(self, outputs: int) -> int:
        """How many uniform numbers `sample` uses for one draw of C outputs."""
        return outputs

    def sample_given(self, z: Float[Tensor, "... C"], uniform: Float[Tensor, "... channels"], target: Tensor) -> Tensor:
        """Targets drawn beside an observed one, part of which may be given and not drawn, as a known variance is."""
        return self.sample(z, uniform)

    def drawn_gradient(self, z: Float[Tensor, "... C"], drawn: Tensor) -> Float[Tensor, "... C"]:
        """∂ℓ/∂z at a drawn label."""
        return self.gradient(z, drawn)

    def hessian_matmul(self, z: Float[Tensor, "... C"], w: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """S Sᵀ w for each position."""
        s = self.hessian_factor(z)
        return (s @ (s.mT @ w.unsqueeze(-1))).squeeze(-1)

    def hessian_diagonal(self, z: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """diag S Sᵀ for each position."""
        return self.hessian_factor(z).square().sum(-1)

    def hessian_form(self, z: Float[Tensor, "n C"], w: Float[Tensor, "C d"]) -> Float[Tensor, "n d d"]:
        """Wᵀ S Sᵀ W for each position."""
        return torch.einsum("jnc,ci->nij", self.hessian_matmul(z, w.mT[:, None].expand(-1, *z.shape)), w)

    def hessian_sum(self, z: Float[Tensor, "n C"], root: Float[Tensor, "n #C"] | None = None) -> Float[Tensor, "C C"]:
        """Σ_n D_n^½ S Sᵀ D_n^½ over positions, by products with unit vectors a few at a time.

        ``root`` has the diagonals of D^½, as `hessian_scale` says; None for ones.
        """
        n, c = z.shape
        unit = torch.eye(c, dtype=z.dtype, device=z.device)
        found = []
        for some in unit.split(max(1, _TEMPORARY // max(1, n * c))):
            w = some.unsqueeze(1).expand(-1, n, -1)
            h = self.hessian_matmul(z, w) if root is None else root * self.hessian_matmul(z, root * w)
            found.append(h.sum(1))
        return torch.cat(found)

    def hessian_inverse_form(self, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "..."]:
        """uᵀ H⁺ u with u the gradient, H the Hessian with its scale and H⁺ the pseudo-inverse, for each position.

        Infinite where u has a part outside H's range: no multiple of u uᵀ is below H then.
        """
        s, u = self.hessian_factor(z), self.gradient(z, target)
        scale = self.hessian_scale(z, target)
        s = s if scale is None else scale.sqrt().unsqueeze(-1) * s
        h = s @ s.mT
        found = torch.linalg.pinv(h, hermitian=True) @ u.unsqueeze(-1)
        outside = (h @ found).squeeze(-1) - u
        form = (u * found.squeeze(-1)).sum(-1)
        return torch.where(outside.norm(dim=-1) > 1e-6 * u.norm(dim=-1), torch.inf, form)

    def target_from_gradient(self, z: Float[Tensor, "... C"], gradient: Float[Tensor, "... C"]) -> Tensor | None:
        """The target whose loss has this gradient; None if the likelihood does not say."""
        return None

    def gradient_at(self, z: Float[Tensor, "... C"], gradient: Float[Tensor, "... C"]) -> Float[Tensor, "... C"]:
        """`gradient` as it stands for that of a user's own loss at the outputs; another where the same rows have two.

        Outputs of a log-softmax do: what a constant adds to all of a position's outputs goes no further down.
        """
        return gradient

    # -- shapes and values ---------------------------------------------------------------------------------------------

    def positions(self, z: Float[Tensor, "B ..."], call: str) -> Float[Tensor, "B P C"]:
        """The model's outputs, or numbers of their shape, as positions by outputs.

        Raises:
            DataError: too many axes for a likelihood that does not say which one has the outputs.
        """
        if z.ndim == 1:
            return z.reshape(-1, 1, 1)
        if z.ndim > 3 and self.few_axes:
            raise DataError(
                call, f"outputs of shape {shape_text(z)}", "(B, C) or (B, T, C)",
                why="outputs are positions by classes, the classes last",
                try_="z.movedim(1, -1).flatten(1, -2) in the model for images of logits (B, C, H, W), or a likelihood "
                "that says how to read them: fk.likelihoods.Categorical(class_axis=1), or torch's own loss, "
                "nn.CrossEntropyLoss(), nn.MSELoss() and others",
            )  # fmt: skip
        moved = z if self.class_axis in (-1, z.ndim - 1) else z.movedim(self.class_axis, -1)
        return moved.reshape(z.shape[0], -1, moved.shape[-1])

    def as_outputs(self, v: Float[Tensor, "*lead B P C"], shape: torch.Size) -> Float[Tensor, "..."]:
        """The inverse of `positions`, over any leading axes, for model outputs of a shape."""
        lead = v.shape[:-3]
        if len(shape) < 3:
            return v.reshape(*lead, *shape)
        axis = self.class_axis % len(shape)
        moved = [*shape[:axis], *shape[axis + 1 :], shape[axis]]
        return v.reshape(*lead, *moved).movedim(-1, len(lead) + axis)

    def check_reading(  # noqa: B027  (a default, not a duty)
        self, z: Tensor, target: Tensor | None, inputs: list[Tensor], call: str
    ) -> None:
        """Refuse the model's outputs if they can be read in two ways, as far as targets and inputs ``[B, ...]`` tell.

        Raises:
            DataError: they can.
        """

    def prepare(self, z: Tensor, target: Tensor | None, call: str) -> Prepared:
        """Raw model outputs and targets as ``[B, P, C]``, targets and a mask of the positions that count.

        Whatever else the methods above get as a target is made here. A likelihood whose targets are not of its outputs'
        shape (a mean and a variance for each number observed) overrides this method alone: z as `positions` has it,
        targets with leading axes ``[B, P]``, and a mask.

        Raises:
            DataError: shapes or values that do not fit.
        """
        raw = z
        z = self.positions(raw, call)
        mask = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)
        if target is None:
            return z, None, mask
        if target.shape[:1] != raw.shape[:1] or target.numel() != raw.numel():
            raise DataError(
                call, f"targets of shape {shape_text(target)} for outputs {shape_text(raw)}",
                "targets of the outputs' shape", why=f"the likelihood is {self.name}",
            )  # fmt: skip
        target = self.positions(target.reshape(raw.shape), call).to(z.dtype)
        self.check_values(target, call)
        return z, target, mask

    def fitting(self, z: Any, target: Any, each: int | None = 1) -> Tensor:
        """A target for `loss`: so many numbers for ``each`` output, in z's dtype; None for labels or probabilities.

        Raises:
            DataError: it has another shape, which torch would refuse in its own words, or broadcast without any.
        """
        call = f"{type(self).__name__}.loss"
        for name, value in (("z", z), ("target", target)):
            check_type(call, name, value, Tensor, "a tensor")
        if z.ndim == 0:
            raise DataError(call, "z of shape []", "[…, C]", why="its last axis has the C outputs of a position")
        each = int(target.is_floating_point()) if each is None else each
        wanted = [*z.shape[:-1], *[each * z.shape[-1]] * (each > 0)]
        if list(target.shape) != wanted:
            raise DataError(
                call, f"target of shape {list(target.shape)} for z of shape {list(z.shape)}", str(wanted),
                why="the last axis of z has the C outputs of a position, and all other axes are positions",
                try_="what prepare(outputs, targets, call) returns",
            )  # fmt: skip
        fitting: Tensor = target.to(z) if each else target
        return fitting

    def check_values(self, target: Float[Tensor, "B P C"], call: str) -> None:
        """Refuse targets outside the likelihood's support.

        Raises:
            DataError: NaN, infinite or outside the support.
        """
        if not all_finite(target):
            raise DataError(
                call, "targets with NaN or infinite entries", "finite numbers",
                why="the loss of such an example is no number", try_="leaving those examples out",
            )  # fmt: skip
        least, most, allowed = self.support
        wrong = target[(target < least) | (target > most)].unique().tolist() if allowed else []
        if wrong:
            got = f"target{'s' if len(wrong) > 1 else ''} {listed(f'{value:.4g}' for value in wrong)}"
            raise DataError(call, got, allowed, why=f"the likelihood is {self.name}")

    # -- what the package asks -----------------------------------------------------------------------------------------

    @property
    def few_axes(self) -> bool:
        """Whether outputs of more than three axes are refused."""
        return self.strict

    def settings(self) -> dict[str, str]:
        """What differs from the default, by argument; recorded in files."""
        found = {name: getattr(self, name) for name in self.arguments}
        own = {n: v for n, v in found.items() if isinstance(v, Tensor) or v != getattr(type(self), n)}
        return {name: setting_text(value) for name, value in own.items()}

    @property
    def recorded(self) -> str:
        """The name and the settings: two likelihoods that differ are recorded as different."""
        return self.name + self._settings_text()

    def __repr__(self) -> str:
        return type(self).__name__ + (self._settings_text() or "()")

    def _settings_text(self) -> str:
        own = ", ".join(f"{name}={value}" for name, value in self.settings().items())
        return f"({own})" if own else ""

    def refuse_sampling(self) -> None:
        """Refuse to draw labels where they would be another distribution's than the loss's.

        Raises:
            InvalidArgumentError: ℓ is no −log p, or a subclass changed the loss and not the draws.
        """
        why, advice = self.unlikely, "fk.ExactFisher or fk.TruncatedFisher"
        own = _place(type(self), "sample")
        changed = [name for name in ("gradient", "hessian_factor") if _place(type(self), name) < own]
        if not why and changed:
            why = f"the class has its own {' and '.join(changed)} and inherits sample, whose labels belong to others"
            advice = f"sample in {type(self).__name__}; sample = fk.likelihoods.….sample if the inherited one is right"
        if why:
            raise InvalidArgumentError(
                "SampledFisher", f"the likelihood {self.recorded}", "a −log p(y | z) to draw y from", why=why,
                try_=advice,
            )  # fmt: skip


def _gradient_of_loss(self: Likelihood, z: Float[Tensor, "... C"], target: Tensor) -> Float[Tensor, "... C"]:
    """∂ℓ/∂z by automatic differentiation, of a class that changes `loss` and inherits `gradient`."""
    with torch.enable_grad():
        leaf = z if z.requires_grad else z.detach().requires_grad_()
        return torch.autograd.grad(self.loss(leaf, target).sum(), leaf, create_graph=z.requires_grad)[0]


def prepared(likelihood: Likelihood, raw: Tensor, target: Tensor | None, call: str) -> Prepared:
    """`Likelihood.prepare`, of which gradients in the model's own outputs can be told.

    Raises:
        InvalidArgumentError: a class of one's own whose z has other numbers than the model's outputs.
    """
    found = likelihood.prepare(raw, target, call)
    if not likelihood.built_in and not torch.equal(likelihood.as_outputs(found[0], raw.shape).to(raw), raw):
        raise InvalidArgumentError(
            call, f"a {type(likelihood).__name__} whose prepare changes the outputs", "z as positions(z, call) has it",
            why="gradients are taken in the model's own outputs, and a factor would be left out",
            try_="the factor in gradient and hessian_factor, or in a small nn.Module around the model",
        )  # fmt: skip
    return found


def _place(cls: type[Likelihood], name: str) -> int:
    """How far up the classes a method is defined; 0 for the class itself."""
    return next((i for i, base in enumerate(cls.__mro__) if name in vars(base)), len(cls.__mro__))


def setting_text(value: object) -> str:
    """Enough of a setting to tell two apart, and short."""
    if not isinstance(value, Tensor):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    numbers = value.flatten().tolist()
    shown = " ".join(f"{number:.6g}" for number in numbers[:32])
    return f"[{shown}]" if len(numbers) <= 32 else f"[{shown} ...; sum of {len(numbers)}: {sum(numbers):.9g}]"


def shape_text(x: Tensor) -> str:
    """A tensor's shape in words."""
    # Sizes without the batch's, which may be that of a probe and not the caller's.
    return f"({', '.join(['B', *map(str, x.shape[1:])])})"


_TEMPORARY = 1 << 23
"""Entries of the largest temporary of a sum of Hessians that has no closed form."""
_TRIED = 4
"""Positions on which a class of a user's own is compared with itself."""
_QUANTILES = (0.01, 0.2, 0.5, 0.8, 0.99)
"""Where targets are drawn at which a gradient is differentiated, if none are observed."""
_SMALL = 256
"""Outputs up to which its factor is written out for that."""


def confirm(
    likelihood: Likelihood, z: Float[Tensor, "n P C"], target: Tensor | None, mask: Bool[Tensor, "n P"]
) -> None:
    """Refuse a class of a user's own whose methods contradict each other; looked at once for each object.

    A Hessian that was inherited beside a gradient that was not must be that gradient's derivative, by autograd; closed
    forms must be those of the factor. A class that supplies both itself may have another Hessian than the gradient's
    derivative: its expectation under p(y | z) is the output Fisher.

    Raises:
        InvalidArgumentError: they do.
    """
    if likelihood.built_in or likelihood._confirmed or not bool(mask.any()):
        return
    some = z[mask][:_TRIED].double()
    own = None if target is None else target[mask][:_TRIED]
    own = own.double() if own is not None and own.is_floating_point() else own
    w = torch.randn(some.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(some)
    product = likelihood.hessian_matmul(some, w)
    cls = type(likelihood)
    if some.shape[-1] <= _SMALL:
        s = likelihood.hessian_factor(some)
        index = torch.arange(s.shape[-1], device=s.device)
        columns = torch.stack([likelihood.hessian_columns(some, i.expand(len(some))) for i in index], -1)
        forms = {
            "hessian_matmul": (product, (s @ (s.mT @ w.unsqueeze(-1))).squeeze(-1)),
            "hessian_diagonal": (likelihood.hessian_diagonal(some), s.square().sum(-1)),
            "hessian_columns": (columns @ columns.mT, s @ s.mT),
            "hessian_sum": (likelihood.hessian_sum(some), (s @ s.mT).sum(0)),
        }
        for name, (found, wanted) in forms.items():
            if not _agree(found, wanted):
                _contradict(likelihood, name, "hessian_factor")
    own_gradient = min(_place(cls, "gradient"), _place(cls, "hessian_scale")) < _place(cls, "hessian_factor")
    scaled = not likelihood.hessian_of_targets and cls.hessian_scale is not Likelihood.hessian_scale
    if own_gradient or scaled:
        shape = (*some.shape[:-1], likelihood.channels(some.shape[-1]))
        drawn = [likelihood.sample(some, torch.full(shape, u).to(some)) for u in _QUANTILES] if own is None else [own]
        for targets in drawn:
            scale = likelihood.hessian_scale(some, targets)
            if scale is not None and not likelihood.hessian_of_targets:
                _contradict(likelihood, "hessian_of_targets", "hessian_scale")
            if own_gradient:
                _confirm_derivative(likelihood, some, targets, w, scale)
    object.__setattr__(likelihood, "_confirmed", True)  # a frozen dataclass may be a likelihood, too


def _confirm_derivative(likelihood: Likelihood, z: Tensor, target: Tensor, w: Tensor, scale: Tensor | None) -> None:
    """Compare the Hessian's product with automatic differentiation of the gradient."""
    with torch.enable_grad():
        leaf = z.clone().requires_grad_()
        u = likelihood.gradient(leaf, target)
        derivative = torch.autograd.grad(u, leaf, w, allow_unused=True)[0] if u.requires_grad else None
    root = torch.ones_like(z) if scale is None else scale.sqrt()
    if not _agree(
        torch.zeros_like(z) if derivative is None else derivative, root * likelihood.hessian_matmul(z, root * w)
    ):
        _contradict(likelihood, "hessian_factor", "gradient")


def _agree(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= 1e-6 * torch.maximum(a.norm(), b.norm()))


def _contradict(likelihood: Likelihood, found: str, other: str) -> NoReturn:
    raise InvalidArgumentError(
        "likelihood", f"a {type(likelihood).__name__} whose {found} does not belong to its {other}",
        f"{found} with S Sᵀ the derivative of {other}" if found == "hessian_factor" else "methods of one loss",
        why="one of them was changed and the other inherited, or written for another loss",
        try_=f"{found} in {type(likelihood).__name__} itself",
    )  # fmt: skip
