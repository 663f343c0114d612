"""What a merge did: how each block was solved, and what became of every name.

Owns the report; computes nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from fisherkit.errors import listed


@dataclass(frozen=True)
class BlockInfo:
    """How one independent block was solved.

    Args:
        names: its parameters.
        size: d, how many numbers they are.
        method: "closed_form", "direct", "woodbury" or "conjugate_gradient".
        steps: products of an iterative method; 0 for others.
        residual: ‖(S + λI)δ − b‖₂ / ‖b‖₂ with S = Σ w_t F_t and b = Σ w_t F_t (θ_t − θ_c); 0 where b is 0.
            A diagonal block is divided entry by entry, and has the bound of one rounding, 1.1e-16.
        converged: whether the residual met the tolerance.
        factors: what each Fisher was multiplied by, weight and normalization together.
    """

    names: tuple[str, ...]
    size: int
    method: str
    steps: int
    residual: float
    converged: bool
    factors: tuple[float, ...]


@dataclass(frozen=True)
class MergeInfo:
    """What a merge did.

    Args:
        method: "merge", "average", "task_arithmetic" or "regmean".
        weights: w_t of each model.
        names: each name of the models to what it became: "merged", "averaged", "first", "center", "equal" (the same in
            all models), "tied to NAME" or "skipped".
        normalize: how Fishers were normalized.
        damping: λ, in absolute terms.
        output_damping: ρ.
        blocks: how each block was solved, in the order of solving.
        unverified: numbers of models, from 1, that could not be told to be the ones their Fishers were measured at.
    """

    method: str
    weights: tuple[float, ...]
    names: dict[str, str]
    normalize: str | None = None
    damping: float = 0.0
    output_damping: float = 0.0
    blocks: tuple[BlockInfo, ...] = ()
    unverified: tuple[int, ...] = ()

    @property
    def converged(self) -> bool:
        """Whether every block's residual met the tolerance."""
        return all(block.converged for block in self.blocks)

    @property
    def residual(self) -> float:
        """The largest relative residual of any block."""
        return max((block.residual for block in self.blocks), default=0.0)

    def counts(self) -> dict[str, int]:
        """How many names became what."""
        found: dict[str, int] = {}
        for what in self.names.values():
            kind = what.partition(" ")[0]
            found[kind] = found.get(kind, 0) + 1
        return found

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        """A table of the blocks under a line on the whole."""
        counted = ", ".join(f"{count} {kind}" for kind, count in self.counts().items())
        lines = [f"{self.method} of {len(self.weights)} models: {counted}; damping {self.damping:.3g}"]
        if self.blocks:
            lines.append(f"{'size':>12}  {'method':<20}{'steps':>6}  {'residual':>9}  parameters")
        for block in self.blocks:
            mark = "" if block.converged else "  NOT CONVERGED"
            names = listed(block.names, 2)
            lines.append(
                f"{block.size:>12,}  {block.method:<20}{block.steps:>6}  {block.residual:>9.1e}  {names}{mark}"
            )
        return "\n".join(lines)
