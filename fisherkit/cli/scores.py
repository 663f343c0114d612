"""``fisherkit scores``: the training examples behind a model's predictions, as a table, as JSON or as a page to show.

Owns the command and what a person sees of an example; the numbers are `InfluenceScores`', the words `scores_report`'s.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import typer
from torch import Tensor, nn

from fisherkit import io
from fisherkit._version import __version__
from fisherkit.cli.command import given, make_folder
from fisherkit.cli.estimate import check_fisher_file
from fisherkit.cli.options import AsJson, Kind, Overwrite, Structure, argument, choice, option
from fisherkit.cli.scores_report import Example, Query, Report, data_uri, is_image
from fisherkit.cli.sources import ModelOptions, call_factory, load_likelihood
from fisherkit.data import Batch, Data, Source
from fisherkit.errors import DataError, InvalidArgumentError, InvalidTypeError
from fisherkit.fisher import FisherApproximation
from fisherkit.influence import Compression, InfluenceScores, RowBlocks, TopScores
from fisherkit.influence.compression import check_compress
from fisherkit.likelihoods import Bernoulli, Categorical, Likelihood
from fisherkit.model_inputs import is_causal
from fisherkit.operators import Damping, FisherOperator, RelativeDamping, load, open_file, usual_damping
from fisherkit.processes import Group, Processes, started
from fisherkit.processes import Share as BatchShare
from fisherkit.rows.record import refuse_train_mode
from fisherkit.structures import structure_named, structures
from fisherkit.vectors import rule_of, spelled
from fisherkit.words import number

CALL = "fisherkit scores"
FILES = "scores.html", "scores.json"


def count_or_share(text: str) -> int | float:
    """``compress=``: a count where no point was typed."""
    return int(text) if text.isdecimal() else float(text)


def compress_check(text: str) -> str:
    """What `InfluenceScores.prepare` takes."""
    try:
        check_compress(count_or_share(text), token=False)
    except (ValueError, InvalidArgumentError) as error:
        raise typer.BadParameter(f"{text!r} is neither a share above 0 and up to 1.0 nor a count from 1 on.") from error
    return text


@dataclass(frozen=True, kw_only=True)
class Scores(ModelOptions):
    """Say which training examples predictions depend on.

    For each query the most helpful and the most harmful ones. A score is (1/N) ∇ℓ_qᵀ(F + λI)⁻¹∇ℓ_n, about how much the
    query's loss would rise without the training example. The function's show(split, index) returns example number
    index of "train" or "queries" as a text, a picture (an array), a pair of both, or None. Inputs of shape
    [1 or 3, H, W] are pictures without it.

    Examples:
        fisherkit scores my-model --train train.jsonl --queries test.jsonl --out scores
        fisherkit scores my-model --train train.csv --queries test.csv --fisher f.safetensors --worst 20 --json
        fisherkit scores mymodule:make --kind exact --structure full --top 10 --self 20 --out scores
    """

    model: str = argument(
        "MODEL",
        'A Hugging Face folder, or "package.module:function" that returns (model, train, queries) or (model, '
        "train, queries, show).",
    )
    train: Path | None = option(None, "FILE", "A folder's training texts and labels: .jsonl, .csv or .tsv.")
    queries: Path | None = option(None, "FILE", "Texts and labels of the predictions to explain, likewise.")
    fisher: Path | None = option(None, "FILE", "A Fisher file of this model.", "one is built")
    kind: Kind = "truncated:2"
    structure: Structure = "ekfac"
    save_fisher: Path | None = option(None, "FILE", "Write the Fisher that is built.")
    damping: float | None = option(
        None, "λ", "A multiple of the mean eigenvalue, or λ itself with --absolute-damping.",
        "full, block: 1; kfac, ekfac: 0.1; diagonal: 0.01", min=0,
    )  # fmt: skip
    absolute_damping: bool = option(False, "", "--damping is λ itself.", name="--absolute-damping")
    measurement: str = choice("loss", "What of a query", ("loss", "margin"))
    normalize: str | None = choice(None, "Against outliers with large gradients", ("relatif",))
    top: int = option(5, "K", "Most helpful, and most harmful, for each query.", min=1)
    worst: int | None = option(None, "N", "Only the N queries with the largest loss.", "all", min=1)
    rows: Path | None = option(
        None, "FOLDER", "Keep training rows there: an interrupted run goes on from them, and other queries take them "
        "as they are.", "made anew",
    )  # fmt: skip
    compress: str | None = option(
        None, "C", "Keep of training rows what they have in each layer's leading eigenvectors: a share of its "
        "effective dimension, as 0.9, or so many on either side, as 64.", "whole rows", parser=compress_check,
    )  # fmt: skip
    most_error: float | None = option(
        None, "E", "Refuse --compress if it changes a query's scores by more, in the median.", "any", min=0
    )
    own: int = option(0, "N", "List the N largest self-influences too.", name="--self", min=0)
    out: Path | None = option(None, "FOLDER", "Write scores.html, a page to show, and scores.json there.")
    overwrite: Overwrite = False
    as_json: AsJson = False

    def run(self) -> None:
        """Compute, print, write; of several processes each takes a share of the training batches, the first writes."""
        self._check()
        if self.out is not None:
            make_folder(self.out, FILES, CALL, overwrite=self.overwrite)
        with started(self.device) as (rank, _):
            found = self._report(self._subject())
            if rank == 0:
                self._tell(found)

    def _tell(self, found: Report) -> None:
        text = found.to_json()
        if self.out is not None:
            io.replace_text(self.out / FILES[0], found.to_page())
            io.replace_text(self.out / FILES[1], text + "\n")
        typer.echo(text if self.as_json else found.to_text())  # once the files are safe: nobody may be reading
        if self.out is not None:
            typer.echo(f"\nWrote {self.out / FILES[0]} and {self.out / FILES[1]}.", err=self.as_json)

    def _check(self) -> None:
        """Refuse options that do not go together."""
        built = {"kind": "--kind", "structure": "--structure", "params": "--params", "save_fisher": "--save-fisher"}
        beside = [flag for name, flag in built.items() if name in given()]
        if self.fisher is not None and beside:
            raise InvalidArgumentError(
                CALL, f"{', '.join(beside)} beside --fisher", "--fisher alone", why="they are of a Fisher that is built"
            )
        if self.absolute_damping and self.damping is None:
            raise InvalidArgumentError(CALL, "--absolute-damping without --damping", "λ itself", try_="--damping 1e-3")
        if self.most_error is not None and self.compress is None:
            raise InvalidArgumentError(
                CALL, "--most-error without --compress", "both", why="whole rows have no such error"
            )
        if self.compress is not None:
            self._check_factors()
        if self.save_fisher is not None:
            check_fisher_file(self.save_fisher, f"{CALL} --save-fisher", overwrite=self.overwrite)
        if self.rows is not None:
            io.require_folder(self.rows.parent, f"{CALL} --rows")

    def _check_factors(self) -> None:
        """Refuse a structure whose rows cannot be compressed, as far as a name or a file's description tells."""
        name, known, instead = self.structure, structures(), "--structure"
        asked = f"{instead} {name}"
        if self.fisher is not None:
            name, instead = open_file(self.fisher).metadata.get("structure", ""), "a Fisher file of structure"
            asked = f"--fisher {self.fisher}, of structure {name}"
        if name in known and not known[name].has_eigenbases:
            others = [other for other, structure in known.items() if structure.has_eigenbases]
            raise InvalidArgumentError(
                CALL, f"--compress with {asked}, which is without Kronecker factors", "one with them",
                why="rows are compressed to the factors' eigenvectors",
                try_=f"{instead} {', '.join(others[:-1])} or {others[-1]}, or whole rows, without --compress",
            )  # fmt: skip

    def _subject(self) -> Subject:
        found = self.texts(self.model, {"--train": self.train, "--queries": self.queries}, CALL)
        if found is None:
            return _of_function(self.model, self.device)
        train, queries = found
        texts, folder = {"train": train.texts, "queries": queries.texts}, train.folder
        names = {} if folder.causal else {int(k): v for k, v in folder.config.id2label.items()}
        places = {split: [text.place for text in some] for split, some in texts.items()}

        def show(split: str, index: int) -> str:
            text = texts[split][index]
            return text.text if text.pair is None else f"{text.text}\n{text.pair}"

        return Subject(train.model, train, queries, folder.likelihood, names, show, places)

    def _fisher(self, subject: Subject, share: Share) -> tuple[FisherOperator, float | None]:
        if self.fisher is not None:
            return load(self.fisher, device=next(subject.model.parameters()).device), None
        start = time.perf_counter()
        # Whose rows each process would have a part of, each has whole.
        whole = structure_named(self.structure, CALL).keeps_rows
        fisher = FisherApproximation(
            subject.model, subject.train if whole else share.data,
            rule_of(self.kind, call=CALL).with_seed(self.seed), progress=True, structure=self.structure,
            group=False if whole else None,
            likelihood=load_likelihood(self.likelihood or subject.likelihood, CALL),
            params=self.selection(subject.model, CALL),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if self.save_fisher is not None and share.processes.rank == 0:
            fisher.save(self.save_fisher)
        return fisher, seconds

    def _report(self, subject: Subject) -> Report:
        share = subject.share()
        fisher, fisher_seconds = self._fisher(subject, share)
        known = fisher.metadata.get("likelihood") if self.fisher is not None else None
        likelihood = load_likelihood(self.likelihood or known or subject.likelihood, CALL)
        start = time.perf_counter()
        damping: Damping = usual_damping(fisher)
        if self.damping is not None:
            damping = self.damping if self.absolute_damping else RelativeDamping(self.damping)
        influence = InfluenceScores(fisher, subject.model, likelihood=likelihood, progress=True, damping=damping)
        train, count = share.examples, Source(subject.queries, subject.model).count()
        order = list(range(count))
        if self.worst is not None:
            losses = [
                loss for _, batch in subject.numbered("queries") for *_, loss in subject.outcomes(batch, likelihood)
            ]
            order = sorted(order, key=lambda i: -losses[i])[: self.worst]
        queries, own, compression = self._scored(subject, share, likelihood, influence, sorted(order))
        computed = SimpleNamespace(
            model=self.model,
            kind=self.kind if self.fisher is None else spelled(fisher.metadata),
            structure=fisher.metadata.get("structure", type(fisher).__name__),
            likelihood=likelihood.recorded, measurement=self.measurement, normalize=self.normalize,
            # a multiple of the mean eigenvalue; None if λ was given itself
            relative_damping=damping.scale if isinstance(damping, RelativeDamping) else None,
            compression=None if compression is None else vars(compression),
            damping=float(influence.damping), examples=influence.examples, parameters=fisher.size, train=train,
            queries=count, fisher_seconds=fisher_seconds, score_seconds=time.perf_counter() - start,
            fisher_file=None if self.fisher is None else str(self.fisher),
            versions={"fisherkit": __version__, "torch": torch.__version__, "python": platform.python_version()},
        )  # fmt: skip
        notes = {
            f"Of {count:,} queries the {len(order):,} with the largest loss are shown.": len(order) < count,
            f"The Fisher was measured on N = {influence.examples:,} examples; {train:,} were scored.":
                influence.examples != train,
            "The Fisher does not say at which weights it was measured; other weights would go unnoticed.":
                "parameters_hash" not in fisher.metadata,
            "The iEF matrix is not on the Fisher's scale: scores rank, and their unit is not the loss's.":
                fisher.metadata.get("kind") == "ief",
        }  # fmt: skip
        held = tuple(note for note, holds in notes.items() if holds)
        return Report(computed, tuple(queries[i] for i in order), own, held)

    def _scored(
        self, subject: Subject, share: Share, likelihood: Likelihood, influence: InfluenceScores, kept: list[int]
    ) -> tuple[dict[int, Query], tuple[Example, ...], Compression | None]:
        """The queries by their place in the data, the largest self-influences, and how rows were compressed."""
        asked = [some.raw for _, some in subject.chosen("queries", kept)]
        extremes, itself, compression = self._of_share(influence, share, asked)
        everyones = share.processes.gathered((extremes, itself))
        found = _joined([one for one, _ in everyones if one is not None], min(self.top, share.examples))
        squares = torch.cat([one for _, one in everyones])
        helpful = [[p for p in pairs if p[0] > 0] for pairs in map(_pairs, found.helpful, found.helpful_index)]
        harmful = [[p for p in pairs if p[0] < 0] for pairs in map(_pairs, found.harmful, found.harmful_index)]
        largest = squares.sort(descending=True, stable=True)
        own = _pairs(largest.values[: self.own], largest.indices[: self.own])
        train = subject.examples("train", {i for pairs in (*helpful, *harmful, own) for _, i in pairs}, likelihood)
        queries = subject.examples("queries", kept, likelihood)

        def scored(pairs: list[tuple[float, int]]) -> tuple[Example, ...]:
            return tuple(replace(train[index], score=score) for score, index in pairs)

        rows = zip(kept, helpful, harmful, strict=True)
        return {i: Query(queries[i], scored(good), scored(bad)) for i, good, bad in rows}, scored(own), compression

    def _of_share(
        self, influence: InfluenceScores, share: Share, queries: list[Any]
    ) -> tuple[TopScores | None, Tensor, Compression | None]:
        """The extremes and the self-influences of this process's training examples; None for the former of none."""
        if not share.places:
            return None, torch.empty(0, dtype=torch.float64), None
        train: Data | RowBlocks = share.data
        if self.rows is not None or self.compress is not None:
            asked: dict[str, Any] = {}
            if self.compress is not None:
                compress = count_or_share(self.compress)
                asked = {"compress": compress, "most_error": self.most_error, "queries": queries}
            train = influence.prepare(share.data, folder=self.rows, group=share.group, **asked)
        top, start = min(self.top, len(share.places)), share.places.start
        found = influence.top(queries, train, top, measurement=self.measurement, normalize=self.normalize)
        found = replace(found, helpful_index=start + found.helpful_index, harmful_index=start + found.harmful_index)
        itself = influence.self_influence(train) if self.own else torch.empty(0)
        return found, itself, train.compression if isinstance(train, RowBlocks) else None


def _joined(found: list[TopScores], top: int) -> TopScores:
    """The extremes of parts that follow each other; of equal ones the earlier."""

    def side(name: str, largest: bool) -> tuple[Tensor, Tensor]:
        values, index = (torch.cat([getattr(one, key) for one in found], 1) for key in (name, f"{name}_index"))
        first = values.sort(dim=1, descending=largest, stable=True).indices[:, :top]
        return values.gather(1, first), index.gather(1, first)

    return TopScores(*side("helpful", True), *side("harmful", False))


def _pairs(values: Tensor, places: Tensor) -> list[tuple[float, int]]:
    return list(zip(values.tolist(), places.tolist(), strict=True))


# -- what is looked at -------------------------------------------------------------------------------------------------


class Share(NamedTuple):
    """The part of the training data that one process works on.

    ``data`` are its batches and ``places`` the numbers of their examples among all ``examples``. ``processes`` are all
    that work together; ``group`` is the torch group of those that have any examples.
    """

    data: Data
    places: range
    examples: int
    processes: Processes
    group: Group


@dataclass(frozen=True)
class Subject:
    """The model with its data, and what a person sees of an example: what ``show`` gives, or inputs that are images."""

    model: nn.Module
    train: Data
    queries: Data
    likelihood: str
    classes: Mapping[int, str]
    show: Callable[[str, int], Any] | None
    places: Mapping[str, list[str]]

    def share(self) -> Share:
        """The training batches of this process, which are neighbours."""
        processes = Processes.of(None, CALL, next(self.model.parameters()).device)
        ends = [0, *accumulate(batch.size for _, batch in self.numbered("train"))]
        batches, examples = len(ends) - 1, ends[-1]
        if processes.size == 1:
            return Share(self.train, range(examples), examples, processes, None)
        bounds = [-(-batches * rank // processes.size) for rank in range(processes.size + 1)]
        some = [rank for rank in range(processes.size) if bounds[rank] < bounds[rank + 1]]
        group = None if len(some) == processes.size else torch.distributed.new_group(some)
        first, last = bounds[processes.rank], bounds[processes.rank + 1]
        own = BatchShare(Source(self.train, self.model).batches, first, last)
        return Share(own, range(ends[first], ends[last]), examples, processes, group)

    def numbered(self, split: str) -> Iterator[tuple[int, Batch]]:
        """Batches with the place of their first example."""
        start = 0
        for batch in Source(self.train if split == "train" else self.queries, self.model).once():
            yield start, batch
            start += batch.size

    def chosen(self, split: str, wanted: Collection[int]) -> Iterator[tuple[list[int], Batch]]:
        """Some of the examples as batches, with their places, in the data's order."""
        places = set(wanted)
        for start, batch in self.numbered(split):
            inside = [place for place in range(start, start + batch.size) if place in places]
            if inside:
                yield inside, batch.take(torch.tensor(inside) - start)

    def examples(self, split: str, wanted: Collection[int], likelihood: Likelihood) -> dict[int, Example]:
        """Some of the examples, by their place in the data."""
        found, places = {}, self.places.get(split)
        for inside, batch in self.chosen(split, wanted):
            for i, (index, outcome) in enumerate(zip(inside, self.outcomes(batch, likelihood), strict=True)):
                place = places[index] if places else f"{'train' if split == 'train' else 'query'} {index}"
                found[index] = Example(index, place, *outcome, *self._shown(split, index, batch, i))
        return found

    @torch.no_grad()
    def outcomes(self, batch: Batch, likelihood: Likelihood) -> Iterator[tuple[Any, Any, Any, float]]:
        """Label, prediction, its probability and the loss, of each example; None where there is no single one."""
        batch = batch.to(next(self.model.parameters()).device)
        raw = batch.call(self.model).double()
        batch = batch.aligned(self.model, raw, shift=is_causal(self.model), ignore_index=likelihood.ignore_index)
        z, target, mask = likelihood.prepare(raw, batch.targets, CALL)
        if target is None:
            raise DataError(CALL, "data without targets", "targets", why="scores are those of a loss")
        losses = (likelihood.loss(z, target) * mask).sum(1).tolist()
        none: list[Any] = [None] * len(z)
        if isinstance(likelihood, Bernoulli):
            p = z.sigmoid().flatten(1)
            labels, predictions = ([self._on(row) for row in t.flatten(1).tolist()] for t in (target > 0.5, p > 0.5))
            sure = torch.maximum(p, 1 - p)[:, 0].tolist() if p.shape[1] == 1 else none
        elif not isinstance(likelihood, Categorical):
            labels, predictions = ([", ".join(map(number, row)) for row in t.flatten(1).tolist()] for t in (target, z))
            sure = none
        elif z.shape[1] > 1:
            labels, predictions, sure = none, none, none
        else:
            best = torch.log_softmax(z[:, 0], -1).max(-1)
            y = (target.argmax(-1) if target.is_floating_point() else target)[:, 0].tolist()
            labels = [self._name(c) if counts else "ignored" for c, counts in zip(y, mask[:, 0].tolist(), strict=True)]
            predictions, sure = [self._name(c) for c in best.indices.tolist()], best.values.exp().tolist()
        return zip(labels, predictions, sure, losses, strict=True)

    def _on(self, row: list[bool]) -> str:
        """The names of the outputs that are on."""
        if len(row) == 1 and not self.classes:
            return str(int(row[0]))
        return ", ".join(self._name(c) for c, on in enumerate(row) if on) or "none"

    def _name(self, index: int) -> str:
        return self.classes.get(index, str(index))

    def _shown(self, split: str, index: int, batch: Batch, i: int) -> tuple[str | None, str | None]:
        """An example's text and picture, None where there is none."""
        if self.show is None:
            tensors = [leaf for leaf in (*batch.args, *batch.kwargs.values()) if isinstance(leaf, Tensor)]
            images = len(tensors) == 1 and tensors[0].ndim == 4 and is_image(tensors[0].shape[1:])
            return None, data_uri(tensors[0][i], CALL) if images else None
        call, made = f"show({split!r}, {index})", self.show(split, index)
        picture, text = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if text is None and (picture is None or isinstance(picture, str)):
            picture, text = None, picture
        arrays = ("__array__", "__array_interface__")  # tensors, numpy's arrays, PIL's images
        is_array = any(hasattr(picture, name) for name in arrays)
        if not (picture is None or is_array) or not (text is None or isinstance(text, str)):
            raise InvalidTypeError(
                call, f"a {type(made).__name__}", "a text, a picture as an array, a pair (picture, text), or None"
            )
        # Half a surrogate pair can be written to no file.
        plain = None if text is None else text.encode("utf-8", "replace").decode()
        return plain, None if picture is None else data_uri(picture, call)


def _of_function(spec: str, device: str) -> Subject:
    """What a user's function returns: (model, train, queries) or (model, train, queries, show)."""
    made = call_factory(spec, CALL)
    fits = isinstance(made, (tuple, list)) and len(made) in (3, 4) and isinstance(made[0], nn.Module)
    if not fits or (len(made) == 4 and not (made[3] is None or callable(made[3]))):
        size = f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
        raise InvalidTypeError(
            CALL, f"a {type(made).__name__}{size} from {spec}()",
            "(model, train, queries) or (model, train, queries, show)",
            try_='show = lambda split, index: ..., a text or a picture for split "train" or "queries"',
        )  # fmt: skip
    model, train, queries, show = (*made, None)[:4]
    refuse_train_mode(model)  # a first look at its losses would move running statistics
    for name, data in (("train", train), ("queries", queries)):
        source = Source(data, model)
        source.refuse_shuffling(CALL, name)
        source.first()  # without one nothing is computed
    return Subject(model.to(device), train, queries, "categorical", {}, show, {})
