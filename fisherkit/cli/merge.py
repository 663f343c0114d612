"""``fisherkit merge``: several models and their Fisher files into one folder that loads like the first.

Owns what lies beside the weights (config, tokenizer) and the folder's appearance as a whole; the tensors are
`fisherkit.merging`'s.
"""

from __future__ import annotations

import inspect
import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import typer

from fisherkit import io, merging
from fisherkit.cli.checks import as_dtype, check_choice, check_device
from fisherkit.cli.command import REPLACED, expect, say
from fisherkit.cli.merge_target import CALL, beside_weights, check_target, read_json
from fisherkit.cli.text import numbers, table
from fisherkit.errors import InvalidArgumentError, listed
from fisherkit.io.reader import index_of
from fisherkit.memory import readable
from fisherkit.merging.policies import INTEGERS, KEEPING, MISMATCHED
from fisherkit.merging.systems import METHODS as SOLVERS
from fisherkit.merging.writing import targets
from fisherkit.operators import RelativeDamping

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(SOLVERS, merging.merge),
    "average": merging.average,
    "task-arithmetic": merging.task_arithmetic,
    "regmean": merging.regmean,
}
"""Every --method and what it calls; those of `fisherkit.merging.merge` are ways to solve."""

CHOICES: Mapping[str, tuple[str, ...]] = {
    "normalize": ("block", "output", "trace", "norm", "none"),
    "uncovered": KEEPING,
    "buffers": KEEPING,
    "integers": INTEGERS,
    "mismatched": MISMATCHED,
    "other_weights": ("refuse", "warn"),
}
"""What options of these names may be; the first is the command's default, but for --normalize of regmean."""

NOT_COMPARED = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})
"""Entries of config.json that say nothing about what the weights mean."""


@dataclass(frozen=True)
class MergeSettings:
    """The command's options.

    Args:
        models: folders, or safetensors files.
        fishers: Fisher files, in the models' order; none for average and task-arithmetic.
        out: the folder, or the file, to write.
        method: of `FUNCTIONS`.
        base: what task-arithmetic's models were fine-tuned from.
        scale: of task-arithmetic.
        config_from_first: take the first model's config and tokenizer where they differ.
        overwrite: replace what is there.
        as_json: print one JSON object.
        verbose: print a line for every block.
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
    verbose: bool
    options: dict[str, Any] = field(default_factory=dict)


def run(settings: MergeSettings) -> None:
    """Check, merge, copy what lies beside the weights, and put the folder in its place."""
    _check(settings)
    start = time.perf_counter()
    say(f"Merging {_size(settings)} ...")
    if not all(model.is_dir() for model in settings.models):
        path, info = _function(settings)(out=settings.out, overwrite=settings.overwrite)
        _tell(path, info, settings, time.perf_counter() - start)
        return
    _compare([model / "config.json" for model in settings.models], settings, "config.json", _config)
    _compare([model / "tokenizer.json" for model in settings.models], settings, "the vocabulary", _vocabulary)
    out = settings.out.resolve()
    with io.part_folder(out) as part:
        whole = part / out.name
        whole.mkdir()
        _, info = _function(settings)(out=whole)
        for path in beside_weights(settings.models[0]):
            shutil.copy2(path, whole / path.name)
        (whole / "merge.json").write_text(info.to_json() + "\n", encoding="utf-8")
        _put_in_place(whole, out, part / REPLACED)
    _tell(settings.out, info, settings, time.perf_counter() - start)


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


def _check(settings: MergeSettings) -> None:
    """What can be wrong before anything is read."""

    def refuse(got: str, expected: str, try_: str = "") -> InvalidArgumentError:
        return InvalidArgumentError(call=CALL, got=got, expected=expected, try_=try_)

    check_choice(CALL, "--method", settings.method, FUNCTIONS)
    for name, allowed in CHOICES.items():
        check_choice(CALL, f"--{name.replace('_', '-')}", settings.options.get(name, allowed[0]), allowed)
    check_device(CALL, settings.options.get("device"))
    taken = _keywords(settings)
    strange = [f"--{name.replace('_', '-')}" for name in settings.options if name not in taken]
    if strange:
        raise refuse(f"--method {settings.method} with {', '.join(strange)}", "options that it has", "leave them out")
    if "fishers" not in taken and settings.fishers:
        raise refuse(f"--method {settings.method} with --fisher", "no Fishers, which it does not use")
    if "fishers" in taken and len(settings.fishers) != len(settings.models):
        raise refuse(
            f"{len(settings.models)} models and {len(settings.fishers)} Fishers", "a Fisher for each model",
            "--model A --fisher FA --model B --fisher FB, or --method average",
        )  # fmt: skip
    if {settings.base is not None, settings.scale is not None} != {"base" in taken}:
        raise refuse(f"--method {settings.method}", "--base and --scale with task-arithmetic, and with it alone")
    center = settings.options.get("center", "average")
    named = [*([settings.base] if settings.base else []), *([Path(center)] * (center != "average"))]
    missing = [str(path) for path in (*settings.models, *named) if not path.exists()]
    missing += [str(path) for path in settings.fishers if not path.exists() and not index_of(path).exists()]
    if missing:
        raise refuse(f"paths that do not exist: {missing}", "models and Fisher files", "check the paths")
    check_target(settings.out, settings.models, [*settings.fishers, *named], overwrite=settings.overwrite)
    expect(targets(settings.out) if not all(model.is_dir() for model in settings.models) else [settings.out])


def _keywords(settings: MergeSettings) -> Collection[str]:
    return inspect.signature(FUNCTIONS[settings.method]).parameters


def _function(settings: MergeSettings) -> Callable[..., Any]:
    """The function of `fisherkit.merging` with everything but where its result goes."""
    offered = {
        "fishers": settings.fishers, "base": settings.base, "scale": settings.scale, "method": settings.method,
        "progress": True,
    }  # fmt: skip
    taken = _keywords(settings)
    given = {name: value for name, value in offered.items() if name in taken}
    if "other_weights" in taken:
        given["other_weights"] = CHOICES["other_weights"][0]
    given |= settings.options
    return partial(FUNCTIONS[settings.method], settings.models, **given, return_info=True)


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
        typer.BadParameter: weights that cannot be read.
        InvalidArgumentError: a dtype that cannot be read.
    """
    found = {name: value for name, value in others.items() if value is not None}
    if damping is not None:
        found["damping"] = damping if absolute_damping else RelativeDamping(damping)
    if normalize is not None:
        found["normalize"] = None if normalize == "none" else normalize
    if weights is not None:
        expected = '"examples" or a list of numbers such as 1,2'
        found["weights"] = weights if weights == "examples" else numbers(weights, "--weights", expected)
    if dtype is not None:
        found["dtype"] = as_dtype(CALL, dtype)
    return found


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
    return {name: value for name, value in read_json(path).items() if name not in NOT_COMPARED}


def _vocabulary(path: Path) -> dict[str, Any]:
    """A fast tokenizer's tokens; nothing if there is none."""
    vocabulary = read_json(path).get("model", {}).get("vocab", {})
    return vocabulary if isinstance(vocabulary, dict) else {str(i): entry for i, entry in enumerate(vocabulary)}


def _size(settings: MergeSettings) -> str:
    """How much is read."""

    def bytes_of(path: Path) -> int:
        whole = path if path.exists() else index_of(path)
        stem = whole.name.removesuffix(".index.json").removesuffix(".safetensors")
        files = whole.glob("*.safetensors") if whole.is_dir() else {whole, *whole.parent.glob(f"{stem}-*.safetensors")}
        return sum(file.stat().st_size for file in files)

    models = f"{len(settings.models)} models ({readable(sum(map(bytes_of, settings.models)))})"
    if not settings.fishers:
        return models
    return f"{models} by their Fishers ({readable(sum(map(bytes_of, settings.fishers)))})"


def _tell(path: Path, info: merging.MergeInfo, settings: MergeSettings, seconds: float) -> None:
    if settings.as_json:
        typer.echo(json.dumps({"out": str(path), "residual": info.residual} | json.loads(info.to_json())))
        return
    if settings.verbose and info.blocks:
        rows = [
            (listed(block.names, 2), block.method, f"{block.size:,}", f"{block.steps}",
             f"{block.residual:.1e}" + ("" if block.converged else " not converged"))
            for block in info.blocks
        ]  # fmt: skip
        typer.echo(table(("parameters", "method", "numbers", "steps", "residual"), rows, left=2) + "\n")
    counted = ", ".join(f"{count:,} {kind}" for kind, count in info.counts().items())
    what = f"{len(info.weights)} models, {seconds:.1f} s: {counted}"
    typer.echo(f"{settings.method if settings.method not in SOLVERS else 'merge'} of {what}")
    if info.blocks:
        missed = sum(not block.converged for block in info.blocks)
        typer.echo(
            f"{len(info.blocks):,} blocks solved, damping {info.damping:.3g}, residual at most {info.residual:.1e}"
            + (f"; {missed} NOT CONVERGED, see --verbose" if missed else "")
        )
    if info.unverified:
        unverified = ", ".join(map(str, info.unverified))
        typer.echo(f"Not checked: that each Fisher was measured at its model's weights (models {unverified}).")
    typer.echo(f"Wrote {path}.")
