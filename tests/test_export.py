"""`to_mergekit` and ``fisherkit export``: what was written, read back by transformers and safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import fisherkit as fk
from fisherkit.cli import app
from fisherkit.operators import DiagonalOperator, KroneckerOperator
from fisherkit.operators.composite import join
from fisherkit.space import ParameterSpace
from tests.text_models import make_classifier, make_tokenizer, saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    saved(make_classifier(0), make_tokenizer(tmp_path_factory.mktemp("words")), root / "a")
    return root / "a"


def fisher_of(folder: Path) -> tuple[fk.FisherOperator, dict[str, Tensor]]:
    """Kronecker products for matrices and diagonals for the rest, and the diagonal by hand."""
    weights, parts, expected = load_file(folder / "model.safetensors"), [], {}
    torch.manual_seed(0)
    for name, tensor in weights.items():
        space = ParameterSpace((name,), (tuple(tensor.shape),))
        if tensor.ndim == 2 and tensor.shape[0] < 40:
            x, y = torch.randn(3, tensor.shape[1]), torch.randn(3, tensor.shape[0])
            parts.append(KroneckerOperator(space, x.T @ x, y.T @ y))
            expected[name] = torch.outer(y.square().sum(0), x.square().sum(0))
        else:
            expected[name] = torch.rand(tensor.shape)
            parts.append(DiagonalOperator(space, expected[name].flatten()))
    space = ParameterSpace(tuple(weights), tuple(tuple(tensor.shape) for tensor in weights.values()))
    fisher = join(space, parts)
    fisher.metadata = {"kind": "ef", "structure": "kfac"}
    return fisher, expected


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shard", [None, 400])
def test_command_writes_a_model_that_transformers_loads(folder: Path, tmp_path: Path, shard: int | None) -> None:
    fisher, expected = fisher_of(folder)
    fisher.save(tmp_path / "f.safetensors")
    out = tmp_path / "out"
    options = [] if shard is None else ["--max-shard-size", str(shard)]
    arguments = [
        "export",
        str(tmp_path / "f.safetensors"),
        "--to",
        "mergekit",
        "--model",
        str(folder),
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == (shard is not None)
    same({name: tensor for file in files for name, tensor in load_file(file).items()}, expected)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    same({name: tensor.detach() for name, tensor in model.named_parameters()}, expected)
    assert json.loads((out / "fisher.json").read_text())["kind"] == "ef"
    assert {path.name for path in folder.glob("*.json")} <= {path.name for path in out.glob("*.json")} | {
        "model.safetensors.index.json"
    }
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0


def test_of_a_model_in_half_precision_the_diagonal_stays_in_float32(folder: Path, tmp_path: Path) -> None:
    half = transformers.AutoModelForSequenceClassification.from_pretrained(folder).bfloat16()
    half.save_pretrained(tmp_path / "half")
    fisher, _ = fisher_of(folder)
    small = 1e-12 * fisher
    fk.merging.to_mergekit(small, tmp_path / "half", tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    by_name = small.space.unflatten(small.diagonal())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), by_name[name])


def test_a_full_disk_leaves_no_part_of_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fisher, _ = fisher_of(folder)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    for name in ("os.replace", "shutil.copy2", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(name, fail)
            with pytest.raises(OSError, match="no space left"):
                fk.merging.to_mergekit(fisher, folder, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    fisher, _ = fisher_of(folder)
    names = fisher.space.names
    part = DiagonalOperator(fisher.space.restrict(names[1:]), torch.ones(fisher.space.restrict(names[1:]).size))

    def refused(match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(fk.FisherkitError, match=match):
            fk.merging.to_mergekit(*arguments, **options)

    out = tmp_path / "out"
    refused(f"does not cover: '{names[0]}'", part, folder, out)
    refused("which has no config.json", fisher, tmp_path, out)
    refused("the name of another folder", fisher, folder, folder)
    refused(
        "lacks or has in another shape: 'x'",
        DiagonalOperator(ParameterSpace(("x",), ((2,),)), torch.ones(2)),
        folder,
        out,
    )
    odd, _ = fisher_of(folder)
    odd.metadata = {"covered_hash": "float32:0"}
    refused("measured at other parameters", odd, folder, out)
    assert not out.exists()
    fk.merging.to_mergekit(part, folder, out, uncovered="skip")
    assert load_file(out / "model.safetensors").keys() == set(names[1:])
    save_file({"x": torch.ones(1)}, out / "model.safetensors")
    refused("a place without a model", fisher, folder, out)
