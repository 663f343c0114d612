"""A Fisher to be computed: model, data, kind and conventions, and the one loop over the data.

Yields rows; what becomes of them (stored, squared, factored) is the builder's business.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arithmetic import HALF
from fisherkit.data import Batch, Source, check_finite, no_batch, warn_of_unshifted
from fisherkit.errors import DataError, ModelError, ProcessError, listed
from fisherkit.likelihood import Likelihood, prepared
from fisherkit.model_state import parameters_hash
from fisherkit.outputs import OutputRule, Outputs
from fisherkit.probabilities import warn_of_probabilities
from fisherkit.processes import ALONE, Processes
from fisherkit.progress import bar, beside
from fisherkit.rows.base import TILE, RowSelection
from fisherkit.rows.batch_checks import BatchChecks
from fisherkit.rows.chunks import Chunk, Slots, joined
from fisherkit.rows.collection import Rows
from fisherkit.rows.generic import now
from fisherkit.rows.last_layer import Head, last_layer_rows, last_width
from fisherkit.rows.linearized import MOST, Linearized, OneByOne
from fisherkit.rows.plan import Plan, forward, influenced, tolerance
from fisherkit.rows.record import refuse_train_mode
from fisherkit.rows.units import RuledUnit
from fisherkit.rows.verified import changed_attributes, fingerprint, forget, is_shown, plan_of
from fisherkit.rows.watched import Watched

LONG = 600.0
"""Seconds from which on a run is worth a warning before it."""
Metric = Callable[[Float[Tensor, "B ..."], Float[Tensor, "K B ..."]], Float[Tensor, "K B ..."]]
"""Outputs and K directions in output space to Σ_m v vᵀ times each direction."""
GRAPH = 1 << 23
"""Entries of the layer outputs, or of their gradients, in a pass on a processor: fewer passes are a little faster for
some models, but hold more memory, and what no cache holds is slow, as is memory that the system gives anew each time.
Where rows are kept that are larger than the layer outputs, `TILE`: putting their pieces together would take longer."""
LAYER = 1 << 21
"""The same of the largest layer output, as of large images, for kinds of one vector an example: of several, vectors of
small pieces would go through a backward pass together, which convolutions and pooling are slow in."""
SMALLEST = 1 << 20
"""Entries that a pass may hold however small the budget is: smaller pieces would only be slower."""


class Tally(NamedTuple):
    """What a pass over data counts.

    ``dropped`` is, by batch, for each example or token the trace that the kind left out of the output Fisher; empty if
    nothing. ``squares``: of rows that were looked at, as they say of themselves.
    """

    examples: int = 0
    rows: int = 0
    dropped: tuple[Float[Tensor, "n"], ...] = ()
    squares: float = 0.0

    @classmethod
    def of(cls, parts: Iterable[Tally]) -> Tally:
        """The sums of several counts."""
        examples, rows, dropped, squares = zip(cls(), *parts, strict=True)
        return cls(sum(examples), sum(rows), tuple(itertools.chain(*dropped)), sum(squares))

    @property
    def counted(self) -> Tally | None:
        """Itself: nothing is left to be counted."""
        return self

    def some(self) -> Tally:
        """Itself, if there is an example."""
        if self.examples == 0:
            raise DataError(
                "data", "no example with a label that counts", "at least one", why="all labels are ignore_index",
                try_="check the labels",
            )  # fmt: skip
        return self


class BetterPlanError(Exception):
    """A batch has shown what the plan did not know; whoever can start again does so with the new plan."""

    def __init__(self, plan: Plan, by_owner: bool | None, batch: Batch) -> None:
        super().__init__("a better plan")
        self.plan, self.by_owner, self.batch = plan, by_owner, batch


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything that defines the rows: plan, data, likelihood, kind, and how these are read.

    Args:
        token: whether every position is an example.
        shift_labels: whether labels belong to the position before theirs.
        chunk_size: most rows (examples × vectors) in one backward pass; None to choose by memory.
        summed: whether nothing but sums over rows is wanted: squares, or second moments of their factors.
        vectors_per_example, rowless, fold, head: as `measured` finds: M; whether those sums need no rows; positions of
            an example that are examples of their own; inputs of a last layer that vectors are led through at once.
        most_examples: in a micro-batch, where memory allows only so many; set by the builder.
        revisable: whether a pass may end with `BetterPlanError`; else what the plan does not know goes the slow way.
        shift_guessed: whether nobody has said whether labels belong to the position before theirs.
        by_owner: where layers' positions are to be counted, whether it is those that outputs depend on; False as long
            as the forward pass shows in every batch whose they are. None where they are not.
        budget: bytes, of which a quarter is for passes; None for as much as is fast.
        processes: that each have a part of the data.
        offset: how many examples the ranks before this one have, where examples are known by their place.
        folds: whether positions may become examples of their own where vectors are of single ones.
        weights: `parameters_hash` that the model must have in passes that come later than the build; None during it.
        settled: what `fingerprint` says of the model before such passes; None during the build.
        whole: whether every position counts, as `all_count` says; False where nobody has asked.
        checks: what has been looked at of its batches, which grows with them.
    """

    plan: Plan
    source: Source
    likelihood: Likelihood
    kind: OutputRule
    token: bool
    shift_labels: bool
    chunk_size: int | None
    progress: bool
    summed: bool = False
    vectors_per_example: int = 1
    rowless: bool = False
    most_examples: int | None = None
    revisable: bool = False
    shift_guessed: bool = False
    by_owner: bool | None = None
    budget: int | None = None
    processes: Processes = ALONE
    offset: int = 0
    weights: str | None = None
    folds: bool = False
    fold: int = 1
    head: int = 0
    settled: Hashable = None
    whole: bool = False
    checks: BatchChecks = field(default_factory=BatchChecks)

    @functools.cached_property
    def shares(self) -> list[int]:
        """How many examples each process has."""
        return self.processes.gathered(self.processes.each("counting examples", self.source.count))

    @property
    def examples(self) -> int:
        """How many examples the data have; of several processes, those of the one that has most."""
        return max(self.shares)

    def better(self, batch: Batch) -> BetterPlanError:
        """What a batch shows that another process has."""
        try:
            for _ in self._micro(
                batch.to(self.plan.example_parameter.device), 0, "data of another process", in_company=False
            ):
                pass
        except BetterPlanError as found:
            return found
        raise ProcessError(
            "a pass over the data", "a batch whose rows are made in another way in another process than here",
            "models that behave alike in all processes", why="they compute one Fisher together",
            try_="the same settings of the model in all of them",
        )  # fmt: skip

    def chunks(self, description: str, *, compared: bool = True) -> Iterator[Chunk]:
        """One pass over the data; not ``compared`` with other passes where its results stand alone."""
        for batch, start, call in self._micro_batches(description, compared=compared, shows=True):
            yield from self._micro(batch, start, call, in_company=True)

    def batches(self, description: str, *, compared: bool = True) -> Iterator[Chunk]:
        """The same with a micro-batch's chunks joined, rows ordered by example, position and vector."""
        for batch, start, call in self._micro_batches(description, compared=compared, shows=True):
            yield joined(list(self._micro(batch, start, call, in_company=True)))

    def metrics(
        self, description: str, *, matrix_free: bool = True
    ) -> Iterator[tuple[Batch, Metric, Callable[[Watched], Tally]]]:
        """One pass over the data: each micro-batch, the product of its output metric, and what counts its rows."""
        for batch, start, call in self._micro_batches(description):
            count = functools.partial(self._tally, batch, start, call, matrix_free)
            yield batch, functools.partial(self._metric, batch, start, call), count

    def counts(self, description: str, *, matrix_free: bool) -> Iterator[Tally]:
        """Examples, rows and dropped traces of each micro-batch, by forward passes alone."""
        for batch, _, count in self.metrics(description, matrix_free=matrix_free):
            with self.plan.quiet():
                watched = forward(self.plan, batch)
            yield count(watched)

    def _tally(self, batch: Batch, start: int, call: str, matrix_free: bool, watched: Watched) -> Tally:
        slots = self._slots(batch, watched.z, start, call)
        if not self._judge(batch, start, watched, call, gradients=matrix_free):
            raise influenced(call, "gradients")
        keep = slots.keep(slice(0, slots.number))
        rows = batch.size * slots.number if keep is None else int(keep.sum())
        return Tally(slots.counted, rows, () if slots.dropped is None else (slots.dropped,))

    def probe_rows(self) -> tuple[Linearized, Callable[[Float[Tensor, "k B ..."]], Rows]]:
        """The model at the plan's two examples, and their rows for any output vectors."""
        with self.plan.quiet():
            linearized = Linearized.probe(self.plan)

        def rows(v: Float[Tensor, "k B ..."]) -> Rows:
            with self.plan.quiet():
                return linearized.rows(v, RowSelection(v.shape[0], v.shape[1], v.device))

        return linearized, rows

    def layers(self) -> list[tuple[str, ...]]:
        """The parameters of each module, joined with those that are used beside them: what can be handled apart."""
        with self.plan.quiet():
            uses = Linearized.probe(self.plan).watched.uses
        return self.plan.space.joined_blocks([*(unit.names for unit in self.plan.units), *(use.names for use in uses)])

    def all_count(self) -> bool:
        """Whether every position counts, as far as the labels of a first batch tell."""
        targets = self.source.first().targets
        ignored = targets is not None and bool((targets == self.likelihood.ignore_index).any())
        return not (self.likelihood.labels_mask and (ignored or self.shift_labels))

    @property
    def first_size(self) -> int:
        """How many examples a first micro-batch has."""
        return self._piece(self.source.first().size)

    def first_chunks(self) -> Iterator[Chunk]:
        """Of a first micro-batch."""
        first = self.source.first()
        micro = first.take(slice(0, self.first_size)).to(self.plan.example_parameter.device)
        return self._micro(micro, self.offset, first.place, in_company=False)

    def _metric(self, batch: Batch, start: int, call: str, raw: Tensor, w: Float[Tensor, "K B ..."]) -> Tensor:
        """Σ_m v (vᵀ w) for K directions in output space."""
        outputs, _ = self._outputs(batch, raw, start, call)
        flat = w.to(outputs.z.dtype).reshape(-1, *raw.shape[1:])
        directions = self.likelihood.positions(flat, call).reshape(w.shape[0], *outputs.z.shape)
        if self._flat:
            flat = directions.reshape(w.shape[0], -1, 1, outputs.z.shape[2])
            found = self.kind.output_product(outputs.positionwise(), flat)
        else:
            found = self.kind.output_product(outputs, directions)
        return self.likelihood.as_outputs(outputs.masked(found.reshape(directions.shape)), raw.shape)

    def _outputs(self, batch: Batch, raw: Tensor, start: int, call: str) -> tuple[Outputs, tuple[int, int]]:
        """The model's outputs as ``[B, P, C]``, finite, with checked targets; how many examples and positions count."""
        raw = raw.detach()
        if batch.targets is None and self.kind.needs_targets:
            raise DataError(
                call, "no targets", "targets", why="this kind uses the observed labels",
                try_="fk.ExactFisher or fk.SampledFisher for unlabelled data",
            )  # fmt: skip
        batch = batch.aligned(self.plan.model, raw, shift=self.shift_labels, ignore_index=self.likelihood.ignore_index)
        raw = raw if raw.dtype in (torch.float32, torch.float64) else raw.float()
        self.likelihood.check_reading(raw, batch.targets, batch.batched, call)
        wanted = self.kind.needs_targets or self.likelihood.labels_mask or self.likelihood.hessian_of_targets
        z, target, mask = prepared(self.likelihood, raw, batch.targets if wanted else None, call)
        counted = [mask] if self.token or mask.shape[1] == 1 else [mask, mask.any(1)]
        total, *counts = torch.stack([x.sum(dtype=torch.float64) for x in (raw, *counted)]).tolist()
        if not math.isfinite(total):  # where only the sum overflows, all is well
            check_finite(raw, call)
        if not self.checks.looked:
            self.checks.looked = True
            if self.shift_guessed and not self.shift_labels and target is not None and target.ndim == 2 < raw.ndim:
                warn_of_unshifted(batch, target, mask)
            likelihood, seen = self.likelihood, self.plan.tried.seen
            if ("logits", likelihood.link) not in seen and warn_of_probabilities(
                self.plan.model, z[mask], likelihood.link, likelihood.name
            ):
                seen.add(("logits", likelihood.link))
        positions, whole = int(counts[0]), int(counts[0]) == mask.numel()
        outputs = Outputs(z, target, mask, start, self.likelihood, raw.shape[1:], whole)
        return outputs, (int(counts[-1]), positions)

    def measured(self) -> Problem:
        """With what two examples tell of the kind's vectors, for which it is chosen how each unit's rows are kept."""
        plan, tried, kind = self.plan, self.plan.tried, self.kind
        if plan.nonlinear and (not kind.along_gradient or plan.coarsest in HALF):
            plan.refuse_nonlinear("the Fisher of this model")
        key = type(kind), *kind.kind_options().items(), self.likelihood.recorded, self.token
        if key not in tried.vectors:
            self.confirm()
            slots = self._slots(plan.probe.batch, plan.probe.z, 0, plan.probe.batch.place)
            tried.vectors[key] = slots.number, slots.mask.shape[1]
        number, positions = tried.vectors[key]
        of_hessian = self.summed and kind.of_hessian and not plan.looped
        rowless = of_hessian and self._last_width(only=True) > 0
        head = self._last_width(only=False) if of_hessian and not rowless else 0
        if head * positions >= number or positions * head**2 > TILE:  # not worth it
            head = 0
        number = head * positions or number
        several = self.folds and self._flat and not rowless and positions > 1
        fold = tried.answer("positions", self._positions) if several else 1
        if number > 1 and not rowless and "batched" not in tried.answers:
            with self.plan.quiet():
                _ = Linearized.probe(plan).batched  # cheaper on two examples than on a batch
        checks = replace(self.checks, looked=False)
        found = replace(self, vectors_per_example=number, rowless=rowless, head=head, fold=fold, checks=checks)
        found.choose(lean=True)
        return found

    @property
    def backward_vectors(self) -> int:
        """Output vectors that go back from each example, one after the other."""
        return self.vectors_per_example // self.fold

    def _positions(self) -> int:
        """Positions of the probe's examples, if nothing on the way mixes them; else 1."""
        plan = self.plan
        self.confirm()
        with plan.quiet():
            seen = forward(plan, plan.probe.batch, positions=True)
        simple = all(type(unit) is RuledUnit for unit in plan.units) and not plan.shared
        apart = simple and "attention_mask" not in plan.probe.batch.kwargs and seen.by_position() is not None
        # As the likelihood's positions are, where classes come last.
        in_order = seen.z.ndim == 3 and self.likelihood.class_axis % 3 == 2
        return seen.positions if apart and in_order else 1

    def _folded(self, linearized: Linearized | OneByOne, batch: Batch) -> tuple[Linearized, Batch] | None:
        """A batch whose positions are examples of their own, as they are apart here; None where none has several."""
        if self.fold == 1 or linearized.z.ndim < 3 or linearized.z.shape[1] == 1:
            return None
        apart = None  # an attention mask says of the inputs' positions, example by example, which are data
        if isinstance(linearized, Linearized) and not linearized.unruled and "attention_mask" not in batch.kwargs:
            apart = linearized.watched.by_position()
        if apart is None or self.by_owner:
            self.plan.tried.answers["positions"] = 1
            if self.revisable:
                raise BetterPlanError(self.plan, self.by_owner, batch)
            return None
        wide = replace(batch, size=apart.batch)
        return Linearized(self.plan, wide, apart), wide

    def _last_width(self, *, only: bool) -> int:
        """Inputs of a last layer, the only one that was chosen or above others, if its sums are known; tried once."""

        def find() -> int:
            if not only:
                self.confirm()
            with self.plan.quiet():
                return last_width(Linearized.probe(self.plan), only=only)

        return self.plan.tried.answer("last layer" if only else "head", find)

    def forecast(self) -> tuple[int, float] | None:
        """Backward passes that reading the data once takes, and their seconds at most; None where N is not known.

        Cost: a few backward passes on two examples; where those tell of a long time, of which small batches make too
        much, one on a micro-batch.
        """
        examples, first, two = self.source.expected(), self.source.first(), self.plan.probe.batch
        if examples is None:
            return None
        each = self._piece(first.size)
        passes = max(1, examples / each) * self.backward_vectors
        with self.plan.quiet():
            probe = Linearized.probe(self.plan)
        seconds = self._pass_seconds(probe) * examples / two.size * self.backward_vectors
        if seconds > LONG and each > two.size:
            micro = first.take(slice(0, each)).to(self.plan.example_parameter.device)
            linearized = self._linearized(micro)
            seconds = min(seconds, self._pass_seconds(linearized) * passes)
        return math.ceil(passes), seconds

    def _pass_seconds(self, linearized: Linearized | OneByOne) -> float:
        """Of a backward pass of one output vector an example, measured."""
        with self.plan.quiet():
            v = torch.ones(1, *linearized.z.shape, device=linearized.z.device, dtype=linearized.z.dtype)
            selection = RowSelection(1, len(linearized.z), v.device)
            linearized.rows(v, selection)  # the first one finds out whose the entries are
            start = now(v.device)
            linearized.rows(v, selection)
            return now(v.device) - start

    def choose(self, *, lean: bool) -> None:
        """Choose how each unit's rows are kept: with the fewest numbers if memory is short, else for speed."""
        for unit in self.plan.ruled:
            unit.fold = self.fold
            unit.choose(self.vectors_per_example, lean)

    def row_numbers(self, names: Collection[str], *, vectors: int | None = None) -> int:
        """Numbers of one example's rows over some parameters; of M vectors by default, or 1 where sums need none."""
        vectors = vectors or (1 if self.rowless else self.vectors_per_example)
        units = [unit for unit in self.plan.units if unit.names[0] in names]
        return sum(unit.numbers_per_example(vectors) for unit in units)

    def row_bytes(self, names: Collection[str], *, vectors: int | None = None) -> int:
        """The same in bytes."""
        return torch.finfo(self.plan.dtype).bits // 8 * self.row_numbers(names, vectors=vectors)

    @property
    def _flat(self) -> bool:
        return self.token or self.kind.positionwise

    def confirm(self) -> None:
        """Begin again with a plan that two examples confirm, where nothing has confirmed this one."""
        if self.plan.probe.assumed:
            plan = plan_of(self.plan.model, self.plan.space, self.source)
            raise BetterPlanError(plan, self.by_owner, self.source.first())

    def _micro_batches(
        self, description: str, *, compared: bool = True, shows: bool = False
    ) -> Iterator[tuple[Batch, int, str]]:
        """Pieces of batches on the device, each with its first example's place in the data and a name for errors."""
        if not (shows and self.plan.probe.assumed and self.source.listed):  # else nobody's code has run since the plan
            self.refuse_changed()
        if not shows:  # where what is done with the first does not confirm the plan
            self.confirm()
        self.plan.probe.watched = None  # its graph has served
        device = self.plan.example_parameter.device
        shown = bar(self.source.steps(), description, "it", shown=self.progress)
        start = self.offset
        read = self.source.numbered() if compared else enumerate(self.source.once())
        for number, batch in beside(shown, read):
            step = self._piece(batch.size)
            for first in range(0, batch.size, step):
                micro = batch.take(slice(first, min(first + step, batch.size))).to(device)
                yield micro, start, f"data, batch {number}"
                start += micro.size
                shown.update(micro.size / batch.size)
        if start == 0 and self.processes.size == 1:
            raise no_batch()

    def refuse_changed(self) -> None:
        """Refuse a model that is not what it was when the Fisher was built: its rows would be another Fisher's."""
        own = dict(self.plan.model.named_parameters())
        changed = [
            name
            for name, p in self.plan.parameters.items()
            if own.get(name) is not p or p._version != self.plan.versions[name]
        ]
        if changed:
            got = f"parameters that have changed since the Fisher was built: {changed[:4]}"
        elif self.weights is not None and parameters_hash(self.plan.model) != self.weights:
            got = "parameters or buffers that have changed since the Fisher was built"
        elif attributes := self._changed_attributes():
            got = f"attributes that have changed since the Fisher was built: {listed(map(repr, attributes), 4)}"
        else:
            refuse_train_mode(self.plan.model)
            if not self._says_otherwise():
                return
            got = "outputs that have changed since the Fisher was built, by a hook or an attribute"
        raise ModelError(
            "a pass over the data", got, "the model as it was",
            why="rows that are not kept are made from the live model",
            try_='build the Fisher anew, or with storage="rows", which keeps them from the start',
        )  # fmt: skip

    def _changed_attributes(self) -> list[str]:
        """Plain attributes that are not what they were, but for those that the model's own passes change."""
        now = None if self.settled is None else fingerprint(self.plan.model)
        changed = set() if now is None else changed_attributes(self.settled, now)
        if changed:
            two = self.plan.probe.batch
            with self.plan.quiet():
                for some in (two.take(slice(0, 1)), two):
                    with contextlib.suppress(Exception):  # a model may not take one
                        some.call(self.plan.model)
                    now, before = fingerprint(self.plan.model), now
                    changed -= changed_attributes(before, now)
        return sorted(changed)

    def _says_otherwise(self) -> bool:
        """Whether a model that is not what was verified, by its hooks or attributes, has other outputs than then."""
        plan = self.plan
        if self.weights is None or not isinstance(plan.key, tuple) or fingerprint(plan.model) == plan.key[-1]:
            return False
        with plan.quiet():
            z = plan.probe.batch.call(plan.model).detach()
        before = plan.probe.z
        return z.shape != before.shape or bool((z - before).norm() > tolerance(z.dtype, plan.coarsest) * z.norm())

    def _piece(self, size: int) -> int:
        """Examples in each of the pieces, of about the same size, that a batch of that size is cut into."""
        one = self.plan.numbers_per_example
        room = self._room(size * one, 4 * TILE)
        step = max(1, room // one) if self.chunk_size is None else self.chunk_size
        if room <= GRAPH and self.chunk_size is None and self.vectors_per_example == 1:
            step = max(1, min(step, LAYER // self.plan.largest))
        step = step if self.most_examples is None else min(step, self.most_examples)
        step = min(step, MOST) if self.plan.looped else step
        step = min(step, max(1, TILE // (self.vectors_per_example * self.head))) if self.head else step
        return -(-size // -(-size // step))

    def _linearized(self, batch: Batch) -> Linearized | OneByOne:
        """The model at a batch, as a whole or example by example; a first one confirms what nothing has."""
        plan, assumed = self.plan, self.plan.probe.assumed
        try:
            with plan.quiet() as draws:
                if plan.looped:
                    return OneByOne(plan, batch, follow=self.by_owner is False)
                watched = forward(plan, batch, positions=self.fold > 1)
        except Exception:
            if assumed:  # two examples tell what it means
                self.confirm()
            raise
        if assumed and not (is_shown(plan, watched) and (plan.draws or not draws.happened)):
            plan.tried.seen.add("not shown")
            self.confirm()
        plan.probe.assumed = False
        return Linearized(plan, batch, watched, shown=assumed)

    def _judge(self, batch: Batch, start: int, seen: Watched, call: str, *, gradients: bool = True) -> bool:
        """Refuse examples that influence each other; whether their gradients are their own, if that is asked."""
        self.checks.refuse_influence(self.plan, batch, start, seen, call)
        self._refuse_nonlinear([seen], [batch], call)
        return not gradients or self.checks.has_own_gradients(self.plan, batch, start, seen)

    def _refuse_nonlinear(self, passes: Sequence[Watched], batches: Iterable[Batch], call: str) -> None:
        for seen, batch in zip(passes, batches, strict=True) if not self.kind.along_gradient else ():
            self.plan.refuse_nonlinear_here(seen, call, batch=batch)

    def _micro(self, batch: Batch, start: int, call: str, *, in_company: bool) -> Iterator[Chunk]:
        assumed = self.plan.probe.assumed
        linearized = self._linearized(batch)
        if self.revisable and linearized.newly_ruled:
            raise BetterPlanError(linearized.replanned(), self.by_owner, batch)
        if self.by_owner:
            linearized.by_owner()
        elif self.by_owner is not None and not linearized.followed:
            raise BetterPlanError(self.plan, True, batch)
        outputs, counts = self._outputs(batch, linearized.z, start, call)
        if isinstance(linearized, OneByOne):
            self._refuse_nonlinear(linearized.passes, (batch.take(slice(n, n + 1)) for n in range(batch.size)), call)
        elif in_company and not self._judge(batch, start, linearized.watched, call):  # rows go the slow exact way
            linearized.unruled.update(name for unit in self.plan.ruled for name in unit.names)
        known = self.rowless and isinstance(linearized, Linearized) and not linearized.unruled
        last = last_layer_rows(linearized, outputs) if known else None  # type: ignore[arg-type]  # of a batch as a whole
        if last is not None:
            last.finite(call)
            yield Chunk.whole_batch(last, outputs, batch, counts)
            return
        linearized, batch, slots, head = self._prepared(linearized, batch, outputs, counts)
        one = linearized.numbers_per_vector
        step = max(1, self._room(slots.number * one, TILE) // one)
        if self.chunk_size is not None:
            step = max(1, self.chunk_size // batch.size)

        counting = outputs.counting(linearized.z.shape) if self.by_owner else None
        bare = isinstance(linearized, Linearized) and linearized.watched.bare and not self.plan.generic

        def rows(v: Float[Tensor, "k B P C"], selection: RowSelection) -> Rows:
            with torch.inference_mode(False) if bare else self.plan.quiet(), torch.enable_grad():
                shape = linearized.z.shape
                shaped = self.likelihood.as_outputs(v, shape) if head is None else v.reshape(len(v), *shape)
                shaped = shaped if counting is None else shaped * counting  # of examples without rows nothing is left
                try:
                    alone = slots.number == 1
                    found = linearized.rows(shaped, selection, alone=alone, counting=counting, last=alone)
                except RuntimeError:
                    if assumed:  # two examples tell what it means
                        forget(self.plan)
                        self.plan.probe.assumed = True
                        self.confirm()
                    raise
            if self.revisable and linearized.unruled:
                raise BetterPlanError(linearized.replanned(), self.by_owner, batch)
            return found

        chunks = slots.chunks(batch, step, rows, call)
        yield from chunks if head is None else (head.joined(chunk, self.plan) for chunk in chunks)

    def _prepared(
        self, linearized: Linearized | OneByOne, batch: Batch, outputs: Outputs, counts: tuple[int, int]
    ) -> tuple[Linearized | OneByOne, Batch, Slots, Head | None]:
        """What vectors go back from, whose they are, and which: by position, or below a last layer, where it is so."""
        folded = self._folded(linearized, batch)
        if folded is not None:
            linearized, batch = folded
            outputs = outputs.positionwise()
        head = None
        if self.head and not self.by_owner and isinstance(linearized, Linearized) and not linearized.unruled:
            head = Head.of(linearized, outputs)
        if head is None:
            return linearized, batch, Slots.of(outputs, self.kind, self.token, counts), None
        return head.below, batch, head.slots(counts), head

    def _room(self, entries: int, most: int) -> int:
        """How many of so many entries a pass may hold: of pieces, rows that are kept are copied, and must be few."""
        if self.plan.example_parameter.device.type == "cpu":  # others want large products
            one = self.plan.numbers_per_example
            few = entries > LAYER and (self.summed or self.row_numbers(self.plan.space.slices) < one)
            most = GRAPH if few else TILE
        if self.budget is None:
            return most
        item = torch.finfo(self.plan.example_parameter.dtype).bits // 8
        return min(most, max(SMALLEST, self.budget // (4 * item)))

    def _slots(self, batch: Batch, raw: Tensor, start: int, call: str) -> Slots:
        outputs, counts = self._outputs(batch, raw, start, call)
        return Slots.of(outputs, self.kind, self.token, counts)
