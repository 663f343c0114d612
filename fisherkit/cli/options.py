"""What several commands' options have in common: their words, and what is refused while they are read.

A check takes an option's text and gives it back, or raises `typer.BadParameter`, which typer says with the option's
name. So nothing is loaded before all options are right. Owns no option's meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, field
from difflib import get_close_matches
from typing import Annotated, Any, TypeAlias, TypeVar

import torch
import typer

from fisherkit.arguments import check_device
from fisherkit.cli.command import TYPER
from fisherkit.errors import InvalidArgumentError
from fisherkit.likelihoods import NAMED
from fisherkit.structures import structures
from fisherkit.vectors import rule_of, spellings

T = TypeVar("T")

Check: TypeAlias = Callable[[str], str]

REQUIRED: Any = MISSING
"""`option(REQUIRED, ...)` makes an option without a default, so that a command refuses to start without it."""


def option(default: T, metavar: str, text: str, shown: str = "none", *, name: str = "", **others: Any) -> T:
    """A command's option as a field of its record, named as the field is or ``name``; ``others`` are typer's.

    ``shown`` says the default of one that is None if it is not given. One without a value is False and has a name.
    """
    info = _option(metavar, text, shown if default is None else True, name, **others)
    return field(default=default, metadata={TYPER: info})


def argument(metavar: str, text: str) -> Any:
    """A positional argument of a command, such as MODEL in ``fisherkit estimate MODEL``, as a field of its record."""
    return field(metadata={TYPER: typer.Argument(metavar=metavar, help=text)})


def choice(default: T, text: str, words: Sequence[str], shown: str = "none") -> T:
    """An option that is one of some words."""
    return option(default, "NAME", f"{text}: {', '.join(words)}.", shown, parser=one_of(*words))


def _option(metavar: str, text: str, shown: bool | str = True, name: str = "", **others: Any) -> Any:
    """What typer is told of an option."""
    return typer.Option(*filter(None, [name]), metavar=metavar or None, help=text, show_default=shown, **others)


def one_of(*allowed: str, also: str = "") -> Check:
    """One of some words; the message has the one that was probably meant."""

    def check(text: str) -> str:
        if text not in allowed:
            lower = {word.lower(): word for word in allowed}
            near = get_close_matches(text.lower(), lower, 1)
            advice = f" Try: {lower[near[0]]}." if near else ""
            raise typer.BadParameter(f"{text!r} is not one of {', '.join(allowed)}{also}.{advice}")
        return text

    return check


def each(check: Check) -> Check:
    """Words between commas, each of which passes a check."""

    def check_all(text: str) -> str:
        for word in words(text):
            check(word)
        return text

    return check_all


def words(text: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers(text: str) -> tuple[float, ...]:
    """The numbers between commas."""
    return tuple(map(float, words(text)))


def numbers_or(*words: str) -> Check:
    """Numbers between commas, or one of some words."""

    def check(text: str) -> str:
        try:
            if text not in words:
                numbers(text)
        except ValueError as error:
            allowed = " or ".join([*(f'"{word}"' for word in words), "a list of numbers such as 1,1e-3"])
            raise typer.BadParameter(f"{text!r} is not {allowed}.") from error
        return text

    return check


def kind_check(text: str, also: tuple[str, ...] = ()) -> str:
    """A kind as `vectors.rule_of` reads it, or one of some other words."""
    try:
        if text not in also:
            rule_of(text, call="", also=also)
    except InvalidArgumentError as error:
        known = ", ".join((*also, *spellings()))
        raise typer.BadParameter(f"{text!r} is not one of {known}: {error.why}.") from error
    return text


def likelihood_check(text: str) -> str:
    """A likelihood by name, or a function of the user's that returns a loss."""
    names = one_of(*NAMED, also=", or package.module:function")
    return text if ":" in text else names(text)


def device_check(text: str) -> str:
    """A device that is there."""
    try:
        check_device("--device", text)
    except InvalidArgumentError as error:
        raise typer.BadParameter(f"{text!r} is not {error.expected}; {error.why}. See: fisherkit info.") from error
    return text


def dtype_check(text: str) -> str:
    """A floating-point dtype by its name."""
    found = getattr(torch, text, None)
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise typer.BadParameter(f"{text!r} is not a floating-point type, such as float32, float64 or bfloat16.")
    return text


KIND = f"{', '.join(spellings())}."
STRUCTURE = f"{', '.join(structures())}."
structure_check = one_of(*structures())

LIKELIHOOD = f"{', '.join(NAMED)}, or package.module:function that returns a loss module."

Kind: TypeAlias = Annotated[str, _option("KIND", f"Which Fisher: {KIND}", parser=kind_check)]
Structure: TypeAlias = Annotated[str, _option("NAME", f"What is kept of it: {STRUCTURE}", parser=structure_check)]
Device: TypeAlias = Annotated[str, _option("NAME", "Where it is computed: cpu, cuda, cuda:1, ...", parser=device_check)]
Example: TypeAlias = Annotated[
    str, _option("NAME", "What is one example: sequence, token.", parser=one_of("sequence", "token"))
]
MaxShardSize: TypeAlias = Annotated[
    int | None, _option("BYTES", "Write several files of at most this size.", "one file of any size", min=1)
]
Overwrite: TypeAlias = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
