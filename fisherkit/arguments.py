"""Checks of numbers and words that many calls take: counts, sizes, seeds, strengths, choices.

Owns their words, so that the same mistake reads the same everywhere. Imports nothing from the package but its errors.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch

from fisherkit.errors import InvalidArgumentError, InvalidTypeError

LARGEST = sys.float_info.max
"""Of floating point; integers may be larger."""


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is an integer or a float; True and False are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shown(value: float) -> str:
    """A number for an error; Python prints no integer of thousands of digits."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"an integer of {value.bit_length():,} bits"
    return repr(value)


def check_number(
    call: str, name: str, value: Any, *, least: float = 0, most: float = math.inf, above: bool = False,
    below: bool = False, integer: bool = False, optional: bool = False, **advice: str,
) -> Any:  # fmt: skip
    """A finite number between bounds, which ``above`` and ``below`` leave out themselves; or an integer; or None.

    ``advice`` is what else the errors say.

    Returns:
        The number, as a float unless it is to be an integer.

    Raises:
        InvalidTypeError: it is no number, or no integer where one is asked for.
        InvalidArgumentError: it is outside.
    """
    if optional and value is None:
        return None
    noun, none = "an integer" if integer else "a number", "or None" if optional else ""
    if not (is_integer(value) if integer else is_number(value)):
        raise InvalidTypeError(call, f"{name} of type {type(value).__name__}", f"{noun} {none}".strip(), **advice)
    inside = (least < value if above else least <= value) and (value < most if below else value <= most)
    if not (inside and (integer or abs(value) <= LARGEST)):
        if most < math.inf:
            span = f" {'above' if above else 'from'} {least:g} {'and' if above else 'to'} {'below ' * below}{most:,}"
        else:
            noun = noun if integer else "a finite number"
            span = f" above {least:g}" if above else f", {least:g} or more" if least > -math.inf else ""
        raise InvalidArgumentError(call, f"{name}={shown(value)}", noun + span + f", {none}" * optional, **advice)
    return value if integer else float(value)


check_count = functools.partial(check_number, least=1, integer=True)
"""An integer from 1 on, or None where that is allowed; see `check_number`."""


def check_type(call: str, name: str, value: object, wanted: Any, expected: str, **advice: str) -> None:
    """Refuse what is not of a type, or of one of several; ``advice`` is what else the error says."""
    if not isinstance(value, wanted):
        raise InvalidTypeError(call, f"a {type(value).__name__}" + f" as {name}" * bool(name), expected, **advice)


def check_choice(call: str, name: str, value: object, allowed: Sequence[object], **advice: str) -> None:
    """An argument that is one of a few words."""
    if value not in allowed:
        raise InvalidArgumentError(call, f"{name}={value!r}", f"one of {list(allowed)}", **advice)


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
