"""A model and its data from a function of the user's, named on the command line as ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import Any

from torch import nn

from fisherkit.data import Data
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.likelihoods import Likelihood, resolve


def load_factory(spec: str, call: str) -> tuple[nn.Module, Data]:
    """A model with its data, as the user's function returns them.

    Args:
        spec: "package.module:function"; the current folder's modules are found too.
        call: the command, for errors.

    Returns:
        The model and its data, one batch or a re-iterable of batches.

    Raises:
        InvalidArgumentError: no such module or function.
        InvalidTypeError: it returned something else than a pair of a module and data.
    """
    made = call_factory(spec, call)
    if not (isinstance(made, (tuple, list)) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise InvalidTypeError(
            call=call, got=f"a {type(made).__name__} from {spec}()", expected="a pair (model, data)",
            try_="return model.eval(), [(inputs, targets), ...]",
        )  # fmt: skip
    model, data = made
    return model, data


def load_likelihood(text: str, call: str) -> Likelihood:
    """A likelihood by name, or a loss module or likelihood as the user's function returns it.

    Args:
        text: a name, or "package.module:function".
        call: the command, for errors.

    Raises:
        InvalidArgumentError: no such name, module or function.
        InvalidTypeError: the function returned something else than a loss.
    """
    own = ":" in text and "(" not in text
    try:
        return resolve(call_factory(text, call) if own else text)
    except InvalidArgumentError as error:
        if own:
            raise
        raise InvalidArgumentError(
            call=f"{call} --likelihood", got=repr(text), expected=error.expected,
            why="a name says nothing of weights and other settings" if "(" in text else "",
            try_='"package.module:function", a function that returns a loss module such as nn.CrossEntropyLoss(...)',
        ) from error  # fmt: skip


def call_factory(spec: str, call: str) -> Any:
    """What the user's function returns, whatever it is.

    Args:
        spec: "package.module:function"; the current folder's modules are found too.
        call: the command, for errors.

    Raises:
        InvalidArgumentError: no such module or function.
    """
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise InvalidArgumentError(
            call=call, got=repr(spec), expected='"package.module:function"', try_="mymodule:make"
        )
    function = getattr(_module(module, call), name, None)
    if not callable(function):
        raise InvalidArgumentError(
            call=call, got=f"{spec!r}", expected=f"a function {name!r} in the module {module!r}",
            why=f"the module has {'no such name' if function is None else f'a {type(function).__name__} there'}",
        )  # fmt: skip
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise InvalidArgumentError(
            call=call, got=f"{spec!r}, a function that needs arguments ({error})", expected="one that needs none",
            try_="a default for each of them",
        ) from error  # fmt: skip
    except ValueError:  # no signature to be read: let it be called
        pass
    return function()


def _module(name: str, call: str) -> Any:
    """A module by name, the current folder's own included."""
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is there and cannot import something else says so itself.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise InvalidArgumentError(
            call=call, got=f"{name!r}", expected="a module that can be imported",
            why=f"there is no {error.name!r} in the current folder or among the installed packages",
            try_="run the command in the folder that holds it",
        ) from error  # fmt: skip
