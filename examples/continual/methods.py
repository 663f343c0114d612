"""What is compared: how a method keeps what it has learned, by name. Owns the list; computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import fisherkit as fk

KINDS: dict[str, tuple[str, type[fk.FisherApproximation], dict[str, Any]]] = {
    "ef": ("EF", fk.EmpiricalFisher, {}),
    "ief": ("iEF", fk.ImprovedEmpiricalFisher, {}),
    "ief34": ("iEF, power ¾", fk.ImprovedEmpiricalFisher, {"power": 0.75}),
    "truncated-1": ("truncated, rank 1", fk.TruncatedFisher, {"rank": 1}),
    "truncated-2": ("truncated, rank 2", fk.TruncatedFisher, {"rank": 2}),
    "sf": ("SF", fk.SampledFisher, {}),
    "exact": ("exact", fk.ExactFisher, {}),
}
"""Name in tables, class and options of each kind."""

DAMPED = "ief34"
"""The kind of `EWC`'s defaults, measured in the structures that cost least and as it is alone."""

SQUARED = "squared"
"""The kind that is none: squares of a batch's mean gradient, which much published code calls Fisher."""

MAMMOTH = "mammoth"
"""The kind that is none: squares of examples' gradients, each times the probability of its label, all around the newest
centre, as mammoth's ``ewc_on`` has them."""

STRUCTURES = ("diagonal", "kfac", "ekfac", "full")


@dataclass(frozen=True)
class Method:
    """A way to keep what was learned.

    Args:
        kind: of `KINDS`, or "squared", "mammoth", "l2", "none", "joint".
        structure: of `STRUCTURES`; empty where there is no Fisher.
    """

    kind: str
    structure: str = ""

    @property
    def key(self) -> str:
        """The name in files."""
        return f"{self.structure}-{self.kind}" if self.structure else self.kind

    @property
    def title(self) -> str:
        """The name of the kind in tables."""
        own = {SQUARED: "squared batch gradients", MAMMOTH: "mammoth's", "l2": "L2", "none": "none", "joint": "joint"}
        return own.get(self.kind) or KINDS[self.kind][0]

    @property
    def swept(self) -> bool:
        """Whether it has a strength."""
        return self.kind not in ("none", "joint")


BASELINES = (Method("none"), Method("joint"), Method("l2"))
"""Without a Fisher; "joint" learns all tasks at once and is the ceiling."""

METHODS: dict[str, Method] = {
    method.key: method
    for method in (
        *BASELINES,
        *(
            Method(kind, structure)
            for structure in STRUCTURES
            for kind in (*KINDS, SQUARED, MAMMOTH)
            # a sum over examples has no Kronecker factors, and mammoth has a diagonal
            if not (
                (kind == SQUARED and "kfac" in structure)
                or (kind == MAMMOTH and structure != "diagonal")
                or (kind == DAMPED and structure not in ("diagonal", "kfac"))
            )
        ),
    )
}
"""By key."""
