"""The commands: help, tables, and those that show and audit Fisher files."""

import base64
import json
import re
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner, Result

import fisherkit as fk
from fisherkit.cli import app, fisher_files
from fisherkit.cli.scores_report import LARGEST, data_uri
from fisherkit.cli.text import table
from fisherkit.evaluation import audit
from fisherkit.kinds import KINDS
from fisherkit.operators import unwrap
from fisherkit.structures import structures
from fisherkit.words import duration, number
from tests import commands
from tests.commands import run
from tests.operator_cases import CASES, block_diagonal, diagonal, kronecker, total
from tests.small_data import X, Y, mlp


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
    assert table(("name", "n"), [("a", "10"), ("bcdef", "9")]) == ("name    n\n-----  --\na      10\nbcdef   9")


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.123, "0.12 s"), (9.6, "9.6 s"), (45.6, "46 s"), (110, "110 s"), (120, "2 minutes"), (9000, "2.5 hours")],
)
def test_duration__has_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# -- pictures in the page of ``fisherkit scores`` ----------------------------------------------------------------------


def pixels(uri: str) -> np.ndarray[Any, Any]:
    """A PNG without filters, read back."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, place = {}, 8
    while place < len(data):
        (size,) = struct.unpack_from(">I", data, place)
        name, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack_from(">I", data, place + 8 + size)[0] == zlib.crc32(name + body)
        chunks[name], place = body, place + 12 + size
    width, height, depth, color, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert depth == 8
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, {0: 1, 2: 3, 6: 4}[color])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (torch.tensor([[0, 0.5], [1, 0.2]]), [[[0], [128]], [[255], [51]]]),
        (torch.tensor([[-1.0, 1.0], [3.0, float("nan")]]), [[[0], [128]], [[255], [64]]]),
        (np.array([[0, 7], [255, 1]], dtype=np.uint8), [[[0], [7]], [[255], [1]]]),
        (torch.tensor([[True, False]]), [[[255], [0]]]),
        (torch.eye(3)[:, :1, None].expand(3, 1, 2), [[[255, 0, 0], [255, 0, 0]]]),
        (torch.eye(3).reshape(1, 3, 3)[:, :2].expand(2, 2, 3), [[[255, 0, 0], [0, 255, 0]]] * 2),
    ],
    ids=["unit", "range", "bytes", "bool", "channels first", "channels last"],
)
def test_data_uri__is_a_png_of_the_pixels(image: Any, expected: list[Any]) -> None:
    assert pixels(data_uri(image, "test")).tolist() == expected


def test_data_uri__averages_large_pictures_down() -> None:
    assert pixels(data_uri(torch.ones(640, 1280), "test")).shape == (160, LARGEST, 1)


@pytest.mark.parametrize("image", [torch.zeros(5, 4, 2), torch.zeros(4), torch.zeros(0, 3), torch.zeros(2, 2) * 1j])
def test_data_uri__refuses_what_is_no_picture(image: torch.Tensor) -> None:
    with pytest.raises(fk.errors.InvalidArgumentError, match="C = 1, 3 or 4"):
        data_uri(image, "test")


# -- ``fisherkit show`` ------------------------------------------------------------------------------------------------


F64 = torch.float64
STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac", "nkp")


show = partial(commands.run, "show")


@pytest.mark.parametrize("size", [None, 300])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_json__has_the_matrixs_numbers(structure: str, size: int | None, path: Path) -> None:
    fisher = fk.TruncatedFisher(mlp(), (X, Y), structure=structure)
    fisher.save(path, max_shard_size=size)
    result = show(path, "--json")
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
    result = show(path)
    assert result.exit_code == 0
    assert f"{operator.size} parameters, float64" in result.stdout
    assert f"{float(matrix.trace()):.4g}, mean eigenvalue" in result.stdout
    assert ("Largest eigenvalues: " in result.stdout) == (not name.startswith("sum"))


def test_text__shows_what_was_recorded_and_each_layer(path: Path) -> None:
    fisher = fk.ImprovedEmpiricalFisher(mlp(), (X, Y), structure="kfac")
    fisher.save(path)
    text = show(path).stdout
    for key in ("kind", "power", "label_source", "parameters_hash", "model"):
        assert any(line.split() == [key, fisher.metadata[key]] for line in text.splitlines())
    assert "coverage" not in text
    lines = [line.split() for line in text.splitlines()]
    assert [line[1:3] for line in lines if line[:1] == ["0"]] == [["kronecker", "25"]]


def test_text__says_which_blocks_have_no_closed_form(path: Path) -> None:
    total(block_diagonal(F64), block_diagonal(F64, seed=9))[0].save(path)
    result = show(path)
    assert "Eigenvalues: none in closed form for 2 of 4 blocks, because its parts do not share eigenv" in result.stdout
    found = json.loads(show(path, "--json").stdout)
    assert found["eigenvalues"] is None
    assert {layer["block"] for layer in found["layers"]} == {"sum", "dense", "diagonal"}


@pytest.mark.parametrize("structure", ["full", "block", "kfac"])
def test_text__says_when_a_decomposition_would_take_too_long(
    structure: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher_files, "LARGEST_SIDE", 3)
    fk.EmpiricalFisher(mlp(), (X, Y), structure=structure).save(path)
    assert "would have to decompose a matrix of side" in show(path).stdout
    assert "above 3 (fk.estimators.lanczos_eigenvalues" in show(path).stdout


def test_text__a_block_of_several_layers_is_joint(path: Path) -> None:
    fk.EmpiricalFisher(mlp(), (X, Y), structure="full").save(path)
    assert {layer["block"] for layer in json.loads(show(path, "--json").stdout)["layers"]} == {"low_rank, joint"}


def test_zero__has_shares_of_zero(path: Path) -> None:
    (0.0 * diagonal(F64)[0]).save(path)
    found = json.loads(show(path, "--json", "--out", path.parent / "out").stdout)
    assert (found["trace"], found["layers"][0]["share"]) == (0.0, 0.0)


def test_out__writes_json_and_picture(path: Path) -> None:
    kronecker(F64)[0].save(path, max_shard_size=100)
    folder = path.parent / "deep" / "out"
    result = show(path, "--out", folder)
    assert result.exit_code == 0
    assert "wrote " in result.stdout
    assert sorted(file.name for file in folder.iterdir()) == ["show.json", "show.png"]
    assert (folder / "show.png").read_bytes().startswith(b"\x89PNG")
    refused = show(path, "--out", folder)
    assert (refused.exit_code, "--overwrite" in refused.stderr, "show.json" in refused.stderr) == (1, True, True)
    plain = show(path, "--json", "--out", folder, "--overwrite")
    assert json.loads(plain.stdout) == json.loads((folder / "show.json").read_text("utf-8"))


def test_out__draws_what_has_no_eigenvalues(path: Path) -> None:
    CASES["sum_of_kroneckers"](F64)[0].save(path)
    assert show(path, "--out", path.parent / "out").exit_code == 0
    assert (path.parent / "out" / "show.png").exists()


def test_errors__are_a_line_and_exit_code_1(path: Path) -> None:
    missing = show(path)
    assert missing.exit_code == 1
    assert missing.stderr.startswith("error: open_file(")
    assert "no such file" in missing.stderr
    kronecker(F64)[0].save(path, max_shard_size=200)
    (path.parent / "fisher-00002-of-00002.safetensors").unlink()
    broken = show(path)
    assert broken.exit_code == 1
    assert "no file fisher-00002-of-00002.safetensors" in broken.stderr
    assert show().exit_code == 2


# -- ``fisherkit audit`` -----------------------------------------------------------------------------------------------


def run_audit(*arguments: str | Path) -> Result:
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
    result = run_audit(tmp_path / "theirs.safetensors", tmp_path / "exact.safetensors", "--batch-size", "8")
    assert result.exit_code == 0, result.output
    assert "scale 0.125" in result.stdout
    assert "multiplied by 8 with this one" in result.stdout
    assert "near 1/B = 1/8: squared gradients of batches" in result.stdout
    assert all(name in result.stdout for name in exact.space.names)


def test_audit__two_fisher_files_as_json_are_the_functions(exact: fk.FisherOperator, tmp_path: Path) -> None:
    (2 * exact).save(tmp_path / "twice.safetensors", max_shard_size=200)
    index = tmp_path / "twice.safetensors.index.json"
    result = run_audit(index, tmp_path / "exact.safetensors", "--json")
    assert result.exit_code == 0, result.output
    told, expected = json.loads(result.stdout), audit(2 * exact, exact)
    assert told["compared"] == "matrix"
    assert told["total"]["scale"] == pytest.approx(2)
    assert told["strength_ratio"] == pytest.approx(0.5)
    assert [part["name"] for part in told["parts"]] == [part.name for part in expected.parts]


def test_audit__a_part_that_is_zero_is_null_in_json(exact: fk.FisherOperator, tmp_path: Path) -> None:
    part = exact.space.unflatten(exact.diagonal())
    save_file(part | {"0.bias": torch.zeros(5)}, tmp_path / "part.safetensors")
    result = run_audit(tmp_path / "part.safetensors", tmp_path / "exact.safetensors", "--json")
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
        result = run_audit(tmp_path / name, tmp_path / "exact.safetensors")
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert words in result.stderr
