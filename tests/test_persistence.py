"""Fisher files: every tensor comes back bit by bit, and nothing else is taken for one."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close

from fisherkit import io
from fisherkit.errors import FileFormatError, InvalidArgumentError
from fisherkit.operators import DiagonalOperator, load, state_of
from fisherkit.space import ParameterSpace
from tests.operator_cases import CASES, LAYER, block_diagonal, diagonal, kronecker, normal, total


def tensors(state: io.State) -> list[torch.Tensor]:
    return [*state.tensors.values(), *(tensor for child in state.children for tensor in tensors(child))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_load__gives_back_the_saved_operator(name: str, dtype: torch.dtype, path: Path) -> None:
    operator, _ = CASES[name](dtype)
    operator.metadata = {"kind": "ief", "examples": "160", "note": "λ, ‖u‖"}
    operator.save(path)
    loaded = load(path)
    assert type(loaded) is type(operator)
    assert loaded.space == operator.space
    assert (loaded.dtype, loaded.device) == (dtype, torch.device("cpu"))
    assert loaded.metadata == operator.metadata
    # Tensors are the same bit by bit; products of the same tensors may round by how they lie in memory.
    assert all(torch.equal(a, b) for a, b in zip(tensors(state_of(loaded)), tensors(state_of(operator)), strict=True))
    assert_close(loaded.to_dense(), operator.to_dense(), rtol=1e-5, atol=1e-6)
    v = normal(operator.size, seed=1, dtype=dtype)
    assert_close(loaded.solve(v, 0.1), operator.solve(v, 0.1), rtol=1e-4, atol=1e-5)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_load__blocks_with_sums_inside_come_back(path: Path) -> None:
    operator, _ = total(block_diagonal(torch.float64), block_diagonal(torch.float64, seed=3))
    (2.0 * operator).save(path)
    assert_close(load(path).to_dense(), (2.0 * operator).to_dense())


def test_load__float64_eigenvalues_beside_float32_bases_stay(path: Path) -> None:
    operator, _ = kronecker(torch.float32)
    operator.eigen().save(path)
    assert_close(load(path).eigenvalues(), operator.eigenvalues(), rtol=1e-14, atol=0.0)


def test_save__replaces_an_older_file(path: Path) -> None:
    for seed in (0, 1):
        operator, _ = diagonal(torch.float64, seed=seed)
        operator.save(path)
    assert torch.equal(load(path).diagonal(), operator.diagonal())


def test_load__finds_a_users_own_operator(path: Path) -> None:
    class Doubled(DiagonalOperator):
        tag: ClassVar[str] = "doubled_for_this_test"

        def _matmat(self, columns: torch.Tensor) -> torch.Tensor:
            return 2 * super()._matmat(columns)

    Doubled(LAYER, torch.ones(15)).save(path)
    loaded = load(path)
    assert type(loaded).__name__ == "Doubled"
    assert torch.equal(loaded @ torch.ones(15), 2 * torch.ones(15))


# -- what is not a Fisher file -----------------------------------------------------------------------------------------


def saved(path: Path) -> bytes:
    diagonal(torch.float64)[0].save(path)
    return path.read_bytes()


def refused(path: Path, match: str) -> None:
    with pytest.raises(FileFormatError, match=match) as caught:
        load(path)
    assert str(caught.value).startswith(f"load({str(path)!r})")
    assert "Try: " in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("kept", [0, 4, 100, -8])
def test_load__refuses_a_truncated_file(path: Path, kept: int) -> None:
    path.write_bytes(saved(path)[:kept])
    refused(path, "a file that cannot be read .*an interrupted save leaves the old file in place")


def test_load__refuses_an_operator_over_other_names_than_the_space(path: Path) -> None:
    content = saved(path)
    with safe_open(path, framework="pt") as file:
        operator = file.metadata()["operator"]
    rewrite_header(path, "operator", operator.replace("l.weight", "k.weight"))
    refused(path, r"parts do not make an operator .*a diagonal operator over \[.*\]; expected one over")
    path.write_bytes(content)
    assert load(path).space == LAYER


def rewrite_header(path: Path, key: str, value: str) -> None:
    with safe_open(path, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # Without checksums, or nothing but these would be found.
    kept = {name: text for name, text in header.items() if not name.startswith("checksum")}
    save_file(tensors, path, metadata=kept | {key: value})


def test_load__refuses_a_foreign_safetensors_file(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)
    refused(path, "a safetensors file of another kind; expected one written by fisher.save")


def test_load__refuses_a_missing_file_and_a_folder(path: Path) -> None:
    refused(path, "no such file")
    refused(path.parent, "no such file")


def test_load__refuses_a_version_from_the_future(path: Path) -> None:
    saved(path)
    rewrite_header(path, "version", "3")
    refused(path, "format version 3; expected at most 2. Try: a newer fisherkit")


def test_load__refuses_unknown_tags_wherever_they_are(path: Path) -> None:
    inner = io.State("hologram", LAYER.names)
    io.write(path, io.State("sum", LAYER.names, children=(inner,)), LAYER, {})
    refused(path, r"an operator with the unknown tag 'hologram'; expected one of \[.*'block_diagonal', .*'kronecker'")


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (io.State("diagonal", LAYER.names, {"diagonal": torch.ones(14)}), r"shape \[14\]; expected \[15\]"),
        (io.State("diagonal", LAYER.names, {"diagonal": -torch.ones(15)}), "15 negative entries"),
        (io.State("diagonal", LAYER.names, {"diagonal": torch.full((15,), torch.nan)}), "NaN or infinite"),
        (io.State("diagonal", LAYER.names, {"d": torch.ones(15)}), "'diagonal'"),
        (io.State("dense", LAYER.names, {"matrix": torch.ones(15)}), r"expected \[15, 15\]"),
        (io.State("block_diagonal", LAYER.names), "leave out"),
        (io.State("sum", LAYER.names), "no terms"),
        (io.State("block_diagonal", LAYER.names, children=(io.State("diagonal", ("q",)),)), "a diagonal operator over"),
    ],
    ids=["short", "negative", "nan", "renamed", "flat", "no-blocks", "no-terms", "unknown-name"],
)  # fmt: skip
def test_load__refuses_parts_that_do_not_fit(state: io.State, match: str, path: Path) -> None:
    io.write(path, state, LAYER, {})
    refused(path, f"parts do not make an operator .*{match}")


def test_load__restores_odd_names(path: Path) -> None:
    space = ParameterSpace(("a.b-c/d é", "0"), ((2,), ()))
    DiagonalOperator(space, torch.ones(3)).save(path)
    assert load(path).space == space
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["space"]) == {"a.b-c/d é": [2], "0": []}


def test_save__refuses_a_missing_folder(tmp_path: Path) -> None:
    target = tmp_path / "nowhere" / "f.safetensors"
    with pytest.raises(
        InvalidArgumentError, match=r"a folder that does not exist: .*nowhere; expected an existing folder"
    ):
        diagonal(torch.float64)[0].save(target)
