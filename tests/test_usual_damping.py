"""The damping that suits a structure, and that scores take it unless told otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fisherkit as fk
from fisherkit.operators import FisherOperator, unwrap, usual_damping
from tests.small_data import X, Y, mlp, same

USUAL = {"full": 1.0, "block": 1.0, "kfac": 0.1, "ekfac": 0.1, "diagonal": 0.01}


def fisher(structure: str) -> FisherOperator:
    return fk.ExactFisher(mlp(), (X, Y), structure=structure)


@pytest.mark.parametrize(("structure", "scale"), USUAL.items())
def test_usual_damping__is_the_structure_s_also_from_a_file(structure: str, scale: float, tmp_path: Path) -> None:
    found = fisher(structure)
    found.save(tmp_path / "f.safetensors")
    for operator in (found, unwrap(found), 3.0 * found, fk.load(tmp_path / "f.safetensors")):
        assert usual_damping(operator) == fk.RelativeDamping(scale)


def test_usual_damping__looks_into_sums_and_blocks() -> None:
    kfac, ekfac, full, diagonal = (fisher(s) for s in ("kfac", "ekfac", "full", "diagonal"))
    for total, scale in [
        (kfac + ekfac, 0.1), (full + kfac, 0.1), (0.5 * (diagonal + ekfac), 0.1), (full + diagonal, 1.0),
        (full + full, 1.0), (diagonal + diagonal, 0.01),
    ]:  # fmt: skip
        assert usual_damping(total).scale == scale
    norms = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    mixed = fk.ExactFisher(norms, (X, Y), structure="kfac")
    assert {entry.structure for entry in mixed.coverage().entries} == {"kfac", "exact block"}
    assert usual_damping(mixed).scale == 0.1
    bare = fk.ExactFisher(norms, (X, Y), structure="kfac", params=["1.weight", "1.bias"])
    assert usual_damping(bare).scale == 1.0
    assert usual_damping(fk.ExactFisher(mlp(), (X, Y), memory_budget=500)).scale == 1.0


@pytest.mark.parametrize("structure", USUAL)
def test_scores__take_the_usual_damping_unless_told(structure: str) -> None:
    found, model = fisher(structure), mlp()
    mean = float(found.trace()) / found.size
    default = fk.influence.InfluenceScores(found, model)
    assert default.damping == pytest.approx(USUAL[structure] * mean)
    told = fk.influence.InfluenceScores(found, model, damping=fk.RelativeDamping(USUAL[structure]))
    same(default.scores((X, Y), (X, Y)), told.scores((X, Y), (X, Y)))
    for damping, number in ((fk.RelativeDamping(2.0), 2 * mean), (0.25, 0.25)):
        other = fk.influence.InfluenceScores(found, model, damping=damping)
        assert other.damping == pytest.approx(number)
        assert not torch.allclose(other.scores((X, Y), (X, Y)), default.scores((X, Y), (X, Y)))
