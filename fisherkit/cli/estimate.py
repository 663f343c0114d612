"""``fisherkit estimate``: the Fisher of a model on a file of texts, or on data of a user's function, into a file.

Owns the command's options and what it prints; the Fisher is the package's, the model and its data `hugging_face`'s or
the user's.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import typer
from torch import nn

from fisherkit import io
from fisherkit.cli.checks import as_dtype, check_choice, check_device, check_likelihood
from fisherkit.cli.command import refuse_existing, say
from fisherkit.cli.factories import load_factory, load_likelihood
from fisherkit.cli.hugging_face import Folder, TextBatches
from fisherkit.cli.text import number, table
from fisherkit.cli.texts import Columns, read_texts
from fisherkit.data import Data
from fisherkit.errors import InvalidArgumentError
from fisherkit.fisher import FisherApproximation
from fisherkit.io.reader import index_of
from fisherkit.io.shards import refuse_weights
from fisherkit.kind_specs import KindSpec
from fisherkit.structures import structures

CALL = "fisherkit estimate"


@dataclass(frozen=True)
class EstimateSettings:
    """The command's options.

    Args:
        model: a Hugging Face folder, or "package.module:function".
        out: the Fisher file.
        data: texts, for a folder.
        columns: of the texts' file.
        examples: texts to draw; None for all.
        batch_size: texts a batch.
        max_length: tokens a text is cut to.
        kind: as `KindSpec` spells it.
        structure: of the Fisher, like the next five.
        likelihood: by name; None for that of the folder's loss, "categorical" for a function.
        example: "sequence" or "token".
        normalization: "mean" or "sum".
        params: patterns of parameters' names; none for all that require grad.
        kfac_positions: "expand" or "reduce".
        device: where the model runs.
        dtype: of a folder's weights.
        seed: of drawn texts and sampled labels.
        max_shard_size: bytes a file; None for one file.
        overwrite: replace a file that is there.
        as_json: print one JSON object.
    """

    model: str
    out: Path
    data: Path | None
    columns: Columns
    examples: int | None
    batch_size: int
    max_length: int | None
    kind: str
    structure: str
    likelihood: str | None
    example: str
    normalization: str
    params: tuple[str, ...]
    kfac_positions: str
    device: str
    dtype: str | None
    seed: int
    max_shard_size: int | None
    overwrite: bool
    as_json: bool


def run(settings: EstimateSettings) -> None:
    """Load, build, save, report; what can be wrong with the options is found out before the model is loaded."""
    kind = KindSpec.parse(settings.kind, call=CALL)
    check_choice(CALL, "--structure", settings.structure, structures())
    check_choice(CALL, "--example", settings.example, ("sequence", "token"))
    check_choice(CALL, "--normalization", settings.normalization, ("mean", "sum"))
    check_choice(CALL, "--kfac-positions", settings.kfac_positions, ("expand", "reduce"))
    check_likelihood(CALL, settings.likelihood)
    check_device(CALL, settings.device)
    as_dtype(CALL, settings.dtype)
    check_fisher_file(settings.out, f"{CALL} --out", overwrite=settings.overwrite)
    model, data, likelihood = _model_and_data(settings)
    params = selection(model, settings.params, CALL)
    say(f"{settings.model}: {_size(model, params, data)}. Estimating {settings.kind}, {settings.structure} ...")
    start = time.perf_counter()
    fisher = kind.build(
        model, data, seed=settings.seed, likelihood=load_likelihood(settings.likelihood or likelihood, CALL),
        structure=settings.structure, params=params, example=settings.example, normalization=settings.normalization,
        kfac_positions=settings.kfac_positions, progress=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    fisher.save(settings.out, max_shard_size=settings.max_shard_size)
    found = _summary(fisher, settings, data, seconds)
    typer.echo(json.dumps(found, ensure_ascii=False) if settings.as_json else _as_text(found))


def _size(model: nn.Module, params: list[str] | None, data: Data) -> str:
    """How much there is to do."""
    count = sum(
        p.numel() for name, p in model.named_parameters() if (p.requires_grad if params is None else name in params)
    )
    texts = f", {len(data.texts):,} texts" if isinstance(data, TextBatches) else ""
    batches = f" in {len(data):,} batch{'es' if len(data) > 1 else ''}" if isinstance(data, (TextBatches, list)) else ""
    return f"{count:,} parameters{texts}{batches}"


def _model_and_data(settings: EstimateSettings) -> tuple[nn.Module, Data, str]:
    """The model, its data, and the likelihood of its own loss."""
    folder = Path(settings.model)
    if folder.is_dir():
        if settings.data is None:
            raise InvalidArgumentError(
                call=CALL, got=f"{folder} without data", expected="--data FILE", try_="a .jsonl with text and label"
            )
        found = Folder.open(folder, CALL)
        columns = Columns(settings.columns.text, settings.columns.pair, None) if found.causal else settings.columns
        texts = read_texts(settings.data, columns, CALL, examples=settings.examples, seed=settings.seed)
        own = found.load(device=settings.device, dtype=settings.dtype, max_length=settings.max_length)
        return own.model, TextBatches(own, texts, settings.batch_size, CALL), own.likelihood
    if ":" not in settings.model:
        raise InvalidArgumentError(
            call=CALL, got=repr(settings.model), expected='a Hugging Face folder, or "package.module:function"',
            why="there is no such folder",
        )  # fmt: skip
    if settings.data is not None:
        raise InvalidArgumentError(
            call=CALL, got="--data beside a function", expected="one of them", why="the function returns its own data"
        )
    model, data = load_factory(settings.model, CALL)
    return model.to(settings.device), data, "categorical"


def check_fisher_file(path: Path, call: str, *, overwrite: bool) -> None:
    """Find out before the work is done whether a Fisher file can be written.

    Raises:
        InvalidArgumentError: its folder does not exist, or something is there that may not be replaced.
    """
    io.check_folder(path, call)
    refuse_existing((path, index_of(path)), call, overwrite=overwrite)
    refuse_weights(path, call)


def selection(model: nn.Module, patterns: tuple[str, ...], call: str) -> list[str] | None:
    """The parameters whose names match a pattern.

    Args:
        model: whose parameters.
        patterns: as a shell has them; none for all that require grad.
        call: the command, for errors.

    Returns:
        Names; None without patterns.

    Raises:
        InvalidArgumentError: a pattern that matches no parameter.
    """
    if not patterns:
        return None
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InvalidArgumentError(
                call=call, got=f"--params {pattern!r}, which matches no parameter",
                expected=f"a pattern of names such as {names[-1]!r}", try_="quotes, so that the shell leaves * alone",
            )  # fmt: skip
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _summary(fisher: FisherApproximation, settings: EstimateSettings, data: Data, seconds: float) -> dict[str, Any]:
    trace = float(fisher.trace())
    found = {
        "file": str(settings.out),
        "kind": settings.kind,
        "structure": fisher.structure,
        "examples": fisher.examples,
        "rows": fisher.rows,
        "parameters": fisher.size,
        "trace": trace,
        "mean_eigenvalue": trace / fisher.size,
        "dtype": str(fisher.dtype).removeprefix("torch."),
        "seconds": seconds,
        "likelihood": fisher.metadata["likelihood"],
    }
    if isinstance(data, TextBatches):
        found["texts_at_max_length"] = data.cut
        found["max_length"] = data.pretrained.max_length
    return found


def _as_text(found: dict[str, Any]) -> str:
    cells = [
        ("kind", found["kind"]),
        ("structure", found["structure"]),
        ("likelihood", found["likelihood"]),
        ("examples N", f"{found['examples']:,}"),
        ("rows R", f"{found['rows']:,}"),
        ("parameters D", f"{found['parameters']:,}"),
        ("trace", number(found["trace"])),
        ("mean eigenvalue", number(found["mean_eigenvalue"])),
        ("time", f"{found['seconds']:.1f} s"),
    ]
    lines = table(("", ""), cells, left=2).splitlines()[2:]
    if found.get("texts_at_max_length"):
        lines.append(f"{found['texts_at_max_length']:,} texts fill all {found['max_length']} tokens: some may be cut.")
    return "\n".join([*lines, "", f"Wrote {found['file']}."])
