"""The optimisation part of the paper's reproduction: its grids, its runs at tiny sizes, and what it says of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.paper import optimisation, run
from examples.paper.optimisation import TEXT, TINY
from examples.paper.optimisation_methods import METHODS, start
from examples.paper.optimisation_report import CLAIMS, PAPER, final, verdict
from examples.paper.optimisation_training import train
from examples.shared.tasks import Split, Task, digits

PLAN = replace(TINY, methods=("sgd", "ef", "ief", "truncated-2", "kfac-ief"))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimisation")
    optimisation.run(folder, plan=PLAN)
    return folder


@pytest.fixture(scope="module")
def few() -> Task:
    task = digits(0)
    return replace(task, train=Split(*task.train.take(torch.arange(128))))


@pytest.mark.parametrize("key", METHODS)
def test_grid__has_six_configurations(key: str) -> None:
    method = METHODS[key]
    grid = method.grid()
    assert len({json.dumps(settings) for settings in grid}) == 6
    assert len(method.grid(coarse=True)) == 3
    assert all(settings in grid for settings in method.grid(coarse=True))


def test_methods__are_those_that_are_reported() -> None:
    named = {key for _, *pair in CLAIMS for key in pair} | set(PAPER) | set(TEXT)
    assert named <= METHODS.keys()


@pytest.mark.parametrize("key", METHODS)
def test_start__lowers_the_loss_of_a_few_examples(key: str, few: Task) -> None:
    method = METHODS[key]
    found = train(few, method, method.grid()[0], seed=0, epochs=2)
    assert found["diverged"] is None
    assert found["losses"][-1] < found["losses"][0]
    assert len(found["losses"]) == 3
    assert found["milliseconds"] > 0


def test_start__decays_to_zero(few: Task) -> None:
    stepper = start(METHODS["ef"], {"lr": 0.5, "gram_damping": 1.0}, few.build(0), 4)
    rates = [stepper.optimizers[0].param_groups[0]["lr"]]
    for _ in range(4):
        stepper.step()  # without gradients
        rates.append(stepper.optimizers[0].param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125, 0.0])


def test_train__records_that_it_diverged(few: Task) -> None:
    found = train(few, METHODS["sgd"], {"lr": 1e4}, seed=0, epochs=2)
    assert found["diverged"].startswith("loss ")
    assert "accuracy" not in found


def test_train__is_the_same_every_time(few: Task) -> None:
    first, again = (train(few, METHODS["ief"], METHODS["ief"].grid()[0], seed=1, epochs=1) for _ in range(2))
    assert first["losses"] == again["losses"]


def test_run__goes_on_where_it_was_cut(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        pytest.fail("measured again")

    monkeypatch.setattr(optimisation, "train", nothing)
    optimisation.run(out, plan=PLAN)
    with pytest.raises(ValueError, match=r"made with other \['seeds'\]"):
        optimisation.run(out, plan=replace(PLAN, seeds=(1,)))


def test_run__chooses_by_the_training_loss_of_the_tuning_seed(out: Path) -> None:
    found = optimisation.figures(out)["tasks"]["digits"]["methods"]
    assert list(found) == ["sgd", "ef", "ief", "truncated-2", "kfac-ief"]
    for method in found.values():
        losses = {json.dumps(one["settings"]): one["loss"] for one in method["grid"] if one["diverged"] is None}
        assert losses[json.dumps(method["chosen"])] == min(losses.values())
        assert len(method["seeds"]) == 2


def test_report__shows_every_method_and_the_papers_numbers(out: Path) -> None:
    body = optimisation.report(optimisation.figures(out), ".")
    for text in ("| ieKFAC, momentum |", "| iEF |", "29.2", "than SGD |", "optimisation.png", "1 of 3"):
        assert text in body, text
    assert (out / "optimisation.png").read_bytes().startswith(b"\x89PNG")


def test_figures__need_results(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results yet"):
        optimisation.figures(tmp_path)


def test_report__of_a_method_that_diverged_everywhere() -> None:
    grid = [{"settings": {"lr": lr}, "loss": 1.0, "diverged": "loss nan at step 1"} for lr in (1.0, 2.0, 3.0)]
    lost = {**METHODS["sgd"].to_dict(), "grid": grid, "chosen": None, "seeds": []}
    environment = {"processor": "a processor", "versions": {"torch": "0"}, "date": "today"}
    summary = {
        "title": "a task", "epochs": 1, "batch": 2, "tuning": 0, "seeds": [1], "coarse": False,
        "environment": environment, "methods": {"sgd": lost},
    }  # fmt: skip
    assert "| all diverged |" in optimisation.report({"tasks": {"digits": summary}})


def _method(*losses: float | None) -> dict[str, Any]:
    return {"seeds": [{"losses": [3.0, x], "diverged": "loss nan at step 3" if x is None else None} for x in losses]}


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (_method(1.0, 1.1), _method(2.0, 2.1), "yes"),
        (_method(2.0, 2.1), _method(1.0, 1.1), "no"),
        (_method(1.0, 2.0), _method(1.2, 2.2), "level"),
        (_method(1.0, None), _method(2.0, 2.1), "no"),
        (_method(2.0, 2.0), _method(1.0, None), "yes"),
        (_method(None), _method(None), "level"),
    ],
)
def test_verdict(a: dict[str, Any], b: dict[str, Any], said: str) -> None:
    assert verdict(a, b) == said
    assert all(isinstance(x, float) for x in final(a))


def test_command__runs_the_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    run.main(["--part", "optimisation", "--tiny", "--out", str(tmp_path)])
    optimisation.main(["--report", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    assert "the paper: iEF" in capsys.readouterr().out
    assert {"optimisation.json", "optimisation.md", "optimisation.png"} <= {path.name for path in tmp_path.iterdir()}
