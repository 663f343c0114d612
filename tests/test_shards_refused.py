"""What is refused of Fisher files in shards: sizes, names in the way, and files that are damaged or of two saves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fisherkit.errors import FileFormatError, InvalidArgumentError, InvalidTypeError
from fisherkit.operators import load, open_file
from tests.operator_cases import diagonal, kronecker
from tests.test_shards import index_of, listing

F64 = torch.float64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fisher.safetensors"


@pytest.mark.parametrize(
    ("size", "error", "match"),
    [
        (0, InvalidArgumentError, "max_shard_size=0; expected 1 or more"),
        (1.5, InvalidTypeError, "max_shard_size of type float"),
        (True, InvalidTypeError, "max_shard_size of type bool"),
    ],
)
def test_save__refuses_a_size_that_is_none(size: Any, error: type[Exception], match: str, path: Path) -> None:
    with pytest.raises(error, match=match):
        diagonal(F64)[0].save(path, max_shard_size=size)
    assert listing(path) == []


def test_save__refuses_the_name_of_an_index(path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"the name of an index.*Try: 'fisher.safetensors'"):
        diagonal(F64)[0].save(index_of(path))


def test_save__refuses_to_replace_a_models_files(path: Path) -> None:
    index_of(path).write_text('{"metadata": {"total_size": 3}, "weight_map": {}}')
    for there in (index_of(path), path):
        with pytest.raises(InvalidArgumentError, match=f"where {there.name} is something else than a Fisher file"):
            kronecker(F64)[0].save(path, max_shard_size=100)
        assert listing(path) == [there.name]
        there.unlink()
        save_file({"weight": torch.zeros(3)}, path)


def refused(path: Path, match: str) -> None:
    for function in (load, lambda p: open_file(p).read(open_file(p).space.names)):
        with pytest.raises(FileFormatError, match=match):
            function(path)


def damaged(path: Path) -> tuple[Path, Path]:
    kronecker(F64)[0].save(path, max_shard_size=200)
    one, two = sorted(path.parent.glob("*.safetensors"))
    return one, two


def test_load__says_which_shard_is_missing(path: Path) -> None:
    _, two = damaged(path)
    two.unlink()
    refused(path, r"no file fisher-00002-of-00002.safetensors; expected every file that fisher.safetensors.index.json")


def test_load__says_which_shard_is_of_another_save(path: Path) -> None:
    _, two = damaged(path)
    other = path.parent / "other"
    kronecker(F64, seed=1)[0].save(other, max_shard_size=200)
    shutil.copy(path.parent / "other-00002-of-00002.safetensors", two)
    refused(path, r"fisher-00002-of-00002.safetensors of another save; .*Files of two saves are mixed")
    save_file({"gradient": torch.eye(3, dtype=F64)}, two)
    refused(path, r"fisher-00002-of-00002.safetensors of another save")


def test_load__says_which_shard_lacks_a_tensor(path: Path) -> None:
    _, two = damaged(path)
    with safe_open(two, framework="pt") as file:
        header = file.metadata()
    save_file({"something": torch.zeros(1)}, two, metadata=header)
    refused(path, r"a file fisher-00002-of-00002.safetensors that cannot be read \(.*gradient")


def test_load__says_which_part_of_a_tensor_has_another_length(path: Path) -> None:
    diagonal(F64)[0].save(path, max_shard_size=64)
    one = path.parent / "fisher-00001-of-00002.safetensors"
    with safe_open(one, framework="pt") as file:
        header = file.metadata()
    save_file({"diagonal.0": torch.ones(9, dtype=F64)}, one, metadata=header)
    refused(path, r"fisher-00001-of-00002.safetensors that cannot be read \('diagonal.0' has 9 rows, 8 are needed\)")


def change_index(path: Path, change: Any) -> None:
    """In an index without checksums, or nothing but these would be found."""
    index = json.loads(index_of(path).read_text("utf-8"))
    del index["metadata"]["checksum"], index["metadata"]["checksums"]
    change(index)
    index_of(path).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda i: i["weight_map"].pop("gradient"), r"an index .* that .* \(it has no tensor 'gradient'\)"),
        (lambda i: i.pop("weight_map"), "an index fisher.safetensors.index.json that cannot be read"),
        (lambda i: i["weight_map"].update(gradient="../x.safetensors"), "an index .* that cannot be read"),
        (lambda i: i["weight_map"].update(gradient=3), "an index .* that cannot be read"),
        (lambda i: i["metadata"].pop("save"), "an index .* that cannot be read"),
        (lambda i: i["metadata"].pop("space"), "an index .* that cannot be read"),
        (lambda i: i["metadata"].pop("format"), "an index of something else"),
        (lambda i: i["metadata"].update(version="3"), "format version 3; expected at most 2"),
    ],
)  # fmt: skip
def test_load__refuses_an_index_that_makes_no_sense(path: Path, change: Any, match: str) -> None:
    damaged(path)
    change_index(path, change)
    refused(path, match)


def test_load__of_a_shard_points_to_the_index(path: Path) -> None:
    one, _ = damaged(path)
    refused(one, r"one shard of a Fisher file; expected its index")
