"""The work behind ``fisherkit scores``: the model, its Fisher, the scores, and the files that are written.

Owns the order of things and what is refused before the work begins. The numbers are `InfluenceScores`'.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from torch import Tensor

from fisherkit import io
from fisherkit._version import __version__
from fisherkit.cli.estimate import selection
from fisherkit.cli.scores.describe import Describer, subset
from fisherkit.cli.scores.page import page
from fisherkit.cli.scores.result import Computed, Query, Result, Scored
from fisherkit.cli.scores.sources import Subject, TextOptions, of_demo, of_folder, of_function
from fisherkit.cli.scores.table import as_text
from fisherkit.data import Source
from fisherkit.errors import InvalidArgumentError
from fisherkit.evaluation.kind_specs import SGD, KindSpec
from fisherkit.fisher import STRUCTURES
from fisherkit.influence import InfluenceScores
from fisherkit.operators import FisherOperator, RelativeDamping, load

CALL = "fisherkit scores"
KIND, STRUCTURE = "truncated:2", "ekfac"
DEMO_QUERIES, DEMO_SELF = 8, 12
"""The demo's --worst and --self where they are not given."""


@dataclass(frozen=True)
class ScoresSettings:
    """The command's options.

    Args:
        model: a Hugging Face folder, "package.module:function", or None for the demo.
        texts: for a folder.
        fisher: a file; None to build one.
        kind: of the one that is built, as `KindSpec` spells it; None for `KIND`.
        structure: of it; None for `STRUCTURE`.
        params: patterns of its parameters' names; none for all that require grad.
        save_fisher: where to write it.
        likelihood: by name; None for the Fisher file's, or that of the model's own loss.
        damping: a multiple of the mean eigenvalue, or λ itself.
        absolute_damping: whether it is λ itself.
        measurement: "loss" or "margin".
        normalize: None or "relatif".
        top: how many helpful and how many harmful examples a query.
        worst: only so many queries, those of the largest loss; None for all.
        own: how many training examples of the largest self-influence.
        device: where the model runs.
        seed: of drawn texts, sampled labels and the demo.
        out: folder of the files; None to write none.
        as_json: print one JSON object.
    """

    model: str | None
    texts: TextOptions
    fisher: Path | None
    kind: str | None
    structure: str | None
    params: tuple[str, ...]
    save_fisher: Path | None
    likelihood: str | None
    damping: float
    absolute_damping: bool
    measurement: str
    normalize: str | None
    top: int
    worst: int | None
    own: int | None
    device: str
    seed: int
    out: Path | None
    as_json: bool


def run(settings: ScoresSettings) -> None:
    """Compute, print, write; what can be wrong with the options is found out before the model is loaded."""
    kind = _check(settings)
    if settings.out is not None:
        settings.out.mkdir(parents=True, exist_ok=True)
    found = _result(settings, kind, _subject(settings))
    text = json.dumps(found.to_dict(), indent=1, ensure_ascii=False)
    typer.echo(text if settings.as_json else as_text(found))
    if settings.out is not None:
        paths = settings.out / "scores.html", settings.out / "scores.json"
        io.replace_text(paths[0], page(found))
        io.replace_text(paths[1], text + "\n")
        typer.echo(f"\nWrote {paths[0]} and {paths[1]}.", err=settings.as_json)


def _check(settings: ScoresSettings) -> KindSpec:
    """Refuse options that are none or do not go together."""
    kind = KindSpec.parse(settings.kind or KIND, draws=1, call=CALL)
    if kind.name == SGD:
        raise InvalidArgumentError(call=CALL, got="--kind sgd", expected="a kind of Fisher matrix")
    allowed: tuple[tuple[str, str | None, tuple[str | None, ...]], ...] = (
        ("--structure", settings.structure, (None, *STRUCTURES)),
        ("--measurement", settings.measurement, ("loss", "margin")),
        ("--normalize", settings.normalize, (None, "relatif")),
    )
    for name, value, values in allowed:
        if value not in values:
            words = ", ".join(repr(v) for v in values if v is not None)
            raise InvalidArgumentError(call=CALL, got=f"{name} {value!r}", expected=f"one of {words}")
    if settings.fisher is not None:
        built = {
            "--kind": settings.kind, "--structure": settings.structure, "--params": settings.params or None,
            "--save-fisher": settings.save_fisher,
        }  # fmt: skip
        for name, value in built.items():
            if value is not None:
                raise InvalidArgumentError(
                    call=CALL, got=f"{name} beside --fisher", expected="one of them", why="the file's Fisher is built"
                )
    if settings.save_fisher is not None:
        io.check_folder(settings.save_fisher, f"{CALL} --save-fisher")
    return kind


def _subject(settings: ScoresSettings) -> Subject:
    if settings.model is None:
        return of_demo(settings.texts, seed=settings.seed, call=CALL)
    folder = Path(settings.model)
    if folder.is_dir():
        return of_folder(folder, settings.texts, device=settings.device, seed=settings.seed, call=CALL)
    return of_function(settings.model, settings.texts, device=settings.device, call=CALL)


def _fisher(settings: ScoresSettings, kind: KindSpec, subject: Subject) -> tuple[FisherOperator, float | None]:
    """The Fisher, and the seconds it took."""
    device = next(subject.model.parameters()).device
    if settings.fisher is not None:
        return load(settings.fisher, device=device), None
    start = time.perf_counter()
    fisher = kind.build(
        subject.model, subject.train, seed=settings.seed, likelihood=settings.likelihood or subject.likelihood,
        structure=settings.structure or STRUCTURE, params=selection(subject.model, settings.params, CALL),
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if settings.save_fisher is not None:
        fisher.save(settings.save_fisher)
    return fisher, seconds


def _result(settings: ScoresSettings, kind: KindSpec, subject: Subject) -> Result:
    demo = settings.model is None
    worst = DEMO_QUERIES if settings.worst is None and demo else settings.worst
    own = (DEMO_SELF if demo else 0) if settings.own is None else settings.own
    fisher, fisher_seconds = _fisher(settings, kind, subject)
    known = fisher.metadata.get("likelihood") if settings.fisher is not None else None
    likelihood = settings.likelihood or known or subject.likelihood
    describer = Describer(subject.model, likelihood, subject.classes, subject.show, subject.place, CALL)
    damping = settings.damping if settings.absolute_damping else RelativeDamping(settings.damping)
    start = time.perf_counter()
    influence = InfluenceScores(
        fisher, subject.model, likelihood=likelihood, damping=damping, progress=sys.stderr.isatty()
    )
    # Only now, because what is wrong with the model or the data is best said by those who know it.
    losses = describer.losses(subject.queries)
    order = sorted(range(len(losses)), key=lambda i: -losses[i])[:worst] if worst is not None else range(len(losses))
    kept = sorted(order)
    count = Source(subject.train).count()
    top = influence.top(
        subset(subject.queries, kept), subject.train, min(settings.top, count), measurement=settings.measurement,
        normalize=settings.normalize,
    )  # fmt: skip
    self_influence = influence.self_influence(subject.train).sort(descending=True, stable=True) if own else None
    seconds = time.perf_counter() - start
    mine = [] if self_influence is None else _pairs(self_influence.values[:own], self_influence.indices[:own])
    helpful = [[p for p in _pairs(*row) if p[0] > 0] for row in zip(top.helpful, top.helpful_index, strict=True)]
    harmful = [[p for p in _pairs(*row) if p[0] < 0] for row in zip(top.harmful, top.harmful_index, strict=True)]
    wanted = {index for pairs in (*helpful, *harmful, mine) for _, index in pairs}
    train = describer.examples("train", subject.train, wanted)
    queries = describer.examples("queries", subject.queries, kept)

    def scored(pairs: list[tuple[float, int]]) -> tuple[Scored, ...]:
        return tuple(Scored(score, train[index]) for score, index in pairs)

    neighbours = {i: (scored(h), scored(b)) for i, h, b in zip(kept, helpful, harmful, strict=True)}
    computed = Computed(
        model=subject.name, kind=_kind_name(fisher, kind, settings), structure=_structure(fisher),
        likelihood=likelihood, measurement=settings.measurement, normalize=settings.normalize,
        relative_damping=None if settings.absolute_damping else settings.damping, damping=float(influence.damping),
        examples=influence.examples, parameters=fisher.size, train=count, queries=len(losses),
        fisher_seconds=fisher_seconds, score_seconds=seconds,
        fisher_file=None if settings.fisher is None else str(settings.fisher),
        versions={"fisherkit": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )  # fmt: skip
    return Result(
        computed,
        tuple(Query(queries[i], *neighbours[i]) for i in order),
        scored(mine),
        _notes(computed, fisher, subject, shown=len(kept)),
    )


def _pairs(values: Tensor, places: Tensor) -> list[tuple[float, int]]:
    return list(zip(values.tolist(), places.tolist(), strict=True))


def _kind_name(fisher: FisherOperator, kind: KindSpec, settings: ScoresSettings) -> str:
    return kind.text if settings.fisher is None else fisher.metadata.get("kind", "unknown")


def _structure(fisher: FisherOperator) -> str:
    return fisher.metadata.get("structure", type(fisher).__name__)


def _notes(computed: Computed, fisher: FisherOperator, subject: Subject, *, shown: int) -> tuple[str, ...]:
    notes = list(subject.about)
    if shown < computed.queries:
        notes.append(f"Of {computed.queries:,} queries the {shown:,} with the largest loss are shown.")
    if computed.examples != computed.train:
        notes.append(
            f"The Fisher was measured on {computed.examples:,} examples and {computed.train:,} were scored: N is the first."
        )
    if "parameters_hash" not in fisher.metadata:
        notes.append("The Fisher does not say at which weights it was measured; other weights would go unnoticed.")
    if computed.kind == "ief":
        notes.append("The iEF matrix is not on the Fisher's scale: scores rank, and their unit is not the loss's.")
    return tuple(notes)
