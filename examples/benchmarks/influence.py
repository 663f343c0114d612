"""Influence scores: a fit, and scores of training examples against queries, fisherkit's and kronfluence's.

Everybody runs in a process of its own, which measures seconds of both parts and the most memory. What is compared is
the parameters that kronfluence tracks: weights and biases of linear layers. Run as a module, this file is such a
process.

kronfluence draws one label for each example, and other draws give other scores: of the timed runs, the correlation
with ours is reported. That the two compute the same is asserted before, with the observed labels on both sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fisherkit as fk
from examples.benchmarks.contestants import DisagreementError
from examples.benchmarks.measure import Record
from examples.benchmarks.memory import Peak, run_module
from examples.benchmarks.timing import Clock
from examples.benchmarks.workloads import FULL, TINY, Workload
from examples.influence.kronfluence_peer import kronfluence
from examples.influence.settings import Pair

DAMPING = 1.0
"""Multiples of the mean eigenvalue, for everybody."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is scored.

    Args:
        examples: N, of training.
        queries: Q.
        batch: training examples in a batch of ours.
        peer_batch: in one of the peer's, as its memory has room.
    """

    examples: int
    queries: int
    batch: int
    peer_batch: int


SIZES = {"W1": Sizes(5_000, 200, 5_000, 128), "W3": Sizes(5_000, 200, 50, 50)}
CHECKED = {"W1": Sizes(150, 20, 150, 75), "W3": Sizes(40, 10, 40, 20)}
SMALL = Sizes(12, 5, 6, 6)
"""Of what is timed, of what is compared first, and where both are tiny."""

Scorer = Callable[[Pair], Tensor]
Contestant = Callable[[Workload, Pair, Sizes], Scorer]
"""A fit: model, training data and sizes to a function of the queries."""


def ours(
    kind: type[fk.FisherApproximation], structure: str, workload: Workload, train: Pair, sizes: Sizes, **options: Any
) -> Scorer:
    """What a user of fisherkit writes."""
    batches = [(train[0][i : i + sizes.batch], train[1][i : i + sizes.batch]) for i in _starts(train, sizes.batch)]
    fisher = kind(workload.model, batches, structure=structure, params=workload.layered, **options)
    influence = fk.influence.InfluenceScores(fisher, workload.model, damping=fk.RelativeDamping(DAMPING))
    return lambda queries: influence.scores(queries, batches)


def theirs(strategy: str, empirical: bool, workload: Workload, train: Pair, sizes: Sizes) -> Scorer:
    """What a user of kronfluence writes; layers inside attention run as modules, where it can see them."""
    torch.backends.mha.set_fastpath_enabled(False)
    modules = sorted({name.rpartition(".")[0] for name in workload.layered})
    scorer = kronfluence(
        strategy, workload.model, train, own=False, empirical=empirical, modules=modules, batch=sizes.peer_batch
    )
    return lambda queries: scorer(queries, DAMPING)


PEER = "kronfluence EKFAC"
CONTESTANTS: dict[str, Contestant] = {
    "EKFAC": partial(ours, fk.SampledFisher, "ekfac"),
    PEER: partial(theirs, "ekfac", False),
    "full, EF": partial(ours, fk.EmpiricalFisher, "full"),
}
"""Who is timed. With EKFAC both draw one label an example."""

TARGETS = {"EKFAC": 3.0, "full, EF": 1.0}
"""The peer's seconds over ours, fit and scores together, at least."""

COMPARED: dict[str, Contestant] = {
    "EKFAC, observed labels": partial(ours, fk.EmpiricalFisher, "ekfac"),
    "kronfluence EKFAC, observed labels": partial(theirs, "ekfac", True),
}
AGREEMENT = 1e-3
"""The largest relative difference between the two: eigenvectors of close eigenvalues are known to float32 alone."""


INSTALL = {
    "kronfluence": "not installed: pip install --no-deps -r requirements-bench.txt",
    "bergson": "not installed: pip install --no-deps -r requirements-bergson.txt",
}
"""By peer, what a run says that has not got it."""


def _starts(train: Pair, batch: int) -> range:
    return range(0, len(train[1]), batch)


def data(workload: Workload, count: int, seed: int) -> Pair:
    """Random examples of a workload's form."""
    generator = torch.Generator().manual_seed(seed)
    device, classes = workload.inputs.device, int(workload.targets.max()) + 1
    inputs = torch.randn(count, *workload.inputs.shape[1:], generator=generator)
    return inputs.to(device), torch.randint(classes, (count,), generator=generator).to(device)


def correlation(found: Tensor, expected: Tensor) -> float:
    """Of scores over the training examples, averaged over queries."""
    x, y = (scores.double() - scores.double().mean(1, keepdim=True) for scores in (found, expected))
    return float(torch.nn.functional.cosine_similarity(x, y, dim=1).mean())


def missing() -> list[str]:
    """Peers that are not installed."""
    return [library for library in INSTALL if importlib.util.find_spec(library) is None]


def peer_of(name: str) -> str:
    """The library that a contestant takes, "" for ours."""
    library = name.partition(" ")[0]
    return library if library in INSTALL else ""


def measure_influence(
    name: str, *, device: str, tiny: bool, rounds: int, slow: float, patience: float, folder: Path | None = None
) -> Record:
    """Seconds of fit and scores, and peak memory, of everybody in turn.

    Args:
        name: of the workload.
        device: "cpu" or "cuda".
        tiny: tiny sizes.
        rounds: how often each is run; figures are medians.
        slow: seconds; who takes longer is run once.
        patience: seconds; who takes longer is not waited for.
        folder: where scores are left; None for a temporary one.

    Raises:
        DisagreementError: kronfluence and fisherkit do not compute the same.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return measure_influence(
                name, device=device, tiny=tiny, rounds=rounds, slow=slow, patience=patience, folder=Path(made)
            )
    run = partial(_child, name, device=device, tiny=tiny, patience=patience, folder=folder)
    sizes = SMALL if tiny else SIZES[name]
    record: Record = {"workload": name, "examples": sizes.examples, "queries": sizes.queries, "damping": DAMPING}
    agreed, unable = peer_checked("kronfluence", lambda: _check(name, partial(run, patience=None), folder))
    found, errors = in_turn(CONTESTANTS, run, unable, rounds=rounds, slow=slow, patience=patience)
    return record | agreed | _judged(found, errors, folder)


def peer_checked(library: str, check: Callable[[], float]) -> tuple[Record, dict[str, str]]:
    """The peer with the difference that a check finds, and by library why it cannot take part, if it cannot.

    Raises:
        DisagreementError: from the check.
    """
    if library in missing():
        return {}, {library: INSTALL[library]}
    record: Record = {"peer": f"{library} {importlib.metadata.version(library)}"}
    try:
        return record | {"difference": check()}, {}
    except DisagreementError:
        raise
    except RuntimeError as error:
        return record, {library: _last_line(error)}


def in_turn(
    contestants: Iterable[str], run: Callable[[str], Record], unable: Mapping[str, str], *, rounds: int, slow: float,
    patience: float,
) -> tuple[dict[str, list[Record]], dict[str, str]]:  # fmt: skip
    """What everybody's processes say, round after round, and why some do not take part.

    Args:
        contestants: by name.
        run: makes such a process.
        unable: peers that cannot take part, and why.
        rounds: how often each is run.
        slow: seconds; who takes longer is run once.
        patience: seconds after which ``run`` ends a process.
    """
    found: dict[str, list[Record]] = {contestant: [] for contestant in contestants}
    errors = {name: unable[peer_of(name)] for name in found if peer_of(name) in unable}
    for number in range(rounds):
        for contestant, runs in found.items():
            if contestant in errors or (number and _total(runs[0]) > slow):
                continue
            try:
                runs.append(run(contestant))
            except subprocess.TimeoutExpired:
                errors[contestant] = f"not done after {patience:g} s"
            except RuntimeError as error:
                errors[contestant] = _last_line(error)
    return {name: runs for name, runs in found.items() if runs and name not in errors}, errors


def middle(runs: Sequence[Record]) -> Record:
    """Medians of a contestant's figures, and how many they are of."""
    medians: Record = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return medians | {"total": statistics.median(map(_total, runs)), "rounds": len(runs)}


def _total(run: Record) -> float:
    seconds: float = run["fit"] + run.get("score", 0.0)
    return seconds


def _last_line(error: Exception) -> str:
    return str(error).splitlines()[-1][:200]


def _judged(found: Mapping[str, list[Record]], errors: Mapping[str, str], folder: Path) -> Record:
    medians = {name: middle(runs) for name, runs in found.items()}
    best = medians.get(PEER, {}).get("total")
    mine = [name for name in medians if not peer_of(name)]
    ratios = {name: best / medians[name]["total"] for name in mine} if best else {}
    scores = {name: load_file(_file(folder, name))["scores"] for name in found}
    return {
        "seconds": medians, "errors": dict(errors), "ratios": ratios,
        "correlations": {name: correlation(scores[name], scores[PEER]) for name in mine} if best else {},
        "targets": {name: TARGETS[name] for name in ratios if name in TARGETS},
        "met": {name: ratios[name] >= TARGETS[name] for name in ratios if name in TARGETS},
    }  # fmt: skip


def _check(workload: str, run: Callable[[str], Record], folder: Path) -> float:
    """The relative difference of both libraries' scores from observed labels."""
    for name in COMPARED:
        run(name)
    found, expected = (load_file(_file(folder, name))["scores"].double() for name in COMPARED)
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= AGREEMENT:
        raise DisagreementError(f"{workload}, influence: kronfluence's EKFAC scores differ by {difference:.2e}")
    return difference


def _child(name: str, contestant: str, *, device: str, tiny: bool, patience: float | None, folder: Path) -> Record:
    arguments = [name, contestant, "--device", device, "--scores", str(_file(folder, contestant))]
    return run_module(
        "examples.benchmarks.influence", [*arguments, *(["--tiny"] if tiny else [])], {}, patience=patience
    )


def _file(folder: Path, contestant: str) -> Path:
    return folder / f"{contestant.replace(', ', '-').replace(' ', '-')}.safetensors"


def main() -> None:
    """The process of its own: print seconds and peak as JSON, leave the scores in a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=list(SIZES))
    parser.add_argument("contestant", choices=[*CONTESTANTS, *COMPARED])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scores", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compared = options.contestant in COMPARED
    contestant = {**CONTESTANTS, **COMPARED}[options.contestant]
    sizes = SMALL if options.tiny else (CHECKED if compared else SIZES)[options.workload]
    _once(contestant, TINY[options.workload]().to(options.device), SMALL)
    workload = (TINY if options.tiny else FULL)[options.workload]().to(options.device)
    figures, scores = _once(contestant, workload, sizes)
    save_file({"scores": scores.cpu().contiguous()}, options.scores)
    print(json.dumps(figures))


def _once(contestant: Contestant, workload: Workload, sizes: Sizes) -> tuple[Record, Tensor]:
    train, queries = data(workload, sizes.examples, 1), data(workload, sizes.queries, 2)
    clock, peak = Clock(workload.inputs.device), Peak(workload.inputs.device.type)
    fit, scorer = clock.once(lambda: contestant(workload, train, sizes))
    score, scores = clock.once(lambda: scorer(queries))
    return {"fit": fit, "score": score, "peak": peak.bytes()}, scores


if __name__ == "__main__":
    main()
