"""What was done with each parameter, for people to read before they trust a result."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fisherkit.words import readable


@dataclass(frozen=True)
class CoverageEntry:
    """How one unit of parameters is handled.

    Args:
        parameters: their names.
        rule: the layer rule, or ``"torch.func"`` or ``"loop"`` for parameters without one.
        structure: how they are represented in the operator.
        memory: bytes of that representation; 0 if it is made anew for each product.
        reason: why.
    """

    parameters: tuple[str, ...]
    rule: str
    structure: str
    memory: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """The table that ``fisher.coverage()`` prints."""

    entries: tuple[CoverageEntry, ...]

    def __str__(self) -> str:
        header = ("parameters", "rule", "structure", "memory", "reason")
        rows = [header] + [
            (", ".join(e.parameters), e.rule, e.structure, readable(e.memory), e.reason) for e in self.entries
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    __repr__ = __str__

    def to_json(self) -> str:
        """The table as Fisher files record it."""
        return json.dumps([vars(entry) for entry in self.entries])

    @classmethod
    def from_json(cls, text: str) -> Coverage:
        """The inverse of `to_json`."""
        return cls(tuple(CoverageEntry(**{**e, "parameters": tuple(e["parameters"])}) for e in json.loads(text)))
