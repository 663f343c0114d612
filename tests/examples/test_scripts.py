"""Scripts of the repository, the demo, and the figures of the optimizers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import fisherkit as fk
from examples import large_solve
from examples.benchmarks import growth
from examples.demo import __main__ as demo
from examples.demo.digits import Digits, train
from examples.demo.measure import KINDS, STRUCTURES, project
from examples.demo.pictures import PICTURES
from examples.optimizers.__main__ import SEEDS, chosen, epochs_to, main, table
from examples.optimizers.methods import METHODS, share
from examples.optimizers.tasks import TASKS
from examples.paper.optimisation_training import fit
from examples.shared.tasks import Split, Task
from fisherkit.cli import app


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_exponent__is_the_slope_of_the_larger_half(power: float) -> None:
    # The small half is all fixed cost.
    series: list[dict[str, float | None]] = [
        {"size": n, "seconds": 7.0 if n < 100 else n**power} for n in (1, 10, 100, 1000)
    ]
    assert growth.exponent(series, "seconds") == pytest.approx(power)


def test_exponent__needs_two_points() -> None:
    assert growth.exponent([{"size": 3, "seconds": 1.0}], "seconds") is None
    assert growth.exponent([{"size": n, "bytes": None} for n in (1, 2, 3, 4)], "bytes") is None


@pytest.mark.parametrize("sizes", [growth.Sizes(N=6, width=8, C=3), growth.Sizes(N=4, width=8, C=3, T=20)], ids=str)
def test_kept__is_what_a_fisher_keeps(sizes: growth.Sizes) -> None:
    fisher = fk.EmpiricalFisher(sizes.model(), sizes.data())
    assert fisher.size == sizes.parameters
    stored = sum(entry.memory for entry in fisher.coverage().entries) / 4
    biases = sum(o for _, o in sizes.layers)
    assert sizes.N * growth.kept(sizes) <= stored <= sizes.N * (growth.kept(sizes) + biases)


def test_growth__measures_and_writes_a_page_with_pictures(tmp_path: Path) -> None:
    tiny = {
        axis: (words, [(1, growth.Sizes(4, 8, 3)), (2, growth.Sizes(8, 8, 3))])
        for axis, (words, _) in growth.AXES.items()
    }
    result: dict[str, Any] = growth.run({axis: tiny[axis] for axis in "N"}, limit=60)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{growth.BEGIN}\nold\n{growth.END}\nafter\n")
    growth.write_docs(result, page, tmp_path)
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert all(f"| {name} |" in text for name in growth.OPERATIONS)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["growth-N.png"]


@pytest.mark.smoke
def test_large_solve__is_a_solve_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> str:
        settings = ["--examples", "60", "--budget", "0.1", "--tolerance", "1e-2", *options]
        monkeypatch.setattr("sys.argv", ["large_solve.py", str(tmp_path), *settings])
        large_solve.main()
        return capsys.readouterr().out

    assert "3 steps" in run("--max-steps", "3")
    assert "streamed rows" in run()
    solution = load_file(tmp_path / "ief-streamed.solution")["solution"]
    assert "converged: True" in run("--rows", "stored")
    direct = load_file(tmp_path / "ief-stored.solution")["solution"]
    assert solution.dtype == torch.float32
    assert float((solution - direct).norm()) < 0.1 * float(direct.norm())


# -- the demo on tiny settings -----------------------------------------------------------------------------------------


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
    for kind, part in theory.items():
        got = torch.tensor(found.share[kind], dtype=torch.float64)
        torch.testing.assert_close(got, part / part.sum(), rtol=0.02, atol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize(("command", "words"), [("quality", "1,600 examples"), ("scores", "in truth")])
def test_commands__take_the_demos_network_and_digits(command: str, words: str) -> None:
    options = {"quality": ("--kinds", "sgd,ief", "--batches", "10"), "scores": ("--worst", "3", "--self", "5")}
    result = CliRunner().invoke(app, [command, f"examples.demo.digits:{command}", *options[command]])
    assert result.exit_code == 0, result.output
    assert words in " ".join(result.stdout.split())


# -- the comparison of optimizers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few() -> Task:
    task = TASKS["digits"][0]()
    return replace(task, train=Split(*task.train.take(torch.arange(128))))


def test_share__warms_up_and_ends_at_zero() -> None:
    shares = [share(step, 100) for step in range(101)]
    assert shares[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert shares[100] == pytest.approx(0)
    assert shares[5:] == sorted(shares[5:], reverse=True)


@pytest.mark.parametrize("key", METHODS)
def test_method__lowers_the_loss_of_a_few_examples(key: str, few: Task) -> None:
    method = METHODS[key]
    assert len(method.rates) == 4
    found = fit(few, lambda model, steps: method.start(model, method.rates[1], steps), seed=0, epochs=2)
    assert found["diverged"] is None
    assert found["losses"][-1] < found["losses"][0]


def test_chosen__is_the_least_loss_of_runs_that_ended() -> None:
    runs = {
        0.1: {"losses": [2, 1], "diverged": None},
        0.3: {"losses": [2, 0.5], "diverged": None},
        1.0: {"losses": [2, 0.1], "diverged": "loss 30 at step 9"},
    }
    assert chosen(runs) == 0.3
    assert chosen({1.0: runs[1.0]}) is None


def test_epochs_to__is_the_first_that_ends_at_the_loss_or_below() -> None:
    assert [epochs_to(goal, [2.0, 1.0, 1.5, 0.5]) for goal in (2.0, 1.0, 0.9, 0.5, 0.4)] == [0, 1, 3, 3, None]


def test_table__has_the_epochs_to_the_loss_of_adamw_with_the_same_seed(tmp_path: Path) -> None:
    ends = {"sgd": 4.0, "adamw": 3.0, "muon": 1.0}
    for key, end in ends.items():
        rates = METHODS[key].rates
        for rate, seed in [*((rate, 0) for rate in rates), *((rates[0], seed) for seed in SEEDS)]:
            losses = [9.0, 4.0 + seed, end + seed]
            lost = "at step 3" if rate != rates[0] and key == "sgd" else None
            found = {"losses": losses, "accuracy": 0.5, "milliseconds": 6 / end, "diverged": lost, "title": "few"}
            (tmp_path / f"digits-{key}-{rate:g}-{seed}.json").write_text(json.dumps(found))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(tmp_path, "digits", True).splitlines()]
    assert {row[0]: row[4:] for row in rows if len(row) > 1 and row[0] in ("SGD, momentum", "AdamW", "Muon")} == {
        "SGD, momentum": ["", "3 of 4", "0.2"], "AdamW": ["2.0", "0 of 4", "0.3"], "Muon": ["2.0", "0 of 4", "1.0"],
    }  # fmt: skip


@pytest.mark.smoke
def test_command__goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--tasks", "digits", "--methods", "muon", "--epochs", "1"]
    main(arguments)
    first = capsys.readouterr().out
    assert first.count("digits-muon-") == 7
    main(arguments)
    second = capsys.readouterr().out
    assert "digits-muon-" not in second
    assert "| Muon |" in second
    assert first.endswith(second)
