"""Units: parameters whose rows are made together, and how they are kept.

A ruled unit is a weight with its bias (or either) under one layer rule; a shared unit is a parameter under several; any
other parameter is a unit of its own and goes the generic way. Owns the cost model. Which rule a unit gets is the
business of `rows.plan`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fisherkit.rows.base import RowSelection, StoredRows, UnitRows
from fisherkit.rows.collection import UnitSlot
from fisherkit.rows.derived import Derived
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.ownership import Arrangement, Regular
from fisherkit.rows.patches import Activations, Patches
from fisherkit.rows.rules import LinearRule, Rule, Use
from fisherkit.rows.sliced import SlicedRows
from fisherkit.rows.sparse import SparseRows
from fisherkit.rows.summed import SumRows

Form = tuple[Rule, str | Derived | None, str | Derived | None, bool]
"""A use's rule, weight and bias, and whether it sees the weight transposed."""


@dataclass(frozen=True)
class Pulled:
    """What a backward pass brought to the uses of a forward pass: gradients ``[k, *output]`` at each, for vectors v.

    Inputs of the uses and v are in the parameters' dtype, and ``selection`` says which vectors are rows. A gradient is
    None where nothing depends on an output, an arrangement where an entry belongs to several examples. ``scale`` is by
    vector and example, or by example alone for all vectors, what turns the gradients into those of v. The ``cache`` has
    activations of the units, for other vectors of the same pass that lie in the same way; ``decided`` is as of a
    `Watched`.
    """

    uses: Sequence[Use]
    gradients: Sequence[Tensor | None]
    arrangements: Sequence[Arrangement | None]
    v: Float[Tensor, "k B ..."]
    selection: RowSelection
    scale: Float[Tensor, "#k B 1 1"] | None = None
    cache: dict[tuple[str, ...], Any] = field(default_factory=dict)
    decided: dict[Any, Any] = field(default_factory=dict)


class Unit:
    """A parameter without a rule, whose rows take so many ``numbers``, written out; several only in ruled units.

    ``reason`` is why it is handled as it is, for `coverage`; ``without_use`` if no function was seen to use it.
    ``written`` of the numbers are kept: of a table, those that an example looks up.
    ``fold`` positions of an example are examples of their own here, each with its share of the vectors.
    """

    def __init__(self, names: tuple[str, ...], reason: str, numbers: int, *, without_use: bool = False) -> None:
        self.names, self.reason, self.numbers, self.without_use = names, reason, numbers, without_use
        self.fold, self.written = 1, numbers
        self._known = frozenset(names)

    def copied(self) -> Unit:
        """Another one, for which other choices may be made."""
        found = object.__new__(type(self))
        vars(found).update(vars(self))
        return found

    def numbers_per_example(self, vectors: int) -> int:
        """Numbers that the rows of one example take as they are kept, for so many output vectors an example."""
        return vectors * self.numbers


class RuledUnit(Unit):
    """Weight then bias, or either, under a layer rule; ``turned`` if its uses see the weight transposed.

    ``form`` is that of the uses that count, for the parts of a shared unit; None for all.

    Attributes:
        place: where the batch lies in its uses, in words.
        shape: positions, inputs and outputs ``(T, I, O)`` of a unit that can be kept factored; None for others.
        inputs: numbers that one example's activations take, patches being made when asked for.
        stored: write the rows out instead of keeping the two factors.
        viewed: whether its uses see a view of the weight with another first axis, whose factors are not the weight's.
    """

    def __init__(
        self, names: tuple[str, ...], rule: Rule, numbers: int, form: Form | None = None, *, turned: bool = False
    ) -> None:
        super().__init__(names, "", numbers)
        self.rule, self.form, self.turned = rule, form, turned
        self.place = ""
        self.shape: tuple[int, int, int] | None = None
        self.inputs = 0
        self.stored = self.viewed = False
        self._none: UnitRows = StoredRows(torch.zeros(0, numbers))

    def of(self, uses: Sequence[Use]) -> list[int]:
        """The places of those uses of a forward pass that belong to this unit."""
        own, form = self._known, self.form
        return [
            i for i, use in enumerate(uses) if not own.isdisjoint(use.names) and (form is None or form == form_of(use))
        ]

    @property
    def rule_name(self) -> str:
        """Of its rule, for `coverage`."""
        return self.rule.name

    def _restricted(self, use: Use) -> Use:
        """A use as if only the unit's parameters were chosen."""
        if use.names == self.names:
            return use
        weight, bias = (None if isinstance(one, str) and one not in self.names else one for one in use.sources)
        return use if (weight, bias) == use.sources else replace(use, weight=weight, bias=bias)

    def made(self, pulled: Pulled) -> UnitSlot | None:
        """The unit's rows in a batch; None where an entry of a use belongs to several examples."""
        uses, v, selection = pulled.uses, pulled.v, pulled.selection
        plain = pulled.decided.get(self.names)
        if plain is not None and (gradient := pulled.gradients[plain[0]]) is not None:
            return self._made_plainly(pulled, uses[plain[0]], plain[1], gradient)
        own = self.of(uses)
        if not own:
            none = torch.zeros(selection.batch, 1, dtype=torch.bool, device=v.device)
            zeros = self.zeros(len(selection.owner), selection.batch, selection.example, v)
            return UnitSlot(self.names, zeros, none)
        places = [one for i in own if (one := pulled.arrangements[i]) is not None]
        if len(places) < len(own):
            return None
        entries = [self._entries(uses[i], pulled.gradients[i], v) for i in own]
        key = self.names if self.form is None else (*self.names, repr(self.form[1:]), str(id(self.rule)))
        a, use = pulled.cache.get(key), self._restricted(uses[own[0]])
        if a is None:
            parts = [_by_example(self.rule.activations(uses[i]), one) for i, one in zip(own, places, strict=True)]
            # Several uses of one weight are positions of one use.
            a = parts[0] if len(parts) == 1 else torch.cat([part[:] for part in parts], 1)
            pulled.cache[key] = a
        if self.stored and len(v) == len(own) == 1 and pulled.scale is None and isinstance(a, Patches) and a.has_kernel:
            values = a.rows(entries[0][0], bias=use.bias is not None)
            return UnitSlot(self.names, StoredRows(selection.take(values.unsqueeze(0))))
        found = [one.arranged(g) for g, one in zip(entries, places, strict=True)]
        g = found[0] if len(found) == 1 else torch.cat(found, 2)
        g = g if pulled.scale is None else g * pulled.scale
        rows = self.rule.rows(use, a, selection.take(g), selection.example)
        if (self.stored or self.viewed) and isinstance(rows, FactoredRows):
            rows = StoredRows(rows.dense())
        regular = [one for one in places if isinstance(one, Regular) and one.alive is None]
        if len(regular) == len(places):
            batch, inner = regular[0].batch, regular[0].inner
            plain = len(own) == 1 and self.form is None and type(self.rule) is LinearRule and use is uses[own[0]]
            if plain and batch * inner == use.lead.numel():
                pulled.decided[self.names] = own[0], (batch, inner, -1)
            return UnitSlot(self.names, rows)
        triples = zip(places, found, entries, strict=True)
        exist = [one.exists(whole.shape[2], g.shape[2]).to(v.device) for one, whole, g in triples]
        return UnitSlot(self.names, rows, torch.cat(exist, 1))

    def _made_plainly(self, pulled: Pulled, use: Use, shape: tuple[int, int, int], gradient: Tensor) -> UnitSlot:
        """The same of a linear layer that was used once, on examples first and their positions behind: ``shape``."""
        v, a = pulled.v, pulled.cache.get(self.names)
        if a is None:
            a = pulled.cache[self.names] = use.input.detach().reshape(shape)
        g = gradient.to(v.dtype).reshape(len(v), *shape)
        g = g if pulled.scale is None else g * pulled.scale
        rows = self.rule.rows(use, a, pulled.selection.take(g), pulled.selection.example)
        if (self.stored or self.viewed) and isinstance(rows, FactoredRows):
            rows = StoredRows(rows.dense())
        return UnitSlot(self.names, rows)

    @staticmethod
    def _entries(use: Use, gradient: Tensor | None, v: Float[Tensor, "k B ..."]) -> Float[Tensor, "k E t o"]:
        """A use's output gradients; zeros where nothing depends on it, so that both sides have the same positions."""
        whole = v.new_zeros(len(v), *use.output_shape) if gradient is None else gradient.to(v.dtype)
        return use.rule.gradients(use, whole)

    def measure(self, pulled: Pulled, rows: UnitRows) -> None:
        """Learn the sizes from rows of a first pass."""
        own = self.of(pulled.uses)
        place = pulled.arrangements[own[0]]
        self.place = self.reason = "" if place is None else place.described(pulled.uses[own[0]].lead)
        self._none = rows.reordered(torch.arange(0)).compact()
        if isinstance(rows, FactoredRows):
            self.shape = rows.positions, rows.inputs + rows.bias, rows.outputs
            self.inputs = rows.numbers[0].numel() // rows.activations.shape[0]
        elif isinstance(rows, SparseRows):
            positions = sum(pulled.uses[i].lead.numel() for i in own) // rows.count
            self.written = positions * (rows.values.shape[1] + 2)

    def confirmed(self, pulled: Pulled, rows: UnitRows, weight: torch.Size) -> Unit:
        """Itself, with its sizes known; ``weight`` is the shape of its first parameter."""
        self.measure(pulled, rows)
        if isinstance(rows, FactoredRows) and weight[:1] != (rows.inputs if rows.transposed else rows.outputs,):
            self.shape, self.viewed = None, True
            self._none = StoredRows(self._none.dense())
        return self

    def zeros(self, count: int, examples: int, example: Int[Tensor, "R"] | None, like: Tensor) -> UnitRows:
        """Rows of a batch that does not use the unit, in the form of others."""
        form = self._none
        if isinstance(form, SparseRows) or (isinstance(form, SlicedRows) and not self.stored):
            return form.zeros(count, like)
        if isinstance(form, FactoredRows) and not self.stored:
            return form.zeros(count, examples, example, like)
        return StoredRows(like.new_zeros(count, form.size))

    def choose(self, vectors: int, lean: bool) -> None:
        """The cost model: keep the two factors, or write their product out.

        A product with F takes 4·T·I·O operations an example from factors and 4·M·I·O from rows written out. Writing out
        takes 2·T·M·I·O, once; from factors every Gram, solve or diagonal does it again. So rows are written out where
        T >= M, unless memory is short; then whatever has fewer numbers is kept.
        """
        if self.shape is None:
            return
        t, i, o = self.shape
        t, vectors = max(1, t // self.fold), vectors // self.fold
        pair, product = t * (i + vectors * o), vectors * i * o
        smaller, faster = pair > product, t > 1 and t >= vectors and not lean
        self.stored = smaller or faster
        sign = ">" if smaller else "<="
        why = f"T(I + M·O) = {pair:,} {sign} M·I·O = {product:,}"
        self.reason = f"{self.place}; {f'T = {t:,} >= M = {vectors:,}' if faster else why}"

    def numbers_per_example(self, vectors: int) -> int:
        """As in `Unit`; the activations are shared by an example's rows."""
        if self.shape is None or self.stored:
            return vectors * self.written
        t, _, o = self.shape
        return self.inputs + vectors // self.fold * t * o

    def differs(self, use: Use) -> bool:
        """Whether a use is not of the form that was verified."""
        # A use's other parameters have units of their own.
        own = use.names == self.names or tuple(name for name in use.names if name in self._known) == self.names
        return not own or use.rule is not self.rule or not use.plain or use.turned != self.turned


class SharedUnit(RuledUnit):
    """One parameter under several rules, or beside several others: its row is the sum of what each brings."""

    def __init__(self, name: str, forms: Sequence[Form], numbers: int) -> None:
        super().__init__((name,), forms[0][0], numbers)
        self.parts = [RuledUnit((name,), form[0], numbers, form) for form in forms]

    @property
    def rule_name(self) -> str:
        return " + ".join(dict.fromkeys(part.rule.name for part in self.parts))

    def made(self, pulled: Pulled) -> UnitSlot | None:
        """As in `RuledUnit`; a part that the batch does not use has rows of zeros."""
        found = [part.made(pulled) for part in self.parts]
        made = [slot.rows for slot in found if slot is not None]
        if len(made) < len(found):
            return None
        rows = SumRows.of(made)
        return UnitSlot(self.names, StoredRows(rows.dense()) if self.stored else rows)

    def measure(self, pulled: Pulled, rows: UnitRows) -> None:
        nothing = replace(pulled, gradients=[None] * len(pulled.uses))
        for part in self.parts:
            slot = part.made(nothing)
            if slot is not None:
                part.measure(pulled, slot.rows)
        self.place = self.reason = f"the sum of {len(self.parts)} uses' rows; {self.parts[0].place}"

    def choose(self, vectors: int, lean: bool) -> None:
        """Keep the parts, or write the sum out if that takes fewer numbers."""
        apart, product = sum(part.numbers_per_example(vectors) for part in self.parts), vectors * self.numbers
        self.stored = apart > product
        self.reason = f"{self.place}; {apart:,} {'>' if self.stored else '<='} M·D = {product:,}"

    def numbers_per_example(self, vectors: int) -> int:
        return vectors * self.numbers if self.stored else sum(part.numbers_per_example(vectors) for part in self.parts)

    def differs(self, use: Use) -> bool:
        return all(part.form != form_of(use) for part in self.parts)


class DerivedUnit(RuledUnit):
    """Parameters of which something was made before it met data: rows of that by its function's rule, pulled back."""

    def __init__(self, sizes: Mapping[str, int], rules: Sequence[Rule]) -> None:
        super().__init__(tuple(sizes), rules[0], sum(sizes.values()))
        self.sizes, self.rules = dict(sizes), tuple(rules)

    def made(self, pulled: Pulled) -> UnitSlot | None:
        """As in `RuledUnit`; rows are sums over all that was made."""
        own = self.of(pulled.uses)
        if not own:
            return super().made(pulled)
        totals: dict[str | Derived, Tensor] = {}
        for i in own:
            use = pulled.uses[i]
            seen = replace(use, turned=use.turned and isinstance(use.weight, str))
            unit = RuledUnit(use.names, use.rule, 0)
            alone = (seen,), (pulled.gradients[i],), (pulled.arrangements[i],)
            one = unit.made(Pulled(*alone, pulled.v, pulled.selection, pulled.scale))
            if one is None:
                return None
            places = zip(use.sources, (use.rule.weight_name, use.rule.bias_name), strict=True)
            chosen = [(source, use.arguments[name].numel()) for source, name in places if source is not None]
            parts = one.rows.dense().split([size for _, size in chosen], 1)
            for (source, _), part in zip(chosen, parts, strict=True):
                totals[source] = totals[source] + part if source in totals else part
        found: dict[str, Tensor] = {}
        for source, total in totals.items():
            for name, part in ({source: total} if isinstance(source, str) else source.pulled(total)).items():
                found[name] = found[name] + part if name in found else part
        like = next(iter(found.values()))
        every = [found.get(name, like.new_zeros(len(like), size)) for name, size in self.sizes.items()]
        return UnitSlot(self.names, StoredRows(torch.cat(every, 1)))

    def differs(self, use: Use) -> bool:
        """Whether a use is under a rule that was not verified, or makes something with other parameters."""
        return use.rule not in self.rules or not set(use.names) <= set(self.names)

    def measure(self, pulled: Pulled, rows: UnitRows) -> None:
        super().measure(pulled, rows)
        self.reason = f"{self.place}; through a function of parameters"


class SlicedUnit(RuledUnit):
    """A parameter of which each position uses one slice: factors for every slice, or what is summed up by slice.

    Attributes:
        apart: numbers that an example's rows take, those of the inputs and those of each vector.
    """

    apart = (0, 0)

    def made(self, pulled: Pulled) -> UnitSlot | None:
        uses, v, selection = pulled.uses, pulled.v, pulled.selection
        own = self.of(uses)
        if not own:
            return super().made(pulled)
        inputs, arrived, index, owner = [], [], [], []
        for i in own:
            use, one = uses[i], pulled.arrangements[i]
            if one is None or use.slices is None:
                return None
            g = self._entries(use, pulled.gradients[i], v)
            each = g.shape[2]
            arrived.append(g.flatten(1, 2))
            inputs.append(use.rule.activations(use)[:].flatten(0, 1))
            index.append(use.slices.expand(use.lead).flatten().repeat_interleave(each))
            owner.append(one.owners(g.shape[1]).to(v.device).repeat_interleave(each))
        which, whose = torch.cat(index), torch.cat(owner)
        g, a = (torch.cat(arrived, 1), torch.cat(inputs)) if len(own) > 1 else (arrived[0], inputs[0])
        used = (which >= 0) & (whose >= 0)
        if not bool(used.all()):
            some = used.nonzero().squeeze(1)
            g, a, which, whose = g[:, some], a[some], which[some], whose[some]
        if pulled.scale is not None:
            g = g * pulled.scale[:, whose, 0]
        use = self._restricted(uses[own[0]])
        if isinstance(use.rule, LinearRule) and use.weight is not None:
            known = pulled.cache.setdefault(self.names, {})
            rows: UnitRows = SlicedRows.gathered(
                a, g, which, whose, selection, self.numbers // (a.shape[1] * g.shape[2]),
                transposed=use.rule.transposed != self.turned, cache=known,
            )  # fmt: skip
        else:
            values = use.rule.rows(use, a.unsqueeze(1), g.transpose(0, 1).flatten(0, 1).unsqueeze(1), None).dense()
            rows = _tabled(values.unflatten(0, (-1, len(v))), which, whose, selection, self.numbers // values.shape[1])
        return UnitSlot(self.names, StoredRows(rows.dense()) if self.stored else rows)

    def measure(self, pulled: Pulled, rows: UnitRows) -> None:
        own = self.of(pulled.uses)
        place = pulled.arrangements[own[0]]
        self.place = "" if place is None else f"slices {place.described(pulled.uses[own[0]].lead)}"
        self._none = rows.reordered(torch.arange(0)).compact()
        positions = -(-sum(pulled.uses[i].lead.numel() for i in own) // rows.count)
        if isinstance(rows, SlicedRows):
            self.apart = positions * rows.none.inputs, positions * rows.none.outputs
        elif isinstance(rows, SparseRows):
            self.apart = 0, positions * (rows.values.shape[1] + 2)

    def choose(self, vectors: int, lean: bool) -> None:
        """Keep what each position brings, or write the rows out if that takes fewer numbers."""
        apart, product = self.apart[0] + vectors * self.apart[1], vectors * self.numbers
        self.stored = apart > product
        self.reason = f"{self.place}; T(I + M·O) = {apart:,} {'>' if self.stored else '<='} M·D = {product:,}"

    def numbers_per_example(self, vectors: int) -> int:
        return vectors * self.numbers if self.stored else self.apart[0] + vectors * self.apart[1]

    def differs(self, use: Use) -> bool:
        return use.slices is None or use.rule is not self.rule or use.turned != self.turned


def _tabled(
    values: Float[Tensor, "n k E"], which: Int[Tensor, "n"], whose: Int[Tensor, "n"], selection: RowSelection,
    slices: int,
) -> SparseRows:  # fmt: skip
    """Rows of a table from a summand for each position and vector, its place and its example."""
    vectors, device = values.shape[1], values.device
    slots = torch.arange(vectors * selection.batch, device=device)
    chosen = selection.take(slots.reshape(vectors, -1))
    row = torch.full_like(slots, -1)
    row[chosen] = torch.arange(len(chosen), device=device)
    row = row.reshape(vectors, -1).mT[whose].flatten()
    kept = row >= 0
    token = which.repeat_interleave(vectors)
    return SparseRows.summed(row[kept], token[kept], values.flatten(0, 1)[kept], count=len(chosen), vocabulary=slices)


def form_of(use: Use) -> Form:
    """A use's rule, weight and bias, and whether it sees the weight transposed."""
    return use.rule, *use.sources, use.turned


def _by_example(x: Activations, arrangement: Arrangement) -> Activations:
    """Entries ``[E, t, i]`` as ``[B, T, i]``; patches are made only where they are not neighbours."""
    if isinstance(arrangement, Regular) and arrangement.batch * arrangement.inner == x.shape[0]:
        inner = arrangement.inner
        if inner == 1:
            return x
        if isinstance(x, Patches):
            return x.grouped(inner)
    return arrangement.arranged(x[:].unsqueeze(0)).squeeze(0)
