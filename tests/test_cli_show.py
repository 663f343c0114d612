"""``fisherkit show``: numbers against the dense matrix, text, JSON and files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import fisherkit as fk
from fisherkit.cli import fisher_files
from fisherkit.operators import unwrap
from tests import commands
from tests.operator_cases import CASES, block_diagonal, diagonal, kronecker, total
from tests.small_data import X, Y, mlp

F64 = torch.float64
STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac", "nkp")


run = partial(commands.run, "show")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fisher.safetensors"


@pytest.mark.parametrize("size", [None, 300])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_json__has_the_matrixs_numbers(structure: str, size: int | None, path: Path) -> None:
    fisher = fk.TruncatedFisher(mlp(), (X, Y), structure=structure)
    fisher.save(path, max_shard_size=size)
    result = run(path, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    matrix = fisher.to_dense()
    assert found["metadata"] == fisher.metadata
    assert (found["size"], found["dtype"], found["operator"]) == (matrix.shape[0], "float64", unwrap(fisher).tag)
    assert found["trace"] == pytest.approx(float(matrix.trace()))
    assert [layer["name"] for layer in found["layers"]] == ["0", "2"]
    start = 0
    for layer in found["layers"]:
        part = matrix.diagonal()[start : start + layer["size"]].sum()
        assert layer["trace"] == pytest.approx(float(part))
        assert layer["share"] == pytest.approx(float(part / matrix.trace()))
        assert layer["mean_eigenvalue"] == pytest.approx(float(part) / layer["size"])
        start += layer["size"]
    assert start == found["size"]
    values = torch.linalg.eigvalsh(matrix).flip(0)[:200]
    assert_close(torch.tensor(found["eigenvalues"], dtype=F64), values, rtol=1e-9, atol=1e-12)
    assert found["no_eigenvalues"] == ""
    assert found["bytes"] == sum(file.stat().st_size for file in path.parent.iterdir())
    assert found["files"] == len(list(path.parent.glob("*.safetensors")))


@pytest.mark.parametrize("name", CASES)
def test_text__of_every_structure(name: str, path: Path) -> None:
    operator, matrix = CASES[name](F64)
    operator.save(path)
    result = run(path)
    assert result.exit_code == 0
    assert f"{operator.size} parameters, float64" in result.stdout
    assert f"{float(matrix.trace()):.4g}, mean eigenvalue" in result.stdout
    assert ("Largest eigenvalues: " in result.stdout) == (not name.startswith("sum"))


def test_text__shows_what_was_recorded_and_each_layer(path: Path) -> None:
    fisher = fk.ImprovedEmpiricalFisher(mlp(), (X, Y), structure="kfac")
    fisher.save(path)
    text = run(path).stdout
    for key in ("kind", "power", "label_source", "parameters_hash", "model"):
        assert any(line.split() == [key, fisher.metadata[key]] for line in text.splitlines())
    assert "coverage" not in text
    lines = [line.split() for line in text.splitlines()]
    assert [line[1:3] for line in lines if line[:1] == ["0"]] == [["kronecker", "25"]]


def test_text__says_which_blocks_have_no_closed_form(path: Path) -> None:
    total(block_diagonal(F64), block_diagonal(F64, seed=9))[0].save(path)
    result = run(path)
    assert "Eigenvalues: none in closed form for 2 of 4 blocks, because its parts do not share eigenv" in result.stdout
    found = json.loads(run(path, "--json").stdout)
    assert found["eigenvalues"] is None
    assert {layer["kind"] for layer in found["layers"]} == {"sum", "dense", "diagonal"}


@pytest.mark.parametrize("structure", ["full", "block", "kfac"])
def test_text__says_when_a_decomposition_would_take_too_long(
    structure: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher_files, "LARGEST_SIDE", 3)
    fk.EmpiricalFisher(mlp(), (X, Y), structure=structure).save(path)
    assert "would have to decompose a matrix of side" in run(path).stdout
    assert "above 3 (fk.estimators.lanczos_eigenvalues" in run(path).stdout


def test_text__a_block_of_several_layers_is_joint(path: Path) -> None:
    fk.EmpiricalFisher(mlp(), (X, Y), structure="full").save(path)
    assert {layer["kind"] for layer in json.loads(run(path, "--json").stdout)["layers"]} == {"low_rank, joint"}


def test_zero__has_shares_of_zero(path: Path) -> None:
    (0.0 * diagonal(F64)[0]).save(path)
    found = json.loads(run(path, "--json", "--out", path.parent / "out").stdout)
    assert (found["trace"], found["layers"][0]["share"]) == (0.0, 0.0)


def test_out__writes_json_and_picture(path: Path) -> None:
    kronecker(F64)[0].save(path, max_shard_size=100)
    folder = path.parent / "deep" / "out"
    result = run(path, "--out", folder)
    assert result.exit_code == 0
    assert "wrote " in result.stdout
    assert sorted(file.name for file in folder.iterdir()) == ["show.json", "show.png"]
    assert (folder / "show.png").read_bytes().startswith(b"\x89PNG")
    refused = run(path, "--out", folder)
    assert (refused.exit_code, "--overwrite" in refused.stderr, "show.json" in refused.stderr) == (1, True, True)
    plain = run(path, "--json", "--out", folder, "--overwrite")
    assert json.loads(plain.stdout) == json.loads((folder / "show.json").read_text("utf-8"))


def test_out__draws_what_has_no_eigenvalues(path: Path) -> None:
    CASES["sum_of_kroneckers"](F64)[0].save(path)
    assert run(path, "--out", path.parent / "out").exit_code == 0
    assert (path.parent / "out" / "show.png").exists()


def test_errors__are_a_line_and_exit_code_1(path: Path) -> None:
    missing = run(path)
    assert missing.exit_code == 1
    assert missing.stderr.startswith("error: open_file(")
    assert "no such file" in missing.stderr
    kronecker(F64)[0].save(path, max_shard_size=200)
    (path.parent / "fisher-00002-of-00002.safetensors").unlink()
    broken = run(path)
    assert broken.exit_code == 1
    assert "no file fisher-00002-of-00002.safetensors" in broken.stderr
    assert run().exit_code == 2
