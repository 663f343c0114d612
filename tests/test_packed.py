"""Factors and diagonals in a coarser dtype than they are added up in: still a Fisher matrix, near the one they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fisherkit as fk
from fisherkit.cli import app
from fisherkit.operators.linalg import nearest_orthonormal
from fisherkit.testing import check_fisher

STRUCTURES = ("diagonal", "kfac", "ekfac", "nkp")
WORST = {torch.bfloat16: 1e-2, torch.float32: 1e-7}
"""Of rounding entries, or eigenvectors and eigenvalues, relative to the norm."""


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 6, generator=generator).to(dtype), torch.randint(4, (40,), generator=generator)


def built(structure: str, dtype: torch.dtype | None, of: torch.dtype = torch.float64, **options: Any) -> Any:
    return fk.ExactFisher(network(of), data(of), structure=structure, dtype=dtype, **options)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", WORST, ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed__is_a_fisher_matrix_near_the_one_that_was_rounded(structure: str, dtype: torch.dtype) -> None:
    """All operations belong to one matrix, in float64; its eigenvalues are those that there were."""
    fisher, whole = built(structure, dtype), built(structure, None)
    assert fisher.dtype == torch.float64
    dense = fisher.to_dense()
    check_fisher(fisher, dense)
    assert error(dense, whole.to_dense()) <= WORST[dtype]
    assert error(fisher.trace(), whole.trace()) <= WORST[dtype]
    if structure in ("kfac", "nkp"):
        layer, before = (found.held.blocks[0] for found in (fisher, whole))
        assert error(layer.eigenvalues(layer.size), before.eigenvalues(layer.size)) <= 1e-12
    share = torch.finfo(dtype).bits / 64
    assert share * whole.nbytes <= fisher.nbytes <= share * whole.nbytes + 8 * 30 + 8 * 18**2
    assert fisher.metadata["kept_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed__of_models_in_float32_and_below_computes_in_float32(structure: str, of: torch.dtype) -> None:
    fisher, whole = built(structure, torch.bfloat16, of), built(structure, None, of)
    assert fisher.dtype == whole.dtype == torch.float32
    check_fisher(fisher, fisher.to_dense().double())
    assert error(fisher.to_dense(), whole.to_dense()) <= WORST[torch.bfloat16]
    same = built(structure, torch.float32, of)
    assert torch.equal(same.to_dense(), whole.to_dense())
    assert same.nbytes == whole.nbytes


@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed__goes_to_a_file_and_back_as_it_is(structure: str, tmp_path: Path) -> None:
    fisher, whole = built(structure, torch.bfloat16), built(structure, None)
    fisher.save(tmp_path / "a")
    whole.save(tmp_path / "b")
    loaded = fk.load(tmp_path / "a")
    assert torch.equal(loaded.to_dense(), fisher.to_dense())
    assert loaded.nbytes == fisher.nbytes
    half = (2.0 * fisher).to_dense()
    (2.0 * loaded).save(tmp_path / "c")
    assert torch.equal(fk.load(tmp_path / "c").to_dense(), half)
    assert error(half, 2 * fisher.to_dense()) <= 1e-15


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_packed__in_parts_is_the_whole_build(structure: str, tmp_path: Path) -> None:
    """Also to a file; the plan knows what is kept."""
    options: dict[str, Any] = {"structure": structure, "dtype": torch.bfloat16}
    whole, model = built(**options), network()
    plan = fk.plan(model, data(), "exact", **options)
    assert plan.result_bytes == whole.held.nbytes
    assert plan.peak_bytes < fk.plan(model, data(), "exact", structure=structure).peak_bytes + 32 * 10**2
    budget = 8000  # less than all layers need together
    assert len(fk.plan(model, data(), "exact", to_file=True, memory_budget=budget, **options).parts) > 1
    fk.build_file(tmp_path / "f", model, data(), "exact", memory_budget=budget, **options)
    assert error(fk.load(tmp_path / "f").to_dense(), whole.to_dense()) <= 1e-12


@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed__has_the_blocks_of_the_whole(structure: str, tmp_path: Path) -> None:
    """In memory and in a file, so that what is normalised block by block is the same."""
    fishers = {dtype: built(structure, dtype, torch.float32) for dtype in (None, torch.bfloat16)}
    fishers[torch.bfloat16].save(tmp_path / "f")
    names = {dtype: [block.space.names for block in fk.operators.split(fisher)] for dtype, fisher in fishers.items()}
    assert names[torch.bfloat16] == names[None] == list(fk.operators.open_file(tmp_path / "f").blocks)
    other = {name: value + 0.1 for name, value in network(torch.float32).state_dict().items()}
    policy = fk.merging.MergePolicy(other_weights="warn")
    with pytest.warns(UserWarning, match="measured at other"):
        merged = [
            fk.merging.merge([network(torch.float32), other], [fisher, 2.0 * fisher], policy=policy)
            for fisher in fishers.values()
        ]
    assert all(float((merged[1][name] - value).abs().max()) < 2e-3 for name, value in merged[0].items())


def test_packed__serves_applications() -> None:
    """Merging, consolidation and scores take it as any Fisher, and do not widen what they keep."""
    model, (x, y) = network(), data()
    fishers = [fk.ExactFisher(model, (x, y), structure="kfac", dtype=dtype) for dtype in (torch.bfloat16, None)]
    states = []
    for fisher in fishers:
        ewc = fk.continual.EWC(model)
        ewc.consolidate(fisher)
        states.append(ewc.nbytes)
    assert states[1] - states[0] == fishers[1].nbytes - fishers[0].nbytes > 0
    merged = [fk.merging.merge([model, model], [fisher, fisher], damping=1e-3) for fisher in fishers]
    for name, value in model.named_parameters():
        assert float((merged[0][name] - value).abs().max()) < 1e-9
    scores = [
        fk.influence.InfluenceScores(fisher, model, damping=fk.RelativeDamping(0.1)).scores((x[:3], y[:3]), (x, y))
        for fisher in fishers
    ]
    assert error(*scores) < 1e-2


@pytest.mark.parametrize("dtype", WORST, ids=str)
def test_nearest_orthonormal__is_the_polar_factor(dtype: torch.dtype) -> None:
    basis = torch.linalg.qr(torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    rounded = basis.to(dtype).double()
    u, _, v = torch.linalg.svd(rounded, full_matrices=False)
    assert error(nearest_orthonormal(rounded), u @ v) < 1e-14


@pytest.mark.parametrize(
    ("structure", "dtype", "words"),
    [("full", torch.bfloat16, "kfac"), ("block", torch.float32, "kfac"), ("kfac", torch.float16, "dtype")],
)
def test_packed__is_refused_where_it_would_be_no_fisher_matrix(structure: str, dtype: torch.dtype, words: str) -> None:
    with pytest.raises(fk.InvalidArgumentError, match=words):
        built(structure, dtype)


def test_estimate__keeps_factors_in_a_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Linear(6, 4), (torch.randn(20, 6), torch.arange(20) % 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--kind", "ef", "--structure", "ekfac", "--keep-dtype", "bfloat16", "--out", "f"]
    result = CliRunner().invoke(app, ["estimate", "own:make", *options])
    assert result.exit_code == 0, result.output
    found = fk.load(tmp_path / "f")
    assert found.dtype == torch.float32
    assert found.metadata["kept_dtype"] == "bfloat16"
    assert found.nbytes == 2 * (7 * 7 + 4 * 4 + 7 * 4)
