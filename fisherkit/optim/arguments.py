"""What users pass to an optimizer, checked before anything is done: kinds by name, models, dampings, trust regions.

Owns messages. Knows no rows and no steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import nn

from fisherkit.arguments import check_number, is_number
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.kind_specs import SPELLINGS, KindSpec
from fisherkit.operators import RelativeDamping
from fisherkit.outputs import OutputRule
from fisherkit.vectors import RULES


def rule_of(kind: str | OutputRule, options: Mapping[str, Any], call: str) -> OutputRule:
    """The rule of a kind, by its string or itself.

    Raises:
        InvalidArgumentError: an unknown kind, or options that the kind does not have.
        InvalidTypeError: neither a string nor a rule.
    """
    if isinstance(kind, OutputRule):
        if options:
            raise InvalidArgumentError(call=call, got=f"options {sorted(options)} beside a rule", expected="none")
        return kind
    if not isinstance(kind, str):
        raise InvalidTypeError(
            call=call, got=f"a {type(kind).__name__} as kind", expected=f"one of {list(SPELLINGS)}, or an OutputRule"
        )
    spec = KindSpec.parse(kind, call=call)
    possible = list(signature(RULES[spec.name]).parameters)
    unknown = [name for name in options if name not in possible]
    if unknown:
        named = " and ".join(f"{name}=" for name in unknown)
        own = " and ".join(f"{name}=" for name in possible) or "none"
        raise InvalidArgumentError(
            call=call, got=f"an argument {named} that it does not have", expected=f"its own; for kind={kind!r}, {own}",
            try_=f"help(fk.optim.{call})",
        )  # fmt: skip
    twice = [name for name in options if name in spec.options]
    if twice:
        raise InvalidArgumentError(call=call, got=f"kind={kind!r} and {twice[0]}=", expected="one of them")
    return RULES[spec.name](**spec.options, **options)


def check_model(model: object, call: str) -> None:
    """A module, and not its parameters, which other optimizers take.

    Raises:
        InvalidTypeError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(
            call=call, got=f"a {type(model).__name__} as model", expected="a torch.nn.Module",
            why="per-example gradients come from its forward pass", try_=f"{call}(model, ..., params=names)",
        )  # fmt: skip


def check_trust_region(trust_region: object, call: str) -> None:
    """A positive number, or none.

    Raises:
        InvalidArgumentError: neither.
    """
    if trust_region is None:
        return
    if not is_number(trust_region) or not trust_region > 0:
        raise InvalidArgumentError(call=call, got=f"trust_region={trust_region!r}", expected="a positive number")


def check_damping_choice(damping: object, gram_damping: object, call: str) -> None:
    """Exactly one of the two dampings, and a fitting one.

    Raises:
        InvalidArgumentError: both or neither, or a negative one.
        InvalidTypeError: not a number.
    """
    if (damping is None) == (gram_damping is None):
        raise InvalidArgumentError(
            call=call,
            got=f"damping={damping!r} and gram_damping={gram_damping!r}",
            expected="one of them",
            why="F + λI and the Gram matrix + λI are different updates",
            try_="gram_damping=1e-3 for the paper's update, damping=1e-2 for (F + λI)⁻¹ times the mean gradient",
        )
    value, name = (damping, "damping") if gram_damping is None else (gram_damping, "gram_damping")
    if isinstance(value, RelativeDamping) and gram_damping is None:
        return
    check_number(call, name, value)
