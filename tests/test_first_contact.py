"""What one sees first: the import, a Fisher's repr, its file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fisherkit as fk
from fisherkit.operators import BlockDiagonalOperator, DiagonalOperator, LowRankOperator, unwrap
from fisherkit.space import ParameterSpace

STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")
DATA = torch.linspace(-1, 1, 24).reshape(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


# -- repr --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_repr__says_what_it_is_and_where_it_was_measured(structure: str, model: nn.Module, tmp_path: Path) -> None:
    fisher = fk.SampledFisher(model, DATA, structure=structure, draws=2, normalization="sum")
    sizes = f"sf {structure}, D = 15, N = 6, R = {fisher.rows}, "
    where = f"sum, measured at Linear {fk.parameters_hash(model)[:8]}, torch.float32, cpu>"
    assert repr(fisher) == f"<SampledFisher: {sizes}{where}"
    fisher.save(tmp_path / "f.safetensors")
    for other in (fk.load(tmp_path / "f.safetensors"), 0.5 * fisher, fisher.factorize(0.1).operator):
        assert "\n" not in repr(other)
        assert len(repr(other)) < 160
    loaded = repr(fk.load(tmp_path / "f.safetensors"))
    assert sizes in loaded
    assert loaded.endswith(where)


def test_repr__of_operators_without_a_model(model: nn.Module) -> None:
    space = ParameterSpace(("a", "b"), ((2,), (3,)))
    parts = [DiagonalOperator(space.restrict([name]), torch.ones(size)) for name, size in (("a", 2), ("b", 3))]
    assert repr(parts[0]) == "<DiagonalOperator: D = 2, torch.float32, cpu>"
    assert repr(BlockDiagonalOperator(space, parts)) == "<BlockDiagonalOperator: D = 5, 2 blocks, torch.float32, cpu>"
    rows = unwrap(fk.EmpiricalFisher(model, DATA))
    assert isinstance(rows, LowRankOperator)
    assert repr(rows) == "<LowRankOperator: D = 15, R = 6, torch.float32, cpu>"
    total = fk.EmpiricalFisher(model, DATA) + fk.ExactFisher(model, DATA, structure="kfac")
    # Whose examples are the same the sum does not know.
    assert repr(total).startswith("<SumOperator: ef full + exact kfac, D = 15, 2 terms, mean, measured at Linear ")


def test_repr__survives_metadata_that_others_wrote(model: nn.Module) -> None:
    operator = DiagonalOperator(ParameterSpace(("a",), ((2,),)), torch.ones(2))
    operator.metadata = {"examples": "about 1e6", "kind": "mine"}
    assert repr(operator) == "<DiagonalOperator: mine, D = 2, N = about 1e6, torch.float32, cpu>"


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 64])
def test_save__refuses_to_replace_a_model_s_weights(size: int | None, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    weights = path.read_bytes()
    fisher = fk.EmpiricalFisher(model, DATA, structure="kfac")
    with pytest.raises(
        fk.InvalidArgumentError, match=r"something else than a Fisher file|safetensors file of another kind"
    ):
        fisher.save(path, max_shard_size=size)
    assert path.read_bytes() == weights
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_save__takes_the_place_of_an_empty_file_and_of_a_damaged_one(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.touch()  # as tempfile leaves it
    fisher = fk.EmpiricalFisher(model, DATA, structure="kfac")
    fisher.save(path)
    path.write_bytes(path.read_bytes()[:-9])
    fisher.save(path)
    assert torch.equal(fk.load(path).diagonal(), fisher.diagonal())


# -- the import --------------------------------------------------------------------------------------------------------


def in_a_new_process(code: str) -> str:
    run = [sys.executable, "-c", code]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


def test_import__brings_nothing_heavy_that_torch_does_not_and_finds_every_name_when_it_is_asked_for() -> None:
    heavy = ["scipy", "matplotlib", "sklearn", "transformers", "typer", "rich", "beartype", "networkx", "pandas"]
    found = in_a_new_process(
        f"""
import sys, torch
before = set(sys.modules)
import fisherkit as fk, fisherkit.testing
print(sorted(name for name in [*{heavy}, "pytest"] if name in sys.modules and name not in before))
print([name for name in fk.__all__ if getattr(fk, name, None) is None])
"""
    )
    assert found.split() == ["[]", "[]"]
    assert set(fk.__all__) <= set(dir(fk))
    with pytest.raises(AttributeError, match="module 'fisherkit' has no attribute 'nothing'"):
        _ = fk.nothing
