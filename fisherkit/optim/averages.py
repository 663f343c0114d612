"""The Fisher of recent steps in a structure: sums of a step's rows, averaged with what was before.

The records that outlive a step are all that a file must hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisherkit.arithmetic import all_finite, at_least_single, overflow
from fisherkit.errors import listed
from fisherkit.operators import Factorization, FisherOperator
from fisherkit.operators.damping import check_damping
from fisherkit.operators.linalg import checked_together
from fisherkit.processes import ALONE, Processes
from fisherkit.rows.chunks import Chunk
from fisherkit.rows.plan import Plan
from fisherkit.space import ParameterSpace
from fisherkit.structures import LayerSums, Structure, UnitSums, record_class
from fisherkit.structures.base import Names

_OLD = {"activation_values": "kfac", "matrix": "exact block", "diagonal": "exact diagonal"}
"""By what tensor older states are told, which name no record."""

FLOOR = torch.finfo(torch.float32).tiny ** 0.5
"""Of a damping that follows F's scale: its reciprocal leaves room for gradients in float32."""


@dataclass(frozen=True)
class LayerDamping:
    """λ of each layer as a multiple of its block's mean eigenvalue: λₗ = scale · trace(Fₗ) / Dₗ.

    A step then looks the same at whatever scale a layer's F is, which differs by orders of magnitude between layers and
    while a model is trained. For the optimizers of this package with structures of layers; everything else refuses it.

    Args:
        scale: the multiple, not negative.
    """

    scale: float

    def __post_init__(self) -> None:
        """Check the scale."""
        check_damping(self.scale, "LayerDamping")

    def factorize(self, operator: FisherOperator) -> list[Factorization]:
        """(Fₗ + λₗI)⁻¹ of each block; λₗ is 1 as long as Fₗ is 0."""
        blocks = operator._blocks()
        traces = torch.stack([block._trace() for block in blocks]).tolist()
        means = (trace / block.size for trace, block in zip(traces, blocks, strict=True))
        dampings = (max(self.scale * mean, FLOOR) if mean > 0 else 1.0 for mean in means)
        return [block.factorize(own) for block, own in zip(blocks, dampings, strict=True)]


class Averages:
    """F in a structure of layers, averaged over updates: Σ_k emaᵏ F_k / Σ_k emaᵏ, F_k of the batch k updates ago.

    The sums begin, for each layer, with the first update that used it, whose batch has no more weight than its age
    gives it (bias correction, as in Adam). In a later update that does not use the layer, its F_k is 0. Kronecker
    factors are averaged one by one, as is usual; that of a layer's inputs, whose examples are counted, over the updates
    that used it. An eigenbasis is renewed every ``refresh_every`` updates.
    ``settings`` are the structure's; ``records`` are by unit and label, ``ages`` say how many updates each has been in,
    and ``latest`` are those that the last update had rows for.
    """

    def __init__(self, structure: type[Structure], *, ema: float, refresh_every: int, **settings: Any) -> None:
        self.structure, self.ema, self.refresh_every = structure, ema, refresh_every
        self.settings = {**settings, "averaged": ema > 0}
        self.records: dict[tuple[Names, str], UnitSums] = {}
        self.ages: dict[tuple[Names, str], int] = {}
        self.latest: list[tuple[Names, str]] = []
        self.updates = 0
        self._space: tuple[ParameterSpace, ParameterSpace] | None = None

    def update(
        self, plan: Plan, space: ParameterSpace, chunks: Sequence[Chunk], examples: int,
        processes: Processes = ALONE, *, large: bool = False, call: str = "update",
    ) -> None:  # fmt: skip
        """With the rows of a batch of N examples, of which each of some processes has a part, over all parameters.

        Where squares of ``large`` rows are too large for their dtype, it refuses and leaves the averages as they were.
        """
        structure = replace(self.structure.of(plan, **self.settings, processes=processes), space=space)
        due = self.updates % self.refresh_every == 0
        ema = {key: self.ema * (1 - self.ema**n) / (1 - self.ema ** (n + 1)) for key, n in self.ages.items()}
        records: dict[tuple[Names, str], UnitSums] = {}
        sums: Any = structure.empty()
        with checked_together():  # all factors' decompositions with one wait for the device
            while sums is not None:
                added: LayerSums = sums.added(chunks)
                found = processes.all_reduced(added).averaged(self.records, ema, 1 / examples, due)
                records |= {(names, unit.label): unit for names, unit in found.units.items() if unit.label}
                sums = structure.next_pass(found)
        if large:
            _refuse_infinite(records, call, plan.dtype)
        self.latest, named = list(records), {name for names, _ in records for name in names}
        for key, known in self.records.items():  # of layers that this model's passes have not met yet
            if self.ema > 0 and named.isdisjoint(key[0]):
                records[key] = known.scaled(ema[key])
        self.ages = {key: self.ages.get(key, 0) + 1 for key in records}
        self.records, self._space = records, None
        self.updates += 1

    def operator(self, space: ParameterSpace, like: Tensor) -> FisherOperator:
        """F over the parameters of the last update; ``like`` has the rows' dtype and device."""
        structure = self.structure(space, like.dtype, like.device, (), **self.settings)
        last = {key[0]: self.records[key] for key in self.latest}
        return structure.operator(LayerSums(structure, last), 1.0)  # type: ignore[arg-type]  # a structure of layers

    def space(self, whole: ParameterSpace) -> ParameterSpace:
        """The parameters of the last update."""
        if self._space is None or self._space[0] is not whole:
            self._space = whole, whole.restrict(name for names, _ in self.latest for name in names)
        return self._space[1]

    def state(self) -> list[dict[str, Any]]:
        """Of each record, its unit's names, its label, in how many updates it has been, and its tensors."""
        return [
            {"names": list(key[0]), "record": key[1], "updates": self.ages[key], "tensors": unit.tensors()}
            for key, unit in self.records.items()
        ]

    def read(
        self, state: Sequence[Mapping[str, Any]], own: Mapping[str, Tensor], updates: int
    ) -> dict[tuple[Names, str], tuple[UnitSums, int]]:
        """The records of a `state` and their ages, on the devices of the model's own parameters; none is put in place.

        Those of a state that says no ages have been in all ``updates``.
        """
        records: dict[tuple[Names, str], UnitSums] = {}
        ages: dict[tuple[Names, str], int] = {}
        for entry in state:
            names, device = tuple(entry["names"]), own[entry["names"][0]].device
            tensors = {
                key: (value.to(device) if value.is_floating_point() else value).clone()
                for key, value in entry["tensors"].items()
            }
            label = entry["record"] if "record" in entry else self._old_label(tensors)
            before: UnitSums | None = None
            for one in (label, "ekfac") if label == "kfac" and "values" in tensors else (label,):
                before = records[names, one] = record_class(one).from_tensors(
                    tensors, before or records.get((names, "kfac"))
                )
                ages[names, one] = int(entry.get("updates", updates))
        for (names, _), record in records.items():
            _check(record, ParameterSpace(names, tuple(tuple(own[name].shape) for name in names)), own[names[0]])
        return {key: (record, ages[key]) for key, record in records.items()}

    def put(self, known: Mapping[tuple[Names, str], tuple[UnitSums, int]], updates: int) -> None:
        """Go on from what was read, after so many updates."""
        self.records = {key: record for key, (record, _) in known.items()}
        self.ages = {key: age for key, (_, age) in known.items()}
        self.latest, self.updates, self._space = list(known), updates, None

    def _old_label(self, tensors: Mapping[str, Tensor]) -> str:
        """The record of a state that names none."""
        if self.structure.name == "diagonal":
            return "diagonal"
        return next(label for key, label in _OLD.items() if key in tensors)


def _refuse_infinite(records: Mapping[tuple[Names, str], UnitSums], call: str, dtype: torch.dtype) -> None:
    """Refuse sums of squares that are too large for the dtype."""
    tensors = {names: tuple(unit.tensors().values()) for (names, _), unit in records.items()}
    if not all_finite(*(tensor for own in tensors.values() for tensor in own)):
        infinite = (names for names, own in tensors.items() if not all_finite(*own))
        raise overflow(call, listed(map(repr, infinite)), dtype)


def _check(record: UnitSums, space: ParameterSpace, like: Tensor) -> None:
    """ValueError, or what a product raises, unless a record is of these parameters and finite."""
    columns = torch.zeros(space.size, 1, dtype=at_least_single(like.dtype), device=like.device)
    operator = record.operator(space, 1.0)
    if operator.dtype != columns.dtype or operator._matmat(columns).shape != columns.shape:
        raise ValueError(f"averages of {', '.join(space.names)} in another dtype or of another shape")
    require_finite(f"averages of {', '.join(space.names)}", record.tensors().values())


def require_finite(what: str, tensors: Iterable[Tensor]) -> None:
    """ValueError unless all entries of a state's tensors are finite."""
    if not all_finite(*tensors):
        raise ValueError(f"{what} with NaN or infinite entries")
