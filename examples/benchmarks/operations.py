"""What is measured: operations, the agreement each asks for, and the targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from examples.benchmarks import by_hand, ours, peer_backpack, peer_curvlinops, peer_nngeometry
from examples.benchmarks.contestants import Case, Contestant

AGREEMENT = 1e-3
"""Relative error that float32 explains; the default bound."""

PEERS: dict[str, Callable[[Case], dict[str, Contestant]]] = {
    module.NAME: module.contestants for module in (peer_curvlinops, peer_nngeometry, peer_backpack, by_hand)
}
"""Libraries in the order of the tables' columns."""


@dataclass(frozen=True)
class Target:
    """What fisherkit should reach on one workload.

    Args:
        ratio: time of the best peer over ours, at least.
        units: time in units of one gradient, at most.
        against: the peers that count; empty for all that were measured.
    """

    ratio: float | None = None
    units: float | None = None
    against: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = []
        if self.ratio is not None:
            parts.append(f"≥ {self.ratio:g}×" + (f" {', '.join(self.against)}" if self.against else ""))
        if self.units is not None:
            parts.append(f"≤ {self.units:g} u")
        return ", ".join(parts)


@dataclass(frozen=True)
class Operation:
    """One line of the tables.

    Args:
        title: for readers; "rows at hand" in it means that building is not timed.
        targets: by workload.
        bounds: relative errors allowed by name of value, where not `AGREEMENT`.
        why: why a bound is what it is.
        wide: whether it is measured where a layer is as wide as a vocabulary: not if a peer decomposes its factor.
    """

    title: str
    targets: Mapping[str, Target] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    wide: bool = True


def _targets(w1: Target, w2: Target, w3: Target) -> dict[str, Target]:
    return {"W1": w1, "W2": w2, "W3": w3}


def _against(*peers: str) -> Callable[..., Target]:
    return lambda ratio, units=None: Target(ratio, units, peers)


_curvlinops, _nngeometry, _by_hand = _against("curvlinops"), _against("nngeometry"), _against("torch.func")
_layerwise, _diagonals = _against("curvlinops", "nngeometry", "BackPACK"), _against("nngeometry", "BackPACK")
_EXACT = _targets(_curvlinops(1.7), _curvlinops(1.5), _curvlinops(1.5))
_CACHED = _targets(_curvlinops(3.5, 0.8), _curvlinops(20, 0.12), _curvlinops(5, 0.45))

OPERATIONS: dict[str, Operation] = {
    "ef_product_cached": Operation("EF product, rows at hand", _CACHED),
    "ief_product_cached": Operation(
        "iEF product, rows at hand", {name: Target(units=target.units) for name, target in _CACHED.items()}
    ),
    "sf_product_cached": Operation("SF product, rows at hand", _CACHED),
    "ef_product": Operation("EF build and first product", _targets(Target(2), Target(1.5), Target(1.5))),
    "ef_token_product": Operation("EF build and first product, every token an example"),
    "exact_product": Operation("exact product", _EXACT),
    "exact_product_unkept": Operation("exact product, no rows kept", _EXACT),
    "exact_product_cached": Operation("exact product, rows at hand"),
    "exact_product_streamed": Operation("exact product, streamed again"),
    "ef_diagonal": Operation("EF diagonal", _targets(_diagonals(2), _diagonals(2), _diagonals(2))),
    "exact_diagonal": Operation("exact diagonal", _targets(Target(3), Target(3), Target(units=6))),
    "ef_gram": Operation("EF Gram", _targets(_nngeometry(3), _nngeometry(3), Target(units=2))),
    "ief_solve": Operation("iEF damped solve", _targets(_by_hand(50, 2), _by_hand(3), _by_hand(1.5))),
    "kfac_ef": Operation("KFAC, EF", _targets(_layerwise(1.5), _layerwise(2), _layerwise(1.5))),
    "kfac_exact": Operation("KFAC, exact", _targets(_layerwise(3), _layerwise(3), _curvlinops(3))),
    "kfac_ef_product": Operation("KFAC, EF: build and first product", wide=False),
    "kfac_solve": Operation("KFAC, EF: build and damped solve", wide=False),
    "ekfac_ef": Operation(
        "EKFAC, EF",
        _targets(_nngeometry(5), _nngeometry(20), _curvlinops(2)),
        {"product": 0.1},
        "eigenvectors of close eigenvalues are determined to float32's rounding alone, and measured eigenvalues differ "
        "with them; the trace does not depend on the basis",
        wide=False,
    ),
}
"""By the name that ``--operation`` takes."""

MEMORY_TARGETS = {"W1": 1.6, "W2": 2.0, "W3": 2.0}
"""Peak memory of rows and solve over that of a training step, at most."""


@dataclass(frozen=True)
class Cell:
    """One operation of one case, with everybody who takes part."""

    case: Case
    name: str
    ours: Contestant
    peers: tuple[Contestant, ...]

    @property
    def operation(self) -> Operation:
        """The operation."""
        return OPERATIONS[self.name]

    def bounds(self, peer: Contestant) -> dict[str, float]:
        """Relative errors allowed of a peer's values."""
        names = ("product", "diagonal", "gram", "solution", "linear layers", "trace")
        return {**dict.fromkeys(names, AGREEMENT), **self.operation.bounds, **peer.bounds}


def cells(case: Case, wanted: frozenset[str] | None = None) -> list[Cell]:
    """The cells of a case; for part of the parameters only those where a peer can do no more."""
    mine, peers = ours.contestants(case), [contestants(case) for contestants in PEERS.values()]
    found = []
    for name, operation in OPERATIONS.items():
        if name not in mine or (wanted is not None and name not in wanted):
            continue
        if case.workload.sequence and not operation.wide:
            continue
        against = tuple(theirs[name] for theirs in peers if name in theirs)
        if case.scope == "all" or against:
            found.append(Cell(case, name, mine[name], against))
    return found
