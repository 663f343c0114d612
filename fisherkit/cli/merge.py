"""``fisherkit merge``: several models and their Fisher files into one folder that loads like the first.

Owns what lies beside the weights (config, tokenizer) and the folder's appearance as a whole; the tensors are
`fisherkit.merging`'s.
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer

from fisherkit import merging
from fisherkit.cli.command import refuse_existing
from fisherkit.errors import FileFormatError, InvalidArgumentError
from fisherkit.operators import RelativeDamping

CALL = "fisherkit merge"

SOLVERS = ("auto", "direct", "cg")
OTHERS: Mapping[str, Callable[..., Any]] = {
    "average": merging.average, "task-arithmetic": merging.task_arithmetic, "regmean": merging.regmean,
}  # fmt: skip
METHODS = (*SOLVERS, *OTHERS)

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
"""What is not copied from the first model's folder: weights and the state of a training run."""

NOT_COMPARED = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})
"""Entries of config.json that say nothing about what the weights mean."""


@dataclass(frozen=True)
class MergeSettings:
    """The command's options.

    Args:
        models: folders, or safetensors files.
        fishers: Fisher files, in the models' order; none for average and task-arithmetic.
        out: the folder, or the file, to write.
        method: of `METHODS`.
        base: what task-arithmetic's models were fine-tuned from.
        scale: of task-arithmetic.
        config_from_first: take the first model's config and tokenizer where they differ.
        overwrite: replace what is there.
        as_json: print one JSON object.
        options: keywords of the function of `fisherkit.merging`; those that were not given are left out.
    """

    models: tuple[Path, ...]
    fishers: tuple[Path, ...]
    out: Path
    method: str
    base: Path | None
    scale: float | None
    config_from_first: bool
    overwrite: bool
    as_json: bool
    options: dict[str, Any] = field(default_factory=dict)


def run(settings: MergeSettings) -> None:
    """Check, merge, copy what lies beside the weights, and put the folder in its place."""
    _check(settings)
    if not all(model.is_dir() for model in settings.models):
        path, info = _function(settings)(out=settings.out, overwrite=settings.overwrite)
        _tell(path, info, settings)
        return
    _compare([model / "config.json" for model in settings.models], settings, "config.json", _config)
    _compare([model / "tokenizer.json" for model in settings.models], settings, "the vocabulary", _vocabulary)
    out = settings.out.resolve()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as part:
        whole = Path(part) / out.name
        whole.mkdir()
        _, info = _function(settings)(out=whole)
        _copy_beside(settings.models[0], whole)
        (whole / "merge.json").write_text(info.to_json() + "\n", encoding="utf-8")
        if out.is_dir():
            out.rename(Path(part) / "replaced")
        whole.rename(out)
    _tell(settings.out, info, settings)


def _check(settings: MergeSettings) -> None:
    """What can be wrong before anything is read."""

    def refuse(got: str, expected: str, try_: str = "") -> InvalidArgumentError:
        return InvalidArgumentError(call=CALL, got=got, expected=expected, try_=try_)

    if settings.method not in METHODS:
        raise refuse(f"--method {settings.method}", f"one of {list(METHODS)}")
    taken = inspect.signature(OTHERS.get(settings.method, merging.merge)).parameters
    strange = [f"--{name.replace('_', '-')}" for name in settings.options if name not in taken]
    if strange:
        raise refuse(f"--method {settings.method} with {', '.join(strange)}", "options that it has", "leave them out")
    without = settings.method in {"average", "task-arithmetic"}
    if without and settings.fishers:
        raise refuse(f"--method {settings.method} with --fisher", "no Fishers, which it does not use")
    if not without and len(settings.fishers) != len(settings.models):
        raise refuse(
            f"{len(settings.models)} models and {len(settings.fishers)} Fishers", "a Fisher for each model",
            "--model A --fisher FA --model B --fisher FB, or --method average",
        )  # fmt: skip
    if (settings.method == "task-arithmetic") != (settings.base is not None and settings.scale is not None):
        raise refuse(f"--method {settings.method}", "--base and --scale with task-arithmetic, and with it alone")
    missing = [str(path) for path in (*settings.models, *settings.fishers) if not path.exists()]
    if missing:
        raise refuse(f"paths that do not exist: {missing}", "models and Fisher files", "check the paths")
    if not settings.out.absolute().parent.is_dir():
        raise refuse(f"--out in a folder that does not exist: {settings.out.parent}", "an existing folder")
    if settings.out.is_dir() and any(settings.out.iterdir()) and not settings.overwrite:
        raise refuse(f"--out {settings.out}, a folder that is not empty", "another name", "--overwrite replaces it")
    if settings.out.is_dir() and all(model.is_dir() for model in settings.models):
        _refuse_strangers(settings.out, settings.models[0])
    if settings.out.is_file():
        refuse_existing((settings.out,), f"{CALL} --out", overwrite=settings.overwrite)


def _refuse_strangers(folder: Path, first: Path) -> None:
    """A folder is replaced whole, so it may hold nothing but a model: weights, and files that the first model has too.

    Raises:
        InvalidArgumentError: there is something else in it.
    """
    known = {"merge.json", *(path.name for path in first.iterdir())}
    strangers = sorted(
        path.name for path in folder.iterdir()
        if path.is_dir() or not (path.name in known or any(path.match(pattern) for pattern in WEIGHT_FILES))
    )  # fmt: skip
    if strangers:
        raise InvalidArgumentError(
            call=CALL, got=f"--overwrite of {folder}, which holds {strangers[:8]}",
            expected="a folder of a model alone",
            why="it is replaced whole, and they would be lost", try_="another --out",
        )  # fmt: skip


def _function(settings: MergeSettings) -> Callable[..., Any]:
    """The function of `fisherkit.merging` with everything but where its result goes."""
    models, options = settings.models, settings.options | {"return_info": True}

    def call(**target: Any) -> Any:
        if settings.method == "average":
            return merging.average(models, **options, **target)
        if settings.base is not None and settings.scale is not None:
            return merging.task_arithmetic(models, settings.base, settings.scale, **options, **target)
        own = options | {"progress": sys.stderr.isatty()}
        if settings.method == "regmean":
            return merging.regmean(models, settings.fishers, **own, **target)
        return merging.merge(models, settings.fishers, method=settings.method, **own, **target)

    return call


def options(
    *, damping: float | None, absolute_damping: bool, normalize: str | None, weights: str | None, dtype: str | None,
    **others: Any,
) -> dict[str, Any]:  # fmt: skip
    """Keywords of `fisherkit.merging` from options as text; what was not given is left to its defaults.

    Args:
        damping: λ; a multiple of the mean eigenvalue unless absolute_damping.
        absolute_damping: λ itself.
        normalize: "none" for None.
        weights: "examples", or numbers between commas.
        dtype: a name of torch's.
        others: passed on.

    Raises:
        InvalidArgumentError: weights or a dtype that cannot be read.
    """
    found = {name: value for name, value in others.items() if value is not None}
    if damping is not None:
        found["damping"] = damping if absolute_damping else RelativeDamping(damping)
    if normalize is not None:
        found["normalize"] = None if normalize == "none" else normalize
    if weights is not None:
        found["weights"] = weights if weights == "examples" else _numbers(weights)
    if dtype is not None:
        chosen = getattr(torch, dtype, None)
        if not isinstance(chosen, torch.dtype):
            raise InvalidArgumentError(call=CALL, got=f"--dtype {dtype}", expected="such as float32 or bfloat16")
        found["dtype"] = chosen
    return found


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise InvalidArgumentError(
            call=CALL, got=f"--weights {text}", expected='"examples", or numbers such as 1,2'
        ) from error


def _compare(paths: Sequence[Path], settings: MergeSettings, what: str, read: Callable[[Path], dict[str, Any]]) -> None:
    """Refuse models whose numbers mean different things.

    Raises:
        InvalidArgumentError: entries that differ.
    """
    if settings.config_from_first:
        return
    first = read(paths[0])
    for path in paths[1:]:
        other = read(path)
        differing = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if differing:
            some = {name: (first.get(name), other.get(name)) for name in differing[:4]}
            raise InvalidArgumentError(
                call=CALL, got=f"{paths[0].parent} and {path.parent}, which differ in {what}: {some}",
                expected="models whose outputs and inputs mean the same",
                try_="--config-from-first, if the first one's is right for the merged model",
            )  # fmt: skip


def _config(path: Path) -> dict[str, Any]:
    """What config.json says about the weights' meaning; nothing if there is none."""
    return {name: value for name, value in _json(path).items() if name not in NOT_COMPARED}


def _vocabulary(path: Path) -> dict[str, Any]:
    """A fast tokenizer's tokens; nothing if there is none."""
    vocabulary = _json(path).get("model", {}).get("vocab", {})
    return vocabulary if isinstance(vocabulary, dict) else {str(i): entry for i, entry in enumerate(vocabulary)}


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(call=CALL, got=f"{path}, which is not JSON ({error})", expected="a model's") from error
    return found if isinstance(found, dict) else {}


def _copy_beside(source: Path, target: Path) -> None:
    """Config, tokenizer and whatever else is no weight, from the first model."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in WEIGHT_FILES):
            shutil.copy2(path, target / path.name)


def _tell(path: Path, info: merging.MergeInfo, settings: MergeSettings) -> None:
    if settings.as_json:
        typer.echo(json.dumps({"out": str(path), "residual": info.residual} | json.loads(info.to_json())))
    else:
        numbers = ", ".join(str(number) for number in info.unverified)
        note = (
            f"\nNot checked: that each Fisher was measured at its model's weights (models {numbers})."
            if numbers
            else ""
        )
        typer.echo(f"{info}{note}\n\nWrote {path}.")
