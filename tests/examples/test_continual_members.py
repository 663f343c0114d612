"""Members of stacks, and the report of the continual experiment."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import fisherkit as fk
from examples.continual import experiment, report, run
from examples.continual.benches import BENCHES
from examples.continual.cells import Plan, half_decades
from examples.continual.members import Keeper, Members
from examples.continual.methods import KINDS, METHODS
from examples.continual.modules import MODULES, Heads, LastState, Reader, Task
from examples.continual.report_claims import claims
from examples.continual.report_libraries import chosen_elsewhere, laplace, libraries
from examples.continual.summary import Curve, curves, one_for_all, span, verdict
from tests.small_data import normal

F64 = torch.float64
STRENGTHS = (0.5, 3.0)


def models(name: str) -> list[Heads]:
    """Of two seeds."""
    found = []
    for seed in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            body: nn.Module = LastState(3, 4) if name == "gru" else Reader(9, 4)
            if name == "lora":
                config = LoraConfig(r=2, lora_alpha=4, target_modules=["query", "up"], init_lora_weights=False)
                body = inject_adapter_in_model(config, body)
            found.append(Heads(body, 4, 3, heads=2).double())
    return found


def data(name: str, seed: int, head: int) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x = normal(20, 4, 3, seed=seed) if name == "gru" else torch.randint(9, (20, 5), generator=generator)
    y = torch.randint(3, (20,), generator=generator)
    return Task((x, y), (x, y), head)


def move(members: Members, seed: int) -> None:
    with torch.no_grad():
        for place, own in enumerate(members.parameters[name] for name in members.trained):
            own += 0.2 * normal(*own.shape, seed=100 * seed + place)


def alone(members: Members, number: int) -> Heads:
    return copy.deepcopy(members.load(number))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stated(method: str, model: Heads, task: Task, past: list[tuple[Tensor, Tensor]]) -> None:
    """A task's diagonal and centre, by one backward pass a batch or example."""
    x, y = task.train
    parameters = list(trained(model).values())
    total = [torch.zeros_like(p) for p in parameters]
    size = 5 if method == "diagonal-squared" else 1
    for start in range(0, len(y), size):
        loss = F.cross_entropy(model(x[start : start + size]), y[start : start + size])
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        weight = float(torch.exp(-loss.detach())) if size == 1 else 1.0
        for own, g in zip(total, gradients, strict=True):
            own += 0 if g is None else weight * g.square() * size / len(y)
    diagonal = nn.utils.parameters_to_vector(total)
    centre = nn.utils.parameters_to_vector(parameters).detach().clone()
    if method == "diagonal-mammoth" and past:
        diagonal = diagonal + past.pop()[0]
    past.append((diagonal, centre))


@pytest.mark.parametrize("name", ["gru", "text", "lora"])
@pytest.mark.parametrize(
    "key",
    ["diagonal-ef", "kfac-ief", "kfac-ief34", "ekfac-exact", "kfac-sf", "l2", "diagonal-squared", "diagonal-mammoth"],
)
def test_gradient__is_that_of_loss_and_penalty_of_each_model_alone(name: str, key: str) -> None:
    method, members = METHODS[key], Members(models(name))
    members.repeat(2)
    normalize = "trace" if method.kind in KINDS else None
    keeper = Keeper(method, torch.tensor(STRENGTHS * 2, dtype=F64), normalize, batch=5)
    past: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(4)]
    kept: list[list[fk.FisherOperator]] = [[] for _ in range(4)]
    centres: list[list[dict[str, Tensor]]] = [[] for _ in range(4)]
    for number in range(2):
        move(members, number)
        members.model.head = number
        tasks = [data(name, 10 * number + seed, number) for seed in range(2)]
        keeper.consolidate(members, tasks, number)
        for member in range(4):
            model, task = alone(members, member), tasks[member // 2]
            if method.kind in KINDS:
                _, kind, options = KINDS[method.kind]
                options = {"seed": number} if method.kind == "sf" else options
                kept[member].append(kind(model, task.train, structure=method.structure, params=model.own(), **options))
                centres[member].append(copy.deepcopy(model.state_dict()))
            elif key == "l2":
                flat = nn.utils.parameters_to_vector(trained(model).values()).detach()
                other = f"heads.{1 - number}."
                own = [torch.full_like(p, float(not n.startswith(other))) for n, p in trained(model).items()]
                past[member].append((nn.utils.parameters_to_vector(own), flat))
            else:
                stated(key, model, task, past[member])
    move(members, 7)
    members.model.head = 1
    x = torch.stack([data(name, 50 + seed, 1).train[0] for seed in range(2)])
    y = torch.stack([data(name, 50 + seed, 1).train[1] for seed in range(2)])
    torch.autograd.backward(members.losses(x, y).sum())
    members._penalize(keeper.parts)
    for member in range(4):
        model, strength = alone(members, member), STRENGTHS[member % 2]
        loss = F.cross_entropy(model(x[member // 2]), y[member // 2])
        if method.kind in KINDS:
            now, ewc = copy.deepcopy(model.state_dict()), fk.continual.EWC(model, strength, normalize="trace")
            for fisher, centre in zip(kept[member], centres[member], strict=True):
                model.load_state_dict(centre)
                ewc.consolidate(1.0 * fisher, uncovered="free")
            model.load_state_dict(now)
            (F.cross_entropy(model(x[member // 2]), y[member // 2]) + ewc.penalty()).backward()
        else:
            theta = nn.utils.parameters_to_vector(trained(model).values())
            total = sum(0.5 * strength * (d * (theta - c).square()).sum() for d, c in past[member])
            (loss + total).backward()
        for parameter_name, p in trained(model).items():
            found = members.parameters[parameter_name].grad
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            own = torch.zeros_like(p) if found is None else found[member]
            torch.testing.assert_close(own, expected, rtol=1e-7, atol=1e-10)


# -- the continual-learning benches from end to end at tiny sizes ------------------------------------------------------


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


@pytest.mark.parametrize("bench", ["gru-rows", "lora-pairs"])
def test_command__measures_modules(bench: str, tmp_path: Path) -> None:
    some = ["none", "joint", "l2", "kfac-ief34", "diagonal-mammoth"]
    threads = torch.get_num_threads()
    run.main(["--part", bench, "--methods", *some, "--tiny", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    cells = json.loads((tmp_path / f"{bench}.json").read_text("utf-8"))["cells"]
    assert {key.split("/")[2] for key in cells} == set(some)
    assert all(len(row) == 2 for cell in cells.values() for row in cell["accuracy"])
    assert f"| {bench}, fit |" in (tmp_path / "continual.md").read_text("utf-8")


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
    apart = ("mammoth", "ief34")
    assert {f"fit/trace/{key}" for key, method in METHODS.items() if method.kind not in apart} <= keys
    assert {key for key in keys if "mammoth" in key} == {"fit/none/diagonal-mammoth", "early/none/diagonal-mammoth"}
    assert "early/none/full-ef" in keys
    assert "fit/none/full-ef" not in keys
    assert not any("full" in cell.key for cell in plan.cells(BENCHES["permuted-mnist1d"]))
    cells = {cell.key: plan.strengths_of(MODULES["gru-rows"], cell) for cell in plan.cells(MODULES["gru-rows"])}
    assert set(cells) == {
        f"fit/{'none' if method.kind in ('squared', 'mammoth', 'ief34') else 'trace'}/{key}"
        for key, method in METHODS.items()
        if method.structure != "full" and "truncated" not in key
    }
    assert 3.0 in cells["fit/none/kfac-ief34"]  # the default, which tables compare with
    assert 0.1 in cells["fit/trace/kfac-ief"]


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
        "none/kfac-ief34": three((78, 80, 82), (60, 61, 62), strengths=(3.0, 10.0)),
        "trace/kfac-ief": three((77, 79, 81), (60, 61, 62), strengths=(0.1, 1.0)),
        # Lucky on the last seed: best on average, and best on the others only where that seed is among them.
        "none/diagonal-squared": three((79, 75, 99), (1, 1, 1), strengths=(10.0, 100.0)),
        "none/kfac-exact": three((70, 70, 70), (1, 1, 1), strengths=(10.0, 100.0)),
    }
    assert chosen_elsewhere(own) == [79, 75, 82]
    body = libraries({("a", "fit"): own})
    assert "| a, fit | 40.0 ± 24.8 |  | 84.3 ± 31.9* |  | 79.0 ± 5.0 | 80.0 ± 5.0 | 78.7 | +1.3 ± 8.0 | 15.0 |" in body
    assert "| +1.3 ± 8.0 | 15.0 |  | 15.0 | 98.0" in body
    assert "| a, fit | 0.1 | 0.01 | 0.02 | 5 |" in laplace({("a", "fit"): own})


def test_curves__are_by_bench_and_regime(out: Path) -> None:
    found = curves(experiment.read(out))
    assert list(found) == [("split-digits", "fit"), ("split-digits", "early")]
    assert len(found["split-digits", "fit"]["none/kfac-ief"].strengths) == 3
