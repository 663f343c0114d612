"""Checks of numbers and words that many calls take: counts, sizes, seeds, strengths, choices.

Owns their words, so that the same mistake reads the same everywhere. Imports nothing from the package but its errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from fisherkit.errors import InvalidArgumentError, InvalidTypeError


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an integer or a float; True and False are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_positive(call: str, name: str, value: object) -> None:
    """An argument that is None or an integer from 1 on.

    Raises:
        InvalidTypeError: no integer.
        InvalidArgumentError: below 1.
    """
    if value is None:
        return
    if not is_integer(value):
        raise InvalidTypeError(call=call, got=f"{name} of type {type(value).__name__}", expected="an integer or None")
    if value < 1:
        raise InvalidArgumentError(call=call, got=f"{name}={value}", expected="1 or more, or None")


def check_count(call: str, name: str, value: object, *, optional: bool = False, most: int | None = None) -> None:
    """An argument that counts something, where the call names one error for whatever is wrong with it.

    Args:
        call: for the error.
        name: of the argument.
        value: what was passed.
        optional: whether it may be None.
        most: the largest count, D; None for any.

    Raises:
        InvalidArgumentError: no integer, below 1 or too large.
    """
    if optional and value is None:
        return
    if not (is_integer(value) and value >= 1 and (most is None or value <= most)):
        allowed = "an integer, 1 or more" if most is None else f"an integer from 1 to D = {most}"
        raise InvalidArgumentError(
            call=call, got=f"{name}={value!r}", expected=allowed + (", or None" if optional else "")
        )


def check_number(call: str, name: str, value: object, *, most: float = math.inf) -> float:
    """An argument that is a finite number, from 0 on.

    Args:
        call: for the error.
        name: of the argument.
        value: what was passed.
        most: the largest that is allowed.

    Raises:
        InvalidTypeError: no number.
        InvalidArgumentError: out of range.
    """
    if not is_number(value):
        raise InvalidTypeError(call=call, got=f"{name} of type {type(value).__name__}", expected="a number")
    if not (math.isfinite(value) and 0 <= value <= most):
        expected = "a finite number, 0 or more" if most == math.inf else f"a number from 0 to {most:g}"
        raise InvalidArgumentError(call=call, got=f"{name}={value}", expected=expected)
    return float(value)


def check_choice(call: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """An argument that is one of a few words.

    Raises:
        InvalidArgumentError: another.
    """
    if value not in allowed:
        raise InvalidArgumentError(call=call, got=f"{name}={value!r}", expected=f"one of {list(allowed)}")
