"""The command line's frame: the application, and how an error looks to someone at a terminal."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Annotated

import typer

from fisherkit._version import __version__
from fisherkit.errors import FisherkitError

app = typer.Typer(
    help="Fisher information matrices of PyTorch models.",
    epilog="Exit codes: 0 done, 1 a command failed and said why, 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    for stream in (sys.stdout, sys.stderr):
        # A terminal without Greek letters shows a question mark instead of ending the run.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    if version:
        typer.echo(__version__)
        raise typer.Exit


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
