"""The work behind `compare`: the rows once, every kind's updates, one product with the exact Fisher for all of them.

Owns which formula a kind's update takes. Rows are `stacked`'s, formulas are `updates`', γ is `quality`'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fisherkit import likelihoods
from fisherkit.arithmetic import at_least_single
from fisherkit.data import Batch, model_device
from fisherkit.errors import InvalidArgumentError
from fisherkit.evaluation.quality import approximation_quality
from fisherkit.evaluation.stacked import EXACT, GRADIENT, stack
from fisherkit.evaluation.table import QualityRow, QualityTable
from fisherkit.evaluation.updates import any_gradient, by_block, in_span
from fisherkit.kind_specs import KindSpec
from fisherkit.kinds import ExactFisher
from fisherkit.operators import FisherOperator
from fisherkit.randomness import untouched_rng
from fisherkit.rows.collection import Rows
from fisherkit.rows.record import refuse_train_mode
from fisherkit.rows.whole import kept_whole
from fisherkit.space import ParameterSpace

CALL = "compare"
SGD = "sgd"
"""The gradient itself, which no Fisher preconditions."""
FEW_OUTPUTS = 32
"""Up to this many outputs an example the exact Fisher's rows are made; beyond, if updates are fewer, its products are
by forward- and reverse-mode passes, whose cost does not depend on the outputs."""


@dataclass(frozen=True)
class Update:
    """Updates of one kind in one structure, a column for each damping."""

    kind: str
    structure: str
    dampings: tuple[float | None, ...]
    columns: Float[Tensor, "D K"]
    rows: int
    seconds: float


class Comparison:
    """What all updates on a batch share.

    Args:
        model: the model.
        batch: one batch.
        specs: the kinds.
        seed: of sampled labels.
        options: keywords of `fisherkit.FisherApproximation`.
        updates: how many there will be in a structure.
    """

    def __init__(
        self, model: nn.Module, batch: Batch, specs: Sequence[KindSpec], seed: int, options: dict[str, Any],
        *, updates: int,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.seed, self.options = model, batch, seed, options
        space = ParameterSpace.of(model, options["params"])
        self.device, dtype = model_device(model, space.names)
        self.dtype = at_least_single(dtype)
        few = _outputs(model, batch.to(self.device), options["likelihood"]) <= max(FEW_OUTPUTS, updates)
        self.stack = stack(model, batch.raw, specs, exact=few, seed=seed, **options)
        self.exact: FisherOperator = (
            self.stack.exact_operator(self.dtype, self.device)
            if EXACT in self.stack.index
            # A budget of one byte streams: products by passes, no rows.
            else ExactFisher(model, batch.raw, normalization="sum", memory_budget=1, **options)
        )
        own, _ = self.stack.take(GRADIENT)
        self.whole = self.gradient = self._sum(own)
        self.gram = own.gram()
        self.kept: Bool[Tensor, "N"] | None = None
        self.data = batch.raw

    def drop_duplicates(self, cosine: float | None) -> None:
        """Leave examples out of all updates but those of "sgd" and "exact".

        Args:
            cosine: None to leave out none.
        """
        if cosine is None:
            return
        self.kept = _distinct(self.gram, cosine)
        self.gradient = self._sum(self.stack.take(GRADIENT, self.kept)[0])
        if self.options["example"] == "sequence":
            self.data = self.batch.take(self.stack.places[self.kept].to("cpu")).raw

    def update(self, spec: KindSpec, structure: str, dampings: tuple[float, ...]) -> Update:
        """A kind's updates in a structure.

        Args:
            spec: the kind.
            structure: of its Fisher.
            dampings: λ.
        """
        start = time.perf_counter()
        if structure in {"full", "block"} and (spec.name != EXACT or EXACT in self.stack.index):
            columns, rows = self._from_rows(spec, structure, dampings)
        else:
            columns, rows = self._solved(spec, structure, dampings)
        return Update(spec.text, structure, dampings, columns, rows, time.perf_counter() - start)

    def judge(self, updates: Sequence[Update], start: float, *, sgd: bool) -> QualityTable:
        """γ of all updates by one product with the exact Fisher.

        Args:
            updates: of every kind and structure.
            start: when the comparison began.
            sgd: whether the gradient itself has a row.
        """
        gradient = Update(SGD, "none", (None,), self.whole.unsqueeze(1), 0, 0.0)
        listed = [gradient, *updates]
        columns = torch.cat([update.columns for update in listed], 1)
        lengths = columns.norm(dim=0)
        # γ does not depend on the length, which could overflow the operator's dtype.
        unit = (columns / torch.where(lengths > 0, lengths, 1.0)).to(self.dtype)
        gamma = approximation_quality(unit, self.exact, self.whole.to(self.dtype))
        norms = self.gram.diagonal().clamp_min(0).sqrt()
        imbalance = float(norms.std(correction=0) / norms.mean())
        values = iter(zip(gamma.tolist(), (gamma / gamma[0]).tolist(), lengths.tolist(), strict=True))
        rows = [
            QualityRow(u.kind, u.structure, damping, *next(values), imbalance, u.rows, u.seconds)
            for u in listed
            for damping in u.dampings
        ]
        dropped = 0 if self.kept is None else int((~self.kept).sum())
        return QualityTable(tuple(rows if sgd else rows[1:]), len(norms), dropped, time.perf_counter() - start)

    def _from_rows(
        self, spec: KindSpec, structure: str, dampings: tuple[float, ...]
    ) -> tuple[Float[Tensor, "D K"], int]:
        """The paper's formulas."""
        kept = None if spec.name == EXACT else self.kept
        power = spec.rule.gradient_power
        group = spec.text if power is None else GRADIENT
        rows, owner = self.stack.take(group, kept)
        gram: Tensor | None = None
        c: Tensor | None = None
        if power is not None:
            c = self.stack.norms[owner] ** (2 * power)
            gram = self.gram if kept is None else self.gram[kept][:, kept]
        elif spec.name != "sf" and self.stack.first is not None:
            # The first vector of each unit carries the whole gradient.
            c = torch.where(_first_of_each(owner), self.stack.first[owner], 0.0)
        if structure == "full" and c is not None:
            return in_span(rows, c, dampings, gram), rows.count
        gradient, rounding = self.whole if kept is None else self.gradient, torch.finfo(self.dtype).eps
        if structure == "full":
            return any_gradient(rows, gradient, dampings, rounding), rows.count
        block = partial(_block_update, rows, c, gradient, dampings, rounding)
        return by_block(rows, block, len(dampings)), rows.count

    def _solved(self, spec: KindSpec, structure: str, dampings: tuple[float, ...]) -> tuple[Float[Tensor, "D K"], int]:
        """(F + λI)⁻¹∇L with a Fisher built for it."""
        whole = spec.name == EXACT or self.kept is None
        if not whole and self.options["example"] == "token":
            raise InvalidArgumentError(
                call=CALL, got=f'drop_duplicates with example="token" and structure {structure!r}',
                expected='structures "full" and "block", or example="sequence"',
                why="single tokens cannot be taken out of the data that a structure is built from",
            )  # fmt: skip
        data = self.batch.raw if whole else self.data
        fisher = spec.build(
            self.model, data, seed=self.seed, structure=structure, normalization="sum", **self.options
        )  # fmt: skip
        gradient = (self.whole if whole else self.gradient).to(self.dtype)
        columns = torch.stack([fisher.solve(gradient, damping) for damping in dampings], 1)
        return columns.double(), fisher.rows

    def _sum(self, rows: Rows) -> Float[Tensor, "D"]:
        """Σ of all rows."""
        return rows.rmatmul(torch.ones(rows.count, 1, dtype=torch.float64, device=self.device))[:, 0]


def _block_update(
    rows: Rows,
    c: Float[Tensor, "R"] | None,
    gradient: Float[Tensor, "D"],
    dampings: tuple[float, ...],
    rounding: float,
    names: tuple[str, ...],
) -> Float[Tensor, "d K"]:
    """One module's update by its formula."""
    own = rows.part(names)
    if c is not None:
        return in_span(own, c, dampings)
    part = rows.space.take(gradient, names)
    return any_gradient(own, part, dampings, rounding)


def _first_of_each(owner: Tensor) -> Bool[Tensor, "R"]:
    """Which rows are the first of their unit; rows are ordered by unit."""
    first = torch.ones_like(owner, dtype=torch.bool)
    first[1:] = owner[1:] != owner[:-1]
    return first


def _distinct(gram: Float[Tensor, "N N"], cosine: float) -> Bool[Tensor, "N"]:
    """Units whose gradient has no larger absolute cosine with an earlier one that is kept."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    close = ((gram / norms / norms.unsqueeze(1)).abs() > cosine).cpu()
    kept = torch.ones(len(gram), dtype=torch.bool)
    for n in range(len(gram)):
        kept[n] = not bool((close[n, :n] & kept[:n]).any())
    return kept.to(gram.device)


def _outputs(model: nn.Module, batch: Batch, likelihood: Any) -> int:
    """Outputs of one example, by a forward pass of one or two."""
    refuse_train_mode(model)
    two = batch.take(slice(0, 2))
    with untouched_rng([next(model.parameters()).device]), kept_whole(model), torch.no_grad():
        raw = two.call(model)
    return likelihoods.resolve(likelihood).prepare(raw, None, "batch")[0][0].numel()
