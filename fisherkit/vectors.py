"""The kinds: five rules in output space that say which vectors v an example has, and how each is spelled as a string.

Models, layers, structures and solvers never see the difference. `fisherkit.kinds` makes a Fisher of each, the
optimizers take them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arguments import check_count, check_number
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.outputs import OutputRule, Outputs, OutputVectors
from fisherkit.randomness import keyed_uniform
from fisherkit.truncation import truncated_vectors


class EmpiricalVectors(OutputRule):
    """v = ∂ℓ/∂z at the observed label."""

    kind_name = "ef"
    gradient_power = 0.0

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        return OutputVectors(outputs.gradient().unsqueeze(1))


class ImprovedVectors(OutputRule):
    """v = u / ‖u‖^power with u = ∂ℓ/∂z and a power from 0 (EF) to 1 (iEF)."""

    kind_name = "ief"
    settings = ("POWER",)

    def __init__(self, power: float = 1.0) -> None:
        self.power = self.gradient_power = check_number("ImprovedEmpiricalFisher", "power", power, most=1)

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        u = outputs.gradient()
        # The largest entry goes first: the square of a tiny gradient would underflow, the ratio does not.
        largest = u.flatten(1).abs().amax(1)[:, None, None]
        safe = torch.where(largest > 0, largest, torch.ones_like(largest))
        direction = u / safe
        norm = direction.flatten(1).norm(dim=1)[:, None, None].clamp_min(1)  # at least 1 unless the gradient is zero
        return OutputVectors((direction / norm**self.power * safe ** (1 - self.power)).unsqueeze(1))

    @classmethod
    def spelled(cls, options: Mapping[str, str]) -> str:
        """With the power, unless it is 1."""
        return cls.kind_name if float(options.get("power", 1)) == 1 else super().spelled(options)


class SampledVectors(OutputRule):
    """v = ∂ℓ(ŷ_m)/∂z / √draws at labels drawn from the model by a seed."""

    kind_name = "sf"
    settings = ("DRAWS",)
    needs_targets: ClassVar[bool] = False
    random: ClassVar[bool] = True

    def __init__(self, draws: int = 1, seed: int = 0) -> None:
        call = "SampledFisher"
        self.draws = check_count(call, "draws", draws)
        self.seed = check_number(call, "seed", seed, least=-math.inf, integer=True)

    def with_seed(self, seed: int) -> SampledVectors:
        return SampledVectors(self.draws, seed)

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        likelihood, z = outputs.likelihood, outputs.z
        likelihood.refuse_sampling()
        channels = likelihood.channels(z.shape[2])
        uniform = keyed_uniform(self.seed, outputs.keys, draws=self.draws, channels=channels)
        repeated = z.unsqueeze(1).expand(-1, self.draws, -1, -1)
        if outputs.target is None:
            labels = likelihood.sample(repeated, uniform)
        else:
            labels = likelihood.sample_given(repeated, uniform, outputs.target.unsqueeze(1))
        mask = outputs.mask.unsqueeze(1)
        v = likelihood.drawn_gradient(repeated, labels)
        weight = _repeats(labels.masked_fill(~(mask.unsqueeze(-1) if labels.ndim == 4 else mask), 0))
        return OutputVectors(v * (weight / self.draws).sqrt().to(z.dtype)[:, :, None, None], weight > 0)

    def kind_options(self) -> dict[str, str]:
        return {**super().kind_options(), "seed": str(self.seed)}


class ExactVectors(OutputRule):
    """v the columns of S, S Sᵀ = ∂²ℓ/∂z²."""

    kind_name = "exact"
    positionwise: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        return OutputVectors(outputs.hessian_vectors())

    @property
    def of_hessian(self) -> bool:
        """Whether the vectors are those of this class and not a subclass's."""
        return type(self).output_vectors is ExactVectors.output_vectors

    def output_product(self, outputs: Outputs, w: Float[Tensor, "K n P C"]) -> Float[Tensor, "K n P C"]:
        """The output Hessian's own product, O(C) an output."""
        return outputs.hessian_matmul(w)


class TruncatedVectors(OutputRule):
    """The loss gradient's largest multiple below the output Fisher, then pivots of what is left.

    ``rank`` vectors an example, 2 if neither is given; or a ``tolerance``, the largest share of its output Fisher's
    trace that an example may lack.
    """

    kind_name = "truncated"
    settings = ("RANK", "TOLERANCE")

    def __init__(self, rank: int | None = None, tolerance: float | None = None) -> None:
        call = "TruncatedFisher"
        if rank is not None and tolerance is not None:
            raise InvalidArgumentError(call, f"rank={rank} and tolerance={tolerance}", "one of them")
        check_count(call, "rank", rank, optional=True)
        self.tolerance = check_number(call, "tolerance", tolerance, most=1, below=True, optional=True)
        self.rank = 2 if rank is None and tolerance is None else rank

    @property
    def scale_free(self) -> bool:
        """Whether half the loss has the same vectors: the largest multiple of its gradient is the same."""
        return True

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        return truncated_vectors(outputs, self.rank, self.tolerance)

    @property
    def along_gradient(self) -> bool:
        return self.rank == 1


RULES: dict[str, type[OutputRule]] = {
    rule.kind_name: rule for rule in (EmpiricalVectors, ImprovedVectors, SampledVectors, ExactVectors, TruncatedVectors)
}
"""The rules by their kinds' short names."""


def spellings() -> list[str]:
    """All strings that `rule_of` reads, settings in capitals."""
    return [
        text for name, rule in RULES.items() for text in (name, *(f"{name}:{setting}" for setting in rule.settings))
    ]


def rule_of(
    kind: str | OutputRule, *, call: str, options: Mapping[str, Any] | None = None, also: Sequence[str] = ()
) -> OutputRule:
    """The rule of a kind: itself, or what a string such as "ief", "ief:0.5", "sf:4" or "truncated:3" names.

    Args:
        kind: the rule, or the string.
        call: for errors.
        options: settings by the names of the rule's arguments, instead of one in the string.
        also: what the caller takes beside these, for errors.

    Raises:
        InvalidTypeError: neither a string nor a rule.
        InvalidArgumentError: no such kind, or a setting that the kind cannot have.
    """
    options = options or {}
    if isinstance(kind, OutputRule):
        if options:
            named = " and ".join(f"{option}=" for option in options)
            raise InvalidArgumentError(
                call, f"an argument {named} that it does not have", "its own: a rule has its settings already",
                try_=f"help({call})",
            )  # fmt: skip
        return kind

    def expected() -> str:
        return f"one of {[*also, *spellings()]}"

    if not isinstance(kind, str):
        raise InvalidTypeError(call, f"a kind of type {type(kind).__name__}", f"{expected()}, or an fk.OutputRule")
    name, colon, setting = kind.partition(":")
    if name not in RULES:
        raise InvalidArgumentError(call, f"kind={kind!r}", expected(), why=f"there is no kind {name!r}")
    try:
        written = RULES[name].options_of(setting) if colon else {}
    except ValueError as error:
        raise InvalidArgumentError(call, f"kind={kind!r}", expected(), why=str(error)) from error
    possible = list(signature(RULES[name]).parameters) if options else []
    if unknown := [option for option in options if option not in possible]:
        named = " and ".join(f"{option}=" for option in unknown)
        own = " and ".join(f"{option}=" for option in possible) or "none"
        raise InvalidArgumentError(
            call, f"an argument {named} that it does not have", f"its own, and those of kind={kind!r}: {own}",
            try_=f"help({call})",
        )  # fmt: skip
    if twice := [option for option in options if option in written]:
        raise InvalidArgumentError(call, f"kind={kind!r} and {twice[0]}=", "one of them")
    try:
        return RULES[name](**written, **options)
    except (InvalidArgumentError, InvalidTypeError) as error:
        if not written:
            raise
        why = f"its {error.got.partition('=')[0]} must be {error.expected.removesuffix(', or None')}"
        raise InvalidArgumentError(call, f"kind={kind!r}", expected(), why=why) from error


def spelled(metadata: Mapping[str, str]) -> str:
    """A Fisher's kind with its setting, as `rule_of` reads it back; "unknown" if the metadata names no kind."""
    name = metadata.get("kind", "unknown")
    return RULES[name].spelled(metadata) if name in RULES else name


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
