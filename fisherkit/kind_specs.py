"""Kinds as short strings, "truncated:3" or "ief:0.5": one spelling for tables, commands and optimizers.

Owns the spelling and nothing of what a setting means: the kind's rule checks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fisherkit.data import Data
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.fisher import FisherApproximation
from fisherkit.kinds import KINDS
from fisherkit.outputs import OutputRule
from fisherkit.vectors import RULES

_SETTINGS = {"ief": ("power",), "sf": ("draws",), "truncated": ("rank", "tolerance")}
"""What a kind's setting can be, by the names that its class and the metadata of a Fisher have for it."""

SPELLINGS = ("ef", "ief", "ief:POWER", "sf", "sf:DRAWS", "truncated", "truncated:RANK", "truncated:TOLERANCE", "exact")


@dataclass(frozen=True)
class KindSpec:
    """A kind with its setting.

    Args:
        text: as the user wrote it.
        name: of `fisherkit.kinds.KINDS`.
        options: the keywords of the kind's class that the text says.
        rule: the kind in output space.
    """

    text: str
    name: str
    options: dict[str, Any]
    rule: OutputRule

    @classmethod
    def parse(cls, text: str, *, call: str, also: Sequence[str] = ()) -> KindSpec:
        """From a string.

        Args:
            text: a name, or name:setting.
            call: for errors.
            also: what the caller takes beside these, for errors.

        Raises:
            InvalidTypeError: not a string.
            InvalidArgumentError: no such kind, or a setting that the kind cannot have.
        """
        if not isinstance(text, str):
            raise InvalidTypeError(call=call, got=f"a kind of type {type(text).__name__}", expected="a string")
        name, colon, setting = text.partition(":")
        try:
            options = _options(name, setting) if colon else {}
            return cls(text, name, options, _rule(name, options))
        except ValueError as error:
            raise InvalidArgumentError(
                call=call, got=f"kind={text!r}", expected=f"one of {[*also, *SPELLINGS]}", why=str(error)
            ) from error

    def build(self, model: nn.Module, data: Data, *, seed: int, **options: Any) -> FisherApproximation:
        """The Fisher of this kind with the keywords of `fisherkit.FisherApproximation`."""
        own = self.options | ({"seed": seed} if self.name == "sf" else {})
        return KINDS[self.name](model, data, **own, **options)


def spelled(metadata: Mapping[str, str]) -> str:
    """A Fisher's kind with its setting, as `KindSpec.parse` reads it back; iEF of power 1 by its name alone.

    Args:
        metadata: of the Fisher; "unknown" if it names no kind.
    """
    name = metadata.get("kind", "unknown")
    for key in _SETTINGS.get(name, ()):
        if key in metadata and not (key == "power" and float(metadata[key]) == 1):
            # A tolerance without a point would be read as a rank.
            return f"{name}:{float(metadata[key]) if key == 'tolerance' else metadata[key]}"
    return name


def _options(name: str, setting: str) -> dict[str, Any]:
    """The class's keyword for a setting."""
    if name == "ief":
        return {"power": float(setting)}
    if name == "sf":
        return {"draws": int(setting)}
    if name == "truncated":
        # A rank if it is written as an integer, else a tolerance.
        return {"rank": int(setting)} if setting.isdecimal() else {"tolerance": float(setting)}
    if name in RULES:
        raise ValueError(f"{name!r} has no setting")
    return {}


def _rule(name: str, options: dict[str, Any]) -> OutputRule:
    if name not in RULES:
        raise ValueError(f"there is no kind {name!r}")
    try:
        return RULES[name](**options)
    except InvalidArgumentError as error:
        raise ValueError(f"the setting is {error.got}, not {error.expected}") from error
