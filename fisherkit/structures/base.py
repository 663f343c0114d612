"""The contract of a structure: what a pass over rows adds up, and the operator that it becomes.

A structure is one object for everyone who adds rows up: a build, which reads the data once or more, and an optimizer,
which averages the sums of its steps. It knows neither kinds nor N; whoever counted the examples passes the scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from fisherkit.arguments import check_choice
from fisherkit.errors import InvalidArgumentError, ProcessError, listed
from fisherkit.operators import BlockDiagonalOperator, FisherOperator
from fisherkit.operators.forwarding import packed
from fisherkit.operators.linalg import checked_together
from fisherkit.operators.low_rank import UNBOUNDED
from fisherkit.operators.persistence import is_own, subclasses
from fisherkit.processes import ALONE, Processes
from fisherkit.rows.base import UnitRows
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.rows.plan import Plan
from fisherkit.rows.problem import Problem
from fisherkit.space import ParameterSpace

Names = tuple[str, ...]

A = TypeVar("A", bound="Added")
S = TypeVar("S", bound="Sums")
T = TypeVar("T", bound="Structure")
U = TypeVar("U", bound="UnitSums")


_BY_NAME: dict[str, type[Structure]] = {}


class Part(NamedTuple):
    """What became of some parameters: their own operator, and for `coverage` its structure and the reason.

    ``make`` makes the operator, of so many bytes; ``of_rows`` says that the reason begins with that of how the
    unit's rows are stored.
    """

    make: Callable[[], FisherOperator]
    nbytes: int
    structure: str
    reason: str
    of_rows: bool = False

    @classmethod
    def of(cls, operator: FisherOperator, structure: str, reason: str, *, of_rows: bool = False) -> Part:
        """With an operator that is there."""
        return cls(lambda: operator, operator.nbytes, structure, reason, of_rows)

    @property
    def operator(self) -> FisherOperator:
        """Their own operator."""
        return self.make()


Parts = dict[Names, Part]
"""The part of each group of parameters that was handled as one."""


@dataclass(frozen=True)
class Added(ABC):  # noqa: B024  # subclasses have abstract methods
    """What has been added up, frozen: every method returns a new one; what adding or an operator took is spent.

    A Fisher is linear in each field but `constant`.
    Rows are scaled by the weight's root, and integers, which count, not at all.
    """

    constant: ClassVar[tuple[str, ...]] = ()
    """Fields that scaling and merging leave as they are."""

    def scaled(self: A, weight: float) -> A:
        """Of ``weight`` times the Fisher."""
        return replace(self, **{name: _scaled(getattr(self, name), weight) for name in self._linear})

    def merge(self: A, other: A) -> A:
        """Of the sum of both Fishers: with what another pass, step or process added up."""
        return replace(self, **{name: _merged(getattr(self, name), getattr(other, name)) for name in self._linear})

    def all_reduced(self: A, processes: Processes) -> A:
        """Of what all processes have added up, each of the same form; every process of the group must ask for it."""
        return replace(self, **{name: _all_reduced(getattr(self, name), processes) for name in self._linear})

    @property
    def _linear(self) -> list[str]:
        return [f.name for f in fields(self) if f.name not in self.constant]


def _scaled(value: Any, weight: float) -> Any:
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        return {key: _scaled(one, weight) for key, one in value.items()}
    if isinstance(value, Rows):
        return value.scaled(weight**0.5)
    return weight * value if isinstance(value, (float, Tensor)) else value.scaled(weight)


def _merged(a: Any, b: Any) -> Any:
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, Mapping):
        return {**a, **{key: _merged(a.get(key), one) for key, one in b.items()}}
    if isinstance(a, Rows):
        return Rows.cat([a, b])
    return a + b if isinstance(a, (int, float, Tensor)) else a.merge(b)


def _all_reduced(value: Any, processes: Processes) -> Any:
    if isinstance(value, Mapping):
        return everywhere(value, processes)
    if isinstance(value, Tensor):
        return processes.total(value)
    if isinstance(value, (int, float)):
        return type(value)(processes.total(torch.tensor(value, dtype=torch.float64, device=processes.device)))
    return None if value is None else value.all_reduced(processes)


def everywhere(units: Mapping[Names, A], processes: Processes) -> dict[Names, A]:
    """The records of all units that any process has, of what all processes have added up."""
    held = processes.gathered({names: type(unit).__name__ for names, unit in units.items()})
    found: dict[Names, A] = {}
    groups = sorted({names for one in held for names in one})
    if len(shared := [name for names in groups for name in names]) > len(set(shared)):
        raise _different(f"groups of parameters {listed(map(str, groups), 4)}")
    for names in groups:
        owners = [rank for rank, one in enumerate(held) if names in one]
        forms = {held[rank][names] for rank in owners}
        if len(forms) > 1:
            raise _different(f"records of {listed(names)} as {' and '.join(sorted(forms))}")
        unit = units.get(names)
        if len(owners) < processes.size:  # those that have none begin with nothing, of the right shapes
            sent = processes.sent_by(owners[0], unit)
            unit = sent.scaled(0.0) if unit is None else unit
        found[names] = unit.all_reduced(processes)  # type: ignore[union-attr]
    return found


def _different(got: str) -> ProcessError:
    return ProcessError(
        "adding up what processes found", got, "the same in all processes",
        why="a layer's rows were made in different ways", try_="batches of the same kind in all processes",
    )  # fmt: skip


class Sums(Added):
    """What a pass over rows adds up.

    Attributes:
        dropped: how many rows were left out.
        dropped_share: of the trace, what they had; None if none were to be.
    """

    dropped: int = 0
    dropped_share: float | None = None

    @abstractmethod
    def added(self: S, chunks: Iterable[Chunk]) -> S:
        """With more rows."""


@dataclass(frozen=True)
class Structure(ABC):
    """What to add up, and for whom. A subclass with a name of its own is registered by being defined.

    Args:
        space: the parameters.
        dtype: of the rows.
        device: of the rows.
        modules: the parameters of each module.
        token: whether every position of the outputs is an example.
        reduce: Kronecker factors from sums over shared positions instead of each position.
        max_rows: rows to keep, those of largest norm; None for all.
        max_rank: eigenpairs of a Kronecker factor to keep; None for all.
        averaged: whether the sums will be merged with those of other examples after they were decomposed.
        memory_budget: bytes.
        kept_dtype: the dtype that the operator's numbers are kept in; None for that of the rows.
        processes: that each add up a part of the data.
        expected: says about how many examples will be added up, or None where that is not known.
    """

    name: ClassVar[str] = ""
    meaning: ClassVar[str] = ""
    keeps_rows: ClassVar[bool] = False
    """Whether the operator is made of the rows themselves, so that a running average would grow without end."""
    in_steps: ClassVar[bool] = False
    """Whether optimizers can take it: averaged from step to step, or made of one step's rows where it `keeps_rows`."""
    needs_rows: ClassVar[bool] = True
    """Whether it asks rows for more than sums of squares and the sums for Kronecker factors, which a last layer of the
    exact kind has without a backward pass."""
    counts_positions: ClassVar[bool] = False
    """Whether it asks which positions outputs that count depend on, as Kronecker factors do."""
    in_parts: ClassVar[bool] = False
    """Whether layers can be handled one after the other: whether no block of the operator is of several layers."""
    packs: ClassVar[bool] = False
    """Whether the operator's numbers can be kept in a coarser dtype than they are added up in."""
    has_eigenbases: ClassVar[bool] = False
    """Whether the operator answers `eigenbases`, of layers with factors at least."""
    of_all_rows: ClassVar[bool] = False
    """Whether it is F itself between the parameters of a block: rows made for one such structure serve all of them."""
    passes: ClassVar[int] = 1
    """Over the rows, about."""
    instead: ClassVar[str] = "params= to choose fewer parameters"
    """What to try where memory is too small for it; {0} is the structure itself."""

    own: ClassVar[bool] = True
    """Whether it is the package's, which takes what its `bytes` says."""

    space: ParameterSpace
    dtype: torch.dtype
    device: torch.device
    modules: tuple[Names, ...]
    token: bool = False
    reduce: bool = False
    max_rows: int | None = None
    max_rank: int | None = None
    averaged: bool = False
    memory_budget: int = UNBOUNDED
    kept_dtype: torch.dtype | None = None
    processes: Processes = ALONE
    expected: Callable[[], int | None] = lambda: None

    def __init_subclass__(cls) -> None:
        """Register a class that has a name of its own, in the order of definition."""
        super().__init_subclass__()
        if vars(cls).get("name"):
            own = _BY_NAME.get(cls.name)
            if own is not None and is_own(own) and not is_own(cls):
                raise InvalidArgumentError(
                    f"class {cls.__name__}", f"name = {cls.name!r}", "a name that no structure of the package has",
                    why="strings, files and commands would mean another matrix by it",
                )  # fmt: skip
            _BY_NAME[cls.name] = cls
        cls.own = is_own(cls)

    @classmethod
    def of(cls: type[T], plan: Plan, **settings: Any) -> T:
        """The structure for a plan's parameters."""
        return cls(plan.space, plan.dtype, plan.example_parameter.device, plan.modules, **settings)

    def bytes(self, problem: Problem) -> int:
        """What the operator takes, before anything is computed; ``problem`` knows the examples and their rows' size."""
        return self.kept_item * self.space.size

    def peak(self, problem: Problem) -> int:
        """What adding up and the operator take at most, the operator included: by default, both whole."""
        return self.bytes(problem) + self.bytes(problem) * self.item // self.kept_item

    def summed(self, problem: Problem) -> int:
        """What is held of it during a pass, at most."""
        return self.peak(problem)

    def fitted(self, problem: Problem) -> int:
        """The same, once it is chosen how rows are kept so that they fit."""
        return self.bytes(problem)

    def most_examples(self, problem: Problem) -> int | None:
        """How many examples' rows may exist at once; None for as many as a pass likes."""
        return None

    @abstractmethod
    def empty(self, problem: Problem | None = None) -> Sums:
        """Where adding begins; ``problem`` as in `bytes`, None where rows are those of one step."""

    def next_pass(self, sums: Any) -> Sums | None:
        """Where the next pass over the same rows begins; None if ``sums`` are all that is needed."""
        return None

    @abstractmethod
    def operator(self, sums: Any, scale: float) -> FisherOperator:
        """``scale`` (1/N, or 1) times what was added up, after the last pass."""

    @abstractmethod
    def parts(self, sums: Any, operator: Any) -> Parts:
        """What became of each group of parameters in the operator of the sums, in the space's order."""

    @property
    def groups(self) -> tuple[Names, ...]:
        """The parameters of each block of rows."""
        return (self.space.names,)

    @property
    def streams(self) -> bool:
        """Whether rows that do not fit are made anew for every product."""
        return False

    @property
    def item(self) -> int:
        """Bytes of a number of the sums."""
        return torch.finfo(self.dtype).bits // 8

    @property
    def kept_item(self) -> int:
        """Bytes of a number of the operator."""
        return self.item if self.kept_dtype is None else min(self.item, torch.finfo(self.kept_dtype).bits // 8)


# -- structures that treat layers one by one ---------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitSums(Added):
    """What is added up of one unit (a weight with its bias, or one parameter): a frozen record of tensors and numbers.

    A subclass says which operator it becomes.
    """

    label: ClassVar[str]
    """In `coverage`, and in optimizers' states; "" of what is neither averaged nor kept."""
    reason: ClassVar[str] = ""

    @abstractmethod
    def operator(self, space: ParameterSpace, scale: float) -> FisherOperator:
        """``scale`` times the Fisher over the unit's parameters."""

    def added(self, slot: UnitSlot, chunk: Chunk, structure: LayerStructure) -> UnitSums:
        """With the unit's rows of a chunk."""
        return self.merge(structure.record(slot.rows))

    def grown(self, slot: UnitSlot, chunk: Chunk, structure: LayerStructure) -> UnitSums:
        """As `added`, of a record that nobody else has, so that it may be written to."""
        return self.added(slot, chunk, structure)

    def averaged(self, known: Any, ema: float, weight: float) -> UnitSums:
        """ema · ``known`` + (1 − ema) · weight · self; weight · self where ``known`` is None. The weight is 1/N."""
        if known is None:
            return self.scaled(weight)
        average: UnitSums = known.scaled(ema).merge(self.scaled((1 - ema) * weight))
        return average

    @property
    def decomposition_cost(self) -> float:
        """About how many operations `eigenpairs` takes; 0 of records that keep none."""
        return 0.0

    def eigenpairs(self, known: Any, due: bool, rank: int | None) -> Any:
        """Those that `operator` needs, of records that keep them from step to step as ``spectra``.

        Args:
            known: the record before.
            due: whether it is time for new ones.
            rank: how many to keep of a factor; None for all.

        Raises:
            LookupError: the record keeps none.
        """
        raise LookupError(f"a record of {type(self).__name__} keeps none")

    def tensors(self) -> dict[str, Tensor]:
        """What a file must hold; `from_tensors` takes it back."""
        return {f.name: torch.as_tensor(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_tensors(cls: type[U], tensors: Mapping[str, Tensor], before: UnitSums | None) -> U:
        """The inverse of `tensors`; ``before`` is the unit's record of an earlier pass."""
        return cls(**tensors)


@dataclass(frozen=True)
class LayerSums(Sums):
    """A record of each unit; ``done`` are those of units that need no other pass, None in the first pass."""

    constant = ("structure",)

    structure: LayerStructure
    units: Mapping[Names, UnitSums] = field(default_factory=dict)
    done: Mapping[Names, UnitSums] | None = None

    def added(self, chunks: Iterable[Chunk]) -> LayerSums:
        """With more rows; in a later pass, with those of the units that need it."""
        units = dict(self.units)
        for chunk in chunks:
            for slot in chunk.rows.slots:
                known = units.get(slot.names)
                if known is not None:
                    add = known.added if known is self.units.get(slot.names) else known.grown
                    units[slot.names] = add(slot, chunk, self.structure)
                elif self.done is None:
                    units[slot.names] = self.structure.start(slot, chunk)
            del chunk, slot  # not to be held while the next rows are made
        return replace(self, units=units)

    def all_reduced(self, processes: Processes) -> LayerSums:
        """Of what all processes added up in this pass; after the first they have the same units."""
        if self.done is None:
            return replace(self, units=everywhere(self.units, processes))
        return replace(self, units={names: unit.all_reduced(processes) for names, unit in self.units.items()})

    @property
    def whole(self) -> dict[Names, UnitSums]:
        """The records of all units, in the space's order."""
        place = self.structure.space.names.index
        return dict(sorted({**(self.done or {}), **self.units}.items(), key=lambda unit: place(unit[0][0])))

    def averaged(
        self, known: Mapping[tuple[Names, str], UnitSums], ema: Mapping[tuple[Names, str], float], weight: float,
        due: bool,
    ) -> LayerSums:  # fmt: skip
        """Each record averaged with the one before, by unit and label, and decomposed; not those labelled "".

        Of several processes, each decomposes some and sends the eigenpairs, which are then the same in all.
        """
        old = {names: known.get((names, unit.label)) for names, unit in self.units.items() if unit.label}
        units = dict(self.units)
        for names, before in old.items():
            own = ema.get((names, units[names].label), 0.0)
            units[names] = units[names].averaged(before if own > 0 else None, own, weight)

        def pairs(names: Names) -> Any:
            return units[names].eigenpairs(old[names], due, self.structure.max_rank)

        costs = {names: cost for names in old if (cost := units[names].decomposition_cost)}
        new = {names: cost for names, cost in costs.items() if due or old[names] is None}
        sent = self.structure.processes.shared_out(new, pairs)
        for names in costs:
            spectra = sent[names] if names in sent else pairs(names)
            units[names] = replace(units[names], spectra=spectra)  # type: ignore[call-arg]  # who has a cost has these
        return replace(self, units=units)


class LayerStructure(Structure):
    """A structure whose sums are one record for each unit, and whose operator is block-diagonal over units."""

    in_steps = True

    def summed(self, problem: Problem) -> int:
        """One record of each unit: of as many numbers as the operator has."""
        return self.bytes(problem) * self.item // self.kept_item

    @abstractmethod
    def record(self, rows: UnitRows) -> UnitSums:
        """What is added up of some rows of a unit."""

    def start(self, slot: UnitSlot, chunk: Chunk) -> UnitSums:
        """The record of a unit's first rows."""
        return self.record(slot.rows)

    def empty(self, problem: Problem | None = None) -> LayerSums:
        return LayerSums(self)

    def operator(self, sums: LayerSums, scale: float) -> FisherOperator:
        """A block a unit."""
        return BlockDiagonalOperator(self.space, [self._block(n, u, scale) for n, u in sums.whole.items()])

    def _block(self, names: Names, unit: UnitSums, scale: float) -> FisherOperator:
        if self.kept_dtype is None:
            return unit.operator(self.space.restrict(names), scale)
        with checked_together(alone=True):  # so that nothing keeps the wide form
            return packed(unit.operator(self.space.restrict(names), scale), self.kept_dtype)

    def parts(self, sums: LayerSums, operator: Any) -> Parts:
        units = zip(sums.whole.items(), operator.blocks, strict=True)
        return {names: Part.of(block, unit.label, unit.reason) for (names, unit), block in units}


# -- by name -----------------------------------------------------------------------------------------------------------


def structures() -> dict[str, type[Structure]]:
    """All structures by name, the package's own first and then those that were defined elsewhere."""
    return dict(_BY_NAME)


def structure_named(name: object, call: str) -> type[Structure]:
    """The structure of a name."""
    known = structures()
    check_choice(call, "structure", name, list(known))
    return known[cast(str, name)]


def record_class(label: str) -> type[UnitSums]:
    """The class of records with a label; a LookupError where there is none."""
    return {cls.label: cls for cls in subclasses(UnitSums) if "label" in vars(cls)}[label]
