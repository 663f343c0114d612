"""The command line: ``fisherkit`` and ``python -m fisherkit``.

A command is a record of options, named in `COMMANDS`.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from fisherkit._version import __version__
from fisherkit.cli.command import Command
from fisherkit.cli.estimate import Estimate
from fisherkit.cli.fisher_files import Audit, Export, Show
from fisherkit.cli.info import Info
from fisherkit.cli.merge import Merge
from fisherkit.cli.quality import Quality
from fisherkit.cli.scores import Scores

app = typer.Typer(
    help="Fisher information matrices of PyTorch models.",
    epilog="Exit codes: 0 done, 1 a command failed and said why, 2 wrong usage.", no_args_is_help=True,
    add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}, pretty_exceptions_enable=False,
    rich_markup_mode=None,
)  # fmt: skip

COMMANDS = tuple(map(Command, (Estimate, Show, Merge, Export, Scores, Audit, Quality, Info)))


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    for stream in (sys.stdout, sys.stderr):
        # A terminal without Greek letters shows a question mark instead of ending the run.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    if version:
        typer.echo(__version__)
        raise typer.Exit


for _command in COMMANDS:
    _command.add_to(app)
