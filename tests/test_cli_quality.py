"""``fisherkit quality`` on a model of one's own, and the commands on the losses that people train with."""

import csv
import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import fisherkit as fk
from fisherkit.evaluation import QualityTable
from tests import commands
from tests.commands import own_module, run
from tests.test_losses import W, X, Y, mlp

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

def no_batch():
    return make()[0], []

number = 3

def needs(data):
    return make()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of the user's."""
    own_module(tmp_path, monkeypatch, "users_module", MODULE)
    own_module(tmp_path, monkeypatch, "broken_module", "import a_module_that_is_not_there\n")
    return tmp_path


quality = partial(commands.run, "quality")


def test_module__of_the_current_folder_comes_before_another_of_its_name(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder is among those of the path, behind the other's, as that of a checkout."""
    other = tmp_path_factory.mktemp("other")
    for place, text in ((other, "def another(): ...\n"), (folder, MODULE)):
        (place / "a_common_name.py").write_text(text)
    monkeypatch.setattr("sys.path", [str(other), str(folder), *sys.path])
    result = quality("a_common_name:make", "--kinds", "sgd", "--structures", "full")
    assert result.exit_code == 0, result.output


def test_quality__prints_a_table_and_writes_files(folder: Path) -> None:
    result = quality(
        "users_module:make", "--kinds", "sgd, ief,truncated:1", "--structures", "full,kfac", "--dampings", "1e-4,0.1",
        "--batches", "5", "--out", "found",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "mean of 2 batches, 24 examples" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    for text in ("γ/γ_SGD", "truncated:1  full", "ief          kfac", "0.0001"):
        assert text in result.stdout
    assert f"Wrote {Path('found/quality.csv')}" in result.stdout
    refused = quality("users_module:make", "--out", "found").stderr
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
    assert quality("users_module:make", "--kinds", "sgd", "--out", "found", "--overwrite").exit_code == 0
    assert sorted(os.listdir("found")) == ["quality.csv", "quality.json"]  # no picture of another comparison


@pytest.mark.usefixtures("folder")
def test_quality__takes_one_batch_and_writes_nothing_unasked(folder: Path) -> None:
    before = set(folder.rglob("*"))
    result = quality("users_module:one_batch", "--kinds", "ef", "--drop-duplicates", "0.9", "--dampings", "1e-3")
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
        (["users_module:number"], "has something of type int there"),
        (["users_module:needs"], "needs arguments"),
        (["users_module:alone"], "expected a pair (model, data)"),
        (["users_module:no_batch"], "data: got no batch"),
        (["users_module:make", "--kinds", ","], "got no kinds"),
        (["users_module:make", "--dampings", "0"], "gram damping=0.0"),
        (["users_module:make", "--drop-duplicates", "2"], "a number above 0 and below 1"),
        (["users_module:make", "--out", "users_module.py"], "users_module.py"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_quality__says_what_is_wrong(arguments: list[str], message: str) -> None:
    result = quality(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.mark.usefixtures("folder")
def test_quality__a_broken_module_shows_its_own_error() -> None:
    result = quality("broken_module:make")
    assert isinstance(result.exception, ModuleNotFoundError)
    assert result.exception.name == "a_module_that_is_not_there"


# -- commands on the losses that people train with ---------------------------------------------------------------------


FUNCTIONS = """
import torch
from torch import nn
from tests.test_losses import W, X, Y, CASES, mlp

def make():
    torch.manual_seed(0)
    return mlp()().double(), [(X, Y)]

def scored():
    model, data = make()
    return model, data, data

def loss():
    return nn.CrossEntropyLoss(weight=W, label_smoothing=0.1)

def counts():
    case = CASES["poisson"]
    return case.model(), [(case.x, case.y)], [(case.x, case.y)]

def nothing():
    return nn.L1Loss()
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_module(tmp_path, monkeypatch, "own_losses", FUNCTIONS)


def model() -> nn.Module:
    torch.manual_seed(0)
    return mlp()().double()


def test_estimate__takes_a_loss_module() -> None:
    result = run("estimate", "own_losses:make", "--likelihood", "own_losses:loss", "--kind", "exact",
                 "--structure", "diagonal", "--out", "f.safetensors")  # fmt: skip
    assert result.exit_code == 0, result.output
    right = fk.ExactFisher(model(), (X, Y), likelihood=nn.CrossEntropyLoss(weight=W, label_smoothing=0.1))
    found = fk.load("f.safetensors")
    torch.testing.assert_close(found.diagonal(), right.diagonal())
    assert found.metadata["likelihood"] == right.metadata["likelihood"]
    assert "label_smoothing=0.1" in result.stdout


def test_estimate__says_what_a_likelihood_can_be() -> None:
    for text, words in (("weibull", "package.module:function"), ("own_losses:nothing", "L1Loss")):
        result = run("estimate", "own_losses:make", "--likelihood", text, "--out", "f.safetensors")
        assert result.exit_code != 0
        assert words in " ".join((result.output + str(result.exception)).split())


def test_quality__takes_a_loss_module() -> None:
    result = run("quality", "own_losses:make", "--likelihood", "own_losses:loss", "--kinds", "sgd,ef,truncated:2")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("function", "likelihood"), [("scored", "own_losses:loss"), ("counts", "poisson")])
def test_scores__take_a_loss_module(function: str, likelihood: str) -> None:
    result = run("scores", f"own_losses:{function}", "--likelihood", likelihood, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert likelihood.partition(":")[0] in ("poisson", "own_losses")
    text = json.dumps(found)
    assert ("label_smoothing=0.1" in text) == (function == "scored")


def test_scores__of_a_file_whose_loss_has_settings_ask_for_it() -> None:
    loss = nn.CrossEntropyLoss(weight=W, label_smoothing=0.1)
    fk.TruncatedFisher(model(), (X, Y), likelihood=loss, structure="ekfac").save("f.safetensors")
    result = run("scores", "own_losses:scored", "--fisher", "f.safetensors")
    assert result.exit_code != 0
    words = " ".join((result.output + str(result.exception)).split())
    assert "says nothing of weights" in words
    result = run("scores", "own_losses:scored", "--fisher", "f.safetensors", "--likelihood", "own_losses:loss")
    assert result.exit_code == 0, result.output
