"""Fits to a small language model, a diagonal, kfac and ekfac, and stored rows: tokens a second and peak memory.

Everybody runs in a process of its own, which measures seconds and the most memory beyond model and data. What is fitted
is the weights and biases of the blocks' linear layers, with one drawn label a position, as the peers, kronfluence and
bergson, draw it. Other draws give other numbers: that all compute the same is asserted before, with the observed
labels, of products with a fixed vector. Run as a module, this file is such a process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fisherkit as fk
from examples.benchmarks.contestants import DisagreementError
from examples.benchmarks.influence import AGREEMENT, in_turn, middle, peer_checked, peer_of
from examples.benchmarks.measure import Record
from examples.benchmarks.memory import Peak, run_module, train
from examples.benchmarks.peer_bergson import Bergson
from examples.benchmarks.timing import Clock
from examples.benchmarks.workloads import Decoder, Workload
from examples.influence import kronfluence_peer
from fisherkit.memory import available_memory


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the model and of its data.

    Args:
        layers: blocks.
        width: of the residual stream.
        heads: of attention.
        vocabulary: C.
        positions: T.
        sequences: N.
        batch: sequences in a training step, and in a batch of everybody's.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    sequences: int
    batch: int = 8

    def workload(self, sequences: int) -> Workload:
        """The model, untrained, with so many random sequences."""
        torch.manual_seed(0)
        model = Decoder(self.vocabulary, self.width, self.heads, self.layers, self.positions).eval()
        shape = (sequences, self.positions)
        title = f"decoder, {self.layers} blocks, width {self.width}, vocabulary {self.vocabulary:,}"
        tokens, labels = torch.randint(self.vocabulary, shape), torch.randint(self.vocabulary, shape)
        return Workload("language model", title, model, tokens, labels, attention=True)


SIZES = {
    "full": Size(layers=6, width=384, heads=6, vocabulary=8192, positions=128, sequences=200),
    "small": Size(layers=2, width=128, heads=2, vocabulary=1024, positions=64, sequences=48),
    "tiny": Size(layers=1, width=16, heads=2, vocabulary=40, positions=6, sequences=6, batch=3),
}
"""By name; the first is what is reported."""

Directions = dict[str, Tensor]
"""By layer, in the form of a weight with its bias as one more column, ``[O, I + 1]``."""
Product = Callable[[Directions], Directions]
Contestant = Callable[[Workload, int], Callable[[], Product]]
"""Workload and batch to a fit, which gives the product with what was fitted."""


def steps(workload: Workload, batch: int) -> Callable[[], Product]:
    """Plain training steps over all sequences."""
    pieces = zip(workload.inputs.split(batch), workload.targets.split(batch), strict=True)
    batches = [dataclasses.replace(workload, inputs=x, targets=y) for x, y in pieces]

    def fit() -> Product:
        for some in batches:
            train(some)
        return lambda directions: directions

    return fit


def ours(structure: str, observed: bool, workload: Workload, batch: int, keep: bool = False) -> Callable[[], Product]:
    """What a user of fisherkit writes.

    Args:
        structure: by name.
        observed: labels instead of drawn ones.
        workload: the model with all sequences.
        batch: sequences in a batch.
        keep: a ``memory_budget`` of half of what is available, in which ekfac keeps rows for its second pass; else the
            default, with which it keeps few, and makes them again where they are more.
    """
    batches = list(zip(workload.inputs.split(batch), workload.targets.split(batch), strict=True))
    budget = available_memory(workload.inputs.device) // 2 if keep else None

    def fit() -> Product:
        fisher = fk.FisherApproximation(
            workload.model, batches, "ef" if observed else "sf", structure=structure, params=workload.layered,
            memory_budget=budget,
        )  # fmt: skip
        return partial(_multiplied, fisher)

    return fit


def _multiplied(fisher: fk.FisherOperator, directions: Directions) -> Directions:
    parts = {}
    for layer, v in directions.items():
        parts[f"{layer}.weight"], parts[f"{layer}.bias"] = v[:, :-1], v[:, -1]
    space = fisher.space
    flat = torch.cat([parts[name].flatten() for name in space.names]).to(fisher.device)
    found = dict(zip(space.names, (fisher @ flat).cpu().split(list(space.sizes)), strict=True))
    return {
        layer: torch.cat([found[f"{layer}.weight"].view(len(v), -1), found[f"{layer}.bias"].unsqueeze(1)], 1)
        for layer, v in directions.items()
    }


def rows(workload: Workload, batch: int) -> Callable[[], Product]:
    """A kfac Fisher of fisherkit, then every sequence's row, compressed to `WIDTH` eigenvectors a side, in files."""
    batches = list(zip(workload.inputs.split(batch), workload.targets.split(batch), strict=True))
    folder = tempfile.TemporaryDirectory()

    def fit() -> Product:
        fisher = fk.SampledFisher(workload.model, batches, structure="kfac", params=workload.layered)
        scores = fk.influence.InfluenceScores(fisher, workload.model, damping=fk.RelativeDamping(1.0))
        scores.prepare(batches, folder=Path(folder.name) / "rows", compress=WIDTH, checked=CHECKED)
        return partial(_multiplied, fisher)

    return fit


def theirs(structure: str, observed: bool, workload: Workload, batch: int) -> Callable[[], Product]:
    """What a user of kronfluence writes; of kfac the factors alone, without their eigenvectors."""
    layers = sorted({name.rpartition(".")[0] for name in workload.layered})
    analyzer = kronfluence_peer.prepared(workload.model, layers, workload.inputs.device.type)
    method = analyzer.fit_covariance_matrices if structure == "kfac" else analyzer.fit_all_factors
    run = partial(kronfluence_peer.fit, method, strategy=structure, empirical=observed, batch=batch)

    def fit() -> Product:
        run(workload.data)
        return partial(PRODUCTS[structure], analyzer, workload)

    return fit


def bergson(structure: str, observed: bool, workload: Workload, batch: int) -> Callable[[], Product]:
    """What a user of bergson writes; of kfac the factors alone, without their eigenvectors."""
    peer = Bergson(workload.model, workload.inputs, workload.targets, batch)
    n, positions = workload.examples, workload.targets.numel()

    def kfac() -> Product:
        found = peer.factors(corrected=False, empirical=observed)
        a, g = found["a"], found["g"]
        return lambda directions: {k: g[k] @ v @ a[k] / (n * positions) for k, v in directions.items()}

    def ekfac() -> Product:
        found = peer.factors(corrected=True, empirical=observed)
        a, g, values = found["a"], found["g"], found["values"]
        return lambda directions: {k: g[k] @ (values[k] * (g[k].T @ v @ a[k])) @ a[k].T for k, v in directions.items()}

    def projected() -> Product:
        peer.project(WIDTH)
        return lambda directions: directions

    return {"kfac": kfac, "ekfac": ekfac, ROWS: projected}[structure]


def _their_diagonal(analyzer: Any, workload: Workload, directions: Directions) -> Directions:
    squares = analyzer.load_lambda_matrices("factors")["lambda_matrix"]
    return {name: squares[name] * v / workload.examples for name, v in directions.items()}


def _their_kfac(analyzer: Any, workload: Workload, directions: Directions) -> Directions:
    found, n = analyzer.load_covariance_matrices("factors"), workload.examples
    a, g = found["activation_covariance"], found["gradient_covariance"]
    return {name: g[name] @ v @ a[name] / (n * workload.targets.numel()) for name, v in directions.items()}


def _their_ekfac(analyzer: Any, workload: Workload, directions: Directions) -> Directions:
    bases, squares = analyzer.load_eigendecomposition("factors"), analyzer.load_lambda_matrices("factors")
    a, g = bases["activation_eigenvectors"], bases["gradient_eigenvectors"]
    return {
        name: g[name] @ (squares["lambda_matrix"][name] * (g[name].T @ v @ a[name])) @ a[name].T / workload.examples
        for name, v in directions.items()
    }


PRODUCTS = {"diagonal": _their_diagonal, "kfac": _their_kfac, "ekfac": _their_ekfac}
STEP, KEPT, ROWS = "training step", "ekfac, rows kept", "stored rows"
PEER, BERGSON = "kronfluence ", "bergson "
PEERS = {PEER: tuple(PRODUCTS), BERGSON: ("kfac", "ekfac")}
"""Whose products are compared with ours, and of what."""
CONTESTANTS = (
    STEP, "diagonal", PEER + "diagonal", "kfac", PEER + "kfac", BERGSON + "kfac", "ekfac", KEPT, PEER + "ekfac",
    BERGSON + "ekfac", ROWS, BERGSON + ROWS,
)  # fmt: skip
WIDTH = 16
"""Of a stored row, 16 × 16 numbers a layer: of ours in the eigenbasis, of the peer's by random projections."""
CHECKED = 8
"""Sequences whose whole rows tell what ours lose: the default, 64, is more than the data are worth."""
TARGETS = {"diagonal": 1.8, "kfac": 1.9, "ekfac": 2.0}
"""kronfluence's seconds over ours, at least; bergson's at least 1."""
MOST_MEMORY = 1.3
"""Our peak over that of a training step, at most."""


def contestant(name: str, observed: bool) -> Contestant:
    """By name; with the observed labels or with drawn ones."""
    if name == STEP:
        return steps
    if name == ROWS:
        return rows
    if library := peer_of(name):
        made = theirs if library == PEER.strip() else bergson
        return partial(made, name.partition(" ")[2], observed)
    return partial(ours, name.partition(",")[0], observed, keep=name == KEPT)


def measure_language(
    size: str, *, device: str, rounds: int, slow: float, patience: float, folder: Path | None = None
) -> Record:
    """Tokens a second and peak memory of everybody in turn.

    Args:
        size: of `SIZES`.
        device: "cpu" or "cuda".
        rounds: how often each is run; figures are medians.
        slow: seconds; who takes longer is run once.
        patience: seconds; who takes longer is not waited for.
        folder: where products are left; None for a temporary one.

    Raises:
        DisagreementError: a peer and fisherkit do not compute the same.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return measure_language(size, device=device, rounds=rounds, slow=slow, patience=patience, folder=Path(made))
    run = partial(_child, size, device=device)
    agreed: list[Record] = []
    unable: dict[str, str] = {}
    for peer, structures in PEERS.items():
        check = partial(_check, peer, structures, run, folder)
        record, why = peer_checked(peer.strip(), check)
        agreed += [record] if record else []
        unable |= why
    found, errors = in_turn(
        CONTESTANTS, partial(run, patience=patience), unable, rounds=rounds, slow=slow, patience=patience
    )
    its = SIZES[size]
    figures = judged(its, found)
    return {"size": size, **dataclasses.asdict(its), "peers": agreed, "errors": errors, "figures": figures}


def judged(size: Size, found: Mapping[str, list[Record]]) -> dict[str, Record]:
    """Medians by contestant, beside the peers' and a training step's."""
    figures = {name: middle(runs) for name, runs in found.items()}
    for name, own in figures.items():
        own["tokens"] = size.sequences * size.positions / own["fit"]
        if STEP in figures:
            own["steps"] = own["peak"] / max(1, figures[STEP]["peak"])
        structure = name.partition(",")[0]
        if BERGSON + structure in figures:
            own["bergson"] = figures[BERGSON + structure]["fit"] / own["fit"]
        if structure in TARGETS and PEER + structure in figures:
            peer = figures[PEER + structure]
            own |= {"speed": peer["fit"] / own["fit"], "memory": own["peak"] / max(1, peer["peak"])}
            own |= {"target": TARGETS[structure], "most_steps": MOST_MEMORY}
            fast = own["speed"] >= TARGETS[structure] and own.get("bergson", 1) >= 1
            own["met"] = fast and own.get("steps", 0) <= MOST_MEMORY
    return figures


def _check(peer: str, structures: Iterable[str], run: Callable[..., Record], folder: Path) -> float:
    """The largest difference over structures and layers, relative, of a peer's and our products of observed labels."""
    found = 0.0
    for structure in structures:
        files = [folder / f"{name}.safetensors" for name in (structure, peer + structure)]
        for name, file in zip((structure, peer + structure), files, strict=True):
            if not file.exists():
                run(name, products=file)
        found = max(found, disagreement(peer + structure, *map(load_file, files)))
    return found


def disagreement(whose: str, found: Directions, expected: Directions) -> float:
    """The largest relative difference over layers.

    Args:
        whose: the peer and the structure.
        found: ours.
        expected: the peer's.

    Raises:
        DisagreementError: it is too large.
    """
    largest = max(float((found[name] - v).norm() / v.norm()) for name, v in expected.items())
    if not largest <= AGREEMENT:
        raise DisagreementError(f"language model: {whose} differs by {largest:.2e}")
    return largest


def _child(size: str, name: str, *, device: str, patience: float | None = None, products: Path | None = None) -> Record:
    arguments = [size, name, "--device", device, *([] if products is None else ["--products", str(products)])]
    return run_module("examples.benchmarks.language", arguments, {}, patience=patience)


def main() -> None:
    """The process of its own: print seconds and peak as JSON; if asked, leave products from observed labels."""
    parser = argparse.ArgumentParser()
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--products", type=Path, help="compare: two batches, observed labels")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    made, size = contestant(options.contestant, options.products is not None), SIZES[options.size]
    once(made, SIZES["tiny"], SIZES["tiny"].sequences, options.device)
    sequences = size.sequences if options.products is None else min(size.sequences, 2 * size.batch)
    figures, product = once(made, size, sequences, options.device)
    if options.products is not None:
        products = product(directions(size))
        save_file({name: found.cpu().contiguous() for name, found in products.items()}, options.products)
    print(json.dumps(figures))


def directions(size: Size) -> Directions:
    """Random numbers in the form of each fitted layer's weight and bias."""
    workload, generator = size.workload(1), torch.Generator().manual_seed(0)
    found = {}
    for name in workload.layered:
        layer, _, kind = name.rpartition(".")
        if kind == "weight":
            outputs, inputs = workload.model.get_parameter(name).shape
            found[layer] = torch.randn(outputs, inputs + 1, generator=generator)
    return found


def once(made: Contestant, size: Size, sequences: int, device: str) -> tuple[Record, Product]:
    """Seconds and peak of one fit, which is prepared before."""
    workload = size.workload(sequences).to(device)
    fit = made(workload, size.batch)
    clock, peak = Clock(workload.inputs.device), Peak(device)
    seconds, product = clock.once(fit)
    return {"fit": seconds, "peak": peak.bytes()}, product


if __name__ == "__main__":
    main()
