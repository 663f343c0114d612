"""The paper's experiment: its page and its optimisation."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.paper import optimisation, run, theorem, toys
from examples.paper.optimisation import TEXT, TINY
from examples.paper.optimisation_methods import METHODS as OPTIMISERS
from examples.paper.optimisation_methods import start
from examples.paper.optimisation_report import CLAIMS, PAPER, final, verdict
from examples.paper.optimisation_training import train
from examples.paper.task import METHODS
from examples.paper.toys import LEAST_SQUARES, LOGISTIC, Point
from examples.shared import results
from examples.shared.tasks import Split, Task, digits


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("paper") / "new"
    threads = torch.get_num_threads()
    run.main(["--part", "toys", "theorem", "--tiny", "--out", str(out)])
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """What the pages were written from."""
    return {name: results.read(run.ASSETS / f"{name}.json") for name in run.PARTS}


# -- figure 1 ----------------------------------------------------------------------------------------------------------


def test_least_squares__ief_lets_go_of_an_example_without_residual() -> None:
    """Its row is zero; Gauss-Newton's is not, and keeps it where it is."""
    task = LEAST_SQUARES.at((0.0, 1.0))
    moves = {method: task.direction(method) for method in ("iEF", "GN")}
    assert abs(float(moves["GN"][1])) < 1e-9  # θ₀ is the first example's output
    assert float(moves["iEF"][1]) == pytest.approx(0.5)


def test_least_squares__ef_stops_where_one_example_is_fit() -> None:
    """The difference of squared residuals stays as it is."""
    for begin, left in (((1.0, -0.9), 0.980), ((0.5, 1.0), 0.800), ((-1.3, 0.5), 0.451)):
        first, second = begin[0] ** 2, sum(begin) ** 2
        assert abs(first - second) / (first + second) == pytest.approx(left, abs=5e-4)
        path, ended = toys.follow(LEAST_SQUARES, "EF", begin, 0.02)
        whole, rest = (toys.total_loss(LEAST_SQUARES, place) for place in (begin, path[-1]))
        assert ended
        assert rest / whole == pytest.approx(left, abs=0.03)
        assert toys.follow(LEAST_SQUARES, "iEF", begin, 0.02)[0][-1] == pytest.approx((0, 0), abs=0.02)


# -- figure 4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", LOGISTIC.points, ids=str)
def test_logistic__each_update_asks_what_theory_says(theta: Point) -> None:
    p = (-LOGISTIC.at(theta).losses().detach()).exp()
    asked = {"EF": torch.ones_like(p), "iEF": (1 - p) ** 2, "GN": (1 - p) ** 2, "NGD": (1 - p) / p}
    found = toys.at_point(LOGISTIC, theta)
    for method, request in asked.items():
        assert found["share of the first"][method] == pytest.approx(float(request[0] / request.sum()), rel=1e-5), method
    assert found["quality"]["NGD"] <= min(found["quality"].values()) * (1 + 1e-9)


def test_toys__of_the_page(shown: dict[str, Any]) -> None:
    found = shown["toys"]
    assert max(found["least-squares"]["grid"]["iEF from"].values()) < 1e-8
    assert found["logistic"]["grid"]["iEF from"]["GN"] < 1e-4
    for name in ("least-squares", "logistic"):
        left = {m: [sum(p["left"]) for p in found[name]["paths"] if p["method"] == m] for m in toys.SHOWN}
        assert all(ief < ef for ief, ef in zip(left["iEF"], left["EF"], strict=True))


# -- theorems ----------------------------------------------------------------------------------------------------------


def test_bound__follows_from_the_growth_of_g() -> None:
    """Where g(p) = t + C₀, the slowest growth, 2 may stand in the place of the paper's 1."""
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    g = theorem.transformed(-p.log())
    torch.testing.assert_close(g, 1 / (1 - p) + (p / (1 - p)).log())
    assert bool((1 - p <= 2 / (g + 2))[g + 2 > 0].all())
    assert bool((1 - p < 2 / (g + 1))[g + 1 > 0].all())
    assert float(theorem.transformed(-torch.tensor(0.1).double().log())) == pytest.approx(-1.09, abs=0.005)


@pytest.mark.parametrize("likelihood", theorem.LIKELIHOODS)
def test_flow__every_loss_falls_by_its_own_squared_output_gradient(likelihood: str) -> None:
    task = theorem.task(likelihood, theorem.TINY)
    asked, losses = task.asked(), task.losses().detach()
    assert theorem.condition(task) < 1e6
    task.step(task.direction("iEF"), 1e-6)
    torch.testing.assert_close((losses - task.losses().detach()) / 1e-6, asked, rtol=1e-4, atol=1e-4)


def _checks(found: dict[str, Any]) -> None:
    """What holds at any size."""
    softmax, classes = found["iEF"]["softmax"], found["classes"]
    for check in softmax:
        assert check["violations"] == 0
        assert check["smallest margin"] > 0
        assert check["speed of g"][0] > classes / (classes - 1) - 0.2 * check["rate"]
        assert check["speed of g"][1] < 2 + check["rate"]
    for coarse, fine in pairwise(softmax):
        assert fine["gap to what was asked"] == pytest.approx(coarse["gap to what was asked"] / 2, rel=0.15)
    for coarse, fine in pairwise(found["iEF"]["logit"]):
        for a, b in zip(coarse["speed of g"], fine["speed of g"], strict=True):
            assert abs(b - 1) < 0.65 * abs(a - 1)
    for coarse, fine in pairwise(found["iEF"]["ten outputs"]):
        assert fine["early ratio"][1] - 1 < 0.6 * (coarse["early ratio"][1] - 1)


def test_theorems__hold_at_tiny_sizes(written: Path) -> None:
    _checks(results.read(written / "theorem.json"))


def test_theorems__hold_in_the_results_of_the_page(shown: dict[str, Any]) -> None:
    found = shown["theorem"]
    _checks(found)
    methods = found["methods"]["softmax"]
    assert methods["iEF"]["below the bound"] == 0
    assert methods["SGD"]["below the bound"] > 0
    assert methods["EF"]["stopped"]
    assert methods["iEF"]["p, worst"] > methods["SGD"]["p, worst"]
    last = found["iEF"]["one output"][-1]["ratio"]
    assert 0.5 < last[0] <= 1 <= last[1] < 1.3
    assert found["iEF"]["ten outputs"][-1]["early ratio"][1] < 1.05
    assert found["iEF"]["ten outputs"][-1]["ratio"][1] > 10  # what the page reports as lost in practice
    for checks in found["iEF"].values():
        assert all(check["condition"][1] <= check["condition"][0] < 1e4 for check in checks)


def test_ef__comes_down_until_the_first_example_is_fit_and_is_stopped_when_its_loss_explodes() -> None:
    way = theorem.follow(theorem.task("softmax", theorem.TINY), "EF", 0.2, 20.0)
    total = way.losses.sum(1)
    assert float(total.min()) < 0.1 * float(total[0])
    assert way.stopped
    assert float(way.time[-1]) < 20
    assert float(total[-1]) > 10 * float(total[0])
    assert not bool((total[:-1] > 10 * total[0]).any())


# -- the command -------------------------------------------------------------------------------------------------------


def test_command__writes_figures_and_pictures(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == {
        "toys.json", "theorem.json", "toy-least-squares.png", "toy-logistic.png", "theorem.png",
    }  # fmt: skip
    for picture in written.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    found = results.read(written / "toys.json")
    assert found["tiny"]
    assert found["environment"]["torch"] == torch.__version__
    assert set(found["logistic"]["points"][0]["quality"]) == set(METHODS)


@pytest.mark.smoke
def test_command__runs_what_is_asked_prints_it_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, assets = tmp_path / run.PAGES["toys"], tmp_path / "assets"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(results.markers("toys")))
    monkeypatch.setattr(run, "DOCS", tmp_path)
    monkeypatch.setattr(run, "ASSETS", assets)
    run.main(["--part", "toys", "--tiny", "--docs", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "Logistic regression" in printed
    assert "violations of 5.3" not in printed
    assert "Logistic regression" in page.read_text("utf-8")
    assert {path.name for path in assets.iterdir()} == {"toys.json", "toy-least-squares.png", "toy-logistic.png"}


@pytest.mark.smoke
def test_pages__show_the_results_that_lie_beside_them(shown: dict[str, Any]) -> None:
    for name, found in shown.items():
        page = (run.DOCS / run.PAGES[name]).read_text("utf-8")
        first, last = results.markers(name)
        body = run.part(name).report(found)
        assert page.partition(first)[2].partition(last)[0].strip() == body.strip(), f"section {name} is out of date"
        assert not found.get("tiny")


def test_fill__needs_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    first, last = results.markers("part")
    page.write_text(f"before\n{first}\nold\n{last}\nafter\n")
    results.fill(page, "part", "new")
    assert page.read_text() == f"before\n{first}\n\nnew\n\n{last}\nafter\n"
    with pytest.raises(ValueError, match=r"page\.md should have the lines"):
        results.fill(page, "other", "new")


# -- the optimisation part of the paper's reproduction -----------------------------------------------------------------


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


@pytest.mark.parametrize("key", OPTIMISERS)
def test_grid__has_six_configurations(key: str) -> None:
    method = OPTIMISERS[key]
    grid = method.grid()
    assert len({json.dumps(settings) for settings in grid}) == 6
    assert len(method.grid(coarse=True)) == 3
    assert all(settings in grid for settings in method.grid(coarse=True))


def test_methods__are_those_that_are_reported() -> None:
    named = {key for _, *pair in CLAIMS for key in pair} | set(PAPER) | set(TEXT)
    assert named <= OPTIMISERS.keys()


@pytest.mark.parametrize("key", OPTIMISERS)
def test_start__lowers_the_loss_of_a_few_examples(key: str, few: Task) -> None:
    method = OPTIMISERS[key]
    found = train(few, method, method.grid()[0], seed=0, epochs=2)
    assert found["diverged"] is None
    assert found["losses"][-1] < found["losses"][0]
    assert len(found["losses"]) == 3
    assert found["milliseconds"] > 0


def test_start__decays_to_zero(few: Task) -> None:
    stepper = start(OPTIMISERS["ef"], {"lr": 0.5, "gram_damping": 1.0}, few.build(0), 4)
    rates = [stepper.optimizers[0].param_groups[0]["lr"]]
    for _ in range(4):
        stepper.step()  # without gradients
        rates.append(stepper.optimizers[0].param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.375, 0.25, 0.125, 0.0])


def test_train__records_that_it_diverged(few: Task) -> None:
    found = train(few, OPTIMISERS["sgd"], {"lr": 1e4}, seed=0, epochs=2)
    assert found["diverged"].startswith("loss ")
    assert "accuracy" not in found


def test_train__is_the_same_every_time(few: Task) -> None:
    first, again = (train(few, OPTIMISERS["ief"], OPTIMISERS["ief"].grid()[0], seed=1, epochs=1) for _ in range(2))
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
    lost = {**OPTIMISERS["sgd"].to_dict(), "grid": grid, "chosen": None, "seeds": []}
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
