"""An option that one process alone has, good or bad, is an error in all of them, at once."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fisherkit as fk
from tests import ranks
from tests.test_processes import batches_of, network, own_data, whole_data

Natural: Any = fk.optim.NaturalGradient
Beside: Any = fk.optim.Preconditioner

SOON = 30
"""Seconds, of the 120 for which a process waits."""


def build(rank: int, name: str, other: Any, **options: Any) -> Any:
    arguments = {
        "model": network(),
        "data": own_data(rank, 2),
        "kind": "ef",
        **options,
        **({name: other} if rank else {}),
    }
    return fk.FisherApproximation(**arguments)


def kind(rank: int, make: Any, good: dict[str, Any], bad: dict[str, Any]) -> None:
    make(network(), own_data(rank, 2), **(bad if rank else good))


def step(
    rank: int, make: Any, options: dict[str, Any], change: Callable[[Any, Any], None] = lambda _m, _o: None
) -> None:
    model = DistributedDataParallel(network())
    optimizer = make(model, **options)
    x, y = batches_of(rank, 2)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    if rank:
        change(model.module, optimizer)
    optimizer.step()


def broken() -> float:
    raise LookupError("no schedule")


def damping(value: Any) -> Callable[[Any, Any], None]:
    return lambda _model, optimizer: optimizer.param_groups[0].update(damping=value)


def replaced(model: Any, _optimizer: Any) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def prepare(rank: int, other: dict[str, Any], **options: Any) -> None:
    fisher = fk.EmpiricalFisher(network(), [whole_data()], structure="kfac", group=False)
    scores = fk.influence.InfluenceScores(fisher, network(), damping=0.1)
    scores.prepare(own_data(rank, 2), **{**options, **(other if rank else {})})


def ask(rank: int, structure: str, question: Callable[[Any, Tensor, int], Any]) -> None:
    fisher = build(rank, "kind", "ef", structure=structure, shard=structure != "full")
    question(fisher, torch.ones(fisher.size, dtype=torch.float64), rank)


def load(rank: int, folder: str) -> None:
    path = Path(folder, "f.safetensors")
    fisher = build(rank, "kind", "ef", structure="kfac")
    if rank == 0:
        fisher.save(path)
    torch.distributed.barrier()
    fk.load(path, shard=True, device="nowhere" if rank else "cpu")


def others(fisher: Any) -> Any:
    space = fk.ParameterSpace(("other",), ((fisher.size,),))
    return fk.operators.DiagonalOperator(space, torch.ones(fisher.size, dtype=torch.float64))


def draw(fisher: Any, _: Tensor, rank: int) -> None:
    fisher.factorize(0.1).sample(torch.Generator().manual_seed(0), 2 + rank)


N, P = {"lr": 0.1, "structure": "kfac"}, {"damping": 0.1, "trust_region": 1.0}
QUERIES = {"queries": whole_data()}
CASES: dict[str, tuple[Callable[[int, str], Any], str]] = {
    "a model": (lambda r, _: build(r, "model", "no"), "a str as model"),
    "a kind": (lambda r, _: build(r, "kind", "eff"), "kind='eff'"),
    "labels to draw": (lambda r, _: kind(r, fk.SampledFisher, {"draws": 2}, {"draws": 0}), "draws=0"),
    "a power": (lambda r, _: kind(r, fk.ImprovedEmpiricalFisher, {}, {"power": "a"}), "power of type str"),
    "a rank": (lambda r, _: kind(r, fk.TruncatedFisher, {"rank": 1}, {"rank": 0}), "rank=0"),
    "an argument that is not": (lambda r, _: kind(r, fk.ExactFisher, {}, {"strukture": "kfac"}), "strukture="),
    "a structure": (lambda r, _: build(r, "structure", "kfak"), "structure='kfak'"),
    "parameters": (lambda r, _: build(r, "params", ["no"]), "['no']"),
    "a likelihood": (lambda r, _: build(r, "likelihood", "no"), "'no'"),
    "data": (lambda r, _: build(r, "data", 3), "int"),
    "a size": (lambda r, _: build(r, "chunk_size", 0), "chunk_size=0"),
    "a dtype": (lambda r, _: build(r, "dtype", torch.bfloat16, structure="block"), "bfloat16"),
    "ema": (lambda r, _: Natural(network(), 0.1, damping=0.1, ema=0.5 * r), "ema=0.5"),
    "a text": (lambda r, _: Natural(network(), **N, damping="0.1" if r else 0.1), "damping of type str"),
    "an option": (lambda r, _: Beside(network(), **({"dampin": 1.0} if r else {})), "dampin"),
    "a layer_rms": (lambda r, _: Beside(network(), layer_rms=-1.0 * r or 1.0), "layer_rms=-1.0"),
    "lr that fails": (lambda r, _: step(r, Beside, {**P, "lr": broken if r else 0.1}), "no schedule"),
    "lr of text": (lambda r, _: step(r, Beside, {**P, "lr": (lambda: "a") if r else 0.1}), "lr of type str"),
    "a damping": (lambda r, _: step(r, Natural, {**N, "damping": 0.1}, damping(-1.0)), "damping=-1.0"),
    "another damping": (lambda r, _: step(r, Natural, {**N, "damping": 0.1}, damping(0.2)), "different damping"),
    "a replaced weight": (lambda r, _: step(r, Natural, {**N, "damping": 0.1}, replaced), "replaced or renamed"),
    "queries": (lambda r, _: prepare(r, {**QUERIES, "compress": None}, **QUERIES, compress=0.9), "without compress"),
    "queries that have none": (lambda r, _: prepare(r, QUERIES, compress=0.9), "different queries"),
    "checked": (lambda r, _: prepare(r, {"checked": 0}, compress=0.9), "checked=0"),
    "most_error": (lambda r, _: prepare(r, {"most_error": "a"}, compress=0.9), "most_error of type str"),
    "by": (lambda r, _: prepare(r, {"by": "tokens"}, compress=0.9), "by='tokens'"),
    "compress": (lambda r, _: prepare(r, {"compress": 2.0}, compress=0.9), "compress=2.0"),
    "a folder": (lambda r, f: prepare(r, {"folder": 3}, folder=f), "int"),
    "load on a device": (load, "nowhere"),
    **{
        f"{name}, {structure}": (lambda r, _, s=structure, q=question: ask(r, s, q), said)
        for structure in ("full", "kfac")
        for name, question, said in (
            ("solve", lambda f, v, r: f.solve(v, damping=0.12 if r else 0.21), "different damping"),
            ("no damping", lambda f, v, r: f.solve(v, damping="no" if r else 0.1), "different damping"),
            ("no steps", lambda f, v, r: f.solve(v, damping=0.1, max_steps=1 + r), "different max_steps"),
            ("logdet", lambda f, _, r: f.logdet(damping=0.12 if r else 0.21), "different damping"),
            ("dimension", lambda f, _, r: f.effective_dimension(0.1 + r), "different damping"),
            ("relative", lambda f, v, r: f.factorize(0.1 if r else fk.RelativeDamping(0.1)), "different damping"),
            ("a vector", lambda f, v, r: f.matvec(v / (1 - r)), "NaN or infinite"),
            ("a short vector", lambda f, v, r: f.matvec(v[r:]), "shape"),
            ("no eigenvalues", lambda f, _, r: f.eigenvalues(0 if r else None), "k=0"),
            ("text eigenvectors", lambda f, _, r: f.eigenvectors("2" if r else 2), "k of type str"),
            ("a multiple of text", lambda f, _, r: f * ("x" if r else 2.0), "scale of type str"),
            ("a negative multiple", lambda f, _, r: f * (1.0 - 2.0 * r), "scale=-1.0"),
            ("a part", lambda f, _, r: f / (1.0 - r), "divisor"),
            ("a sum with text", lambda f, _, r: f + ("x" if r else f), "a str"),
            ("text and a sum", lambda f, _, r: ("x" if r else f) + f, "'x'"),
            ("a sum with others", lambda f, _, r: f + (others(f) if r else f), "different parameters"),
            ("a form of nothing", lambda f, v, r: f.quadratic_form({} if r else v), "missing names"),
            ("a form of a number", lambda f, v, r: f.quadratic_form(3 if r else v), "an int"),
            ("a form of names", lambda f, v, r: f.quadratic_form(f.space.unflatten(v) | dict([("no", v)] * r)), "'no'"),
            ("no draws", lambda f, _, r: f.factorize(0.1).sample(None, 1 - r), "n=0"),
            ("draws by seed", lambda f, _, r: f.factorize(0.1).sample(0 if r else None), "an int as generator"),
        )
    },
    "eigenvalues": (lambda r, _: ask(r, "kfac", lambda f, v, r: f.eigenvalues(2 + r)), "something else"),
    "draws": (lambda r, _: ask(r, "kfac", draw), "something else"),
    "a multiple": (lambda r, _: ask(r, "kfac", lambda f, v, r: (1.0 + r) * f), "something else"),
}  # fmt: skip


def errors(rank: int, size: int, folder: str) -> dict[str, tuple[str, float]]:
    warnings.simplefilter("ignore")
    found = {}
    for name, (call, _) in CASES.items():
        began = time.monotonic()
        try:
            call(rank, folder)
            said = "nothing"
        except Exception as error:  # noqa: BLE001  the test looks at it
            said = f"{type(error).__name__}: {error}"
        found[name] = said, time.monotonic() - began
        torch.distributed.barrier()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ranks.run(2, errors, str(tmp_path_factory.mktemp("options")))


@pytest.mark.parametrize("name", CASES)
def test_an_option__of_one_process_alone_is_an_error_in_all(found: Any, name: str) -> None:
    (first, waited), (second, _) = (one[name] for one in found)
    assert first.startswith("ProcessError"), first
    assert "rank 1" in first or "something else" in first, first
    assert CASES[name][1] in first, first
    assert second != "nothing"
    assert waited < SOON


def test_prepare__in_memory_names_no_folder(found: Any) -> None:
    assert found[0]["by"][0].startswith("ProcessError: prepare: "), found[0]["by"]
