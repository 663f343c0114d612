"""Output space: what a kind sees of a batch, and the vectors it answers with.

Everything that tells one Fisher from another happens on these two records. Neither holds parameters, layers or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fisherkit.errors import DataError
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
        keys: an integer for each position that depends on the example's place in the data alone, for random draws.
        likelihood: p(y | z).
        shape: of one example's outputs as the model has them; None where positions stand by themselves.
    """

    z: Float[Tensor, "n P C"]
    target: Tensor | None
    mask: Bool[Tensor, "n P"]
    keys: Int[Tensor, "n P"]
    likelihood: Likelihood
    shape: torch.Size | None = None

    def positionwise(self) -> Outputs:
        """The same outputs with every position as a unit of its own: ``[n·P, 1, C]``."""

        def flat(x: Tensor) -> Tensor:
            return x.reshape(-1, 1, *x.shape[2:])

        target = None if self.target is None else flat(self.target)
        return Outputs(flat(self.z), target, flat(self.mask), flat(self.keys), self.likelihood)

    @property
    def observed(self) -> Tensor:
        """The targets.

        Raises:
            DataError: there are none.
        """
        if self.target is None:
            raise DataError(
                call="the kind's output_vectors",
                got="no targets",
                expected="targets",
                why="this kind uses the observed labels",
                try_="fk.ExactFisher or fk.SampledFisher for unlabelled data",
            )
        return self.target

    def gradient(self) -> Float[Tensor, "n P C"]:
        """∂ℓ/∂z at the observed target; zero at positions that do not count.

        Raises:
            DataError: there are no targets.
        """
        return self.masked(self.likelihood.gradient(self.z, self.observed))

    # H of each position, with what the loss has it depend on in the target; of positions that do not count as it comes.

    def hessian_matmul(self, w: Float[Tensor, "... n P C"]) -> Float[Tensor, "... n P C"]:
        """H w."""
        root = self.hessian_root()
        if root is None:
            return self.likelihood.hessian_matmul(self.z, w)
        return root * self.likelihood.hessian_matmul(self.z, root * w)

    def hessian_diagonal(self) -> Float[Tensor, "n P C"]:
        """diag H."""
        root, diagonal = self.hessian_root(), self.likelihood.hessian_diagonal(self.z)
        return diagonal if root is None else root.square() * diagonal

    def hessian_sum(self) -> Float[Tensor, "C C"]:
        """Σ H over the positions that count."""
        root = self.hessian_root()
        return self.likelihood.hessian_sum(self.z[self.mask], None if root is None else root[self.mask])

    def hessian_inverse_form(self) -> Float[Tensor, "n P"]:
        """uᵀ H⁺ u with u the loss gradient."""
        self.confirmed()
        return self.likelihood.hessian_inverse_form(self.z, self.observed)

    def hessian_vectors(self) -> Float[Tensor, "n M P C"] | Columns:
        """S with S Sᵀ = H, for outputs of one position."""
        likelihood, z, root = self.likelihood, self.z[:, 0], self.hessian_root()
        root = None if root is None else root[:, 0]

        def columns(unit: Tensor, vector: Tensor) -> Tensor:
            found = likelihood.hessian_columns(z[unit], vector)
            return (found if root is None else root[unit] * found).unsqueeze(1)

        if likelihood.columnwise:
            return Columns(likelihood.hessian_rank(z), columns)
        s = likelihood.hessian_factor(z)
        return (s if root is None else root.unsqueeze(-1) * s).transpose(1, 2).unsqueeze(2)

    def hessian_root(self) -> Float[Tensor, "n P ..."] | None:
        """√D, D the diagonal factor of H that depends on the target; None where there is none.

        Raises:
            DataError: there are no targets, and H depends on them.
        """
        self.confirmed()
        if self.target is None:
            if self.likelihood.hessian_of_targets:
                raise DataError(
                    call="the kind's output_vectors",
                    got="no targets",
                    expected="targets",
                    why=f"the Hessian of the loss depends on them: {self.likelihood.recorded}",
                    try_="data with targets, or a likelihood without weights",
                )
            return None
        scale = self.likelihood.hessian_scale(self.z, self.target)
        return None if scale is None else scale.sqrt()

    def confirmed(self) -> None:
        """Refuse a likelihood of the user's own that contradicts itself; looked at once.

        Raises:
            InvalidArgumentError: it does.
        """
        confirm(self.likelihood, self.z, self.target, self.mask)

    def masked(self, v: Float[Tensor, "... n P C"]) -> Float[Tensor, "... n P C"]:
        """Zero at positions that do not count, whatever was there (NaN of padding included)."""
        return torch.where(self.mask.unsqueeze(-1), v, torch.zeros((), dtype=v.dtype, device=v.device))


@dataclass(frozen=True)
class Columns:
    """Vectors that are made when asked for.

    Args:
        number: M.
        make: numbers of units and of vectors, each ``[k]``, to the vectors ``[k, P, C]``.
    """

    number: int
    make: Callable[[Int[Tensor, "k"], Int[Tensor, "k"]], Float[Tensor, "k P C"]]


@dataclass(frozen=True)
class OutputVectors:
    """The vectors v_nm of a kind: F = (1/N) Σ_nm (J_nᵀ v_nm)(J_nᵀ v_nm)ᵀ.

    Args:
        v: ``[n, M, P, C]``, or `Columns` where there are too many to exist at once.
        keep: False where a slot is padding because this unit has fewer vectors; None for all kept.
        dropped: trace of the output Fisher that the vectors leave out, for each unit; None if they leave out nothing or
            the kind does not know.
    """

    v: Float[Tensor, "n M P C"] | Columns
    keep: Bool[Tensor, "n M"] | None = None
    dropped: Float[Tensor, "n"] | None = None

    @property
    def number(self) -> int:
        """M."""
        return self.v.number if isinstance(self.v, Columns) else self.v.shape[1]

    def select(self, unit: Int[Tensor, "k"], vector: Int[Tensor, "k"]) -> Float[Tensor, "k P C"]:
        """Some of the vectors."""
        return self.v.make(unit, vector) if isinstance(self.v, Columns) else self.v[unit, vector]


class OutputRule(ABC):
    """A kind of Fisher: the rule that says which vectors v an example has.

    Attributes:
        kind_name: short name, as recorded in metadata.
        settings: names of the settings that a string may give after a colon, as "ief:POWER" does.
        positionwise: whether every position has vectors of its own (kinds whose output Fisher is block-diagonal).
        needs_targets: whether observed labels are used.
        random: whether vectors depend on a seed, which `with_seed` then takes.
        scale_free: whether vectors stay what they are when the loss is multiplied, or change as `gradient_power` says.
    """

    kind_name: ClassVar[str] = "custom"
    settings: ClassVar[tuple[str, ...]] = ()
    positionwise: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = True
    random: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    @abstractmethod
    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """The vectors v of this kind for a batch of outputs; all that tells kinds apart."""

    def output_product(self, outputs: Outputs, w: Float[Tensor, "K n P C"]) -> Float[Tensor, "K n P C"]:
        """Σ_m v (vᵀ w) for K directions w; overridden where the output Fisher has a cheaper product."""
        found = self.output_vectors(outputs)
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
    def along_gradient(self) -> bool:
        """Whether v is one vector, a multiple of the loss gradient, whose row any training step's backward pass has."""
        return self.gradient_power is not None

    @property
    def gradient_power(self) -> float | None:
        """p of kinds with v = u / ‖u‖ᵖ, u = ∂ℓ/∂z: the paper's Gram-space update is that of these; None of others."""
        return None

    def with_seed(self, seed: int) -> OutputRule:
        """The same kind with another seed; itself where nothing is random."""
        return self

    def kind_options(self) -> dict[str, str]:
        """The kind's own settings, as recorded in metadata."""
        return {}

    @classmethod
    def options_of(cls, setting: str) -> dict[str, Any]:
        """Arguments for the setting that follows the colon in a string such as "ief:0.5".

        Raises:
            ValueError: the kind has no setting, or this is none.
        """
        raise ValueError(f"{cls.kind_name!r} has no setting")

    @classmethod
    def spelled(cls, options: Mapping[str, str]) -> str:
        """The kind with its settings as a string that is read back as the same kind.

        Args:
            options: as `kind_options` gives them; others may be among them.
        """
        return cls.kind_name
