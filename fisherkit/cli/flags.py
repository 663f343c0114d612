"""What the package says to Python, said to a command line: keywords as options, calls as the command.

Owns the words alone; every error and warning that a command shows goes through here once.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from fisherkit.errors import FisherkitError
from fisherkit.kinds import KINDS

_VALUE = r"\"[^\"]*\"|'[^']*'|\[[^\]]*\]|-?[\w.+-]*\w|\.\.\."

_KINDS = {kind.__name__: name for name, kind in KINDS.items()}

_PHRASES = (
    (r"policy=MergePolicy\(([^)]*)\)", r"\1"),
    (r"(?:damping=)?(?:fk\.|fisherkit\.)?RelativeDamping\(([^)]*)\)", r"--damping \1"),
    (r"pass params=lambda name, parameter: True\b", "--params '*'"),
    (r"fk\.merging\.average\(models\)", "--method average"),
    (r"fk\.load\(path, device=\"([^\"]*)\"\)", r"--device \1"),
    (r"written by fisher\.save\b", "that fisherkit estimate wrote"),
    (r",? or a larger memory_budget=?(?!, with)", ""),
    (r"(a cosine between 0 and 1), or None", r"\1"),
    (r"the setting is (\w+)=(.*?)(, or None)?$", r"the \1 is \2"),
    (r"\bmemory_budget = ", "the memory that may be used, "),
    (r"another out=, or overwrite=True", "another --out, or --overwrite"),
    (r"(one of .*)\bNone\b", r"\1'none'"),
    (r"[;,] or(, of a full Fisher,| with)? storage=[^.]*", ""),
)
"""What no rule turns into options; patterns and what stands in their place."""

_CALLS = {
    "audit", "compare", "merge", "average", "task_arithmetic", "regmean", "to_mergekit", "MergePolicy", "likelihood",
    "params", "RelativeDamping", "FisherApproximation", "build_file", "plan", *_KINDS,
}  # fmt: skip
"""Of the package, whose place the command takes."""


def error_in_flags(error: FisherkitError, command: str, flags: Mapping[str, str]) -> str:
    """The message of an error as the command says it."""
    name, bracket, keywords = error.call.removeprefix("fk.").partition("(")
    where, comma, rest = error.call.partition(",")
    call = error.call
    if (where in _CALLS or where.startswith("_")) and not bracket:
        call = f"{command}{comma}{rest}"
    elif name in _CALLS and keywords.partition("=")[0] in flags:
        call = f"{command} {in_flags(keywords.removesuffix(')'), flags).replace(',', '')}"
    got, expected, why, try_ = (in_flags(text, flags) for text in (error.got, error.expected, error.why, error.try_))
    return str(FisherkitError(call=call, got=got, expected=expected, why=why, try_=try_))


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """A sentence with options in the place of keywords."""
    text = re.sub(
        r"(?:Path\(('[^']*'|\"[^\"]*\")\)\.mkdir\(parents=True\))",
        lambda found: f"mkdir -p {shlex.quote(found[1][1:-1])}", text,
    )  # fmt: skip
    text = re.sub(rf"fk\.({'|'.join(_KINDS)})(\([^)]*\))?", lambda found: f"--kind {_KINDS[found[1]]}", text)
    for pattern, words in _PHRASES[:5]:
        text = re.sub(pattern, words, text)
    known = "|".join(sorted(flags, key=len, reverse=True))
    if known:
        text = re.sub(rf"(?<![\w.-])({known})=({_VALUE})?", lambda found: _option(flags[found[1]], found[2]), text)
    if "memory_budget" in flags:
        text = text.replace("memory_budget", flags["memory_budget"])
    for pattern, words in _PHRASES[5:]:
        text = re.sub(pattern, words, text)
    return text


def _option(flag: str, value: str | None) -> str:
    """An option with its value, as it is typed."""
    if value is None or value in ("True", "..."):
        return flag
    value = "none" if value == "None" else value.removeprefix("torch.")
    if value[0] in "\"'":
        value = shlex.quote(value[1:-1])
    elif value[0] == "[":
        value = ",".join(word.strip().strip("'\"").removesuffix(".0") for word in value[1:-1].split(","))
    return f"{flag} {value}"
