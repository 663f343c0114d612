"""Output space: what a kind sees of a batch, and the vectors it answers with.

Everything that tells one Fisher from another happens on these two records. Neither holds parameters, layers or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherkit.arguments import check_type
from fisherkit.errors import DataError, InvalidArgumentError, InvalidTypeError
from fisherkit.likelihood import confirm

if TYPE_CHECKING:
    from fisherkit.likelihood import Likelihood


@dataclass(frozen=True)
class Outputs:
    """The model's outputs for n units (examples, or positions where each stands by itself).

    Args:
        z: ``[n, P, C]``, P positions of C outputs; at least float32.
        target: labels ``[n, P]`` or values ``[n, P, C]``, as the likelihood wants; None for unlabelled data.
        mask: which positions count.
        start: the first example's place in the data, of which `keys` are made; or the keys.
        likelihood: p(y | z).
        shape: of one example's outputs as the model has them; None where positions stand by themselves.
        whole: whether all positions are known to count.
    """

    z: Float[Tensor, "n P C"]
    target: Tensor | None
    mask: Bool[Tensor, "n P"]
    start: int | Int[Tensor, "n P"]
    likelihood: Likelihood
    shape: torch.Size | None = None
    whole: bool = False

    @property
    def keys(self) -> Int[Tensor, "n P"]:
        """An integer for each position that depends on the example's place in the data alone, for random draws.

        Examples are counted from ``start``; 2²⁴ positions keep two examples' apart in one integer.
        """
        if isinstance(self.start, Tensor):
            return self.start
        n, positions, device = *self.z.shape[:2], self.z.device
        keys = torch.arange(self.start, self.start + n, device=device).unsqueeze(1) << 24
        return keys + torch.arange(positions, device=device)

    def positionwise(self) -> Outputs:
        """The same outputs with every position as a unit of its own: ``[n·P, 1, C]``."""

        def flat(x: Tensor) -> Tensor:
            return x.reshape(-1, 1, *x.shape[2:])

        target = None if self.target is None else flat(self.target)
        return Outputs(flat(self.z), target, flat(self.mask), flat(self.keys), self.likelihood, whole=self.whole)

    @property
    def observed(self) -> Tensor:
        """The targets.

        Raises:
            DataError: there are none.
        """
        if self.target is None:
            _refuse_unlabelled(
                "this kind uses the observed labels", "fk.ExactFisher or fk.SampledFisher for unlabelled data"
            )
        return self.target

    def gradient(self) -> Float[Tensor, "n P C"]:
        """∂ℓ/∂z at the observed target; zero at positions that do not count. Computed once: not to be written to.

        Raises:
            DataError: there are no targets.
        """
        return self._gradient

    def is_gradient(self, v: Float[Tensor, "n P C"]) -> bool:
        """Whether vectors are `gradient` itself, and need no copy to be zero where it is."""
        u = vars(self).get("_gradient")
        return u is not None and (v.data_ptr(), v.stride()) == (u.data_ptr(), u.stride())

    @cached_property
    def _gradient(self) -> Float[Tensor, "n P C"]:
        return self.masked(self.likelihood.gradient(self.z, self.observed))

    # H of each position, with what the loss has it depend on in the target; of positions that do not count as it comes.

    def hessian_matmul(self, w: Float[Tensor, "... n P C"]) -> Float[Tensor, "... n P C"]:
        """Each position's Hessian H times w."""
        root = self.hessian_root()
        if root is None:
            return self.likelihood.hessian_matmul(self.z, w)
        return root * self.likelihood.hessian_matmul(self.z, root * w)

    def hessian_diagonal(self) -> Float[Tensor, "n P C"]:
        """The diagonal of each position's Hessian."""
        root, diagonal = self.hessian_root(), self.likelihood.hessian_diagonal(self.z)
        return diagonal if root is None else root.square() * diagonal

    def hessian_sum(self) -> Float[Tensor, "C C"]:
        """Σ H over the positions that count."""
        root = self.hessian_root()
        return self.likelihood.hessian_sum(self.z[self.mask], None if root is None else root[self.mask])

    def hessian_forms(self, w: Float[Tensor, "C d"], entries: int) -> Float[Tensor, "m d d"]:
        """Wᵀ H W of each of the n·P positions, 0 of those that do not count; ``entries`` are of a temporary, about."""
        root, size = self.hessian_root(), max(1, entries // w.numel())
        found = []
        for k, z in enumerate(self.z.flatten(0, 1).split(size)):
            own = None if root is None else root.flatten(0, 1)[k * size : k * size + len(z)]
            if own is None or own.shape[1] == 1:
                form = self.likelihood.hessian_form(z, w)
                found.append(form if own is None else form * own.square().unsqueeze(2))
            else:  # of each output
                found += [self.likelihood.hessian_form(z[:, None][n], r.unsqueeze(1) * w) for n, r in enumerate(own)]
        return torch.where(self.mask.reshape(-1, 1, 1), torch.cat(found), 0.0)

    def hessian_inverse_form(self) -> Float[Tensor, "n P"]:
        """uᵀ H⁺ u with u the loss gradient."""
        confirm(self.likelihood, self.z, self.target, self.mask)
        return self.likelihood.hessian_inverse_form(self.z, self.observed)

    def hessian_vectors(self) -> Float[Tensor, "n M P C"] | Columns:
        """S with S Sᵀ = H, for outputs of one position."""
        likelihood, z, root = self.likelihood, self.z[:, 0], self.hessian_root()
        root = None if root is None else root[:, 0]

        def columns(unit: Tensor, vector: Tensor) -> Tensor:
            found = likelihood.hessian_columns(z[unit], vector)
            return (found if root is None else root[unit] * found).unsqueeze(1)

        def all_columns() -> Tensor:
            s = likelihood.hessian_factor(z)
            return (s if root is None else root.unsqueeze(-1) * s).transpose(1, 2).unsqueeze(2)

        return Columns(likelihood.hessian_rank(z), columns, all_columns) if likelihood.columnwise else all_columns()

    def hessian_root(self) -> Float[Tensor, "n P ..."] | None:
        """√D, D the diagonal factor of H that depends on the target; None where there is none.

        Raises:
            DataError: there are no targets, and H depends on them.
            InvalidArgumentError: a likelihood of the user's own that contradicts itself.
        """
        confirm(self.likelihood, self.z, self.target, self.mask)
        if self.target is None:
            if self.likelihood.hessian_of_targets:
                why = f"the Hessian of the loss depends on them: {self.likelihood.recorded}"
                _refuse_unlabelled(why, "data with targets, or a likelihood without weights")
            return None
        scale = self.likelihood.hessian_scale(self.z, self.target)
        return None if scale is None else scale.sqrt()

    def counting(self, shape: torch.Size) -> Float[Tensor, "n ..."]:
        """1 at outputs of positions that count, else 0, in the ``shape`` of the model's outputs."""
        return self.likelihood.as_outputs(self.mask.unsqueeze(2).expand(self.z.shape).to(self.z), shape)

    def masked(self, v: Float[Tensor, "... n P C"]) -> Float[Tensor, "... n P C"]:
        """Zero at positions that do not count, whatever was there (NaN of padding included)."""
        return v if self.whole else torch.where(self.mask.unsqueeze(-1), v, 0.0)


def _refuse_unlabelled(why: str, advice: str) -> NoReturn:
    call = "the kind's output_vectors"
    raise DataError(call, "no targets", "targets", why=why, try_=advice)


@dataclass(frozen=True)
class Columns:
    """Vectors that are made when asked for.

    Args:
        number: M.
        make: numbers of units and of vectors, each ``[k]``, to the vectors ``[k, P, C]``.
        whole: all of them, ``[n, M, P, C]``, where that is cheaper than one by one; None where it is not.
    """

    number: int
    make: Callable[[Int[Tensor, "k"], Int[Tensor, "k"]], Float[Tensor, "k P C"]]
    whole: Callable[[], Float[Tensor, "n M P C"]] | None = None


@dataclass(frozen=True)
class OutputVectors:
    """The vectors v_nm of a kind: F = (1/N) Σ_nm (J_nᵀ v_nm)(J_nᵀ v_nm)ᵀ.

    Args:
        v: ``[n, M, P, C]``, or `Columns` where there are too many to exist at once.
        keep: False where a slot is padding because this unit has fewer vectors; None for all kept.
        dropped: trace of the output Fisher that the vectors leave out, for each unit, or what computes it; None if they
            leave out nothing or the kind does not know.
    """

    v: Float[Tensor, "n M P C"] | Columns
    keep: Bool[Tensor, "n M"] | None = None
    dropped: Float[Tensor, "n"] | Callable[[], Float[Tensor, "n"]] | None = None

    @property
    def number(self) -> int:
        """How many vectors a unit has at most, M."""
        return self.v.number if isinstance(self.v, Columns) else self.v.shape[1]

    def select(self, unit: Int[Tensor, "k"], vector: Int[Tensor, "k"]) -> Float[Tensor, "k P C"]:
        """Some of the vectors."""
        return self.v.make(unit, vector) if isinstance(self.v, Columns) else self.v[unit, vector]

    def at(self, outputs: Outputs, call: str, whole: bool = False) -> OutputVectors:
        """The vectors of these outputs, with zeros at positions that do not count; ``whole`` if all are known to.

        Raises:
            InvalidTypeError: parts that are no tensors.
            InvalidArgumentError: parts of another shape or dtype than the outputs', or no vector.
        """
        z, mask, v = outputs.z, outputs.mask, self.v
        n, *each = z.shape
        why = f"the outputs are n = {n} units of P = {each[0]} positions and C = {each[1]} outputs"
        if isinstance(v, Columns):
            number, make, every = v.number, v.make, v.whole

            def masked_whole() -> Tensor:
                found = every() if every is not None else z.new_empty(0)
                _check_tensor("Columns.whole's answer", found, z.dtype, (n, number, *each), "n, M, P, C", call, why)
                return found if whole else torch.where(mask[:, None, :, None], found, found.new_zeros(()))

            def masked(unit: Tensor, vector: Tensor) -> Tensor:
                found = make(unit, vector)
                _check_tensor("Columns.make's answer", found, z.dtype, (len(unit), *each), "k, P, C", call, why)
                return found if whole else torch.where(mask[unit].unsqueeze(-1), found, found.new_zeros(()))

            v = Columns(number, masked, None if every is None else masked_whole)
        else:
            advice = "v.unsqueeze(1) for one vector a unit" if getattr(v, "shape", None) == z.shape else ""
            _check_tensor("v", v, z.dtype, (n, None, *each), "n, M, P, C", call, why, advice)
            if not (whole or (v.shape[1] == 1 and outputs.is_gradient(v[:, 0]))):
                v = torch.where(mask[:, None, :, None], v, v.new_zeros(()))
        if self.number < 1:
            advice = "a vector of zeros for units without a row"
            raise InvalidArgumentError(call, "no vector", "M from 1 on", why=why, try_=advice)
        if self.keep is not None:
            _check_tensor("keep", self.keep, torch.bool, (n, self.number), "n, M", call, why)
        if isinstance(self.dropped, Tensor):
            _check_tensor("dropped", self.dropped, self.dropped.dtype, (n,), "n", call, why)
        return OutputVectors(v, self.keep, self.dropped)


def _check_tensor(
    name: str, value: object, dtype: torch.dtype, shape: tuple[int | None, ...], axes: str, call: str, why: str,
    advice: str = "",
) -> None:  # fmt: skip
    """Refuse a part of a kind's answer that is no tensor of that dtype and shape, where None is any size."""
    if not isinstance(value, Tensor):
        raise InvalidTypeError(call, f"a {type(value).__name__} as {name}", "a tensor")
    sizes = ", ".join("M" if size is None else str(size) for size in shape)
    fits = value.ndim == len(shape) and all(b is None or a == b for a, b in zip(value.shape, shape, strict=True))
    if not fits or value.dtype != dtype:
        cast = "" if value.dtype == dtype else f"{name}.to({dtype})"
        raise InvalidArgumentError(
            call, f"{name} of {value.dtype} and shape {list(value.shape)}", f"{dtype} and [{axes}] = [{sizes}]",
            why=why, try_=advice or cast,
        )  # fmt: skip


class OutputRule(ABC):
    """A kind of Fisher: the rule that says which vectors v an example has.

    Attributes:
        kind_name: short name, as recorded in metadata.
        settings: arguments and attributes, in capitals, that a string may give after a colon, as "ief:POWER" does.
        positionwise: whether every position has vectors of its own (kinds whose output Fisher is block-diagonal).
        needs_targets: whether observed labels are used.
        random: whether vectors depend on a seed, which `with_seed` then takes.
        gradient_power: p of kinds with v = u / ‖u‖ᵖ, u = ∂ℓ/∂z, whose Gram-space update is the paper's; None of others.
    """

    kind_name: ClassVar[str] = "custom"
    settings: ClassVar[tuple[str, ...]] = ()
    positionwise: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = True
    random: ClassVar[bool] = False
    gradient_power: float | None = None

    @abstractmethod
    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """The vectors v of this kind for a batch of outputs; all that tells kinds apart.

        What they are at positions that do not count has no effect.
        """

    def output_product(self, outputs: Outputs, w: Float[Tensor, "K n P C"]) -> Float[Tensor, "K n P C"]:
        """Σ_m v (vᵀ w) for K directions w; overridden where the output Fisher has a cheaper product."""
        found = vectors_of(self, outputs)
        n = torch.arange(len(outputs.z), device=outputs.z.device).unsqueeze(1).expand(-1, found.number)
        v = found.select(n.flatten(), torch.arange(found.number, device=n.device).expand_as(n).flatten())
        v = v.reshape(*n.shape, *outputs.z.shape[1:])
        v = v if found.keep is None else v * found.keep[:, :, None, None]
        return torch.einsum("nmpc,knm->knpc", v, torch.einsum("nmpc,knpc->knm", v, w))

    @property
    def label_source(self) -> str:
        """Which labels the vectors are made of: "observed", "sampled" from the model, or "none"; recorded in files."""
        return "sampled" if self.random else "observed" if self.needs_targets else "none"

    @property
    def of_hessian(self) -> bool:
        """Whether Σ_m v vᵀ is the Hessian of the loss in each position's outputs, whose sums need no vectors."""
        return False

    @property
    def scale_free(self) -> bool:
        """Whether vectors stay what they are when the loss is multiplied, or change as `gradient_power` says.

        Where not, optimizers refuse several passes in a step of which they learn the loss's scale afterwards.
        """
        return self.gradient_power is not None or not self.needs_targets

    @property
    def along_gradient(self) -> bool:
        """Whether v is one vector, a multiple of the loss gradient, whose row any training step's backward pass has."""
        return self.gradient_power is not None

    def with_seed(self, seed: int) -> OutputRule:
        """The same kind with another seed; itself where nothing is random."""
        return self

    # Settings, by default the attributes and arguments that `settings` names.

    def kind_options(self) -> dict[str, str]:
        """The kind's own settings that are not None, as recorded in metadata."""
        found = {name.lower(): getattr(self, name.lower(), None) for name in self.settings}
        return {name: str(value) for name, value in found.items() if value is not None}

    @classmethod
    def options_of(cls, setting: str) -> dict[str, Any]:
        """Arguments for the setting after the colon of a string such as "ief:0.5".

        Of several settings the first is an integer and the last a number that is none.

        Raises:
            ValueError: the kind has no setting, or this is none.
        """
        if not cls.settings:
            raise ValueError(f"{cls.kind_name!r} has no setting")
        if setting.isdecimal():
            return {cls.settings[0].lower(): int(setting)}
        return {cls.settings[-1].lower(): float(setting)}

    @classmethod
    def spelled(cls, options: Mapping[str, str]) -> str:
        """The kind with its setting as a string that is read back as the same kind.

        Args:
            options: as `kind_options` gives them; others may be among them.
        """
        written = [options[name.lower()] for name in cls.settings if name.lower() in options]
        return ":".join([cls.kind_name, *written[:1]])


def vectors_of(rule: OutputRule, outputs: Outputs, whole: bool = False) -> OutputVectors:
    """What a rule answers, checked, with zeros at positions that do not count; ``whole`` if all are known to."""
    found, call = rule.output_vectors(outputs), f"{type(rule).__name__}.output_vectors"
    why, try_ = "it says which of the vectors count, too", "fk.OutputVectors(v), v of shape [n, M, P, C]"
    check_type(call, "", found, OutputVectors, "an fk.OutputVectors", why=why, try_=try_)
    return found.at(outputs, call, whole)
