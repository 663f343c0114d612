"""The demo on tiny settings: what it prints, what it writes, and that its figures mean what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from fisherkit.cli import app
from fisherkit.cli.digits.kinds import KINDS
from fisherkit.cli.digits.structures import STRUCTURES, Spectrum
from fisherkit.cli.digits.training import Checkpoint, Digits, train
from fisherkit.cli.digits.updates import project, quality_over_training

PICTURES = ("summary.png", "quality.png", "projection.png", "spectra.png")
TINY = ("--epochs", "2", "--examples", "12", "--batches", "1", "--repeats", "1", "--seed", "3")


class Run(NamedTuple):
    """A finished run: its folder, what it printed, its figures."""

    folder: Path
    printed: str
    figures: dict[str, Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    result = CliRunner().invoke(app, ["demo", "--out", str(folder), *TINY], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    return Run(folder, result.stdout, json.loads((folder / "figures.json").read_text(encoding="utf-8")))


def test_demo__writes_pictures_and_figures(tiny: Run) -> None:
    for name in PICTURES:
        assert (tiny.folder / name).read_bytes().startswith(b"\x89PNG")
        assert str(tiny.folder / name) in tiny.printed
    assert {path.name for path in tiny.folder.iterdir()} == {*PICTURES, "figures.json"}


def test_demo__prints_every_kind_and_structure(tiny: Run) -> None:
    for text in ("held-out accuracy", "γ/γ_SGD", "units", "worst fit", *KINDS, *STRUCTURES):
        assert all(word in tiny.printed for word in text.split())  # names may go on in the next line of a table


def test_figures__say_how_they_came_about(tiny: Run) -> None:
    assert tiny.figures["environment"]["torch"] == torch.__version__
    assert tiny.figures["environment"]["threads"] == 1
    assert tiny.figures["settings"]["seed"] == 3
    assert [row["epoch"] for row in tiny.figures["training"]] == [0, 1, 2]


def test_figures__hold_every_cell(tiny: Run) -> None:
    structures = tiny.figures["structures"]
    cells = {(cell["kind"], cell["structure"]): cell for cell in structures["cells"]}
    assert set(cells) == {(kind, structure) for kind in KINDS for structure in STRUCTURES}
    for cell in cells.values():
        assert cell["trace"] > 0
        assert 0 < cell["effective_rank"] <= 64 * 64 + 64 + 64 * 32 + 32 + 32 * 10 + 10
        assert cell["build_ms"] > 0
        assert cell["build_units"] == pytest.approx(cell["build_ms"] / structures["unit_ms"])
        assert cell["memory_bytes"] > 0
    assert structures["unit_ms"] > 0
    exact = cells["exact", "full"]
    assert exact["rows"] == 12 * 9
    # Nothing beats the natural gradient, and the exact trace is the same whichever structure keeps the diagonal.
    assert exact["relative_quality"] <= min(cell["relative_quality"] for cell in cells.values()) * 1.001
    for structure in ("block", "diagonal", "ekfac"):
        assert cells["exact", structure]["trace"] == pytest.approx(exact["trace"], rel=1e-4)
    truncated = [cells[f"truncated, rank {rank}", "full"]["trace"] for rank in (1, 2, 3)]
    assert sorted([*truncated, exact["trace"]]) == [*truncated, exact["trace"]]
    assert set(structures["spectra"]) == set(KINDS)
    assert set(structures["structure_spectra"]) == set(STRUCTURES)


def test_figures__of_quality_have_the_exact_kind_lowest(tiny: Run) -> None:
    for checkpoint in tiny.figures["quality_over_training"]:
        assert set(checkpoint["mean"]) == set(KINDS)
        assert checkpoint["mean"]["exact"] <= min(checkpoint["mean"].values()) * 1.001
        assert checkpoint["vectors"]["EF"] == 1
        assert checkpoint["vectors"]["exact"] == 9


@pytest.fixture(scope="module")
def trained() -> tuple[Digits, list[Checkpoint]]:
    generator = torch.Generator().manual_seed(0)
    digits = Digits.load(generator)
    return digits, train(digits, epochs=6, seed=0, generator=generator)


def test_train__learns_and_keeps_checkpoints(trained: tuple[Digits, list[Checkpoint]]) -> None:
    _, checkpoints = trained
    assert [checkpoint.epoch for checkpoint in checkpoints] == [0, 1, 2, 3, 5, 6]
    assert checkpoints[-1].accuracy > 0.9 > 0.2 > checkpoints[0].accuracy


def test_train__repeats_exactly(trained: tuple[Digits, list[Checkpoint]]) -> None:
    digits, checkpoints = trained
    generator = torch.Generator().manual_seed(0)
    again = train(Digits.load(generator), epochs=1, seed=0, generator=generator)
    for name, tensor in checkpoints[1].state.items():
        assert torch.equal(tensor, again[1].state[name])
    assert len(digits.targets) + len(digits.test_targets) == 1797


def test_project__is_the_kinds_theory_without_damping(trained: tuple[Digits, list[Checkpoint]]) -> None:
    digits, checkpoints = trained
    inputs, targets = digits.batch(24, torch.Generator().manual_seed(1))
    found = project(checkpoints[-1], (inputs, targets))
    log_p = torch.log_softmax(checkpoints[-1].network(torch.float64)(inputs.double()), 1).detach()
    p = log_p.exp()[torch.arange(24), targets]
    norm = torch.tensor(found.logit_gradient_norm, dtype=torch.float64)
    theory = {
        "EF": torch.ones(24, dtype=torch.float64),
        "iEF": norm.square(),
        "truncated, rank 1": (1 - p) / p,
        "exact": (1 - p) / p,
    }
    for kind, share in theory.items():
        got = torch.tensor(found.share[kind], dtype=torch.float64)
        torch.testing.assert_close(got, share / share.sum(), rtol=0.02, atol=1e-5)


def test_quality_over_training__is_the_same_for_the_same_generator(trained: tuple[Digits, list[Checkpoint]]) -> None:
    digits, checkpoints = trained
    first, second = (
        quality_over_training(checkpoints[-1:], digits, batches=1, generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert first == second


def test_spectrum__is_thinned_and_cut_at_rounding() -> None:
    values = torch.logspace(0, -20, 2001, dtype=torch.float64)
    spectrum = Spectrum.of(values)
    assert spectrum.index[0] == 1
    assert spectrum.eigenvalue[0] == 1
    assert len(spectrum.index) <= 200
    assert spectrum.eigenvalue[-1] > 1e-10
    assert spectrum.eigenvalue == [values[i - 1].item() for i in spectrum.index]
