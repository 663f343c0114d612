"""An operator that holds another one and answers as it does: every hook is forwarded, in one loop."""

from __future__ import annotations

import functools
from typing import Any

from fisherkit.errors import FisherkitError
from fisherkit.operators.base import HOOKS, FisherOperator


def _forwarded(name: str) -> Any:
    """A hook that asks the held operator, whose refusals are then the holder's."""
    original = vars(FisherOperator)[name]

    def ask(self: ForwardingOperator, *arguments: Any, **options: Any) -> Any:
        try:
            found = getattr(self.held, name)
            return found if isinstance(original, property) else found(*arguments, **options)
        except FisherkitError as error:
            call = error.call.removeprefix(f"{self.held._name}.")
            if call == error.call:
                raise
            raise error.at(f"{self._name}.{call}") from error

    return property(ask) if isinstance(original, property) else functools.wraps(original, updated=())(ask)


class ForwardingOperator(FisherOperator):
    """An operator that another one answers for; metadata, and the name in errors, are its own."""

    held: FisherOperator
    """The other one."""

    _matmat = _forwarded("_matmat")
    _diagonal = _forwarded("_diagonal")
    _draw = _forwarded("_draw")
    _scaled = _forwarded("_scaled")
    _state = _forwarded("_state")


for _name in HOOKS:
    if not isinstance(vars(FisherOperator)[_name], classmethod):  # a class holds nothing
        setattr(ForwardingOperator, _name, _forwarded(_name))


def unwrap(operator: FisherOperator) -> FisherOperator:
    """The operator that does the algebra: of a Fisher of a model the structure that was built, else itself; shared."""
    return operator.held if isinstance(operator, ForwardingOperator) else operator
