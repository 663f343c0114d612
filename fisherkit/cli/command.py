"""What every command shares: how it is registered, what it replaces, and how an error looks at a terminal."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from fisherkit.errors import FisherkitError, InvalidArgumentError


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


def refuse_existing(paths: Iterable[Path], call: str, *, overwrite: bool) -> None:
    """Find out before the work is done whether it would replace something that nobody said may go.

    Args:
        paths: what will be written.
        call: the command, for errors.
        overwrite: whether it may go.

    Raises:
        InvalidArgumentError: one of them is there, and it may not.
    """
    there = [] if overwrite else [str(path) for path in paths if path.exists()]
    if there:
        raise InvalidArgumentError(
            call=call, got=f"{', '.join(there)} to write, which {'is' if len(there) == 1 else 'are'} there",
            expected="another name", try_="--overwrite replaces it",
        )  # fmt: skip


def make_folder(folder: Path, names: Iterable[str], call: str, *, overwrite: bool) -> None:
    """The folder that files will be written to, made if missing, so that a wrong path fails before the work.

    Raises:
        InvalidArgumentError: one of the files is there, and it may not be replaced.
    """
    refuse_existing([folder / name for name in names], call, overwrite=overwrite)
    folder.mkdir(parents=True, exist_ok=True)


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
