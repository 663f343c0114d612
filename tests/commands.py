"""Commands run as a user types them, here or in a process of their own, and modules in the current folder."""

import itertools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fisherkit.cli import app
from tests.ranks import FORKED


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


class Running:
    """A command in a process of its own, in a folder whose modules it sees; what it prints is in files beside that."""

    number = itertools.count()

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        own = f"{folder.name}-{next(self.number)}"
        self.printed = [folder.with_name(f"{own}-{name}") for name in ("stdout", "stderr")]
        self.process = FORKED.Process(target=_start, args=(folder, self.printed, arguments, environment), daemon=True)
        self.process.start()

    @property
    def status(self) -> int | None:
        """None until it has ended."""
        return self.process.exitcode

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self, seconds: float = 300) -> tuple[str, str]:
        """What it has printed and its errors, when it has ended."""
        self.process.join(seconds)
        assert self.status is not None, "it does not end"
        out, err = (path.read_text("utf-8") for path in self.printed)
        return out, err


def _start(folder: Path, printed: list[Path], arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    app(list(arguments))


def own_module(folder: Path, patch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """A module that can be imported until the test ends, from a folder that is the current one until then."""
    (folder / f"{name}.py").write_text(text)
    patch.chdir(folder)
    patch.syspath_prepend(folder)
    patch.delitem(sys.modules, name, raising=False)
