"""`split` and `open_file`: an operator's independent blocks, in memory and one by one from a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import fisherkit as fk
from fisherkit import io
from fisherkit.errors import FileFormatError, InvalidArgumentError, InvalidTypeError, UnknownParameterError
from fisherkit.operators import (
    BlockDiagonalOperator,
    DiagonalOperator,
    FisherOperator,
    SumOperator,
    load,
    open_file,
    split,
    state_of,
)
from fisherkit.space import ParameterSpace
from tests.operator_cases import (
    CASES,
    LAYER,
    MIXED,
    assert_close,
    block_diagonal,
    dense,
    diagonal,
    kronecker,
    normal,
    total,
)
from tests.small_data import X, Y, mlp

STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac", "nkp")

F64 = torch.float64
BLOCKS = {
    "diagonal": [("l.weight",), ("l.bias",)],
    "block_diagonal": [("x.weight", "x.bias"), ("y.weight",), ("z",), ("w.weight", "w.bias")],
    "sum_of_structures": [("l.weight", "l.bias")],
    "sum_of_blocks": [("x.weight", "x.bias"), ("y.weight",), ("z",), ("w.weight", "w.bias")],
}


def places(space: ParameterSpace, names: tuple[str, ...]) -> Tensor:
    """Where the names' entries lie in a flat vector, counted."""
    order, start = [], 0
    for name, shape in zip(space.names, space.shapes, strict=True):
        size = int(torch.tensor(shape).prod()) if shape else 1
        order += list(range(start, start + size)) if name in names else []
        start += size
    return torch.tensor(order)


def entries(matrix: Tensor, space: ParameterSpace, names: tuple[str, ...]) -> Tensor:
    chosen = places(space, names)
    return matrix[chosen][:, chosen]


# -- split -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_split__blocks_are_the_matrix(name: str) -> None:
    operator, matrix = CASES[name](F64)
    operator.metadata = {"kind": "ief"}
    blocks = split(operator)
    covered = torch.cat([places(operator.space, block.space.names) for block in blocks])
    assert covered.sort().values.tolist() == list(range(operator.size))
    rest = matrix.clone()
    for block in blocks:
        chosen = places(operator.space, block.space.names)
        assert block.space == operator.space.restrict(block.space.names)
        assert_close(block.to_dense(), matrix[chosen][:, chosen], F64)
        rest[chosen.unsqueeze(-1), chosen] = 0
        assert block.metadata == {}
    assert not rest.any()
    assert [block.space.names for block in blocks] == BLOCKS.get(name, [operator.space.names])
    assert operator.metadata == {"kind": "ief"}


def test_split__goes_into_blocks_within_blocks() -> None:
    space = ParameterSpace(("a", "b", "c", "d"), ((2,), (3,), (1,), (2,)))
    inner = BlockDiagonalOperator(
        space.restrict("acd"), [diagonal(F64, space.restrict("ad"))[0], dense(F64, space.restrict("c"))[0]]
    )
    whole = BlockDiagonalOperator(space, [dense(F64, space.restrict("b"))[0], inner])
    assert [block.space.names for block in split(whole)] == [("a",), ("b",), ("c",), ("d",)]


def test_split__joins_what_a_chain_of_terms_connects() -> None:
    """Terms of blocks {ab}{c}{d} and {a}{bc}{d} leave {abc} and {d}."""
    space = ParameterSpace(("a", "b", "c", "d"), ((2,), (3,), (1,), (2,)))

    def of(*groups: str, seed: int) -> FisherOperator:
        return BlockDiagonalOperator(space, [dense(F64, space.restrict(g), seed + i)[0] for i, g in enumerate(groups)])

    summed = SumOperator([of("ab", "c", "d", seed=0), of("a", "bc", "d", seed=5)])
    blocks = split(summed)
    assert [block.space.names for block in blocks] == [("a", "b", "c"), ("d",)]
    for block in blocks:
        assert_close(block.to_dense(), entries(summed.to_dense(), space, block.space.names), F64)


def test_split__of_a_sum_folds_a_blocks_parts_where_that_is_exact() -> None:
    operator, _ = total(block_diagonal(F64), block_diagonal(F64, seed=9))
    assert [type(block).__name__ for block in split(operator)] == [
        "SumOperator", "DenseOperator", "DiagonalOperator", "SumOperator",
    ]  # fmt: skip
    mixed, matrix = total(dense(F64), diagonal(F64, seed=3))
    (block,) = split(mixed)
    assert type(block).__name__ == "DenseOperator"
    assert_close(block.to_dense(), matrix, F64)


class Doubled(DiagonalOperator):
    tag: ClassVar[str] = "doubled_for_split"

    def _matmat(self, columns: Tensor) -> Tensor:
        return 2 * super()._matmat(columns)


def test_split__takes_a_users_own_operator_for_one_block(tmp_path: Path) -> None:
    operator = Doubled(LAYER, torch.ones(15))
    assert split(operator) == (operator,)
    operator.save(tmp_path / "f")
    assert open_file(tmp_path / "f").blocks == (LAYER.names,)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_split__of_a_built_fisher(structure: str) -> None:
    fisher = fk.EmpiricalFisher(mlp(), (X, Y), structure=structure)
    layers = [("0.weight", "0.bias"), ("2.weight", "2.bias")]
    expected = {"full": [fisher.space.names], "diagonal": [(name,) for name in fisher.space.names]}
    blocks = split(fisher)
    assert [block.space.names for block in blocks] == expected.get(structure, layers)
    assert all(block.metadata == {} for block in blocks)
    assert fisher.metadata["kind"] == "ef"


# -- open_file ---------------------------------------------------------------------------------------------------------

SIZES = [None, 200, 8]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_read__gives_each_block_as_split_does(name: str, size: int | None, tmp_path: Path) -> None:
    operator, matrix = CASES[name](F64)
    operator.metadata = {"kind": "ief", "note": "λ"}
    operator.save(tmp_path / "f.safetensors", max_shard_size=size)
    file = open_file(tmp_path / "f.safetensors")
    assert (file.space, file.metadata) == (operator.space, operator.metadata)
    blocks = split(operator)
    assert file.blocks == tuple(block.space.names for block in blocks)
    for names, block in zip(file.blocks, blocks, strict=True):
        read = file.read(names)
        assert (type(read), read.space, read.metadata) == (type(block), block.space, {})
        assert_close(read.to_dense(), entries(matrix, operator.space, names), F64)
    whole = file.read(reversed(operator.space.names))
    assert whole.space == operator.space
    assert isinstance(whole, BlockDiagonalOperator) == (len(blocks) > 1)
    assert_close(whole.to_dense(), matrix, F64)


def test_read__of_several_blocks_is_over_their_space(tmp_path: Path) -> None:
    operator, matrix = block_diagonal(F64)
    operator.save(tmp_path / "f")
    read = open_file(tmp_path / "f").read(["w.bias", "z", "w.weight"])
    assert isinstance(read, BlockDiagonalOperator)
    assert read.space == MIXED.restrict(["z", "w.weight", "w.bias"])
    assert_close(read.to_dense(), entries(matrix, MIXED, ("z", "w.weight", "w.bias")), F64)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_read__of_a_built_fisher(structure: str, tmp_path: Path) -> None:
    fisher = fk.TruncatedFisher(mlp(), (X, Y), structure=structure)
    fisher.save(tmp_path / "f", max_shard_size=300)
    file = open_file(tmp_path / "f")
    assert file.metadata == fisher.metadata
    for block in split(fisher):
        read = file.read(block.space.names)
        v = normal(block.size, seed=4)
        assert_close(read.solve(v, 0.1), block.solve(v, 0.1), F64)


class Recorder:
    """Stands in for ``safe_open`` and keeps what was read: (file's name, key, how many entries)."""

    def __init__(self) -> None:
        self.read: list[tuple[str, str, int]] = []

    def __call__(self, path: Path, **options: Any) -> Any:
        recorder = self

        class File:
            def __init__(self) -> None:
                self.file = safe_open(path, **options)

            def __enter__(self) -> Any:
                self.file.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                self.file.__exit__(*error)

            def metadata(self) -> Any:
                return self.file.metadata()

            def keys(self) -> Any:
                return self.file.keys()

            def get_tensor(self, key: str) -> Tensor:
                tensor = self.file.get_tensor(key)
                recorder.read.append((Path(path).name, key, tensor.numel()))
                return tensor

            def get_slice(self, key: str) -> Any:
                whole = self.file.get_slice(key)

                class Slice:
                    def get_shape(self) -> Any:
                        return whole.get_shape()

                    def __getitem__(self, span: slice) -> Tensor:
                        part = whole[span]
                        recorder.read.append((Path(path).name, key, part.numel()))
                        return part

                return Slice()

        return File()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr("fisherkit.io.fisher_file.safe_open", found)
    return found


def test_open_file__reads_no_tensor(recorder: Recorder, tmp_path: Path) -> None:
    for size in (None, 200):
        CASES["sum_of_blocks"](F64)[0].save(tmp_path / "f", max_shard_size=size)
        file = open_file(tmp_path / "f")
        assert (file.space, len(file.blocks)) == (MIXED, 4)
        assert file.nbytes > 0
    assert recorder.read == []


def test_read__reads_a_blocks_tensors_and_no_others(recorder: Recorder, tmp_path: Path) -> None:
    block_diagonal(F64)[0].save(tmp_path / "f")
    file = open_file(tmp_path / "f")
    file.read(["y.weight"])
    assert recorder.read == [("f", "1.matrix", 16)]


@pytest.mark.parametrize("size", [None, 24])
def test_read__reads_a_diagonals_slice_alone(
    size: int | None, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 numbers, the bias the last three; in shards of three numbers it is one of them, and so are checksums."""
    monkeypatch.setattr("fisherkit.io.checksums.PIECE", 24)
    operator, _ = diagonal(F64)
    operator.save(tmp_path / "f.safetensors", max_shard_size=size)
    read = open_file(tmp_path / "f.safetensors").read(["l.bias"])
    assert torch.equal(read.diagonal(), operator.diagonal()[12:])
    where = ("f.safetensors", "diagonal") if size is None else ("f-00005-of-00005.safetensors", "diagonal.4")
    assert recorder.read == [(*where, 3)]


def test_read__needs_no_shard_but_its_own(tmp_path: Path) -> None:
    operator, matrix = block_diagonal(F64)
    operator.save(tmp_path / "f.safetensors", max_shard_size=130)
    index = open_file(tmp_path / "f.safetensors").header
    own = index.files["1.matrix"]
    for other in {*index.files.values()} - {own}:
        other.unlink()
    file = open_file(tmp_path / "f.safetensors")
    assert_close(file.read(["y.weight"]).to_dense(), entries(matrix, MIXED, ("y.weight",)), F64)
    with pytest.raises(FileFormatError, match=r"no file f-0000.*not copied along"):
        file.read(["w.weight", "w.bias"])
    with pytest.raises(FileFormatError, match=r"no file f-0000"):
        load(tmp_path / "f.safetensors")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        (["x.weight"], InvalidArgumentError, r"a part of the block \['x.weight', 'x.bias'\]; expected whole blocks"),
        ([], InvalidArgumentError, "no names"),
        (["z", "q"], UnknownParameterError, r"unknown names \['q'\]"),
    ],
)
def test_read__refuses_anything_but_whole_blocks(
    names: list[str], error: type[Exception], match: str, tmp_path: Path
) -> None:
    block_diagonal(F64)[0].save(tmp_path / "f")
    with pytest.raises(error, match=match):
        open_file(tmp_path / "f").read(names)


def test_read__takes_a_single_name(tmp_path: Path) -> None:
    block_diagonal(F64)[0].save(tmp_path / "f")
    assert open_file(tmp_path / "f").read("z").space.names == ("z",)


@pytest.mark.parametrize("function", [open_file, load])
def test_open__refuses_what_is_no_path(function: Callable[[Any], Any]) -> None:
    with pytest.raises(InvalidTypeError, match="expected the path of a file"):
        function(3)


def test_open_file__refuses_blocks_that_do_not_cover_the_space(tmp_path: Path) -> None:
    state = io.State("block_diagonal", LAYER.names, children=(state_of(diagonal(F64, LAYER.restrict(["l.bias"]))[0]),))
    io.write(tmp_path / "f", state, LAYER, {})
    with pytest.raises(FileFormatError, match=r"blocks over \['l.bias'\]; expected each of"):
        open_file(tmp_path / "f")


def test_read__refuses_tensors_that_do_not_fit(tmp_path: Path) -> None:
    io.write(tmp_path / "f", io.State("diagonal", LAYER.names, {"diagonal": torch.ones(14)}), LAYER, {})
    file = open_file(tmp_path / "f")
    assert file.read(["l.weight"]).size == 12
    with pytest.raises(FileFormatError, match="'diagonal' has 14 rows, 15 are needed"):
        file.read(["l.bias"])
    io.write(tmp_path / "f", io.State("diagonal", LAYER.names, {"diagonal": -torch.ones(15)}), LAYER, {})
    with pytest.raises(FileFormatError, match=r"parts do not make an operator .*3 negative entries"):
        open_file(tmp_path / "f").read(["l.bias"])


def test_read__refuses_a_file_that_was_replaced_since(tmp_path: Path) -> None:
    for size in (None, 100):
        kronecker(F64)[0].save(tmp_path / "f", size)
        file = open_file(tmp_path / "f")
        kronecker(F64, seed=1)[0].save(tmp_path / "f", size)
        with pytest.raises(FileFormatError, match=r"(f of another save|no file f-).*open it again"):
            file.read(LAYER.names)


def test_load__of_what_torch_save_wrote_says_so(tmp_path: Path) -> None:
    for old in (False, True):
        torch.save({"weight": torch.zeros(3)}, tmp_path / "f", _use_new_zipfile_serialization=not old)
        with pytest.raises(fk.FileFormatError, match=r"torch.save or pickle.*torch.load"):
            fk.load(tmp_path / "f")
