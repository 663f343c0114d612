"""``fisherkit quality`` on a model of one's own, its files, and what it says when it cannot."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fisherkit.cli import app
from fisherkit.evaluation import QualityTable

MODULE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(24, 4).double(), torch.randint(3, (24,))
    return model, [(x[:12], y[:12]), (x[12:], y[12:])]

def one_batch():
    model, batches = make()
    return model, batches[0]

def alone():
    return make()[0]

number = 3

def needs(data):
    return make()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a module of the user's."""
    (tmp_path / "users_module.py").write_text(MODULE)
    (tmp_path / "broken_module.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in ("users_module", "broken_module"):
        sys.modules.pop(name, None)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["quality", *arguments])


def test_quality__prints_a_table_and_writes_files(folder: Path) -> None:
    result = run(
        "users_module:make", "--kinds", "sgd, ief,truncated:1", "--structures", "full,kfac", "--dampings", "1e-4,0.1",
        "--batches", "5", "--out", "found",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "mean of 2 batches, 24 examples" in result.stdout
    for text in ("γ/γ_SGD", "truncated:1  full", "ief          kfac", "0.0001"):
        assert text in result.stdout
    assert f"Wrote {Path('found/quality.csv')}" in result.stdout
    refused = run("users_module:make", "--out", "found").stderr
    assert "found/quality.png to write, which are there; expected another name. Try: --overwrite" in refused
    assert sorted(os.listdir("found")) == ["quality.csv", "quality.json", "quality.png"]
    with (folder / "found/quality.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 2 * 2 * 2)
    assert [row["batch"] for row in rows] == ["0"] * 9 + ["1"] * 9
    found = json.loads((folder / "found/quality.json").read_text(encoding="utf-8"))
    tables = [QualityTable.from_dict(batch) for batch in found["batches"]]
    assert [float(row["gamma"]) for row in rows] == [row.gamma for table in tables for row in table.rows]
    assert found["settings"]["dampings"] == [1e-4, 0.1]
    assert (folder / "found/quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("folder")
def test_quality__takes_one_batch_and_writes_nothing_unasked(folder: Path) -> None:
    before = set(folder.rglob("*"))
    result = run("users_module:one_batch", "--kinds", "ef", "--drop-duplicates", "0.9", "--dampings", "1e-3")
    assert result.exit_code == 0, result.output
    assert "mean of 1 batch, 12 examples" in result.stdout
    assert "near-duplicates left out" in result.stdout
    assert {p for p in set(folder.rglob("*")) - before if "__pycache__" not in p.parts} == set()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["users_module"], 'expected "package.module:function"'),
        (["no_such_module:make"], "no 'no_such_module' in the current folder"),
        (["users_module.inner:make"], "expected a module that can be imported"),
        (["users_module:nothing"], "has no such name"),
        (["users_module:number"], "has a int there"),
        (["users_module:needs"], "needs arguments"),
        (["users_module:alone"], "expected a pair (model, data)"),
        (["users_module:make", "--kinds", ","], "got no kinds"),
        (["users_module:make", "--dampings", "0"], "gram damping 0.0"),
        (["users_module:make", "--drop-duplicates", "2"], "a cosine between 0 and 1"),
        (["users_module:make", "--out", "users_module.py"], "users_module.py"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_quality__says_what_is_wrong(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--dampings", "small", "'small' is not a list of numbers"),
        ("--kinds", "newton", "there is no kind 'newton'"),
        ("--structures", "full,dense", "'dense' is not one of full"),
        ("--likelihood", "weibull", "'weibull' is not one of categorical"),
    ],
)
def test_quality__what_no_option_can_be_is_wrong_usage(option: str, value: str, message: str) -> None:
    result = run("users_module:make", option, value)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.usefixtures("folder")
def test_quality__a_broken_module_shows_its_own_error() -> None:
    result = run("broken_module:make")
    assert isinstance(result.exception, ModuleNotFoundError)
    assert result.exception.name == "a_module_that_is_not_there"


@pytest.mark.usefixtures("folder")
def test_quality__names_the_missing_extra_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("users_module:make", "--out", "found")
    assert result.exit_code == 1
    assert 'pip install "fisherkit[demo]"' in result.stderr
    assert not Path("found").exists()
    assert run("users_module:make", "--kinds", "ef", "--dampings", "1e-3").exit_code == 0


def test_help__explains_the_spec() -> None:
    result = CliRunner().invoke(app, ["quality", "--help"])
    assert result.exit_code == 0
    assert "Examples:\n    fisherkit quality " in result.stdout
    assert "package.module:function" in result.stdout
