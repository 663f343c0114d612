"""The command line as a user meets it: help, info, exit codes, and what is said when something is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import fisherkit as fk
from fisherkit.cli.text import number, table
from fisherkit.kinds import KINDS
from fisherkit.structures import structures
from tests.commands import run


def test_help__lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for text in ("info", "merge", "--version", "Exit codes"):
        assert text in result.stdout


@pytest.mark.parametrize("command", ["info", "merge --model A"])
def test_help__of_a_command_shows_examples_line_by_line(command: str) -> None:
    result = run(command.split()[0], "--help")
    assert result.exit_code == 0
    assert re.search(rf"Examples:\n    fisherkit {command}.*\n  +\S", result.stdout)


def test_no_command__shows_the_help_and_is_wrong_usage() -> None:
    result = run()
    assert result.exit_code == 2
    assert "Commands:" in result.output


@pytest.mark.parametrize("arguments", [["bogus"], ["info", "--bogus"], ["quality", "m:f", "--seed", "x"]], ids=" ".join)
def test_wrong_usage__exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error" in result.output


def test_version__is_the_packages() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.strip() == fk.__version__


def test_info__shows_versions_kinds_and_structures() -> None:
    result = run("info")
    assert result.exit_code == 0
    for text in (fk.__version__, torch.__version__, "threads", "GB available", *KINDS, *structures()):
        assert text in result.stdout
    for kind in KINDS.values():
        assert kind.__name__ in result.stdout


def test_info__as_json() -> None:
    result = run("info", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["fisherkit"] == fk.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["devices"][0]["name"] == "cpu"
    assert found["devices"][0]["available_bytes"] > 0
    assert list(found["kinds"]) == list(KINDS)
    assert all(kind["meaning"] for kind in found["kinds"].values())
    assert found["structures"] == {name: one.meaning for name, one in structures().items()}


def test_out__replaces_nothing_unless_told(tmp_path: Path) -> None:
    (tmp_path / "quality.json").write_text("mine")
    result = run("quality", "m:f", "--out", str(tmp_path))
    assert (result.exit_code, "--overwrite" in result.stderr) == (1, True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("quality.json", "mine")]


def test_torchrun__is_for_estimate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("quality", "m:f")
    assert result.exit_code == 1
    assert "got 2 processes of torchrun; expected one process" in " ".join(result.stderr.split())


def test_table__aligns_text_left_and_numbers_right() -> None:
    assert table(("name", "n"), [("a", "10"), ("bcdef", "9")]) == (
        "name    n\n"
        "-----  --\n"
        "a      10\n"
        "bcdef   9"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.01234, "0.0123"),
        (0.0024, "0.00240"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (1234.5, "1,234"),
        (1e-4, "1.00e-04"),
    ],
)
def test_number__has_three_digits(value: float, text: str) -> None:
    assert number(value) == text
