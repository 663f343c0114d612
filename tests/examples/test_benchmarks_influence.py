"""Influence scores in the benchmark, on tiny sizes: ours are those by brute force, everybody runs and is judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from examples.benchmarks import influence, report, results, run
from examples.benchmarks.contestants import DisagreementError
from examples.benchmarks.environment import environment
from examples.benchmarks.influence import SMALL, Sizes, measure_influence, ours
from examples.benchmarks.workloads import TINY, Workload

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
        if influence.is_peer(contestant):
            raise RuntimeError("a traceback\nits last line")
        return child(name, contestant, **others)

    record = measured(monkeypatch, failing)
    assert record["errors"] == {"kronfluence EKFAC": "its last line"}
    assert list(record["seconds"]) == ["EKFAC", "full, EF"]
