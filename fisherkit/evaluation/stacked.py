"""One batch's rows for all kinds at once: one forward pass, one backward pass a vector, shared by whoever needs it.

The gradient's row serves EF, iEF of every power and ∇L itself; the truncated kind's vectors are nested, so that the
rows of the highest rank serve all ranks and, at full rank, are the exact Fisher's. Owns which row belongs to what;
what is done with the rows is `fisherkit.evaluation.updates`' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fisherkit.data import Data
from fisherkit.errors import MemoryBudgetError
from fisherkit.fisher import FisherApproximation
from fisherkit.kind_specs import KindSpec
from fisherkit.operators import LowRankOperator
from fisherkit.outputs import Outputs, OutputVectors
from fisherkit.rows.collection import Rows
from fisherkit.truncation import Stop, truncated_vectors
from fisherkit.vectors import SampledVectors, TruncatedVectors

Group = str
"""A kind's text, or `GRADIENT` or `EXACT`."""
GRADIENT, EXACT = "gradient", "exact"


@dataclass(frozen=True)
class _Noted:
    """What output space knows of some units and their rows do not.

    Args:
        norms: ‖∂ℓ/∂z‖ of each unit that counts.
        first: c with u = c v₁ and v₁ the truncated kind's first vector; NaN where v₁ is not along u.
        places: the batch's place of each unit.
        slots: M, the rows of each unit.
        used: which slots each group uses.
    """

    norms: Float[Tensor, "n"]
    first: Float[Tensor, "n"]
    places: Int[Tensor, "n"]
    slots: int
    used: dict[Group, Bool[Tensor, "n M"]]


@dataclass(frozen=True)
class Stack:
    """The rows of a batch and what they are.

    Args:
        rows: all of them, unscaled (normalization "sum").
        norms: ‖∂ℓ_n/∂z_n‖, float64.
        first: c_n with ∂ℓ_n/∂z_n = c_n v_n1, float64; None where the truncated kind's first vector is not along it.
        places: where in the batch each unit is.
        index: the rows of a group, ordered by unit.
        owner: the unit of each of these.
    """

    rows: Rows
    norms: Float[Tensor, "N"]
    first: Float[Tensor, "N"] | None
    places: Int[Tensor, "N"]
    index: dict[Group, Int[Tensor, "R"]]
    owner: dict[Group, Int[Tensor, "R"]]

    def take(self, group: Group, kept: Bool[Tensor, "N"] | None = None) -> tuple[Rows, Int[Tensor, "R"]]:
        """A group's rows in float64 and the unit of each, of all units or some."""
        index, owner = self.index[group], self.owner[group]
        if kept is not None:
            index, owner = index[kept[owner]], owner[kept[owner]]
        return self.rows.reordered(index).double(), owner

    def exact_operator(self, dtype: torch.dtype, device: torch.device) -> LowRankOperator:
        """The exact Fisher, from its rows."""
        return LowRankOperator(self.rows.reordered(self.index[EXACT]), 1.0, dtype=dtype, device=device)


def stack(model: nn.Module, data: Data, specs: Sequence[KindSpec], *, exact: bool, seed: int, **options: Any) -> Stack:
    """All rows of a batch.

    Args:
        model: the model.
        data: one batch.
        specs: the kinds.
        exact: whether to make the exact Fisher's rows too, if they fit in memory.
        seed: of sampled labels.
        options: keywords of `fisherkit.FisherApproximation`.

    Raises:
        MemoryBudgetError: the other kinds' rows do not fit.
    """
    fisher = _StackedVectors(model, data, specs=specs, exact=exact, seed=seed, normalization="sum", **options)
    if fisher.stored_rows is not None:
        return fisher.collect(fisher.stored_rows[0])
    if exact:
        return stack(model, data, specs, exact=False, seed=seed, **options)
    raise MemoryBudgetError(
        call="compare",
        got=f"{fisher.rows:,} rows that do not fit in memory",
        expected="rows that do",
        try_="a smaller batch, or params= to choose fewer parameters",
    )


class _StackedVectors(FisherApproximation):
    """The vectors of several kinds side by side: the gradient, drawn labels' gradients, truncated ones."""

    kind_name = "stacked"

    def __init__(
        self, model: nn.Module, data: Data, *, specs: Sequence[KindSpec], exact: bool, seed: int, **options: Any
    ) -> None:
        rules = {spec.text: spec.rule for spec in specs}
        self.sampled = {text: rule.draws for text, rule in rules.items() if isinstance(rule, SampledVectors)}
        self.stops = {text: rule.stop for text, rule in rules.items() if isinstance(rule, TruncatedVectors)}
        self.stops |= {EXACT: Stop(None, 0.0)} if exact else {}
        self.seed = seed
        self.noted: dict[int, _Noted] = {}
        super().__init__(model, data, **options)

    def output_vectors(self, outputs: Outputs) -> OutputVectors:
        """All vectors, unused slots zero."""
        u = outputs.gradient()
        parts = [u.unsqueeze(1)]
        used = {GRADIENT: (0, torch.ones(len(u), 1, dtype=torch.bool, device=u.device))}
        for text, draws in self.sampled.items():
            drawn = SampledVectors(draws, self.seed).output_vectors(outputs)
            used[text] = sum(p.shape[1] for p in parts), used[GRADIENT][1] if drawn.keep is None else drawn.keep
            parts += [v for v in (drawn.v,) if isinstance(v, Tensor)]
        found = {text: truncated_vectors(outputs, stop) for text, stop in self.stops.items()}
        start = sum(p.shape[1] for p in parts)
        first = u.new_full((len(u),), float("nan"), dtype=torch.float64)
        if found:
            vectors = [v for f in found.values() if isinstance(v := f.v, Tensor)]
            parts.append(longest := max(vectors, key=lambda v: v.shape[1]))
            used |= {text: (start, f.keep) for text, f in found.items() if f.keep is not None}
            first = _along(u, longest[:, 0])
        stacked = torch.cat(parts, 1)
        self._note(outputs, u, first, stacked.shape[1], used)
        return OutputVectors(stacked)

    def _note(
        self, outputs: Outputs, u: Tensor, first: Tensor, slots: int, used: dict[Group, tuple[int, Tensor]]
    ) -> None:
        """Keep what `collect` needs, by the first unit's place in the data: a later pass replaces an earlier one."""
        counts = outputs.mask.any(1)
        wide = {}
        for text, (start, keep) in used.items():
            wide[text] = torch.zeros(len(u), slots, dtype=torch.bool, device=u.device)
            wide[text][:, start : start + keep.shape[1]] = keep
        self.noted[int(outputs.keys[0, 0])] = _Noted(
            u.double().flatten(1).norm(dim=1)[counts], first[counts],
            (outputs.keys[:, 0] >> 24)[counts],  # a key is the example's place times 2²⁴ plus the position
            slots,
            {text: keep[counts] for text, keep in wide.items()},
        )  # fmt: skip

    def collect(self, rows: Rows) -> Stack:
        """The rows with what was noted of them, in the order of the data."""
        parts = [self.noted[key] for key in sorted(self.noted)]
        first = torch.cat([part.first for part in parts])
        index: dict[Group, Tensor] = {}
        owner: dict[Group, Tensor] = {}
        for group in parts[0].used:
            found, units, base, seen = [], [], 0, 0
            for part in parts:
                unit, slot = part.used[group].nonzero(as_tuple=True)
                found.append(base + unit * part.slots + slot)
                units.append(seen + unit)
                base, seen = base + len(part.norms) * part.slots, seen + len(part.norms)
            index[group], owner[group] = torch.cat(found), torch.cat(units)
        return Stack(
            rows, torch.cat([part.norms for part in parts]), None if bool(first.isnan().any()) else first,
            torch.cat([part.places for part in parts]), index, owner,
        )  # fmt: skip


def _along(u: Float[Tensor, "n P C"], v: Float[Tensor, "n P C"]) -> Float[Tensor, "n"]:
    """c with u = c v, 0 for a zero u, NaN where v is not along u; float64."""
    u, v = u.double().flatten(1), v.double().flatten(1)
    norm_u, norm_v, inner = u.norm(dim=1), v.norm(dim=1), (u * v).sum(1)
    aligned = (inner.abs() >= (1 - 1e-6) * norm_u * norm_v) & (norm_v > 0)
    ratio = torch.where(aligned, inner.sign() * norm_u / norm_v, float("nan"))
    return torch.where(norm_u == 0, 0.0, ratio)
