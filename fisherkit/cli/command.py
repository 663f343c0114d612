"""What every command shares: how it is registered, and how an error looks to someone at a terminal."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer

from fisherkit.errors import FisherkitError


@dataclass(frozen=True)
class Command:
    """A command of ``fisherkit``; its name is its function's.

    Args:
        function: with typer's annotations; its docstring is the help.
        short_help: the line in the list of commands.
        examples: command lines, shown under the options.
    """

    function: Callable[..., Any]
    short_help: str
    examples: tuple[str, ...]

    def add_to(self, app: typer.Typer) -> None:
        """Register it."""
        # \b keeps the line breaks of the paragraph that follows it.
        lines = "\n".join(f"  {example}" for example in self.examples)
        app.command(epilog=f"\b\nExamples:\n{lines}\n", short_help=self.short_help)(self.function)


@contextmanager
def readable_errors() -> Iterator[None]:
    """What fisherkit or the file system refuses is a message, not a traceback."""
    try:
        yield
    except (FisherkitError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def require(extra: str, modules: dict[str, str]) -> None:
    """End with the pip command if a module, by import name, is missing from its distribution."""
    missing = [distribution for module, distribution in modules.items() if not _importable(module)]
    if missing:
        typer.echo(f"error: this command needs {' and '.join(missing)}, which cannot be imported.", err=True)
        typer.echo(f'Try: pip install "fisherkit[{extra}]"', err=True)
        raise typer.Exit(1)


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True
