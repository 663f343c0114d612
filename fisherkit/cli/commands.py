"""The list of commands: ``fisherkit`` itself, and what it knows.

A command is a `Command` of a module of its own, in `COMMANDS`; the first three have their options here.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from fisherkit._version import __version__
from fisherkit.cli.command import readable_errors, require
from fisherkit.cli.file_commands import AUDIT, ESTIMATE, MERGE
from fisherkit.cli.options import Overwrite
from fisherkit.cli.scores.command import SCORES
from fisherkit.cli.show import SHOW

app = typer.Typer(
    help="Fisher information matrices of PyTorch models.",
    epilog="Exit codes: 0 done, 1 a command failed and said why, 2 wrong usage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

COMMANDS = (ESTIMATE, SHOW, MERGE, AUDIT, SCORES)

# \b keeps the line breaks of the paragraph that follows it.
_INFO_EXAMPLES = """\b
Examples:
  fisherkit info
  fisherkit info --json > info.json
"""
_DEMO_EXAMPLES = """\b
Examples:
  fisherkit demo
  fisherkit demo --out my-demo --seed 1
  fisherkit demo --epochs 5 --examples 64 --batches 1    (a quick look)
"""
_QUALITY_EXAMPLES = """\b
Examples:
  fisherkit quality                                      (on the demo's network)
  fisherkit quality mymodule:make --kinds sgd,ef,ief,truncated:2 --out quality
  fisherkit quality mymodule:make --dampings 1e-7,1e-3 --drop-duplicates 0.99 --batches 10
"""


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    for stream in (sys.stdout, sys.stderr):
        # A terminal without Greek letters shows a question mark instead of ending the run.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(epilog=_INFO_EXAMPLES, short_help="Versions, devices, memory, kinds and structures.")
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show versions, devices, memory, and which kinds and structures there are."""
    from fisherkit.cli.info import as_text, collect, to_json

    with readable_errors():
        typer.echo(to_json(collect()) if as_json else as_text(collect()))


@app.command(epilog=_DEMO_EXAMPLES, short_help="Train a small network and compare every kind of Fisher on it.")
def demo(
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where pictures and figures.json go; made if missing.")
    ] = Path("demo"),
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of everything random.")] = 0,
    epochs: Annotated[int, typer.Option(metavar="N", min=1, help="Epochs of training.")] = 40,
    examples: Annotated[
        int, typer.Option(metavar="N", min=2, max=1437, help="Examples behind the table of structures.")
    ] = 256,
    batches: Annotated[int, typer.Option(metavar="N", min=1, help="Batches of 160 that γ is averaged over.")] = 6,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Builds that a time is the median of.")] = 5,
    threads: Annotated[int, typer.Option(metavar="N", min=1, help="Threads; the network is too small for two.")] = 1,
    overwrite: Overwrite = False,
) -> None:
    """Train a small network on handwritten digits and compare every kind of Fisher on it.

    Prints tables, and writes pictures and figures.json. Needs the packages of fisherkit[demo]. Takes a minute or two.
    """
    with readable_errors():
        require("demo", {"matplotlib": "matplotlib", "sklearn": "scikit-learn"})
        from fisherkit.cli.digits import Settings, run

        run(Settings(out, seed, epochs, examples, batches, repeats, threads, overwrite))


@app.command(epilog=_QUALITY_EXAMPLES, short_help="How good each kind's update is on a model of yours.")
def quality(
    spec: Annotated[
        str | None,
        typer.Argument(
            metavar="[SPEC]", help='"package.module:function" that returns (model, data); none: the demo\'s.'
        ),
    ] = None,
    kinds: Annotated[
        str, typer.Option(metavar="LIST", help="sgd, ef, ief[:POWER], sf[:DRAWS], truncated[:RANK], exact.")
    ] = "sgd,ef,ief,sf,truncated:1,truncated:2,exact",
    structures: Annotated[str, typer.Option(metavar="LIST", help="Of full, block, diagonal, kfac, ekfac.")] = "full",
    dampings: Annotated[
        str, typer.Option(metavar="LIST", help="Gram dampings λ > 0, beside sums over examples.")
    ] = "1e-7,1e-5,1e-3,1e-1",
    likelihood: Annotated[
        str, typer.Option(metavar="NAME", help="categorical, gaussian or bernoulli.")
    ] = "categorical",
    example: Annotated[str, typer.Option(metavar="NAME", help="sequence or token.")] = "sequence",
    batches: Annotated[int, typer.Option(metavar="N", min=1, help="Batches that are averaged over.")] = 1,
    drop_duplicates: Annotated[
        float | None,
        typer.Option(metavar="COSINE", help="Leave near-duplicates out of the updates; none unless asked for."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of sampled labels.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write quality.csv, quality.json and quality.png there.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare every kind's preconditioned update with the natural gradient, by γ of Wu and others (NeurIPS 2024).

    The model is any module in eval mode, the data one batch or a list or DataLoader of batches. Prints a table.
    """
    with readable_errors():
        if out is not None or spec is None:
            needed = {"matplotlib": "matplotlib"} if out is not None else {}
            require("demo", needed | ({"sklearn": "scikit-learn"} if spec is None else {}))
        from fisherkit.cli.quality import QualitySettings, run

        numbers = _numbers(dampings)
        run(
            QualitySettings(
                spec, out, batches, _names(kinds), _names(structures), numbers, likelihood, example, drop_duplicates,
                seed, overwrite,
            )
        )  # fmt: skip


def _names(text: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str) -> tuple[float, ...]:
    """The numbers between commas."""
    try:
        return tuple(float(word) for word in _names(text))
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers such as 1e-7,1e-3", param_hint="--dampings"
        ) from error


for _command in COMMANDS:
    _command.add_to(app)
