"""Checks of numbers and words that many calls take: counts, sizes, seeds, strengths, choices.

Owns their words, so that the same mistake reads the same everywhere. Imports nothing from the package but its errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch

from fisherkit.errors import InvalidArgumentError, InvalidTypeError


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an integer or a float; True and False are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_positive(call: str, name: str, value: object) -> None:
    """An argument that is None or an integer from 1 on."""
    if value is None:
        return
    if not is_integer(value):
        raise InvalidTypeError(call, f"{name} of type {type(value).__name__}", "an integer or None")
    if value < 1:
        raise InvalidArgumentError(call, f"{name}={value}", "1 or more, or None")


def check_count(call: str, name: str, value: object, *, optional: bool = False, most: int | None = None) -> None:
    """Refuse what is no integer from 1 on (to ``most``), nor None where that is allowed, by one error for all of it."""
    if optional and value is None:
        return
    if not (is_integer(value) and value >= 1 and (most is None or value <= most)):
        allowed = "an integer, 1 or more" if most is None else f"an integer from 1 to D = {most}"
        raise InvalidArgumentError(call, f"{name}={value!r}", allowed + (", or None" if optional else ""))


def check_number(call: str, name: str, value: object, *, most: float = math.inf) -> float:
    """A finite number from 0 to ``most``; an InvalidTypeError or InvalidArgumentError for anything else."""
    if not is_number(value):
        raise InvalidTypeError(call, f"{name} of type {type(value).__name__}", "a number")
    if not (math.isfinite(value) and 0 <= value <= most):
        expected = "a finite number, 0 or more" if most == math.inf else f"a number from 0 to {most:g}"
        raise InvalidArgumentError(call, f"{name}={value}", expected)
    return float(value)


def check_choice(call: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """An argument that is one of a few words."""
    if value not in allowed:
        raise InvalidArgumentError(call, f"{name}={value!r}", f"one of {list(allowed)}")


def check_device(call: str, device: torch.device | str) -> torch.device:
    """A device that is there and holds values."""
    try:
        if (found := torch.device(device)).type != "meta":
            torch.empty(0, device=found)
            return found
        why = "tensors there have no values"
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        unknown = "device type at start of device string" in str(error)
        why = "there is no such kind of device" if unknown else str(error).splitlines()[0]
    there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
    raise InvalidArgumentError(call, f"device={str(device)!r}", f"a device of this machine: {there}", why=why)
