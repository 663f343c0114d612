"""``fisherkit audit``: what it prints for Fisher files and for diagonals of other origin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import fisherkit as fk
from fisherkit.cli import app
from fisherkit.evaluation import audit


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["audit", *map(str, arguments)])


@pytest.fixture
def exact(tmp_path: Path) -> fk.FisherOperator:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    fisher = fk.EmpiricalFisher(model, (torch.randn(48, 4), torch.randint(3, (48,))), structure="kfac")
    fisher.save(tmp_path / "exact.safetensors")
    return fisher


def test_audit__a_diagonal_of_named_tensors_and_what_its_scale_is_near(
    exact: fk.FisherOperator, tmp_path: Path
) -> None:
    save_file(exact.space.unflatten(exact.diagonal() / 8), tmp_path / "theirs.safetensors")
    result = run(tmp_path / "theirs.safetensors", tmp_path / "exact.safetensors", "--batch-size", "8")
    assert result.exit_code == 0, result.output
    assert "scale 0.125" in result.stdout
    assert "multiplied by 8 with this one" in result.stdout
    assert "near 1/B = 1/8: squared gradients of batches" in result.stdout
    assert all(name in result.stdout for name in exact.space.names)


def test_audit__two_fisher_files_as_json_are_the_functions(exact: fk.FisherOperator, tmp_path: Path) -> None:
    (2 * exact).save(tmp_path / "twice.safetensors", max_shard_size=200)
    index = tmp_path / "twice.safetensors.index.json"
    result = run(index, tmp_path / "exact.safetensors", "--json")
    assert result.exit_code == 0, result.output
    told, expected = json.loads(result.stdout), audit(2 * exact, exact)
    assert told["compared"] == "matrix"
    assert told["total"]["scale"] == pytest.approx(2)
    assert told["strength_ratio"] == pytest.approx(0.5)
    assert [part["name"] for part in told["parts"]] == [part.name for part in expected.parts]


def test_audit__a_part_that_is_zero_is_null_in_json(exact: fk.FisherOperator, tmp_path: Path) -> None:
    part = exact.space.unflatten(exact.diagonal())
    save_file(part | {"0.bias": torch.zeros(5)}, tmp_path / "part.safetensors")
    result = run(tmp_path / "part.safetensors", tmp_path / "exact.safetensors", "--json")
    assert result.exit_code == 0, result.output
    assert "NaN" not in result.stdout
    cosines = {part["name"]: part["cosine"] for part in json.loads(result.stdout)["parts"]}
    assert cosines["0.bias"] is None
    assert cosines["0.weight"] == pytest.approx(1)


@pytest.mark.usefixtures("exact")
def test_audit__refuses_what_is_no_fisher(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    save_file({"other": torch.ones(3)}, tmp_path / "other.safetensors")
    for name, words in (
        ("missing", "no such file"),
        ("text", "cannot be read"),
        ("other.safetensors", "missing names ['0.bias', '0.weight'"),
    ):
        result = run(tmp_path / name, tmp_path / "exact.safetensors")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert words in result.stderr
