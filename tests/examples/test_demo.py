"""The demo on tiny settings: it prints tables, writes pictures, and its figures mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from examples.demo import __main__ as demo
from examples.demo.digits import Digits, train
from examples.demo.measure import KINDS, STRUCTURES, project
from examples.demo.pictures import PICTURES
from fisherkit.cli import app


def test_demo__prints_and_draws_what_its_figures_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, threads = tmp_path / "new" / "folder", torch.get_num_threads()
    sizes = ("--epochs", "2", "--examples", "12", "--batches", "1", "--repeats", "1", "--seed", "3")
    demo.main(["--out", str(folder), *sizes])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    for text in ("held-out accuracy", "γ/γ_SGD", "units", "worst fit", *KINDS, *STRUCTURES, *PICTURES):
        assert all(word in printed for word in text.split())  # names may go on in the next line of a table
    assert {path.name for path in folder.iterdir()} == {*PICTURES, "figures.json"}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    figures = json.loads((folder / "figures.json").read_text("utf-8"))
    assert (figures["environment"]["torch"], figures["settings"]["seed"]) == (torch.__version__, 3)
    assert [row["epoch"] for row in figures["training"]] == [0, 1, 2]
    uses = figures["uses"]
    assert uses["kept"]["with EWC"][-1] > uses["kept"]["as usual"][-1] > 0
    assert sum(uses["merged"]["merged by Fishers"]) > sum(uses["merged"]["average"])
    assert len(uses["losses"]) == 3
    assert len({*uses["helpful"], *uses["harmful"]}) == 6
    cells = {(cell["kind"], cell["structure"]): cell for cell in figures["structures"]["cells"]}
    assert set(cells) == {(kind, structure) for kind in KINDS for structure in STRUCTURES}
    assert all(min(cell[name] for name in ("trace", "build_ms", "memory_bytes")) > 0 for cell in cells.values())
    # Nothing beats the natural gradient, and the exact trace is the same whichever structure keeps the diagonal.
    exact = cells["exact", "full"]
    assert exact["relative_quality"] <= min(cell["relative_quality"] for cell in cells.values()) * 1.001
    for structure in ("block", "diagonal", "ekfac"):
        assert cells["exact", structure]["trace"] == pytest.approx(exact["trace"], rel=1e-4)
    truncated = [cells[f"truncated, rank {rank}", "full"]["trace"] for rank in (1, 2, 3)]
    assert sorted([*truncated, exact["trace"]]) == [*truncated, exact["trace"]]
    for checkpoint in figures["quality_over_training"]:
        assert checkpoint["mean"]["exact"] <= min(checkpoint["mean"].values()) * 1.001
        assert (checkpoint["vectors"]["EF"], checkpoint["vectors"]["exact"]) == (1, 9)


def test_project__is_the_kinds_theory_without_damping() -> None:
    generator = torch.Generator().manual_seed(0)
    digits = Digits.load(generator)
    checkpoints = train(digits, epochs=6, seed=0, generator=generator)
    assert [checkpoint.epoch for checkpoint in checkpoints] == [0, 1, 2, 3, 5, 6]
    assert checkpoints[-1].accuracy > 0.9 > 0.2 > checkpoints[0].accuracy
    inputs, targets = digits.batch(24, torch.Generator().manual_seed(1))
    found = project(checkpoints[-1], (inputs, targets))
    log_p = torch.log_softmax(checkpoints[-1].network(torch.float64)(inputs.double()), 1).detach()
    p, norm = log_p.exp()[torch.arange(24), targets], torch.tensor(found.logit_gradient_norm, dtype=torch.float64)
    theory = {"EF": torch.ones_like(p), "iEF": norm.square(), "truncated, rank 1": (1 - p) / p, "exact": (1 - p) / p}
    for kind, share in theory.items():
        got = torch.tensor(found.share[kind], dtype=torch.float64)
        torch.testing.assert_close(got, share / share.sum(), rtol=0.02, atol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize(("command", "words"), [("quality", "1,600 examples"), ("scores", "in truth")])
def test_commands__take_the_demos_network_and_digits(command: str, words: str) -> None:
    options = {"quality": ("--kinds", "sgd,ief", "--batches", "10"), "scores": ("--worst", "3", "--self", "5")}
    result = CliRunner().invoke(app, [command, f"examples.demo.digits:{command}", *options[command]])
    assert result.exit_code == 0, result.output
    assert words in " ".join(result.stdout.split())
