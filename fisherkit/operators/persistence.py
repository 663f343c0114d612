"""From a state back to an operator, without the model.

A `State`'s tag names the class that reads it: every imported subclass of `FisherOperator` with a `tag`, users' own too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fisherkit import io
from fisherkit.errors import FileFormatError, InvalidArgumentError
from fisherkit.io.tensors import WRITER
from fisherkit.operators.base import FisherOperator, Makers
from fisherkit.space import ParameterSpace


@contextmanager
def parts_fit(call: str) -> Iterator[None]:
    """A FileFormatError of the call for whatever a structure says of tensors that it cannot use."""
    try:
        yield
    except MemoryError:
        raise  # the machine's, not the file's
    except Exception as error:  # structures of one's own may say it by any class
        if isinstance(error, FileFormatError) and error.call == call:
            raise
        raise FileFormatError(
            call, f"a file whose parts do not make an operator ({error})", f"one written by {WRITER}",
            why="each structure checks its own tensors when it is restored", try_="save it again",
        ) from error  # fmt: skip


def restore(space: ParameterSpace, state: io.State) -> FisherOperator:
    """The operator that a state describes; refuses unknown tags and other parameters."""
    registry = _registry()
    if state.tag not in registry:
        raise FileFormatError(
            "load", f"an operator with the unknown tag {state.tag!r}", f"one of {sorted(registry)}",
            try_="import the module that defines it first, or a newer fisherkit",
        )  # fmt: skip
    check_names(state, space)
    return registry[state.tag]._from_state(space, state)


def check_names(described: io.State | io.Node, space: ParameterSpace) -> None:
    """Refuse what is described as acting on other parameters."""
    if described.names != space.names:
        raise FileFormatError(
            "load", f"a {described.tag} operator over {list(described.names)}", f"one over {list(space.names)}"
        )


def blocks_of_node(node: io.Node, space: ParameterSpace, reader: io.Reader) -> Makers:
    """The finest independent blocks of an operator in a file; making one reads its tensors and no others."""
    check_names(node, space)
    found = _registry().get(node.tag, FisherOperator)._blocks_of_node(node, space, reader)
    return {space.names: lambda: restore(space, reader.state(node))} if found is None else found


def state_of(operator: FisherOperator) -> io.State:
    """All that a file of the operator would hold, its own tensors and no copies; `restore` makes it again.

    Raises:
        NoClosedFormError: the rows are streamed from the data and lie nowhere.
    """
    return operator._state()


def renamed(operator: FisherOperator, names: Mapping[str, str]) -> FisherOperator:
    """The same operator over parameters of other names; tensors are shared."""
    if all(old == new for old, new in names.items()):
        return operator
    space = operator.space
    new = restore(
        ParameterSpace(tuple(names[n] for n in space.names), space.shapes), _renamed(state_of(operator), names)
    )
    new.metadata = dict(operator.metadata)
    return new


def _renamed(state: io.State, names: Mapping[str, str]) -> io.State:
    children = tuple(_renamed(child, names) for child in state.children)
    return replace(state, names=tuple(names[name] for name in state.names), children=children)


def _registry() -> dict[str, type[FisherOperator]]:
    found: dict[str, type[FisherOperator]] = {}
    for cls in subclasses(FisherOperator):
        for tag in filter(None, (cls.tag, *cls.other_tags)):
            first = found.setdefault(tag, cls)
            if is_own(first) and not issubclass(cls, first):
                raise InvalidArgumentError(
                    f"class {cls.__name__}", f"tag = {tag!r}", "a tag that no operator of the package has",
                    why=f"files would not tell it from {first.__name__}",
                )  # fmt: skip
    return found


def is_own(cls: type) -> bool:
    """Whether a class is the package's and no user's."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def subclasses(cls: Any) -> Iterator[Any]:
    """All that are imported, at any depth."""
    for subclass in cls.__subclasses__():
        yield subclass
        yield from subclasses(subclass)
