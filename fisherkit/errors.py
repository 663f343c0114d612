"""Every error that fisherkit raises on purpose.

Each says the same five things in one sentence or two: which call failed, what it got, what it expected, why, and what
to try. Each is also a builtin exception, so that code which does not know fisherkit can still catch it. This module
owns the wording's shape, how long lists are cut and where warnings point, and imports nothing from the package.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

E = TypeVar("E", bound="FisherkitError")

_STOP = re.compile(r"""(?<=[\w)\]}'"`%])\.(?=;|\.(?: |$))""")
"""A full stop, as of another error that a part ends in, where another stop or a semicolon follows."""

_ARTICLE = re.compile(r"^a (?=[aeioAEIO](?!ne\b))")
"""An article in front of a type's name that begins with a vowel."""


def listed(texts: Iterable[str], most: int = 8, separator: str = ", ") -> str:
    """The first few of a list, and how many more there are."""
    found = list(texts)
    return separator.join(found[:most]) + (f" and {len(found) - most:,} more" if len(found) > most else "")


class FisherkitError(Exception):
    """Base of all errors of the package.

    Args:
        call: the public call that failed, as the user would write it, for example ``"Fisher.solve(damping=-1.0)"``.
        got: what was passed or found.
        expected: what would have been accepted.
        why: the reason, where it is not obvious from the two above.
        try_: what to do next.
    """

    def __init__(self, call: str, got: str, expected: str = "", *, why: str = "", try_: str = "") -> None:
        got = _ARTICLE.sub("an ", got)
        self.call, self.got, self.expected, self.why, self.try_ = call, got, expected, why, try_
        parts = [f"{call}: got {got}" + (f"; expected {expected}." if expected else ".")]
        if why:
            parts.append(f"{why[0].upper()}{why[1:]}.")
        if try_:
            parts.append(f"Try: {try_}.")
        super().__init__(_STOP.sub("", " ".join(parts)))

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, as errors come from other processes."""
        parts = {name: getattr(self, name) for name in ("call", "got", "expected", "why", "try_")}
        return functools.partial(type(self), **parts), ()

    def at(self: E, call: str) -> E:
        """The same error as raised by another, outer call."""
        return type(self)(call=call, got=self.got, expected=self.expected, why=self.why, try_=self.try_)

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError and its kin would quote it


class InvalidArgumentError(FisherkitError, ValueError):
    """An argument has the right type and a value or shape that cannot be used."""


class InvalidTypeError(FisherkitError, TypeError):
    """An argument has the wrong type."""


class UnknownParameterError(FisherkitError, LookupError):
    """A parameter name that the model does not have."""


class DataError(FisherkitError, ValueError):
    """The data, a batch or its labels cannot be used."""


class ModelError(FisherkitError, RuntimeError):
    """The model cannot have a well-defined Fisher in its present state."""


class NonFiniteError(FisherkitError, ArithmeticError):
    """NaN or infinity where finite numbers are needed."""


class NoClosedFormError(FisherkitError, NotImplementedError):
    """The structure has no closed form for the operation; the message names an estimator or a structure that has."""


class SingularMatrixError(FisherkitError, ArithmeticError):
    """The matrix, with the damping that was passed, is singular."""


class MemoryBudgetError(FisherkitError, MemoryError):
    """The run would not fit the memory budget; raised before it starts."""


class FileFormatError(FisherkitError, ValueError):
    """A file is not a Fisher file, is damaged, or is of a version this package cannot read."""


class MissingFileError(FileFormatError, FileNotFoundError):
    """A file that is to be read is not there."""


class MissingPackageError(FisherkitError, ImportError):
    """A package that only a part of fisherkit needs cannot be imported; the message has the command to install it."""

    @classmethod
    def of(cls, call: str, package: str, extra: str, error: ImportError) -> MissingPackageError:
        """The error for a package, by its distribution's name, that one of fisherkit's extras brings."""
        needed, advice = f"{package}, which only this part of fisherkit needs", f'pip install "fisherkit[{extra}]"'
        return cls(call, f"no {package} ({error})", needed, try_=advice)


class ProcessError(FisherkitError, RuntimeError):
    """Another process of the group failed, ended, or computes something else; the message names its rank."""


class NotConvergedWarning(UserWarning):
    """An iterative solver stopped before its tolerance."""


_INSIDE = ("fisherkit", "torch", "contextlib", "functools", "beartype", "jaxtyping")
"""Packages whose frames stand between a user's line and a warning."""


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's own line, the nearest one outside of the package and of what calls it."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
