"""Commands on the losses that people train with: a loss module from a function of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fisherkit as fk
from tests.commands import own_module, run
from tests.test_losses import W, X, Y, mlp

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
