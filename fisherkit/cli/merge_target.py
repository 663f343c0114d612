"""Where ``fisherkit merge`` may put its result: never in the place of what it reads, or of anything but a model.

Owns what is refused about ``--out``, all of it before anything is read, and which files of a folder are a model's
weights. Knows nothing of merging.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fisherkit.cli.command import refuse_existing
from fisherkit.errors import FileFormatError, InvalidArgumentError
from fisherkit.merging.checkpoints import FOLDER_NAMES
from fisherkit.merging.writing import targets

CALL = "fisherkit merge"

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
"""What is not copied from the first model's folder: weights and the state of a training run."""


def check_target(out: Path, models: Sequence[Path], others: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse a place where something would be lost, or that cannot be written to.

    Args:
        out: the target: a folder, replaced whole, if all models are folders.
        models: folders, or safetensors files.
        others: what else is read: Fishers, a base, a center.
        overwrite: whether a model that is there may go.

    Raises:
        InvalidArgumentError: as above.
        FileFormatError: an index in the target that is not JSON.
    """
    whole = all(model.is_dir() for model in models)
    if not out.absolute().parent.is_dir():
        _refuse(
            f"--out in a folder that does not exist: {out.parent}", "an existing folder",
            try_=f"mkdir -p {shlex.quote(str(out.parent))}",
        )  # fmt: skip
    if whole and (out.suffix == ".safetensors" or (out.exists() and not out.is_dir())):
        _refuse(
            f"models that are folders and --out {out}, a file", "the name of a folder",
            "folders are merged with what lies beside the weights", "--out merged, or files such as --model "
            f"{models[0] / FOLDER_NAMES[0]}",
        )  # fmt: skip
    _refuse_sources(out, (*models, *others), whole)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        _refuse(f"--out {out}, a folder that is not empty", "another name", try_="--overwrite replaces it")
    if out.is_dir() and whole:
        _refuse_strangers(out, models[0])
    if out.is_file():
        refuse_existing((out,), f"{CALL} --out", overwrite=overwrite)


def beside_weights(folder: Path) -> list[Path]:
    """Config, tokenizer and whatever else is no weight of a model's folder."""
    return sorted(
        path for path in folder.iterdir()
        if path.is_file() and not any(path.match(pattern) for pattern in WEIGHT_FILES)
    )  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; nothing if there is no file, or no object in it.

    Raises:
        FileFormatError: it is not JSON.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(call=CALL, got=f"{path}, which is not JSON ({error})", expected="a model's") from error
    return found if isinstance(found, dict) else {}


def _refuse_sources(out: Path, sources: Sequence[Path], whole: bool) -> None:
    place = out.resolve()
    written = {place} if whole else {place, *(target.resolve() for target in targets(out))}
    for source in sources:
        for path in _places(source):
            if path in written or (whole and place in path.parents):
                _refuse(f"--out {out}, the place of {source}, which is read", "another place", "it would be lost")


def _places(source: Path) -> Iterator[Path]:
    """Where a source and, of a folder, its files lie in truth."""
    yield source.resolve()
    if source.is_dir():
        yield from (path.resolve() for path in source.iterdir() if path.is_file())


def _refuse_strangers(folder: Path, first: Path) -> None:
    """A folder is replaced whole, so it may hold a model's weights, and else only what the first model's has too."""
    shards = read_json(folder / FOLDER_NAMES[1]).get("weight_map")
    weights = [*FOLDER_NAMES, *(shards.values() if isinstance(shards, dict) else ())]
    known = ["merge.json", *weights, *(path.name for path in beside_weights(first))]
    strangers = sorted(path.name for path in folder.iterdir() if path.is_dir() or path.name not in known)
    if strangers:
        _refuse(
            f"--overwrite of {folder}, which holds {strangers[:8]}", "a folder of a model alone",
            "it is replaced whole, and they would be lost", "another --out",
        )  # fmt: skip


def _refuse(got: str, expected: str, why: str = "", try_: str = "") -> NoReturn:
    raise InvalidArgumentError(call=CALL, got=got, expected=expected, why=why, try_=try_)
