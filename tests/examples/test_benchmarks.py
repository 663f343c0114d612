"""The benchmarks, and those of influence scores."""

import gc
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from examples.benchmarks import influence, language, memory, report, results, roofline, run
from examples.benchmarks.accuracy import accuracy
from examples.benchmarks.choice import compare, forced
from examples.benchmarks.contestants import Case, Contestant, DisagreementError, check_agreement
from examples.benchmarks.environment import environment
from examples.benchmarks.fixed import STEPS, measure_fixed
from examples.benchmarks.influence import SMALL, Sizes, measure_influence, ours
from examples.benchmarks.measure import Settings, agree, measure
from examples.benchmarks.operations import OPERATIONS, PEERS, Cell, cells
from examples.benchmarks.peer_bergson import Bergson
from examples.benchmarks.steps import measure_steps
from examples.benchmarks.timing import Clock, TookTooLongError, limit, race
from examples.benchmarks.workloads import TINY, Workload
from fisherkit.rows.units import RuledUnit

SETTINGS = Settings(torch.device("cpu"), rounds=1)
CASES = [(name, scope) for name in TINY for scope in ("all", "linear") if scope == "all" or name in ("W3", "W4")]
UNABLE = {
    ("W3", "nngeometry"): "3-D inputs of linear layers",
    ("W3", "BackPACK"): "second-order extensions beyond sequential models",
}
"""Who may fail on what; anybody else who does has broken."""


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Collecting garbage before every run takes no time if what the test session holds is left out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("name", "scope"), CASES)
def test_cells__everybody_agrees(name: str, scope: str) -> None:
    case = Case(TINY[name](), scope)
    records = [agree(cell, SETTINGS)[0] for cell in cells(case)]
    assert records
    for record in records:
        assert "error" not in record, record
        for peer in record["peers"]:
            assert peer.get("errors") or (name, peer["name"]) in UNABLE, peer


def test_operations__each_has_a_peer_somewhere() -> None:
    met = {
        (cell.name, peer.name)
        for name, scope in CASES
        for cell in cells(Case(TINY[name](), scope))
        for peer in cell.peers
    }
    assert {name for name, _ in met} == set(OPERATIONS)
    assert {peer for _, peer in met} == set(PEERS)


def test_agreement__a_wrong_result_stops_the_benchmark() -> None:
    case = Case(TINY["W1"]())
    (cell,) = cells(case, frozenset({"ef_diagonal"}))
    wrong = Contestant("wrong", "", lambda: lambda: 1.01, lambda factor: {"diagonal": factor * _diagonal(case)})
    with pytest.raises(DisagreementError, match=r"W1, EF diagonal \(all\), wrong: diagonal differs by 1\.00e-02"):
        measure(Cell(case, "ef_diagonal", cell.ours, (wrong,)), SETTINGS)


def test_measure__everybody_in_units() -> None:
    (cell,) = cells(Case(TINY["W1"]()), frozenset({"ef_product_cached"}))
    record = measure(cell, SETTINGS)
    everybody = [record, *record["peers"]]
    assert [entry["units"] for entry in everybody] == [entry["seconds"] / record["unit_seconds"] for entry in everybody]
    assert record["ratio"] == min(peer["seconds"] for peer in record["peers"]) / record["seconds"]
    assert record["target"] == "≥ 3.5× curvlinops, ≤ 0.8 u"
    curvlinops = next(peer["seconds"] for peer in record["peers"] if peer["name"] == "curvlinops")
    assert record["met"] == (curvlinops / record["seconds"] >= 3.5 and record["units"] <= 0.8)


def _diagonal(case: Case) -> torch.Tensor:
    return fk.EmpiricalFisher(case.workload.model, case.workload.data).diagonal()


def test_agreement__needs_something_to_compare_and_no_nan() -> None:
    one = {"product": torch.ones(3)}
    with pytest.raises(DisagreementError, match="nothing to compare"):
        check_agreement("here", one, {}, {})
    with pytest.raises(DisagreementError, match="nan"):
        check_agreement("here", one, {"product": torch.full((3,), float("nan"))}, {"product": 1.0})
    with pytest.raises(DisagreementError, match="shape"):
        check_agreement("here", one, {"product": torch.ones(2)}, {"product": 1.0})


def test_race__everybody_in_turn_and_the_slow_once() -> None:
    order: list[str] = []
    first = {"a": 1.0, "b": 1.0, "slow": 20.0, "endless": 99.0}
    runs = {name: (lambda name=name: order.append(name)) for name in first}
    found = race(runs, first, Clock(SETTINGS.device), rounds=3, slow=10)
    assert order == ["a", "b", "slow", "a", "b", "a", "b"]
    assert [found[name].rounds for name in first] == [3, 3, 1, 1]
    assert found["endless"].seconds == 99.0


def test_limit__interrupts() -> None:
    def wait() -> None:
        with limit(0.05):
            time.sleep(5)

    with pytest.raises(TookTooLongError, match=r"0\.05 s"):
        wait()


def test_forced__representation_and_back() -> None:
    case, before = Case(TINY["W2"]()), RuledUnit.choose
    for stored, kind in ((False, "factored"), (True, "stored")):
        with forced(stored):
            fisher = fk.EmpiricalFisher(case.workload.model, case.workload.data)
        assert {entry.structure for entry in fisher.coverage().entries} == {f"full, {kind} rows"}
    assert RuledUnit.choose is before
    record = compare(case, fk.EmpiricalFisher, SETTINGS.device, rounds=1)
    assert set(record["seconds"]) == {"chosen", "factored", "written out"}
    assert record["ratio"] >= 1


def test_roofline__counts_what_the_formulas_say() -> None:
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    assert roofline.count(lambda: a @ b) == {torch.float32: 2 * 4 * 5 * 6}
    square = torch.eye(6, dtype=torch.float64)
    assert roofline.count(lambda: torch.linalg.cholesky(square)) == {torch.float64: 6**3 / 3}
    assert roofline.count(lambda: torch.cholesky_solve(square[:, :2], square)) == {torch.float64: 2 * 6 * 6 * 2}


def test_memory__of_fresh_processes() -> None:
    record = memory.measure_memory("W1", device="cpu", tiny=True, repeats=1)
    assert min(record["train_bytes"], record["solve_bytes"]) > 0


def test_accuracy__falls_with_precision() -> None:
    errors = {record["precision"]: record["errors"]["EF product"] for record in accuracy(TINY["W1"]())}
    assert 0 < errors["float32"] < 1e-5 < errors["bfloat16 model"] < 0.1


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command's output for two cheap operations."""
    out = tmp_path_factory.mktemp("benchmarks")
    options = ["--tiny", "--rounds", "3", "--threads", "1", "--out", str(out)]
    two = ["--operation", "ef_product_cached", "ef_gram"]
    run.main([*options, "--workload", "W1", *two, "--part", "operations", "roofline"])
    run.main([*options, "--workload", "W4", *two, "--part", "operations", "--keep"])
    run.main([*options, "--workload", "W1", "--part", "choice", "--keep"])
    return out


@pytest.mark.smoke
def test_command__writes_results_table_and_pictures(written: Path) -> None:
    found = results.read(written / "results.json")
    assert [record["operation"] for record in found["cells"]] == ["ef_product_cached", "ef_gram"] * 2
    assert set(found["settings"]["titles"]) == {"W1", "W4"}
    assert len(found["roofline"]) == 2
    assert {record["kind"] for record in found["choice"]} == {"ef", "exact"}  # --keep kept the rest
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert (written / "bars-W1.png").read_bytes().startswith(b"\x89PNG")
    assert "EF product, rows at hand" in (written / "table.md").read_text("utf-8")


def test_command__does_not_mix_machines(written: Path) -> None:
    found = results.read(written / "results.json")
    other = {**found["environment"], "processor": "another"}
    with pytest.raises(ValueError, match="environment of the results that are there differs in"):
        results.continued(found, other, found["settings"])


def test_command__without_a_card(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run.main(["--device", "cuda"])
    assert "this torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.smoke
def test_page__shows_the_results_that_lie_beside_it() -> None:
    found = results.read(run.ASSETS / "results.json")
    page = run.PAGE.read_text("utf-8")
    growth = (run.PAGE.parent / "growth.md").exists()
    for name, body in report.sections(found, pictures="../assets/benchmarks", growth=growth).items():
        first, last = report.markers(name)
        assert page.partition(first)[2].partition(last)[0].strip() == body.strip(), f"section {name} is out of date"
    assert not found["settings"]["tiny"]


def test_environment__names_no_machine_and_no_user() -> None:
    text = json.dumps(run.environment(torch.device("cpu")))
    assert "/" not in text.replace("+cpu", "")


def test_fixed__every_row_has_a_peer() -> None:
    records = list(measure_fixed(SETTINGS))
    assert len(records) == 4 + len(STEPS)
    assert all(len(record["seconds"]) > 1 and record["ratio"] > 0 for record in records)
    assert report.fixed_table({"fixed": records})[0][-1] == "ours / best peer"


@pytest.mark.parametrize("name", ["W1", "W2", "W3"])
def test_steps__ours_is_the_one_by_hand_and_everybody_steps(name: str) -> None:
    record = measure_steps(TINY[name](), torch.device("cpu"), rounds=1, slow=5.0, patience=60.0)
    assert record["errors"] == {}
    assert record["difference"] < 1e-6
    assert record["units"]["SGD"] == 1.0
    assert set(record["met"]) == set(record["targets"])
    assert len(record["targets"]) == 3
    assert record["targets"].keys() <= record["units"].keys()


@pytest.mark.smoke
@pytest.mark.parametrize("whose", [peer + name for peer, names in language.PEERS.items() for name in names])
def test_language__all_fit_the_same(whose: str) -> None:
    library, structure = whose.split()
    if library in influence.missing():
        pytest.skip(f"{library} is not installed")
    size, found = language.SIZES["tiny"], []
    for name in (structure, whose):
        figures, product = language.once(language.contestant(name, observed=True), size, size.sequences, "cpu")
        assert figures["fit"] > 0
        found.append(product(language.directions(size)))
    assert list(found[0]) == [f"blocks.0.{layer}" for layer in ("attend", "project", "up", "down")]
    assert language.disagreement(whose, *found) < 1e-4
    with pytest.raises(DisagreementError, match=f"language model: {whose} differs by 9"):
        language.disagreement(whose, found[0], {name: 1.01 * v for name, v in found[1].items()})


def test_language__rows_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, prepare = [], fk.influence.InfluenceScores.prepare

    def kept(self: Any, *args: Any, **options: Any) -> Any:
        rows = prepare(self, *args, **options)
        stored.append((len(list(options["folder"].glob("rows-*"))), rows.count(), rows.compression.bytes))
        return rows

    monkeypatch.setattr(fk.influence.InfluenceScores, "prepare", kept)
    language.once(language.contestant(language.ROWS, observed=False), language.SIZES["tiny"], 6, "cpu")
    ((files, sequences, size),) = stored
    assert files > 0
    assert sequences == 6
    assert 0 < size <= 4 * 4 * language.WIDTH**2  # bytes of four layers' numbers in float32


def test_language__the_peers_rows_are_stored() -> None:
    if language.BERGSON.strip() in influence.missing():
        pytest.skip("bergson is not installed")
    size = language.SIZES["tiny"]
    workload = size.workload(6)
    peer = Bergson(workload.model, workload.inputs, workload.targets, size.batch)
    peer.project(language.WIDTH)
    stored = sum(file.stat().st_size for file in Path(peer.folder.name).rglob("*") if file.is_file())
    assert stored >= 6 * 4 * language.WIDTH**2  # of four layers' numbers, a byte or more each


def test_language__is_judged_by_the_peer_and_a_training_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {
        "diagonal": 1.0, "kronfluence diagonal": 2.0, "kfac": 1.0, "kronfluence kfac": 1.5, "bergson kfac": 0.5,
        "bergson ekfac": 1.5,
    }  # fmt: skip
    peaks = {"diagonal": 130, "kfac": 100, language.STEP: 100}

    def child(size: str, name: str, *, products: Path | None = None, **_: Any) -> dict[str, float]:
        if products is not None:
            influence.save_file({"layer": torch.ones(2, 3)}, products)
        elif name == "kronfluence ekfac":
            raise RuntimeError("a traceback\nits last line")
        return {"fit": seconds.get(name, 1.0), "peak": 1e6 * peaks.get(name, 200)}

    monkeypatch.setattr(influence, "missing", list)
    monkeypatch.setattr(importlib.metadata, "version", lambda library: f"of {library}")
    monkeypatch.setattr(language, "_child", child)
    arguments = ["--part", "language", "--size", "small", "--rounds", "3", "--out", str(tmp_path)]
    run.main(["--workload", "W1", *arguments])
    elsewhere = results.read(tmp_path / "results.json")
    elsewhere["environment"]["processor"] = "another"
    results.write(tmp_path / "results.json", elsewhere)
    run.main([*arguments, "--keep"])  # its records say where they were measured, and the others keep their place
    kept = results.read(tmp_path / "results.json")
    (record,) = kept["language"]
    assert record["environment"]["processor"] != kept["environment"]["processor"] == "another"
    figures, tokens = record["figures"], 48 * 64
    assert figures["diagonal"] == {
        "fit": 1.0, "peak": 1.3e8, "total": 1.0, "rounds": 3, "tokens": tokens, "steps": 1.3, "speed": 2.0,
        "memory": 0.65, "target": 1.8, "most_steps": 1.3, "met": True,
    }  # fmt: skip
    assert not figures["kfac"]["met"]
    assert (figures["kfac"]["bergson"], figures[language.KEPT]["bergson"]) == (0.5, 1.5)
    assert "met" not in figures["ekfac"]
    assert record["errors"] == {"kronfluence ekfac": "its last line"}
    table = (tmp_path / "table.md").read_text("utf-8")
    assert "| small, fisherkit diagonal |" in table
    assert "| small, training step |" in table
    assert "| 2.00× |  | 1.30× | 0.65× | ≥ 1.8×, ≤ 1.3 steps | yes |" in table
    assert "| 1.50× | 0.50× | 1.00× | 0.50× | ≥ 1.9× and 1×, ≤ 1.3 steps | **no** |" in table
    assert "8 in a batch; products of kronfluence of kronfluence and ours differ by at most 0e+00; products" in table
    assert "; torch " in table
    assert "small: 2 blocks, width 128, vocabulary 1,024, 48 sequences of 64 tokens, 8 in a batch" in table


def test_language__of_a_process_of_its_own() -> None:
    figures = language._child("tiny", "ekfac", device="cpu")
    assert figures["fit"] > 0
    assert figures["peak"] >= 0


# -- influence scores in the benchmark ---------------------------------------------------------------------------------


Pair = tuple[Tensor, Tensor]
OWN = {"environment": environment(torch.device("cpu")), "rounds": 3}  # as a run keeps them beside a record


def case(name: str) -> tuple[Workload, Pair, Pair]:
    workload = TINY[name]().to("cpu", torch.float64)
    train, queries = (influence.data(workload, size, seed) for size, seed in ((SMALL.examples, 1), (SMALL.queries, 2)))
    return workload, (train[0].double(), train[1]), (queries[0].double(), queries[1])


def by_layer(workload: Workload, data: Pair) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each layer ∂ℓ/∂(W, b) of every example ``[N, O, I + 1]``, all inputs with a 1, all outputs' gradients."""
    names = sorted({name.rpartition(".")[0] for name in workload.layered})
    found: dict[str, list[list[Tensor]]] = {name: [[], [], []] for name in names}
    for x, y in zip(*data, strict=True):
        kept: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(module: nn.Module, inputs: Any, output: Tensor, kept: dict[Any, Any] = kept) -> None:
            kept[module] = (inputs[0], output)

        layers = {name: workload.model.get_submodule(name) for name in names}
        handles = [layer.register_forward_hook(hook) for layer in layers.values()]
        loss = F.cross_entropy(workload.model(x[None]), y[None])
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            inputs, output = kept[layer]  # type: ignore[index]
            g, weight, bias = torch.autograd.grad(loss, [output, layer.weight, layer.bias], retain_graph=True)
            a = F.pad(inputs.detach().flatten(0, -2), (0, 1), value=1.0)
            for kind, value in zip(
                found[name], (torch.cat([weight, bias[:, None]], 1), a, g.flatten(0, -2)), strict=True
            ):
                kind.append(value)
    return {name: (torch.stack(w), torch.cat(a), torch.cat(g)) for name, (w, a, g) in found.items()}


def ekfac(workload: Workload, train: Pair, queries: Pair) -> Tensor:
    """Σ over layers of gradients in the factors' eigenbases, over measured eigenvalues and λ."""
    asked, rotated, eigenvalues = by_layer(workload, queries), [], []
    for name, (n, a, g) in by_layer(workload, train).items():
        left, right = torch.linalg.eigh(g.T @ g)[1], torch.linalg.eigh(a.T @ a)[1]
        rotated.append([left.T @ side @ right for side in (asked[name][0], n)])
        eigenvalues.append(rotated[-1][1].square().mean(0))
    damping = torch.cat([values.flatten() for values in eigenvalues]).mean()
    parts = [torch.einsum("qoi,noi->qn", q / (e + damping), n) for (q, n), e in zip(rotated, eigenvalues, strict=True)]
    return torch.stack(parts).sum(0) / len(train[1])


def full(workload: Workload, train: Pair, queries: Pair) -> Tensor:
    """By the dense matrix."""
    n, q = (torch.cat([w.flatten(1) for w, _, _ in by_layer(workload, side).values()], 1) for side in (train, queries))
    matrix = n.T @ n / len(n)
    matrix += matrix.diagonal().mean() * torch.eye(len(matrix), dtype=n.dtype)
    return q @ torch.linalg.solve(matrix, n.T) / len(n)


CHECKS: dict[str, tuple[type[fk.FisherApproximation], str, Callable[..., Tensor]]] = {
    "EKFAC": (fk.EmpiricalFisher, "ekfac", ekfac),
    "full, EF": (fk.EmpiricalFisher, "full", full),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", list(influence.SIZES))
def test_ours__are_the_scores_by_brute_force(name: str, check: str) -> None:
    workload, train, queries = case(name)
    kind, structure, expected = CHECKS[check]
    found = ours(kind, structure, workload, train, Sizes(12, 5, 5, 5))(queries)
    torch.testing.assert_close(found, expected(workload, train, queries), rtol=1e-8, atol=1e-10)


def test_correlation__is_the_mean_over_queries() -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    other = torch.stack([2 * scores[0] + 1, -scores[1], scores[2]])
    assert influence.correlation(other, scores) == pytest.approx(1 / 3)


def test_influence__without_the_peer_has_figures_and_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(influence, "missing", lambda: ["kronfluence"])
    names = ("EKFAC", influence.PEER)
    monkeypatch.setattr(influence, "CONTESTANTS", {name: influence.CONTESTANTS[name] for name in names})
    options = ["--tiny", "--rounds", "3", "--threads", "1", "--slow", "0", "--out", str(tmp_path)]
    run.main([*options, "--workload", "W1", "--part", "influence"])
    (record,) = results.read(tmp_path / "results.json")["influence"]
    figures = record["seconds"]["EKFAC"]
    assert list(record["seconds"]) == ["EKFAC"]
    assert figures["total"] == pytest.approx(figures["fit"] + figures["score"])
    assert (figures["rounds"], record["ratios"], record["met"]) == (1, {}, {})
    section = report.influence_section({"influence": [record]})
    assert "pip install --no-deps -r requirements-bench.txt" in section
    assert "12 training examples, 5 queries" in section
    assert "fisherkit EKFAC" in (tmp_path / "table.md").read_text("utf-8")


def fake(scores: dict[str, Tensor], seconds: dict[str, float]) -> Callable[..., dict[str, float]]:
    """A process that leaves scores and figures."""

    def child(_: str, contestant: str, *, folder: Path, **others: Any) -> dict[str, float]:
        found = scores.get(contestant, scores[""])
        influence.save_file({"scores": found}, influence._file(folder, contestant))
        return {"fit": seconds.get(contestant, 1.0), "score": 1.0, "peak": 1e6}

    return child


def measured(monkeypatch: pytest.MonkeyPatch, child: Callable[..., Any]) -> dict[str, Any]:
    monkeypatch.setattr(influence, "missing", list)
    monkeypatch.setattr(influence.importlib.metadata, "version", lambda _: "1.0.1")
    monkeypatch.setattr(influence, "_child", child)
    return measure_influence("W1", device="cpu", tiny=True, rounds=3, slow=5.0, patience=60.0)


def test_influence__is_judged_by_the_peers_ekfac(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    record = measured(monkeypatch, fake({"": scores}, {influence.PEER: 9.0, "EKFAC": 1.5, "full, EF": 11.0}))
    assert record["ratios"]["EKFAC"] == pytest.approx(4.0)
    assert record["met"] == {"EKFAC": True, "full, EF": False}
    assert record["correlations"]["EKFAC"] == pytest.approx(1.0)
    assert record["seconds"][influence.PEER]["rounds"] == 1
    assert record["seconds"]["EKFAC"]["rounds"] == 3
    section = report.influence_section({"influence": [record | OWN]})
    assert "≥ 3× | yes | 1.000" in section
    assert "EKFAC scores of kronfluence 1.0.1 and ours differ by 0e+00" in section


def test_influence__other_scores_from_observed_labels_stop_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    wrong = {"": scores, "kronfluence EKFAC, observed labels": 1.01 * scores}
    with pytest.raises(DisagreementError, match=r"W1, influence: kronfluence's EKFAC scores differ by 9\.90e-03"):
        measured(monkeypatch, fake(wrong, {}))


def test_influence__a_peer_that_fails_has_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    child = fake({"": torch.ones(5, 12)}, {})

    def failing(name: str, contestant: str, **others: Any) -> dict[str, float]:
        if influence.peer_of(contestant):
            raise RuntimeError("a traceback\nits last line")
        return child(name, contestant, **others)

    record = measured(monkeypatch, failing)
    assert record["errors"] == {"kronfluence EKFAC": "its last line"}
    assert list(record["seconds"]) == ["EKFAC", "full, EF"]
