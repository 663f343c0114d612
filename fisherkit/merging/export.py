"""A Fisher's diagonal as a model folder of its own, for tools that merge models and know no Fisher file.

Owns the folder: the model's names and shapes with the diagonal as values, and what lies beside the weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from fisherkit.arguments import check_choice, check_count
from fisherkit.arithmetic import without_autocast
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, listed
from fisherkit.io import part_folder, replace_text, require_folder
from fisherkit.io.model_files import written
from fisherkit.io.tensors import Form
from fisherkit.merging.fishers import Fisher, check_fits, check_measured, open_fishers
from fisherkit.merging.models import open_model
from fisherkit.merging.policy import MOST_LISTED, WORDS

CALL = "to_mergekit"

UNCOVERED = ("refuse", "skip")
"""What becomes of tensors of the model that the Fisher does not cover."""

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
"""What is not copied from a model's folder: weights and the state of a training run."""


@without_autocast()
def to_mergekit(
    fisher: Fisher,
    model: str | Path,
    out: str | Path,
    *,
    uncovered: str = "refuse",
    other_weights: str = "refuse",
    max_shard_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write F's diagonal as a model folder that mergekit, or ``from_pretrained``, reads as another model.

    Every parameter has its name and shape and, as values, its part of the diagonal, in the Fisher's dtype. Config and
    tokenizer are the model's; the config's dtype is the diagonal's, since squares underflow in half precision.
    ``fisher.json`` beside them has the Fisher's metadata. One block at a time is in memory.

    Args:
        fisher: an operator, or the path of a Fisher file, of any structure whose diagonal has a closed form.
        model: the folder of the model that it was measured on, with ``config.json`` and safetensors.
        out: the folder to write.
        uncovered: tensors of the model that the Fisher lacks: "refuse", or "skip" to leave them out of the folder.
        other_weights: a Fisher that was measured at other weights than the model has: "refuse" or "warn".
        max_shard_size: bytes of tensors in one file; None for a single file.
        overwrite: replace a model that is there.

    Returns:
        The folder.

    Raises:
        InvalidArgumentError: names or shapes that do not fit, other weights, or a model that is there.
        InvalidTypeError: no paths.
        NoClosedFormError: a structure without a diagonal in closed form.
        MissingFileError, FileFormatError: a file that is not there, or damaged.
    """
    check_choice(CALL, "uncovered", uncovered, UNCOVERED)
    check_choice(CALL, "other_weights", other_weights, WORDS["other_weights"])
    check_count(CALL, "max_shard_size", max_shard_size, optional=True)
    if not isinstance(model, (str, Path)) or not isinstance(out, (str, Path)):
        raise InvalidTypeError(
            CALL, f"a {type(model).__name__} as model and a {type(out).__name__} as out", "paths of folders",
            try_="model.save_pretrained(folder)",
        )  # fmt: skip
    folder, out = Path(model), Path(out)
    if not (folder / "config.json").is_file():
        raise InvalidArgumentError(
            CALL, f"{folder}, which has no config.json", "a folder that save_pretrained wrote",
            why="a model without a config cannot be listed as one", try_="model.save_pretrained(folder)",
        )  # fmt: skip
    if out.resolve() == folder.resolve() or out.suffix == ".safetensors":
        raise InvalidArgumentError(
            CALL, f"out={str(out)!r}", "the name of another folder",
            why="the model would be lost" if out.suffix != ".safetensors" else "a model is a folder here",
        )  # fmt: skip
    source = open_model(folder, "the model", CALL)
    (found,) = open_fishers([fisher], [source], CALL)
    shapes = dict(zip(found.space.names, found.space.shapes, strict=True))
    check_fits(found, source, "a Fisher", CALL)
    lost = [repr(name) for name in source.shapes if name not in shapes]
    if lost and uncovered == "refuse":
        raise InvalidArgumentError(
            f'{CALL}(uncovered="refuse")',
            f"tensors of the model that the Fisher does not cover: {listed(lost, MOST_LISTED)}", "none",
            why="tools that merge expect every tensor of an architecture",
            try_='uncovered="skip", which leaves them out, or a Fisher of all parameters',
        )  # fmt: skip
    check_measured([source], [found], other_weights, CALL)
    dtype = found.read(found.blocks[0]).dtype
    forms: dict[str, Form] = {name: (shapes[name], dtype) for name in source.shapes if name in shapes}
    require_folder(out.absolute().parent, CALL)
    with part_folder(out.absolute()) as beside:
        place = out if out.exists() else beside / out.name  # a new folder appears when it is whole
        with written(place, forms, {}, max_shard_size, overwrite=overwrite, call=CALL) as put:
            for names in found.blocks:
                block = found.read(names)
                for name, part in block.space.unflatten(block.diagonal()).items():
                    put(name, part.to("cpu", dtype))
            copy_beside(folder, place, dtype)
            replace_text(place / "fisher.json", json.dumps(dict(found.metadata), indent=2) + "\n")
        if place != out:
            place.rename(out)
    return out


def copy_beside(model: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy what is no weight of a model's folder; the config says the dtype of the weights there, if it is another."""
    for path in beside_weights(model):
        shutil.copy2(path, folder / path.name)
    file = folder / "config.json"
    if dtype is not None and file.exists():  # transformers cast weights to what it says
        config, word = json.loads(file.read_text("utf-8")), str(dtype).removeprefix("torch.")
        config.update({key: word for key in ("dtype", "torch_dtype") if key in config} or {"dtype": word})
        replace_text(file, json.dumps(config, indent=2) + "\n")


def beside_weights(folder: Path) -> list[Path]:
    """Config, tokenizer and whatever else is no weight of a model's folder."""
    return sorted(
        path for path in folder.iterdir() if path.is_file() and not any(path.match(pattern) for pattern in WEIGHT_FILES)
    )
