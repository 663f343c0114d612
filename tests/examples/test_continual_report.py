"""The continual-learning benches from end to end at tiny sizes, and what their summary and report make of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.continual import experiment, report, run
from examples.continual.benches import BENCHES
from examples.continual.cells import Plan, half_decades
from examples.continual.methods import METHODS
from examples.continual.modules import MODULES
from examples.continual.report_claims import claims
from examples.continual.report_libraries import chosen_elsewhere, laplace, libraries
from examples.continual.summary import Curve, curves, one_for_all, span, verdict

SOME = ["none", "joint", "l2", "diagonal-ef", "diagonal-squared", "kfac-ief", "full-exact"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, threads = tmp_path_factory.mktemp("continual") / "new", torch.get_num_threads()
    run.main(["--part", "split-digits", "--methods", *SOME, "--tiny", "--out", str(folder)])
    torch.set_num_threads(threads)
    return folder


def curve(*means: float, strengths: tuple[float, ...] = ()) -> Curve:
    """Of two seeds, half a point around the means."""
    return Curve(strengths or half_decades(0, 9)[: len(means)], tuple((m - 0.5, m + 0.5) for m in means), {})


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_command__measures_draws_and_reports(out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    drawn = {
        f"strength-{s}.png"
        for s in ("diagonal-trace", "diagonal-none", "kfac-trace", "kfac-none", "full-trace", "full-none")
    }
    assert names == {"split-digits.json", "continual.md", "best-strengths.png"} | drawn
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
    cells = json.loads((out / "split-digits.json").read_text("utf-8"))["cells"]
    expected = {f"{regime}/trace/{key}" for regime in ("fit", "early") for key in SOME}
    expected |= {f"{regime}/none/{key}" for regime in ("fit", "early") for key in SOME if METHODS[key].structure}
    assert cells.keys() == expected
    assert all(len(row) == 2 and all(0 <= x <= 100 for x in row) for c in cells.values() for row in c["accuracy"])
    body = (out / "continual.md").read_text("utf-8")
    for text in ("### A default", "| kfac, iEF |", "squared batch gradients", "best-strengths.png", "iEF"):
        assert text in body, text


def test_command__measures_modules(tmp_path: Path) -> None:
    some = ["none", "joint", "l2", "kfac-ief", "diagonal-mammoth"]
    threads = torch.get_num_threads()
    run.main(["--part", "gru-rows", "--methods", *some, "--tiny", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    cells = json.loads((tmp_path / "gru-rows.json").read_text("utf-8"))["cells"]
    assert {key.split("/")[2] for key in cells} == set(some)
    assert all(len(row) == 2 for cell in cells.values() for row in cell["accuracy"])
    assert "| gru-rows, fit |" in (tmp_path / "continual.md").read_text("utf-8")


def test_command__goes_on_where_it_stopped(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any) -> None:
        pytest.fail("measured again")

    monkeypatch.setattr(experiment, "measure", nothing)
    monkeypatch.setattr(run, "draw", lambda *_: [])  # which takes seconds
    before = (out / "continual.md").read_text("utf-8")
    run.main(["--part", "split-digits", "--methods", *SOME, "--tiny", "--out", str(out)])
    run.main(["--report", "--out", str(out)])
    assert (out / "continual.md").read_text("utf-8") == before
    with pytest.raises(SystemExit, match=r"made with other \['seeds'"):
        run.main(["--part", "split-digits", "--out", str(out)])


def test_command__writes_a_file_after_each_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def measure(bench: Any, tasks: Any, cell: Any, plan: Plan) -> dict[str, Any]:
        if calls:
            raise KeyboardInterrupt
        calls.append(cell.key)
        return {"accuracy": [[50.0]], "strengths": [], "seconds": 1.0, "build_seconds": 0.0}

    monkeypatch.setattr(experiment, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        experiment.run(tmp_path, BENCHES["split-digits"], run.TINY)
    assert list(experiment.read(tmp_path)["split-digits"]["cells"]) == calls
    assert [path.name for path in tmp_path.iterdir()] == ["split-digits.json"]


def test_command__needs_results(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no results yet"):
        run.main(["--report", "--out", str(tmp_path / "new")])


def test_plan__is_the_tasks(out: Path) -> None:
    plan = Plan()
    assert len(plan.seeds) >= 5
    for normalization in ("trace", "none"):
        strengths = plan.strengths[normalization]
        assert strengths[-1] / strengths[0] >= 1e12
        assert strengths[2] / strengths[0] == pytest.approx(10)
    keys = {cell.key for cell in plan.cells(BENCHES["permuted-digits"])}
    assert {f"fit/trace/{key}" for key in METHODS if key != "diagonal-mammoth"} <= keys
    assert {key for key in keys if "mammoth" in key} == {"fit/none/diagonal-mammoth", "early/none/diagonal-mammoth"}
    assert "early/none/full-ef" in keys
    assert "fit/none/full-ef" not in keys
    assert not any("full" in cell.key for cell in plan.cells(BENCHES["permuted-mnist1d"]))
    cells = {cell.key: plan.strengths_of(MODULES["gru-rows"], cell) for cell in plan.cells(MODULES["gru-rows"])}
    assert set(cells) == {
        f"fit/{'none' if key in ('diagonal-squared', 'diagonal-mammoth') else 'trace'}/{key}"
        for key, method in METHODS.items()
        if method.structure != "full" and "truncated" not in key
    }
    assert 0.1 in cells["fit/trace/kfac-ief"]  # the default, which tables compare with


@pytest.mark.smoke
def test_docs__show_the_results_that_lie_beside_them() -> None:
    page = run.PAGE.read_text("utf-8")
    found = experiment.read(run.ASSETS)
    assert report.report(found, "../assets/continual") in page


# -- what is made of results -------------------------------------------------------------------------------------------


def test_curve__best_and_how_wide() -> None:
    found = curve(50, 60, 78, 80, 78, 70, 79)
    assert (found.best, found.strength, found.at_edge) == (80, 31.6, False)
    assert found.decades() == pytest.approx(1, abs=1e-3)  # the last one is near again, but not next to it
    assert found.loss_at(10.0) == 2
    assert curve(3, 2, 1).at_edge
    assert found.deviation == pytest.approx(0.5**0.5)


def test_span_and_one_for_all() -> None:
    own = {("a", "fit"): curve(50, 60, 70, 60), ("a", "early"): curve(70, 69, 60, 50)}
    assert span(own) == pytest.approx(1)
    assert one_for_all(own) == (3.16, 10)


@pytest.mark.parametrize(
    ("a", "b", "lead", "said"),
    [((3, 4, 5), (1, 2, 3), 2, "yes"), ((1, 2, 3), (3, 4, 5), -2, "no"), ((1, 9, 2), (2, 1, 3), 2, "level")],
)
def test_verdict__pairs_seeds(a: tuple[float, ...], b: tuple[float, ...], lead: float, said: str) -> None:
    assert verdict(a, b) == (pytest.approx(lead), said)


def test_claims__say_what_the_curves_do() -> None:
    strengths = (0.01, 0.1, 1.0)
    own = {
        "trace/kfac-ief": curve(70, 80, 70, strengths=strengths),
        "trace/kfac-ef": curve(60, 70, 75, strengths=strengths),
        "trace/kfac-exact": curve(70, 80, 70, strengths=strengths),
    }
    body = claims({("permuted-digits", "fit"): own})
    assert "iEF above EF | 86.9 / 81.4 | 80.0 / 75.0 (+5.0) | yes |" in body
    assert "iEF above exact | 86.9 / 86.7 | 80.0 / 80.0 (+0.0) | level |" in body
    assert "KFAC EF at 0.1: points below its best | ≤ 0.2 | 5.0 at worst" in body


def test_libraries__compare_the_default_with_what_is_best_on_other_seeds() -> None:
    cell = {"learned": [[90, 90, 90]] * 2, "final": [[80, 70, 90], [60, 60, 90]], "eigenvalues": [0.01, 0.03]}

    def three(*rows: tuple[float, float, float], strengths: tuple[float, ...] = ()) -> Curve:
        return Curve(strengths, rows, cell)

    own = {
        "trace/none": three((30, 40, 50)),
        "trace/joint": three((97, 98, 99)),
        "trace/kfac-ief": three((78, 80, 82), (60, 61, 62), strengths=(0.1, 1.0)),
        # Lucky on the last seed: best on average, and best on the others only where that seed is among them.
        "none/diagonal-squared": three((79, 75, 99), (1, 1, 1), strengths=(10.0, 100.0)),
        "none/kfac-exact": three((70, 70, 70), (1, 1, 1), strengths=(10.0, 100.0)),
    }
    assert chosen_elsewhere(own) == [79, 75, 82]
    body = libraries({("a", "fit"): own})
    assert (
        "| a, fit | 40.0 ± 24.8 |  | 84.3 ± 31.9* |  | 80.0 ± 5.0 | 78.7 | +1.3 ± 8.0 | 15.0 |  | 15.0 | 98.0" in body
    )
    assert "| a, fit | 0.1 | 0.01 | 0.02 | 5 |" in laplace({("a", "fit"): own})


def test_curves__are_by_bench_and_regime(out: Path) -> None:
    found = curves(experiment.read(out))
    assert list(found) == [("split-digits", "fit"), ("split-digits", "early")]
    assert len(found["split-digits", "fit"]["none/kfac-ief"].strengths) == 3
