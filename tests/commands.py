"""Commands run as a user types them, and modules of the user's in the current folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fisherkit.cli import app


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def own_module(folder: Path, patch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """A module that can be imported until the test ends, from a folder that is the current one until then."""
    (folder / f"{name}.py").write_text(text)
    patch.chdir(folder)
    patch.syspath_prepend(folder)
    patch.delitem(sys.modules, name, raising=False)
