"""What can be wrong with an option, found before any model is loaded and said in the command's words."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches

import torch

from fisherkit.errors import InvalidArgumentError

LIKELIHOODS = ("categorical", "gaussian", "bernoulli", "poisson")
"""By name, as every command takes them."""


def check_choice(call: str, option: str, value: str | None, allowed: Collection[str], also: str = "") -> None:
    """One of some words, or not given.

    Args:
        call: the command, for errors.
        option: its name.
        value: as it was typed.
        allowed: what it may be.
        also: what else it may be, in words.

    Raises:
        InvalidArgumentError: anything else; the message has the word that was probably meant.
    """
    if value is None or value in allowed:
        return
    lower = {word.lower(): word for word in allowed}
    near = get_close_matches(value.lower(), lower, 1)
    raise InvalidArgumentError(
        call=call, got=f"{option} {value!r}", expected=f"one of {list(allowed)}{also}",
        try_=f"{option} {lower[near[0]]}" if near else "",
    )  # fmt: skip


def check_likelihood(call: str, value: str | None) -> None:
    """A likelihood by name, a function of the user's that returns a loss, or not given.

    Raises:
        InvalidArgumentError: anything else.
    """
    if value is None or ":" not in value:
        check_choice(call, "--likelihood", value, LIKELIHOODS, ", or package.module:function")


def check_device(call: str, device: str | None) -> None:
    """A device that is there, or not given.

    Raises:
        InvalidArgumentError: no such device.
    """
    if device is None:
        return
    try:
        if torch.device(device).type != "meta":
            torch.empty(1, device=device)
            return
        why = "tensors there have no values"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        unknown = "device type at start of device string" in str(error)
        why = "there is no such kind of device" if unknown else str(error).splitlines()[0]
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    raise InvalidArgumentError(
        call=call, got=f"--device {device!r}", expected=f"a device of this machine: {', '.join(['cpu', *gpus])}",
        why=why, try_="fisherkit info, which lists them",
    )  # fmt: skip


def as_dtype(call: str, dtype: str | None) -> torch.dtype | None:
    """A floating-point dtype by its name; None if it was not given.

    Raises:
        InvalidArgumentError: no such dtype, or one of integers.
    """
    found = None if dtype is None else getattr(torch, dtype, None)
    if dtype is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise InvalidArgumentError(
        call=call, got=f"--dtype {dtype}", expected="a floating-point type, such as float32, float64 or bfloat16"
    )
