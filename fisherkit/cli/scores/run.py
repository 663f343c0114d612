"""The work behind ``fisherkit scores``: the model, its Fisher, the scores, and the files that are written.

Owns the order of things and what is refused before the work begins. The numbers are `InfluenceScores`'.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from torch import Tensor

from fisherkit import io
from fisherkit._version import __version__
from fisherkit.cli.checks import as_dtype, check_choice, check_device, check_likelihood
from fisherkit.cli.command import make_folder
from fisherkit.cli.estimate import check_fisher_file, selection
from fisherkit.cli.factories import load_likelihood
from fisherkit.cli.scores.describe import Describer, subset
from fisherkit.cli.scores.page import page
from fisherkit.cli.scores.result import Computed, Query, Result, Scored
from fisherkit.cli.scores.sources import Subject, TextOptions, of_folder, of_function
from fisherkit.cli.scores.table import as_text
from fisherkit.data import Source
from fisherkit.errors import InvalidArgumentError
from fisherkit.fisher import STRUCTURES
from fisherkit.influence import InfluenceScores
from fisherkit.kind_specs import KindSpec, spelled
from fisherkit.operators import Damping, FisherOperator, RelativeDamping, load, usual_damping

CALL = "fisherkit scores"
FILES = "scores.html", "scores.json"
KIND, STRUCTURE = "truncated:2", "ekfac"


@dataclass(frozen=True)
class ScoresSettings:
    """The command's options.

    Args:
        model: a Hugging Face folder, or "package.module:function".
        texts: for a folder.
        fisher: a file; None to build one.
        kind: of the one that is built, as `KindSpec` spells it; None for `KIND`.
        structure: of it; None for `STRUCTURE`.
        params: patterns of its parameters' names; none for all that require grad.
        save_fisher: where to write it.
        likelihood: by name; None for the Fisher file's, or that of the model's own loss.
        damping: a multiple of the mean eigenvalue, or λ itself; None for the structure's `usual_damping`.
        absolute_damping: whether it is λ itself.
        measurement: "loss" or "margin".
        normalize: None or "relatif".
        top: how many helpful and how many harmful examples a query.
        worst: only so many queries, those of the largest loss; None for all.
        own: how many training examples of the largest self-influence.
        device: where the model runs.
        seed: of drawn texts and sampled labels.
        out: folder of the files; None to write none.
        overwrite: replace files that are there.
        as_json: print one JSON object.
    """

    model: str
    texts: TextOptions
    fisher: Path | None
    kind: str | None
    structure: str | None
    params: tuple[str, ...]
    save_fisher: Path | None
    likelihood: str | None
    damping: float | None
    absolute_damping: bool
    measurement: str
    normalize: str | None
    top: int
    worst: int | None
    own: int
    device: str
    seed: int
    out: Path | None
    overwrite: bool
    as_json: bool


def run(settings: ScoresSettings) -> None:
    """Compute, print, write; what can be wrong with the options is found out before the model is loaded."""
    kind = _check(settings)
    if settings.out is not None:
        make_folder(settings.out, FILES, CALL, overwrite=settings.overwrite)
    found = _result(settings, kind, _subject(settings))
    text = json.dumps(found.to_dict(), indent=1, ensure_ascii=False)
    typer.echo(text if settings.as_json else as_text(found))
    if settings.out is not None:
        paths = [settings.out / name for name in FILES]
        io.replace_text(paths[0], page(found))
        io.replace_text(paths[1], text + "\n")
        typer.echo(f"\nWrote {paths[0]} and {paths[1]}.", err=settings.as_json)


def _check(settings: ScoresSettings) -> KindSpec:
    """Refuse options that are none or do not go together."""
    kind = KindSpec.parse(settings.kind or KIND, call=CALL)
    check_choice(CALL, "--structure", settings.structure, STRUCTURES)
    check_choice(CALL, "--measurement", settings.measurement, ("loss", "margin"))
    check_choice(CALL, "--normalize", settings.normalize, ("relatif",))
    check_likelihood(CALL, settings.likelihood)
    check_device(CALL, settings.device)
    as_dtype(CALL, settings.texts.dtype)
    if settings.fisher is not None:
        given = {
            "--kind": settings.kind, "--structure": settings.structure, "--params": settings.params or None,
            "--save-fisher": settings.save_fisher,
        }  # fmt: skip
        beside = [name for name in given if given[name] is not None]
        if beside:
            raise InvalidArgumentError(
                call=CALL, got=f"{', '.join(beside)} beside --fisher", expected="--fisher alone",
                why="they are of a Fisher that is built",
            )  # fmt: skip
    if settings.absolute_damping and settings.damping is None:
        raise InvalidArgumentError(
            call=CALL, got="--absolute-damping without --damping", expected="λ itself", try_="--damping 1e-3"
        )
    if settings.damping is not None:
        RelativeDamping(settings.damping)  # refuses what no λ can be
    if settings.save_fisher is not None:
        check_fisher_file(settings.save_fisher, f"{CALL} --save-fisher", overwrite=settings.overwrite)
    return kind


def _subject(settings: ScoresSettings) -> Subject:
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
        subject.model, subject.train, seed=settings.seed,
        likelihood=load_likelihood(settings.likelihood or subject.likelihood, CALL),
        structure=settings.structure or STRUCTURE, params=selection(subject.model, settings.params, CALL),
        progress=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if settings.save_fisher is not None:
        fisher.save(settings.save_fisher)
    return fisher, seconds


def _result(settings: ScoresSettings, kind: KindSpec, subject: Subject) -> Result:
    fisher, fisher_seconds = _fisher(settings, kind, subject)
    known = fisher.metadata.get("likelihood") if settings.fisher is not None else None
    likelihood = load_likelihood(settings.likelihood or known or subject.likelihood, CALL)
    start = time.perf_counter()
    damping = _damping(settings, fisher)
    influence = InfluenceScores(fisher, subject.model, likelihood=likelihood, progress=True, damping=damping)
    describer = Describer(subject.model, likelihood, subject.classes, subject.show, subject.place, CALL)
    train, queries = (Source(data, subject.model).count() for data in (subject.train, subject.queries))
    order = _order(settings, subject, describer, queries)
    scored, own = _scored(settings, subject, describer, influence, sorted(order), train)
    seconds = time.perf_counter() - start
    computed = Computed(
        model=subject.name, kind=spelled(fisher.metadata) if settings.fisher is not None else kind.text,
        structure=fisher.metadata.get("structure", type(fisher).__name__),
        likelihood=likelihood.recorded, measurement=settings.measurement, normalize=settings.normalize,
        relative_damping=damping.scale if isinstance(damping, RelativeDamping) else None,
        damping=float(influence.damping),
        examples=influence.examples, parameters=fisher.size, train=train, queries=queries,
        fisher_seconds=fisher_seconds, score_seconds=seconds,
        fisher_file=None if settings.fisher is None else str(settings.fisher),
        versions={"fisherkit": __version__, "torch": torch.__version__, "python": platform.python_version()},
    )  # fmt: skip
    notes = _notes(computed, fisher, shown=len(order))
    return Result(computed, tuple(scored[i] for i in order), own, notes)


def _damping(settings: ScoresSettings, fisher: FisherOperator) -> Damping:
    if settings.damping is None:
        return usual_damping(fisher)
    return settings.damping if settings.absolute_damping else RelativeDamping(settings.damping)


def _order(settings: ScoresSettings, subject: Subject, describer: Describer, count: int) -> list[int]:
    """The queries that are shown: all, or the ones with the largest loss first."""
    if settings.worst is None:
        return list(range(count))
    losses = describer.losses(subject.queries)
    return sorted(range(count), key=lambda i: -losses[i])[: settings.worst]


def _scored(
    settings: ScoresSettings,
    subject: Subject,
    describer: Describer,
    influence: InfluenceScores,
    kept: list[int],
    count: int,
) -> tuple[dict[int, Query], tuple[Scored, ...]]:
    """The queries by their place in the data, and the largest self-influences."""
    top = influence.top(
        subset(subject.queries, kept, subject.model), subject.train, min(settings.top, count),
        measurement=settings.measurement, normalize=settings.normalize,
    )  # fmt: skip
    own: list[tuple[float, int]] = []
    if settings.own:
        found = influence.self_influence(subject.train).sort(descending=True, stable=True)
        own = _pairs(found.values[: settings.own], found.indices[: settings.own])
    helpful = [[p for p in _pairs(*row) if p[0] > 0] for row in zip(top.helpful, top.helpful_index, strict=True)]
    harmful = [[p for p in _pairs(*row) if p[0] < 0] for row in zip(top.harmful, top.harmful_index, strict=True)]
    wanted = {index for pairs in (*helpful, *harmful, own) for _, index in pairs}
    train = describer.examples("train", subject.train, wanted)
    queries = describer.examples("queries", subject.queries, kept)

    def scored(pairs: list[tuple[float, int]]) -> tuple[Scored, ...]:
        return tuple(Scored(score, train[index]) for score, index in pairs)

    rows = zip(kept, helpful, harmful, strict=True)
    return {i: Query(queries[i], scored(good), scored(bad)) for i, good, bad in rows}, scored(own)


def _pairs(values: Tensor, places: Tensor) -> list[tuple[float, int]]:
    return list(zip(values.tolist(), places.tolist(), strict=True))


def _notes(computed: Computed, fisher: FisherOperator, *, shown: int) -> tuple[str, ...]:
    notes: list[str] = []
    if shown < computed.queries:
        notes.append(f"Of {computed.queries:,} queries the {shown:,} with the largest loss are shown.")
    if computed.examples != computed.train:
        notes.append(f"The Fisher was measured on N = {computed.examples:,} examples; {computed.train:,} were scored.")
    if "parameters_hash" not in fisher.metadata:
        notes.append("The Fisher does not say at which weights it was measured; other weights would go unnoticed.")
    if fisher.metadata.get("kind") == "ief":
        notes.append("The iEF matrix is not on the Fisher's scale: scores rank, and their unit is not the loss's.")
    return tuple(notes)
