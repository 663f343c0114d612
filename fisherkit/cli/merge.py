"""``fisherkit merge``: several models and their Fisher files into one folder that loads like the first.

Owns what lies beside the weights (config, tokenizer), what may be written over, and the folder's appearance as a whole;
the tensors are `fisherkit.merging`'s.
"""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import typer

from fisherkit import io, merging
from fisherkit.cli.command import REPLACED, expect, given, refuse_existing, say
from fisherkit.cli.options import (
    REQUIRED,
    AsJson,
    Device,
    Kind,
    MaxShardSize,
    Overwrite,
    Structure,
    choice,
    dtype_check,
    numbers,
    numbers_or,
    option,
)
from fisherkit.cli.sources import IGNORE, ModelOptions, TextBatches, load_likelihood
from fisherkit.cli.text import apart, table
from fisherkit.errors import FileFormatError, InvalidArgumentError, listed
from fisherkit.fisher import FisherApproximation
from fisherkit.io.fisher_file import index_of
from fisherkit.io.model_files import FOLDER_NAMES, ModelFiles, targets
from fisherkit.merging import MergePolicy
from fisherkit.merging.blocks import expected_seconds
from fisherkit.merging.export import beside_weights, copy_beside
from fisherkit.merging.policy import WORDS
from fisherkit.operators import RelativeDamping
from fisherkit.vectors import rule_of
from fisherkit.words import duration, readable

CALL = "fisherkit merge"

WORTH_SAYING = 5.0
"""Seconds from which the expected time is said."""

FARTHER = 1.01
"""`BlockInfo.against_average` from which --verbose says it: docs/merging.md has how often it was right."""

SETTINGS = frozenset({"buffers", "integers", "mismatched", "dtype", "max_shard_size"})
"""Of a `MergePolicy`, that every way of merging has."""

OF_FISHERS = SETTINGS | {"other_weights", "device", "tolerance", "max_steps"}

METHODS: Mapping[str, tuple[Callable[..., Any], frozenset[str]]] = {
    **dict.fromkeys(WORDS["method"], (merging.merge, OF_FISHERS | {"method", "uncovered"})),
    "average": (merging.average, SETTINGS),
    "task-arithmetic": (merging.task_arithmetic, SETTINGS),
    "regmean": (merging.regmean, OF_FISHERS),
    "layers": (merging.merge_layers, OF_FISHERS - {"other_weights"}),
}
"""Every --method, what it calls and which settings of a `MergePolicy` it has; those of `merge` are ways to solve."""

NOT_COMPARED = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})
"""Entries of config.json that say nothing about what the weights mean."""

OF_LAYERS = ("data", "kind", "structure", "examples")

OWN = frozenset({
    *OF_LAYERS, "model", "fisher", "check", "method", "out", "config_from_first", "absolute_damping", "overwrite",
    "as_json", "verbose",
})  # fmt: skip
"""Options that are not keywords of the functions of `fisherkit.merging`, or of none but those with Fishers."""


@dataclass(frozen=True)
class Merge:
    """Merge models by their Fishers into one that loads like the first.

    The result makes Σ (θ − θ_t)ᵀF_t(θ − θ_t) least, damped towards the models' average. Reads and writes one block at a
    time. The folder loads with from_pretrained; merge.json in it says how every block was solved. With each task's
    --data in place of Fishers, layers are merged one after another: the better way, where the texts can be read.

    Examples:
        fisherkit merge --model A --fisher a.safetensors --model B --fisher b.safetensors --out merged
        fisherkit merge --model A --data a.jsonl --model B --data b.jsonl --method layers --out merged
        fisherkit merge --model A --model B --method average --out merged
        fisherkit merge --model A --fisher a --model B --fisher b --uncovered average --weights examples --out new
        fisherkit merge --model A --fisher a --model B --fisher b --check a.jsonl --check b.jsonl --out merged
    """

    model: list[Path] = option(REQUIRED, "PATH", "A Hugging Face folder, or a safetensors file; twice or more.")
    out: Path = option(REQUIRED, "PATH", "The folder (or, for files, the file) to write.")
    fisher: list[Path] | None = option(None, "FILE", "A Fisher file for each model, in their order.")
    data: list[Path] | None = option(None, "FILE", "For layers: each model's texts with labels, in the models' order.")
    kind: Kind = "ief"
    structure: Structure = "kfac"
    examples: int | None = option(None, "N", "Draw this many of each model's texts.", "all", min=1)
    check: list[Path] | None = option(
        None, "FILE", "Texts with labels, best of all held-out ones: how far to go from the average."
    )
    method: str = choice(
        "auto", "By Fishers, whose blocks are solved by one of the first three, or another way", tuple(METHODS)
    )
    weights: str | None = option(
        None, "LIST", 'Of the models, such as 1,2; or "examples".', "equal", parser=numbers_or("examples")
    )
    damping: float | None = option(
        None, "λ", "A multiple of the mean eigenvalue; see --absolute-damping.",
        "0.03; layers: 0.01; regmean: 1e-06", min=0,
    )  # fmt: skip
    absolute_damping: bool = option(False, "", "--damping is λ itself.", name="--absolute-damping")
    output_damping: float | None = option(
        None, "ρ", "How much of each Fisher's average over outputs is added.",
        "by each gradient factor; 3 for what has none and for layers", min=0,
    )  # fmt: skip
    normalize: str = choice("block", "Fishers to one size before merging", ("block", "output", "trace", "norm", "none"))
    center: str = option("average", "PATH", 'Where damping pulls to: "average" or a model.')
    base: Path | None = option(None, "PATH", "For task-arithmetic: the model that all began from.")
    scale: float | None = option(None, "S", "For task-arithmetic: factor of the sum of changes.")
    shrink: float = option(0.9, "α", "For regmean: share of the off-diagonal that is kept.", min=0, max=1)
    uncovered: str | None = choice(
        None, "Parameters that differ and some Fisher lacks", WORDS["uncovered"], "refuse; regmean: average"
    )
    buffers: str = choice(MergePolicy.buffers, "Float buffers that differ", WORDS["buffers"])
    integers: str = choice(MergePolicy.integers, "Other tensors that differ", WORDS["integers"])
    mismatched: str = choice(MergePolicy.mismatched, "Names or shapes that differ", WORDS["mismatched"])
    other_weights: str = choice(
        MergePolicy.other_weights, "Fishers measured at other weights than their models'", WORDS["other_weights"]
    )
    config_from_first: bool = option(
        False, "", "Where configs or vocabularies differ, take the first.", name="--config-from-first"
    )
    dtype: str | None = option(None, "NAME", "Of the result, such as bfloat16.", "the models'", parser=dtype_check)
    device: Device = "cpu"
    tolerance: float = option(MergePolicy.tolerance, "ε", "Largest relative residual of a block's solution.")
    max_steps: int = option(MergePolicy.max_steps, "N", "Most steps of conjugate gradients in each block.", min=1)
    max_shard_size: MaxShardSize = None
    overwrite: Overwrite = False
    as_json: AsJson = False
    verbose: bool = option(False, "", "Print how every block was solved.", name="--verbose")

    def run(self) -> None:
        """Check, merge, copy what lies beside the weights, and put the folder in its place."""
        options = self._options()
        self._check()
        texts = self._texts()
        function = partial(METHODS[self.method][0], **options, **self._sources(), return_info=True)
        start = time.perf_counter()
        say(f"Merging {self._size()} ...")
        if not self._folders:
            path, info = function(out=self.out, overwrite=self.overwrite)
            self._tell(path, info, time.perf_counter() - start)
            return
        if not self.config_from_first:
            _compare([model / "config.json" for model in self.model], "config.json", _config)
            _compare([model / "tokenizer.json" for model in self.model], "the vocabulary", _vocabulary)
        out = self.out.resolve()
        with io.part_folder(out) as part:
            whole = part / out.name
            whole.mkdir()
            merged = part / f"{out.name}.merged" if self.check else whole
            merged.mkdir(exist_ok=True)
            _, info = function(out=merged)
            if self.check:
                info = self._checked(texts, merged, whole, options["policy"], info)
            copy_beside(self.model[0], whole, options["policy"].dtype)
            (whole / "merge.json").write_text(info.to_json() + "\n", encoding="utf-8")
            _put_in_place(whole, out, part / REPLACED)
        self._tell(self.out, info, time.perf_counter() - start)

    def _checked(
        self, texts: Sequence[TextBatches], merged: Path, whole: Path, policy: MergePolicy, info: merging.MergeInfo
    ) -> merging.MergeInfo:
        """Write the best model on texts between the models' average and the merged one; its info has their losses."""
        average, policy = merged.with_name(f"{whole.name}.average"), replace(policy, uncovered=None)
        average.mkdir()
        merging.average(self.model, info.weights, policy=policy, out=average)
        for folder in (average, merged):
            copy_beside(self.model[0], folder, policy.dtype)
        say(f"Checking on {sum(len(own.texts) for own in texts):,} texts ...")
        start, end = (replace(texts[0].folder, path=folder).load(self.device, None) for folder in (average, merged))
        _, found = merging.line_search(start, end, partial(_loss, texts), policy=policy, return_info=True)
        merging.average([average, merged], found.weights, policy=policy, out=whole)
        return replace(info, losses=found.losses, share=found.share)

    def _sources(self) -> dict[str, Any]:
        """The models' paths, or themselves with their texts and what measures a stage of layers."""
        if not self.data:
            return {"models": self.model}
        own = ModelOptions(device=self.device, examples=self.examples)
        pairs = zip(self.model, self.data, strict=True)
        texts = [(own.texts(str(model), {f"--data {path}": path}, CALL) or [])[0] for model, path in pairs]
        kind, likelihood = rule_of(self.kind, call=CALL), load_likelihood(texts[0].folder.likelihood, CALL)
        fisher = partial(FisherApproximation, kind=kind, structure=self.structure, likelihood=likelihood)
        models = [batches.model for batches in texts]
        everywhere = list(zip(*(model.named_parameters() for model in models), strict=False))
        changed = [any(name != one[0][0] or not torch.equal(p, one[0][1]) for name, p in one) for one in everywhere]
        for one, has in zip(everywhere, changed, strict=True):
            for _, p in one:
                p.requires_grad_(has or not any(changed))  # what no model has changed needs no backward pass
        return {"models": models, "data": texts, "fisher": fisher}

    def _texts(self) -> list[TextBatches]:
        """What the result is checked on, read before anything is merged; nothing without --check."""
        if not self.check:
            return []
        odd = [] if self._folders else ["files of weights"]
        odd += [
            text for text in ("--method average", "--mismatched skip") if getattr(self, text.split()[0][2:]) in text
        ]
        if odd:
            _refuse(
                f"--check with {' and '.join(odd)}",
                "folders that are merged whole, by Fishers, RegMean or task arithmetic",
                "a model is chosen between their average and the merged one, by its own loss on texts",
                "fk.merging.line_search, with a loss of yours" if not self._folders
                else f"leave out {' and '.join(odd)}, or --check",
            )  # fmt: skip
        files: dict[str, Path | None] = {f"--check {path}": path for path in self.check}
        found = ModelOptions(device=self.device, dtype=self.dtype).texts(str(self.model[0]), files, CALL) or []
        for flag, own in zip(files, found, strict=True):
            if own.folder.causal and not all((batch["labels"][:, 1:] != IGNORE).any() for batch in own):
                _refuse(
                    f"{flag} with a batch of texts of one token", "texts of two tokens or more",
                    "a causal model's loss is that of the tokens after the first, and of none it is no number",
                )  # fmt: skip
        return found

    @property
    def _folders(self) -> bool:
        return all(model.is_dir() for model in self.model)

    def _options(self) -> dict[str, Any]:
        function, settings = METHODS[self.method]
        taken = inspect.signature(function).parameters
        values = {name: value for name, value in vars(self).items() if name in given() and name not in OWN}
        unknown = [name for name in values if name not in {*taken, *settings, "base", "scale"}]
        layers = [name for name in OF_LAYERS if name in given() and "data" not in taken]
        if self.data and "data" not in taken:
            _refuse(f"--method {self.method} with --data", "--method layers", "no other way runs the models")
        if unknown or layers:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in (*unknown, *layers))
            why = f"{', '.join(f'--{name}' for name in layers)}: of --method layers alone" if layers else ""
            _refuse(f"--method {self.method} with {options}", "options that it has", why, "leave them out")
        if "fishers" not in taken and self.fisher:
            _refuse(f"--method {self.method} with --fisher", "no Fishers, which it does not use")
        if "fishers" in taken and len(self.fisher or ()) != len(self.model):
            _refuse(
                f"{len(self.model)} models and {len(self.fisher or ())} Fishers", "a Fisher for each model",
                try_="--model A --fisher FA --model B --fisher FB, or --method average",
            )  # fmt: skip
        if "data" in taken and (len(self.data or ()) != len(self.model) or any(map(Path.is_file, self.model))):
            _refuse(
                f"{len(self.model)} models and {len(self.data or ())} --data", "folders, and a file of texts for each",
                "each model is run on its own task's texts", "--model A --data a.jsonl --model B --data b.jsonl",
            )  # fmt: skip
        if {self.base is not None, self.scale is not None} != {"base" in taken}:
            _refuse(f"--method {self.method}", "--base and --scale with task-arithmetic, and with it alone")
        typed: dict[str, Callable[[Any], Any]] = {
            "damping": float if self.absolute_damping else RelativeDamping,
            "normalize": lambda word: None if word == "none" else word,
            "weights": lambda text: text if text == "examples" else numbers(text),
            "dtype": partial(getattr, torch),
        }
        values = {name: typed[name](value) if name in typed else value for name, value in values.items()}
        policy = {name: values.pop(name) for name in settings if name in values}
        if "method" in settings:
            policy["method"] = self.method
        if "fishers" in taken:
            values["fishers"] = self.fisher
        return {**values, "policy": MergePolicy(**policy), "progress": True}

    def _check(self) -> None:
        """Refuse paths before anything is read: what is missing, and a target where something would be lost."""
        fishers, out, folders = list(self.fisher or ()), self.out, self._folders
        others = [Path(path) for path in (self.base, self.center) if path not in (None, "average")]
        missing = [str(path) for path in (*self.model, *others) if not path.exists()]
        missing += [str(path) for path in fishers if not path.exists() and not index_of(path).exists()]
        if missing:
            _refuse(
                f"paths that do not exist: {missing}", "models and Fisher files",
                try_="other paths; of a model of your own, the file that "
                "safetensors.torch.save_file(model.state_dict(), path) writes",
            )  # fmt: skip
        io.require_folder(out.parent, f"{CALL} --out")
        if folders and (out.suffix == ".safetensors" or (out.exists() and not out.is_dir())):
            _refuse(
                f"models that are folders and --out {out}, a file", "the name of a folder",
                "folders are merged with what lies beside the weights",
                f"--out merged, or files such as --model {self.model[0] / FOLDER_NAMES[0]}",
            )  # fmt: skip
        _refuse_sources(out, (*self.model, *fishers, *others), folders)
        if out.is_dir() and any(out.iterdir()) and not self.overwrite:
            _refuse(f"--out {out}, a folder that is not empty", "another name", try_="--overwrite replaces it")
        if out.is_dir() and folders:
            _refuse_other_files(out, self.model[0])
        if out.is_file():
            refuse_existing((out,), f"{CALL} --out", overwrite=self.overwrite)
        expect([out] if folders else targets(out))

    def _size(self) -> str:
        files = {file for model in self.model for file in ModelFiles(model, CALL).paths if file.is_file()}
        models = f"{len(self.model)} models ({readable(sum(file.stat().st_size for file in files))})"
        models += " layer after layer" * bool(self.data)
        if not self.fisher:
            return models
        headers = [io.read_header(path, CALL) for path in self.fisher]
        # RegMean takes a step or two.
        seconds = expected_seconds(headers) if METHODS[self.method][0] is merging.merge else 0.0
        time_said = f", about {duration(seconds)} on one CPU core" if seconds >= WORTH_SAYING else ""
        return f"{models} by their Fishers ({readable(sum(header.nbytes for header in headers))}){time_said}"

    def _tell(self, path: Path, info: merging.MergeInfo, seconds: float) -> None:
        if self.as_json:
            typer.echo(json.dumps({"out": str(path), "residual": info.residual} | json.loads(info.to_json())))
            return
        if self.verbose and info.blocks:
            rows = [
                (listed(block.names, 2), block.method, f"{block.size:,}", f"{block.steps}",
                 f"{block.residual:.1e}" + ("" if block.converged else " not converged"))
                for block in info.blocks
            ]  # fmt: skip
            typer.echo(table(("parameters", "method", "numbers", "steps", "residual"), rows, left=2) + "\n")
        counted = ", ".join(f"{count:,} {kind}" for kind, count in info.counts().items())
        what = f"{len(info.weights)} models, {duration(seconds)}: {counted}"
        typer.echo(f"{self.method if self.method not in WORDS['method'] else 'merge'} of {what}")
        if info.blocks:
            missed = sum(not block.converged for block in info.blocks)
            typer.echo(
                f"{len(info.blocks):,} block{'s' * (len(info.blocks) > 1)} solved, damping {info.damping:.3g}, "
                f"residual at most {info.residual:.1e}" + (f"; {missed} NOT CONVERGED, see --verbose" if missed else "")
            )
        if self.verbose and (farther := sum(block.worst > FARTHER for block in info.blocks)):
            typer.echo(
                f"{farther:,} block{'s are' if farther > 1 else ' is'} farther from some model's outputs than "
                "the average is,\na reason for --check, or for --method average (against_average in merge.json)."
            )
        if info.losses:
            tried = ", ".join(apart([loss for _, loss in info.losses]))
            typer.echo(f"Loss from the average to the merged model {tried}: {info.share:g} of the way was taken.")
        if info.unverified:
            unverified = ", ".join(map(str, info.unverified))
            typer.echo(f"Not checked: that each Fisher was measured at its model's weights (models {unverified}).")
        typer.echo(f"Wrote {path}.")


def _loss(texts: Sequence[TextBatches], state: Mapping[str, torch.Tensor]) -> float:
    """The mean over files of the model's own loss, whose batches count by their texts."""
    model, means = texts[0].model, []
    model.load_state_dict(state)
    device = next(model.parameters()).device
    with torch.no_grad():
        for own in texts:
            batches = ({name: tensor.to(device) for name, tensor in batch.items()} for batch in own)
            total = sum(float(model(**batch).loss) * len(batch["labels"]) for batch in batches)
            means.append(total / len(own.texts))
    return sum(means) / len(means)


def _put_in_place(whole: Path, out: Path, replaced: Path) -> None:
    """The new folder under its name; whatever comes between, the old one is there again."""
    try:
        if out.is_dir():
            out.rename(replaced)
        whole.rename(out)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise


def _compare(paths: Sequence[Path], what: str, read: Callable[[Path], dict[str, Any]]) -> None:
    """Refuse models whose numbers mean different things."""
    first = read(paths[0])
    for path in paths[1:]:
        other = read(path)
        if differing := io.differing(first, other):
            some = {name: (first.get(name), other.get(name)) for name in differing[:4]}
            raise InvalidArgumentError(
                CALL, f"{paths[0].parent} and {path.parent}, which differ in {what}: {some}",
                "models whose outputs and inputs mean the same",
                try_="--config-from-first, if the first one's is right for the merged model",
            )  # fmt: skip


def _config(path: Path) -> dict[str, Any]:
    """What config.json says about the weights' meaning; nothing if there is none."""
    return {name: value for name, value in _read_json(path).items() if name not in NOT_COMPARED}


def _vocabulary(path: Path) -> dict[str, Any]:
    """A fast tokenizer's tokens; nothing if there is none."""
    vocabulary = _read_json(path).get("model", {}).get("vocab", {})
    return vocabulary if isinstance(vocabulary, dict) else {str(i): entry for i, entry in enumerate(vocabulary)}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing if there is no file, or no object in it."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(CALL, f"{path}, which is not JSON ({error})", "a model's") from error
    return found if isinstance(found, dict) else {}


def _refuse_sources(out: Path, sources: Sequence[Path], whole: bool) -> None:
    place = out.resolve()
    written = {place} if whole else {place, *(target.resolve() for target in targets(out))}
    for source in sources:
        # A folder's files may be links to elsewhere.
        files = [path.resolve() for path in source.iterdir() if path.is_file()] if source.is_dir() else []
        for path in (source.resolve(), *files):
            if path in written or (whole and place in path.parents):
                _refuse(f"--out {out}, the place of {source}, which is read", "another place", "it would be lost")


def _refuse_other_files(folder: Path, first: Path) -> None:
    """A folder is replaced whole, so it may hold a model's weights, and else only what the first model's has too."""
    shards = _read_json(folder / FOLDER_NAMES[1]).get("weight_map")
    weights = [*FOLDER_NAMES, *(shards.values() if isinstance(shards, dict) else ())]
    known = ["merge.json", *weights, *(path.name for path in beside_weights(first))]
    others = sorted(path.name for path in folder.iterdir() if path.is_dir() or path.name not in known)
    if others:
        _refuse(
            f"--overwrite of {folder}, which holds {others[:8]}", "a folder of a model alone",
            "it is replaced whole, and they would be lost", "another --out",
        )  # fmt: skip


def _refuse(got: str, expected: str, why: str = "", try_: str = "") -> NoReturn:
    raise InvalidArgumentError(CALL, got, expected, why=why, try_=try_)
