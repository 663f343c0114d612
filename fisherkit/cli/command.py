"""What every command shares: how it is registered, what it replaces, how it stops, and how an error looks.

Owns what a terminal sees of errors, warnings and signals, in its own words: keywords of the package as options, its
calls as the command.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Protocol, get_args, get_type_hints

import typer
from tqdm.auto import tqdm
from typer.models import OptionInfo

from fisherkit import io
from fisherkit.errors import FisherkitError, InvalidArgumentError, MissingPackageError, listed
from fisherkit.kinds import KINDS
from fisherkit.processes import world_size
from fisherkit.progress import in_lines
from fisherkit.words import duration, readable

# -- the package's words in a command's --------------------------------------------------------------------------------


_KINDS = {kind.__name__: name for name, kind in KINDS.items()}
_KIND = re.compile(rf"fk\.({'|'.join(_KINDS)})(\([^)]*\))?")
_WRAPPED = re.compile(r"(?:policy=MergePolicy|fk\.RelativeDamping)\(([^)]*)\)")
"""What Python wraps values in that an option has bare."""
_KEYWORD = re.compile(r"""(?<![\w.-])(\w+)=("[^"]*"|'[^']*'|\[[^]]*\]|-?[\w.+-]*\w|\.\.\.)?""")

_CALLS = {
    "audit", "compare", "merge", "merge_layers", "average", "task_arithmetic", "regmean", "to_mergekit", "MergePolicy",
    "likelihood", "params", "RelativeDamping", "FisherApproximation", "InfluenceScores", "build_file", "plan", *_KINDS,
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
    own = error.call.startswith("fisherkit ")  # not a call of the package's
    expected, advice = error.expected.removesuffix(", or None"), error.try_
    advice = advice if own else _possible(_bare(advice), flags)
    got, expected, why, advice = (in_flags(text, flags) for text in (error.got, expected, error.why, advice))
    return str(FisherkitError(call, got, expected, why=why, try_=advice))


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """A sentence with options in the place of keywords."""

    def typed(found: re.Match[str]) -> str:
        return _option(flags[found[1]], found[2]) if found[1] in flags else found[0]

    return _KEYWORD.sub(typed, _bare(text))


def _bare(text: str) -> str:
    return _WRAPPED.sub(r"\1", _KIND.sub(lambda found: f'kind="{_KINDS[found[1]]}"', text))


def _possible(advice: str, flags: Mapping[str, str]) -> str:
    """Of the ways to try, those that are no Python and whose keywords are the command's options."""
    ways = [way for way in re.split(r"(?=, or |; )", advice) if "fk." not in way]
    ways = [way for way in ways if all(found[1] in flags for found in _KEYWORD.finditer(way))]
    return re.sub("^(, or |; (or )?)", "", "".join(ways))


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


# -- a command ---------------------------------------------------------------------------------------------------------


LINES_EVERY = 10.0
"""Seconds between lines that say how far a command is, where the error stream is no terminal."""

EXAMPLE_WIDTH = 72
"""Of the lines of examples, within the 80 columns of a terminal."""

REPLACED = "replaced"
"""The name that a folder has while another takes its place."""

TYPER = "typer"
"""The key in the metadata of a record's field under which typer's ``Option`` or ``Argument`` for it is kept."""

KEYWORDS = {"model": "models", "fisher": "fishers", "own": "self", "keep_dtype": "dtype"}
"""Of the package, where an option has another name; a command's own options come before those that it shares."""


class Settings(Protocol):
    """A command's options as a frozen record of fields by `fisherkit.cli.options`; its docstring is the help.

    The docstring's first paragraph stands in the list of commands, its examples under the options.
    """

    def run(self) -> None:
        """Do the work."""


@dataclass(frozen=True)
class Command:
    """A command of ``fisherkit``: its options, and what it does. Its name is the settings', in lower case."""

    settings: type[Settings]

    @property
    def name(self) -> str:
        """The command's name as it is typed."""
        return self.settings.__name__.lower()

    @property
    def signature(self) -> inspect.Signature:
        """The command's options for typer, those of its own before those that it shares."""
        record: Any = self.settings
        hints = get_type_hints(record, include_extras=True)
        for own in fields(record):
            if TYPER in own.metadata:
                hints[own.name] = Annotated[hints[own.name], own.metadata[TYPER]]
        parameters = inspect.signature(record).parameters.values()
        ordered = sorted(parameters, key=lambda parameter: parameter.name not in record.__annotations__)
        keyword = inspect.Parameter.KEYWORD_ONLY
        context = inspect.Parameter("context", keyword, annotation=typer.Context)
        return inspect.Signature([context, *(p.replace(kind=keyword, annotation=hints[p.name]) for p in ordered)])

    @property
    def flags(self) -> dict[str, str]:
        """The keywords of the package that the command's options stand for, and these options."""
        found: dict[str, str] = {}
        for name, parameter in self.signature.parameters.items():
            options = [entry for entry in get_args(parameter.annotation) if isinstance(entry, OptionInfo)]
            if options:
                said = [word for word in options[0].param_decls or () if word.startswith("--")]
                found.setdefault(KEYWORDS.get(name, name), said[0] if said else f"--{name.replace('_', '-')}")
        lists = {name: flag for name, flag in found.items() if name in ("kinds", "structures")}
        return {name.removesuffix("s"): flag for name, flag in lists.items()} | found

    def _refuse_others(self) -> None:
        if world_size() > 1 and self.name not in ("estimate", "scores"):
            raise InvalidArgumentError(
                f"fisherkit {self.name}", f"{world_size()} processes of torchrun", "one process",
                why="only estimate and scores share their work among processes", try_="the command without torchrun",
            )  # fmt: skip

    def add_to(self, app: typer.Typer) -> None:
        """Register the command with a typer application."""

        def run(context: typer.Context, **options: Any) -> None:
            typed = {name for name in options if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
            token = _running.set(Running(f"fisherkit {self.name}", self.flags, typed))
            try:
                with readable_errors():
                    self._refuse_others()
                    self.settings(**options).run()
            finally:
                _running.reset(token)

        text, _, examples = (inspect.getdoc(self.settings) or "").partition("\n\nExamples:\n")
        run.__doc__ = text
        run.__signature__ = self.signature  # type: ignore[attr-defined]
        # \b keeps the line breaks of the paragraph that follows it.
        lines = "\n".join(f"  {line}" for example in examples.splitlines() for line in _folded(example.strip()))
        short = " ".join(text.partition("\n\n")[0].split())
        app.command(self.name, epilog=f"\b\nExamples:\n{lines}\n", short_help=short)(run)


@dataclass
class Running:
    """The command at work, how its ``targets`` looked before, and the folders that it ``made``, the innermost first."""

    name: str = "fisherkit"
    flags: Mapping[str, str] = field(default_factory=dict)
    given: Collection[str] = ()
    targets: dict[Path, tuple[int, ...] | None] = field(default_factory=dict)
    made: list[Path] = field(default_factory=list)


_running: ContextVar[Running | None] = ContextVar("running", default=None)


def _now() -> Running:
    return _running.get() or Running()


def given() -> Collection[str]:
    """The settings that were typed, be it with the value that they have by default."""
    return _now().given


def _folded(example: str) -> list[str]:
    """A command line in lines of a terminal's width, as a shell reads them."""
    lines = [""]
    for part in re.split(r" (?=--)", example):
        if lines[-1] and len(lines[-1]) + len(part) > EXAMPLE_WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {part}")
        else:
            lines[-1] += f" {part}" if lines[-1] else part
    return lines


@contextmanager
def readable_errors() -> Iterator[None]:
    """What fisherkit or the file system refuses is a message, not a traceback; what stops the command is told too."""
    with ExitStack() as stack:
        stack.enter_context(_warnings_as_lines())
        stack.enter_context(_stopping())
        stack.push(_without_empty_folders)
        if not sys.stderr.isatty():
            stack.enter_context(in_lines(LINES_EVERY))
        try:
            yield
        except (FisherkitError, OSError) as error:
            text = error_in_flags(error, _now().name, _now().flags) if isinstance(error, FisherkitError) else error
            typer.echo(f"error: {text}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as stop:
            number = stop.args[0] if stop.args else signal.SIGINT
            typer.echo(f"\nstopped: {_written()}", err=True)
            raise typer.Exit(128 + number) from stop


def _without_empty_folders(kind: type[BaseException] | None, *_: object) -> None:
    """Take back folders that were made for files which a command that failed has not written."""
    for folder in _now().made if kind is not None else ():
        with suppress(OSError):  # it is not empty
            folder.rmdir()


def say(text: str) -> None:
    """A line on the error stream of a terminal, beside any bar; nothing elsewhere."""
    if sys.stderr.isatty():
        tqdm.write(text, file=sys.stderr)


def expect(paths: Iterable[Path]) -> None:
    """Remember how the places look that the command will write to, and name what a killed run has left beside them."""
    targets = _now().targets
    fresh = [path for path in paths if path not in targets]
    targets.update({path: _stamp(path) for path in fresh})
    _tell_leftovers(fresh)


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What tells a file or folder from the one that replaces it; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _written() -> str:
    """What has become of the command's targets so far."""
    done = [str(path) for path, before in _now().targets.items() if _stamp(path) != before]
    return f"{listed(done)} {'was' if len(done) == 1 else 'were'} written." if done else "nothing was written."


def _tell_leftovers(paths: Iterable[Path]) -> None:
    found = list(dict.fromkeys((part, path) for path in paths for part in io.leftovers(path)))
    # A folder that was killed between taking the old one away and putting the new one in its place.
    away = {part: path for part, path in found if (part / REPLACED).is_dir() and not path.exists()}
    for part, path in away.items():
        typer.echo(
            f"note: {path} was being replaced by a run that was killed. It is there in full: "
            f"{shlex.join(['mv', str(part / REPLACED), str(path)])}", err=True,
        )  # fmt: skip
    left = [part for part in dict.fromkeys(part for part, _ in found) if part not in away]
    if left:
        age = min(time.time() - part.stat().st_mtime for part in left)
        size = sum(file.stat().st_size for part in left for file in (part, *part.rglob("*")) if file.is_file())
        names = listed((shlex.quote(str(part)) for part in left), 4, " ")
        typer.echo(
            "note: left over from a run that was killed, unless another one is at work "
            f"({readable(size)}, last changed {duration(max(age, 0))} ago):\n  rm -r {names}", err=True,
        )  # fmt: skip


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Warnings as lines that name no source file."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        tqdm.write(f"warning: {in_flags(str(message), _now().flags)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM and SIGHUP as Ctrl-C, unless whoever started the command has them ignored or handled already."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    wanted = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    main = threading.current_thread() is threading.main_thread()
    mine = [number for number in wanted if main and signal.getsignal(number) == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def refuse_existing(paths: Iterable[Path], call: str, *, overwrite: bool) -> None:
    """Find out before the work is done whether it would replace something that nobody said may go; see `expect`."""
    paths = list(paths)
    expect(paths)
    there = [] if overwrite else [str(path) for path in paths if path.exists()]
    if there:
        raise InvalidArgumentError(
            call, f"{', '.join(there)} to write, which {'is' if len(there) == 1 else 'are'} there", "another name",
            try_="--overwrite replaces it",
        )  # fmt: skip


def make_folder(folder: Path, names: Iterable[str], call: str, *, overwrite: bool) -> None:
    """The folder that files will be written to, made if missing, so that a wrong path fails before the work."""
    refuse_existing([folder / name for name in names], call, overwrite=overwrite)
    _now().made.extend(path for path in (folder, *folder.parents) if not path.exists())
    folder.mkdir(parents=True, exist_ok=True)


def require(extra: str, package: str) -> None:
    """End with the pip command if a package, which one of fisherkit's extras brings, cannot be imported."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise MissingPackageError.of(_now().name, package, extra, error) from error
