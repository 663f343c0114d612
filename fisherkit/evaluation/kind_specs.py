"""Kinds as short strings, "truncated:3" or "ief:0.5": what a table's rows and a command's options call them.

Owns the spelling. Knows the kinds' classes and their one setting each, and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fisherkit.data import Data
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.fisher import FisherApproximation
from fisherkit.kinds import KINDS

SGD = "sgd"
"""The gradient itself, which no Fisher preconditions."""

SPELLINGS = ("sgd", "ef", "ief", "ief:POWER", "sf", "sf:DRAWS", "truncated:RANK", "truncated:TOLERANCE", "exact")


@dataclass(frozen=True)
class KindSpec:
    """A kind with its setting.

    Args:
        text: as the user wrote it.
        name: "sgd" or a name of `fisherkit.kinds.KINDS`.
        options: the keywords of the kind's class, without the seed.
    """

    text: str
    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str, *, draws: int, call: str) -> KindSpec:
        """From a string.

        Args:
            text: a name, or name:setting.
            draws: of "sf" without a setting.
            call: for errors.

        Raises:
            InvalidTypeError: not a string.
            InvalidArgumentError: no such kind, or a setting that the kind cannot have.
        """
        if not isinstance(text, str):
            raise InvalidTypeError(call=call, got=f"a kind of type {type(text).__name__}", expected="a string")
        name, colon, setting = text.partition(":")
        try:
            return cls(text, name, _options(name, setting if colon else None, draws))
        except ValueError as error:
            raise InvalidArgumentError(
                call=call, got=f"kind {text!r}", expected=f"one of {list(SPELLINGS)}", why=str(error)
            ) from error

    @property
    def power(self) -> float:
        """Of the improved empirical Fisher; the empirical one is its power 0."""
        return float(self.options.get("power", 0.0))

    def build(self, model: nn.Module, data: Data, *, seed: int, **options: Any) -> FisherApproximation:
        """The Fisher of this kind with the keywords of `fisherkit.FisherApproximation`."""
        own = self.options | ({"seed": seed} if self.name == "sf" else {})
        return KINDS[self.name](model, data, **own, **options)


def _options(name: str, setting: str | None, draws: int) -> dict[str, Any]:
    """The class's keywords for a setting, None if there is none."""
    if name == "ief":
        power = 1.0 if setting is None else float(setting)
        if not 0 <= power <= 1:
            raise ValueError("a power lies between 0 and 1")
        return {"power": power}
    if name == "sf":
        number = draws if setting is None else int(setting)
        if number < 1:
            raise ValueError("1 draw or more")
        return {"draws": number}
    if name == "truncated":
        return _truncation("2" if setting is None else setting)
    if name not in {SGD, "ef", "exact"}:
        raise ValueError(f"there is no kind {name!r}")
    if setting is not None:
        raise ValueError(f"{name!r} has no setting")
    return {}


def _truncation(setting: str) -> dict[str, Any]:
    """A rank if it is written as an integer, else a tolerance."""
    if setting.isdecimal():
        if int(setting) < 1:
            raise ValueError("a rank is 1 or more")
        return {"rank": int(setting)}
    tolerance = float(setting)
    if not 0 <= tolerance < 1:
        raise ValueError("a tolerance lies between 0 and 1")
    return {"tolerance": tolerance}
