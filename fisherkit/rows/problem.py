"""A Fisher to be computed: model, data, kind and conventions, and the one loop over the data.

Yields rows; what becomes of them (stored, squared, factored) is the builder's business. N is counted here and nowhere
else.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from fisherkit.data import Batch, Source, check_finite
from fisherkit.errors import DataError
from fisherkit.likelihoods import Likelihood
from fisherkit.outputs import OutputRule, Outputs, OutputVectors
from fisherkit.randomness import untouched_rng
from fisherkit.rows.base import TILE
from fisherkit.rows.collection import Rows
from fisherkit.rows.linearized import Linearized
from fisherkit.rows.matrix_free import Metric
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
        slots: output vectors for each example of the micro-batch, those that are no rows included.
        counted_positions: which positions ``[B, P]`` of the outputs count, then which of the inputs are data, if the
            batch says so in an attention mask.
        dropped: for each example or token counted, the output Fisher's trace that the kind left out; first chunk only.
    """

    rows: Rows
    owner: Int[Tensor, "R"]
    first: bool
    counted: int
    slots: int
    counted_positions: tuple[Bool[Tensor, "..."], ...]
    dropped: Float[Tensor, "n"] | None


@dataclass
class Problem:
    """Everything that defines the rows.

    Args:
        plan: how rows are made.
        source: the data.
        likelihood: p(y | z).
        kind: the kind, as functions of outputs.
        token: whether every position is an example.
        shift_labels: whether labels belong to the position before theirs.
        chunk_size: most rows (examples × vectors) in one backward pass; None to choose by memory.
        progress: show a progress bar.
        vectors_per_example: M, found by `measure`.
        numbers_per_example: entries of all layer outputs for one example, found by `measure`.
    """

    plan: Plan
    source: Source
    likelihood: Likelihood
    kind: OutputRule
    token: bool
    shift_labels: bool
    chunk_size: int | None
    progress: bool
    vectors_per_example: int = 1
    numbers_per_example: int = 1

    def chunks(self, description: str) -> Iterator[Chunk]:
        """One pass over the data."""
        for batch, start, call in self._micro_batches(description):
            yield from self._micro(batch, start, call)

    def batches(self, description: str) -> Iterator[Chunk]:
        """The same with a micro-batch's chunks joined, rows ordered by example, position and vector."""
        pending: list[Chunk] = []
        for chunk in self.chunks(description):
            if chunk.first and pending:
                yield _join(pending)
                pending = []
            pending.append(chunk)
        yield _join(pending)

    def metrics(self, description: str) -> Iterator[tuple[Batch, Metric]]:
        """One pass over the data that yields each micro-batch with the product of its output metric."""
        for batch, start, call in self._micro_batches(description):
            yield batch, functools.partial(self._metric, batch, start, call)

    def probe(self) -> Problem:
        """The same problem on the first two examples."""
        first = self.source.first()
        two = first.take(slice(0, min(2, first.size)))
        return replace(self, source=Source([two.raw]), progress=False, chunk_size=None)

    def _metric(self, batch: Batch, start: int, call: str, raw: Tensor, w: Float[Tensor, "K B ..."]) -> Tensor:
        """Σ_m v (vᵀ w) for K directions in output space."""
        outputs = self._outputs(batch, raw, start, call)
        directions = w.to(outputs.z.dtype).reshape(w.shape[0], *outputs.z.shape)
        if self._flat:
            flat = directions.reshape(w.shape[0], -1, 1, outputs.z.shape[2])
            found = self.kind.output_product(outputs.positionwise(), flat)
        else:
            found = self.kind.output_product(outputs, directions)
        return outputs.masked(found.reshape(directions.shape)).reshape(w.shape)

    def _outputs(self, batch: Batch, raw: Tensor, start: int, call: str) -> Outputs:
        """The model's outputs as ``[B, P, C]``, with checked targets."""
        raw = raw.detach()
        check_finite(raw, call)
        if batch.targets is None and self.kind.needs_targets:
            raise DataError(
                call=call,
                got="no targets",
                expected="targets",
                why="this kind uses the observed labels",
                try_="fk.ExactFisher or fk.SampledFisher for unlabelled data",
            )
        if self.shift_labels:
            batch = batch.shifted(self.likelihood.ignore_index)
        raw = raw if raw.dtype in (torch.float32, torch.float64) else raw.float()
        wanted = self.kind.needs_targets or self.likelihood.labels_mask
        z, target, mask = self.likelihood.prepare(raw, batch.targets if wanted else None, call)
        # 2²⁴ positions an example keep (example, position) apart in one integer.
        example = torch.arange(start, start + z.shape[0], device=z.device)
        keys = example.unsqueeze(1) * (1 << 24) + torch.arange(z.shape[1], device=z.device)
        return Outputs(z, target, mask, keys, self.likelihood)

    def measure(self) -> None:
        """Find out on two examples how many vectors the kind has, and choose how each unit's rows are kept."""
        probe = self.probe()
        chunk = next(probe.chunks("probe"))
        self.vectors_per_example = chunk.slots
        with self._quiet():
            linearized = Linearized(self.plan, probe.source.first().to(self.plan.example_parameter.device))
        self.numbers_per_example = linearized.numbers_per_vector // linearized.batch.size
        for unit in self.plan.ruled:
            unit.choose(self.vectors_per_example)

    def row_bytes(self, names: Collection[str]) -> int:
        """Bytes of one example's rows over the units of some parameters, as they are kept."""
        item = torch.finfo(self.plan.example_parameter.dtype).bits // 8
        units = [unit for unit in self.plan.units if unit.names[0] in names]
        return item * sum(unit.numbers_per_example(self.vectors_per_example) for unit in units)

    @property
    def _flat(self) -> bool:
        return self.token or self.kind.positionwise

    def _micro_batches(self, description: str) -> Iterator[tuple[Batch, int, str]]:
        """Pieces of batches on the model's device, their first example's place in the data, and a name for errors."""
        self.plan.refuse_changed()
        device = self.plan.example_parameter.device
        bar = tqdm(self.source, desc=description, total=self.source.steps(), disable=not self.progress, leave=False)
        start = 0
        for number, batch in enumerate(bar):
            step = max(1, TILE // self.numbers_per_example) if self.chunk_size is None else self.chunk_size
            for first in range(0, batch.size, step):
                micro = batch.take(slice(first, min(first + step, batch.size))).to(device)
                yield micro, start, f"data, batch {number}"
                start += micro.size
        if start == 0:
            raise DataError(call="data", got="no batch", expected="at least one example")

    def _micro(self, batch: Batch, start: int, call: str) -> Iterator[Chunk]:
        with self._quiet():
            linearized = Linearized(self.plan, batch)
        outputs = self._outputs(batch, linearized.z, start, call)
        found = self.kind.output_vectors(outputs.positionwise() if self._flat else outputs)
        mask = outputs.mask
        counts = mask.flatten() if self.token else mask.any(1)
        dropped = None if found.dropped is None else found.dropped[mask.flatten() if self._flat else mask.any(1)]
        attention = batch.kwargs.get("attention_mask")
        positions: tuple[Tensor, ...] = (mask,)
        if isinstance(attention, Tensor) and attention.ndim == 2:
            positions = mask, attention.bool() & mask.any(1, keepdim=True)
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
                yield Chunk(rows, selection.owner, True, int(counts.sum()), slots, positions, dropped)
            else:
                yield Chunk(rows, selection.owner, False, 0, slots, positions, None)

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


def _join(chunks: list[Chunk]) -> Chunk:
    """One micro-batch's rows in order: every chunk has rows of every example, so they are sorted by example."""
    if len(chunks) == 1:
        return chunks[0]
    owner = torch.cat([chunk.owner for chunk in chunks])
    order = torch.argsort(owner, stable=True)
    return replace(chunks[0], rows=Rows.cat([chunk.rows for chunk in chunks]).reordered(order), owner=owner[order])
