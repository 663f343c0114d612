"""Fisher files in shards: what lies where, what an interruption leaves, and what is refused."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fisherkit import io
from fisherkit.errors import FileFormatError, InvalidArgumentError, InvalidTypeError
from fisherkit.io import fisher_file, tensors
from fisherkit.operators import DiagonalOperator, FisherOperator, load, open_file, state_of
from fisherkit.space import ParameterSpace
from tests.operator_cases import CASES, LAYER, block_diagonal, diagonal, kronecker

F64 = torch.float64


def index_of(path: Path) -> Path:
    return path.parent / "fisher.safetensors.index.json"


def listing(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def numbers(operator: FisherOperator) -> list[Tensor]:
    return state_of(operator).all_tensors()


def same(a: FisherOperator, b: FisherOperator) -> bool:
    mine, theirs = numbers(a), numbers(b)
    return len(mine) == len(theirs) and all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


# -- what lies where ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 8, 50, 100, 400])
@pytest.mark.parametrize("name", CASES)
def test_load__gives_back_a_sharded_operator(name: str, size: int, path: Path) -> None:
    operator, _ = CASES[name](F64)
    operator.metadata = {"kind": "ief", "note": "λ"}
    operator.save(path, max_shard_size=size)
    loaded = load(path)
    assert type(loaded) is type(operator)
    assert loaded.metadata == operator.metadata
    assert same(loaded, operator)


def test_save__names_and_index_are_hugging_faces(path: Path) -> None:
    """A kfac layer of 8-byte numbers: 25 in one factor and 9 in the other."""
    operator, _ = kronecker(F64)
    operator.save(path, max_shard_size=200)
    parts = ["fisher-00001-of-00002.safetensors", "fisher-00002-of-00002.safetensors"]
    assert listing(path) == sorted([*parts, "fisher.safetensors.index.json"])
    index = json.loads(index_of(path).read_text("utf-8"))
    assert index["weight_map"] == {"activation": parts[0], "gradient": parts[1]}
    assert index["metadata"]["total_size"] == 8 * 34
    assert (index["metadata"]["format"], index["metadata"]["version"]) == ("fisherkit", "2")
    assert list(load_file(path.parent / parts[0])) == ["activation"]


def test_save__no_shard_is_larger_than_asked_for(path: Path) -> None:
    for name in CASES:
        CASES[name](F64)[0].save(path, max_shard_size=130)
        for file in path.parent.glob("*.safetensors"):
            assert sum(t.numel() * t.element_size() for t in load_file(file).values()) <= 130


def test_save__keeps_small_operators_in_one_file(path: Path) -> None:
    operator, _ = diagonal(F64)
    operator.save(path, max_shard_size=15 * 8)
    assert listing(path) == [path.name]
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["version"] == "1"
    operator.save(path, max_shard_size=15 * 8 - 1)
    assert len(listing(path)) == 3


def test_save__one_row_that_is_larger_than_a_shard_is_one_file(path: Path) -> None:
    alone = DiagonalOperator(ParameterSpace(("x",), ((1,),)), torch.ones(1, dtype=F64))
    alone.save(path, max_shard_size=1)
    assert listing(path) == [path.name]
    assert same(load(path), alone)
    kronecker(F64)[0].save(path, max_shard_size=100)
    alone.save(path, max_shard_size=1)
    assert listing(path) == [path.name]


@pytest.mark.parametrize("name", ["fisher.safetensors", "fisher", "fisher.bin"])
def test_load__takes_the_index_and_the_path_of_saving(name: str, tmp_path: Path) -> None:
    operator, _ = kronecker(F64)
    operator.save(tmp_path / name, max_shard_size=100)
    (index,) = tmp_path.glob("*.index.json")
    for given in (tmp_path / name, index, str(index)):
        assert same(load(given), operator)
        assert open_file(given).space == LAYER


def test_load__reads_a_file_of_version_1_without_this_package(path: Path) -> None:
    """The header as version 1 had it, written key by key."""
    header = {
        "format": "fisherkit",
        "version": "1",
        "space": '{"l.weight": [3, 4], "l.bias": [3]}',
        "operator": '{"kind": "diagonal", "names": ["l.weight", "l.bias"], "tensors": {"diagonal": "diagonal"}, '
        '"options": {}, "children": []}',
        "metadata": '{"kind": "ef"}',
    }
    save_file({"diagonal": torch.arange(15.0)}, path, metadata=header)
    assert torch.equal(load(path).diagonal(), torch.arange(15.0))
    assert torch.equal(open_file(path).read(["l.bias"]).diagonal(), torch.arange(12.0, 15.0))


def test_save__a_file_is_as_readable_as_any_other(path: Path) -> None:
    (path.parent / "plain").touch()
    diagonal(F64)[0].save(path)
    kronecker(F64)[0].save(path.parent / "k", max_shard_size=100)
    assert len({file.stat().st_mode for file in path.parent.iterdir()}) == 1


# -- one save after another --------------------------------------------------------------------------------------------

# Factors of 5 × 5 and 3 × 3 numbers of 8 bytes, cut between rows.
SIZES = {"whole": None, "two": 200, "three": 120, "four": 80}
FILES = {"whole": 1, "two": 3, "three": 4, "four": 5}


def first(path: Path, size: str) -> FisherOperator:
    operator, _ = kronecker(F64, seed=0)
    operator.save(path, max_shard_size=SIZES[size])
    return operator


@pytest.mark.parametrize("new", SIZES)
@pytest.mark.parametrize("old", SIZES)
def test_save__replaces_whatever_there_was(old: str, new: str, path: Path) -> None:
    first(path, old)
    second, _ = kronecker(F64, seed=1)
    for _ in range(2):
        second.save(path, max_shard_size=SIZES[new])
        assert same(load(path), second)
        assert len(listing(path)) == FILES[new]


@contextmanager
def steps(before: Any) -> Iterator[None]:
    """Call ``before`` ahead of each step that changes the folder: replacing and deleting."""
    replace, unlink = os.replace, Path.unlink
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (before(), replace(*a))[1])
        patch.setattr(Path, "unlink", lambda self, **options: (before(), unlink(self, **options))[1])
        yield


@contextmanager
def failing(step: int, error: BaseException) -> Iterator[None]:
    """Raise at a step: after writing a safetensors file, or instead of putting a file in place."""
    replace, flush, count = os.replace, tensors.flush, itertools.count()

    def reach() -> None:
        if next(count) == step:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (reach(), replace(*a))[1])
        patch.setattr(tensors, "flush", lambda part: (flush(part), reach())[0])
        yield


@pytest.mark.parametrize("new", SIZES)
@pytest.mark.parametrize("old", SIZES)
def test_save__leaves_the_old_or_the_new_file_wherever_it_is_killed(
    old: str, new: str, path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The folder is copied ahead of every step: each copy is what a killed process leaves."""
    before = first(path, old)
    second, _ = kronecker(F64, seed=1)
    copies: list[Path] = []
    aside = tmp_path_factory.mktemp("copies")

    def copy() -> None:
        copies.append(aside / str(len(copies)))
        shutil.copytree(path.parent, copies[-1])

    with steps(copy):
        second.save(path, max_shard_size=SIZES[new])
    seen = []
    for folder in copies:
        found = load(folder / path.name)
        seen.append("new" if same(found, second) else "old")
        assert same(found, before if seen[-1] == "old" else second)
        # What a killed process left is cleared away by the next save.
        second.save(folder / path.name, max_shard_size=SIZES[new])
        assert same(load(folder / path.name), second)
        assert len([file for file in folder.iterdir() if file.suffix != ".part"]) == FILES[new]
    assert seen == sorted(seen, reverse=True)  # once new, new for good
    assert seen[0] == "old"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
@pytest.mark.parametrize("old", SIZES)
def test_save__that_fails_leaves_the_old_file_and_nothing_else(old: str, error: BaseException, path: Path) -> None:
    before = first(path, old)
    files = listing(path)
    second, _ = kronecker(F64, seed=1)
    step = 0
    while True:
        try:
            with failing(step, error):
                second.save(path, max_shard_size=SIZES["three"])
            break
        except type(error):
            assert listing(path) == files
            assert same(load(path), before)
        step += 1
    assert step == 7  # three shards written, three renamed, and the index
    assert same(load(path), second)


def test_save__interrupted_right_after_the_index_keeps_the_new_shards(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first(path, "two")
    second, _ = kronecker(F64, seed=1)
    put = io.replace_text

    def interrupted(*arguments: Any) -> None:
        put(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "replace_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            second.save(path, max_shard_size=200)
    assert same(load(path), second)
    second.save(path, max_shard_size=200)
    assert len(listing(path)) == 3


def test_save__needs_no_more_memory_than_one_shard_beside_the_operator(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    new_files = tensors.new_files

    @contextmanager
    def recorded(*arguments: Any, **options: Any) -> Iterator[Any]:
        with new_files(*arguments, **options) as put:
            yield lambda name, tensor: (held.append(tensor.nbytes), put(name, tensor))

    monkeypatch.setattr(fisher_file, "new_files", recorded)
    block_diagonal(F64)[0].save(path, max_shard_size=96)
    assert max(held) <= 96


def test_save__leaves_files_of_others_alone(path: Path) -> None:
    """A model's shards and files that only look like ours stay, and no name of theirs is used."""
    theirs = ["fisher-00001-of-00002.safetensors", "fisher-00001-of-00003.safetensors"]
    for name in theirs:
        save_file({"weight": torch.zeros(3)}, path.parent / name)
    (path.parent / "fisher-0000000a-00001-of-00001.safetensors").write_text("notes")
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    for size in (200, None, 120, 200):
        kronecker(F64)[0].save(path, max_shard_size=size)
        assert {file: file.read_bytes() for file in before} == before
    kronecker(F64)[0].save(path)
    assert {*path.parent.iterdir()} == {*before, path}


# -- what is refused of Fisher files in shards -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "error", "match"),
    [
        (0, InvalidArgumentError, "max_shard_size=0; expected an integer, 1 or more"),
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
