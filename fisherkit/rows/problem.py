"""A Fisher to be computed: model, data, kind and conventions, and the one loop over the data.

Yields rows; what becomes of them (stored, squared, factored) is the builder's business. N is counted here and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from fisherkit.data import Batch, Source, check_finite
from fisherkit.errors import DataError
from fisherkit.likelihoods import Categorical, Likelihood
from fisherkit.outputs import OutputRule, Outputs, OutputVectors
from fisherkit.randomness import untouched_rng
from fisherkit.rows.base import TILE
from fisherkit.rows.collection import Rows
from fisherkit.rows.linearized import Linearized
from fisherkit.rows.plan import Plan, differentiable
from fisherkit.rows.selection import RowSelection


@dataclass(frozen=True)
class Chunk:
    """Rows of some output vectors of one micro-batch.

    Args:
        rows: the rows.
        owner: which example of the micro-batch each row belongs to.
        first: whether this is the micro-batch's first chunk.
        counted: examples that this chunk adds to N (all of them in the first chunk).
        positions: which positions ``[B, T]`` of the inputs are data; None for all.
        dropped: for each example or token counted, the output Fisher's trace that the kind left out; first chunk only.
    """

    rows: Rows
    owner: Int[Tensor, "R"]
    first: bool
    counted: int
    positions: Bool[Tensor, "B T"] | None
    dropped: Float[Tensor, "n"] | None


@dataclass
class Problem:
    """Everything that defines the rows.

    Args:
        plan: how rows are made.
        source: the data.
        likelihood: p(y | z).
        rule: the kind, as a function of outputs.
        positionwise: whether the kind has vectors of its own for every position (block-diagonal output Fishers do).
        needs_targets: whether the kind uses observed labels.
        token: whether every position is an example.
        shift_labels: whether labels belong to the position before theirs.
        chunk_size: most rows (examples × vectors) in one backward pass; None to choose by memory.
        progress: show a progress bar.
        vectors_per_example: M, found by `measure`.
    """

    plan: Plan
    source: Source
    likelihood: Likelihood
    rule: OutputRule
    positionwise: bool
    needs_targets: bool
    token: bool
    shift_labels: bool
    chunk_size: int | None
    progress: bool
    vectors_per_example: int = 1

    def chunks(self, description: str) -> Iterator[Chunk]:
        """One pass over the data."""
        device = self.plan.parameters[self.plan.space.names[0]].device
        bar = tqdm(self.source, desc=description, total=self.source.steps(), disable=not self.progress, leave=False)
        start = 0
        for number, batch in enumerate(bar):
            for micro in self._split(batch.to(device)):
                yield from self._micro(micro, start, f"data, batch {number}")
                start += micro.size
        if start == 0:
            raise DataError(call="data", got="no batch", expected="at least one example")

    def batches(self, description: str) -> Iterator[Chunk]:
        """The same with a micro-batch's chunks joined, rows ordered by example, position and vector."""
        pending: list[Chunk] = []
        for chunk in self.chunks(description):
            if chunk.first and pending:
                yield _join(pending)
                pending = []
            pending.append(chunk)
        yield _join(pending)

    def vectors(self, linearized: Linearized, start: int, call: str) -> tuple[OutputVectors, Outputs]:
        """The kind's vectors for a batch, and the outputs they belong to as ``[B, P, C]``."""
        batch, raw = linearized.batch, linearized.z.detach()
        check_finite(raw, call)
        if batch.targets is None and self.needs_targets:
            raise DataError(call=call, got="no targets", expected="targets", why="this kind uses the observed labels",
                            try_="fk.ExactFisher or fk.SampledFisher for unlabelled data")
        if self.shift_labels and batch.targets is not None:
            ignored = self.likelihood.ignore_index if isinstance(self.likelihood, Categorical) else -100
            batch = batch.shifted(ignored)
        raw = raw if raw.dtype in (torch.float32, torch.float64) else raw.float()
        z, target, mask = self.likelihood.prepare(raw, batch.targets, call)
        # 2²⁴ positions an example keep (example, position) apart in one integer.
        example = torch.arange(start, start + z.shape[0], device=z.device)
        keys = example.unsqueeze(1) * (1 << 24) + torch.arange(z.shape[1], device=z.device)
        outputs = Outputs(z, target, mask, keys, self.likelihood)
        return self.rule(outputs.positionwise() if self._flat else outputs), outputs

    def measure(self) -> None:
        """Find out on two examples how many vectors the kind has, and choose how each unit's rows are kept."""
        device = self.plan.parameters[self.plan.space.names[0]].device
        first = self.source.first()
        batch = first.take(slice(0, min(2, first.size))).to(device)
        with self._quiet():
            linearized = Linearized(self.plan, batch)
        found, outputs = self.vectors(linearized, 0, "data, batch 0")
        self.vectors_per_example = found.v.shape[1] * (outputs.mask.shape[1] if self._flat else 1)
        for unit in self.plan.units:
            unit.choose(self.vectors_per_example)

    def row_bytes(self, names: Collection[str]) -> int:
        """Bytes of one example's rows over the units of some parameters, as they are kept."""
        item = torch.finfo(self.plan.parameters[self.plan.space.names[0]].dtype).bits // 8
        units = [unit for unit in self.plan.units if unit.names[0] in names]
        return round(item * sum(unit.numbers_per_example(self.vectors_per_example) for unit in units))

    @property
    def _flat(self) -> bool:
        return self.token or self.positionwise

    def _split(self, batch: Batch) -> Iterator[Batch]:
        step = batch.size if self.chunk_size is None else min(self.chunk_size, batch.size)
        for first in range(0, batch.size, step):
            yield batch.take(slice(first, min(first + step, batch.size)))

    def _micro(self, batch: Batch, start: int, call: str) -> Iterator[Chunk]:
        with self._quiet():
            linearized = Linearized(self.plan, batch)
        found, outputs = self.vectors(linearized, start, call)
        mask = outputs.mask
        counts = mask.flatten() if self.token else mask.any(1)
        dropped = None if found.dropped is None else found.dropped[mask.flatten() if self._flat else mask.any(1)]
        positions = self._positions(batch, mask)
        slots = found.v.shape[1] * (mask.shape[1] if self._flat else 1)
        step = max(1, TILE // linearized.numbers_per_vector)
        if self.chunk_size is not None:
            step = max(1, self.chunk_size // batch.size)
        for first in range(0, slots, step):
            v, keep = self._cut(found, mask, range(first, min(first + step, slots)))
            selection = RowSelection(v.shape[0], batch.size, v.device, keep)
            with self._quiet():
                rows = linearized.rows(v.reshape(v.shape[0], *linearized.z.shape), selection)
            if first == 0:
                yield Chunk(rows, selection.owner, True, int(counts.sum()), positions, dropped)
            else:
                yield Chunk(rows, selection.owner, False, 0, positions, None)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Around the model's own code, never around a yield: between chunks the caller sees an unchanged model."""
        parameters = list(self.plan.parameters.values())
        with untouched_rng([parameters[0].device]), differentiable(parameters):
            yield

    def _cut(self, found: OutputVectors, mask: Tensor, span: range) -> tuple[Tensor, Tensor | None]:
        """Vectors ``[k, B, P, C]`` of a span of slots, and which of them are rows."""
        batch, positions = mask.shape
        m = found.v.shape[1]
        index = torch.arange(span.start, span.stop, device=mask.device)
        if not self._flat:
            v = found.v[:, span.start : span.stop].transpose(0, 1)
            keep = mask.any(1, keepdim=True).expand(batch, len(span))
            keep = keep if found.keep is None else keep & found.keep[:, span.start : span.stop]
        else:
            position, vector = index // m, index % m
            own = found.v.reshape(batch, positions, m, -1)[:, position, vector].transpose(0, 1)
            v = own.new_zeros(len(span), batch, positions, own.shape[-1])
            v[torch.arange(len(span), device=mask.device), :, position] = own
            keep = mask[:, position]
            if found.keep is not None:
                keep = keep & found.keep.reshape(batch, positions, m)[:, position, vector]
        return v, (None if bool(keep.all()) else keep)

    def _positions(self, batch: Batch, mask: Tensor) -> Tensor | None:
        if mask.shape[1] > 1:
            return mask
        attention = batch.kwargs.get("attention_mask")
        return attention.bool() if isinstance(attention, Tensor) and attention.ndim == 2 else None


def _join(chunks: list[Chunk]) -> Chunk:
    """One micro-batch's rows in order: chunks cut the vectors of every example, so examples have to be sorted together."""
    if len(chunks) == 1:
        return chunks[0]
    owner = torch.cat([chunk.owner for chunk in chunks])
    order = torch.argsort(owner, stable=True)
    return replace(chunks[0], rows=Rows.cat([chunk.rows for chunk in chunks]).reordered(order), owner=owner[order])
