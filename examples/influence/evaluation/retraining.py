"""Training one architecture on many subsets of the data and measuring each model, with a file that a long run keeps.

The list of models still to be trained, what is measured of them, and the file's format, so that an interrupted run can
go on. Knows neither scores nor what the subsets mean. Pickle is never used.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm import tqdm

from examples.influence.evaluation.checks import check_masks
from examples.influence.evaluation.losses import Loss, Measurements, PerExample, loss_of, measurements_of, resolved_loss
from examples.influence.evaluation.training import Build, TrainingRecipe, built, train_model
from fisherkit import io
from fisherkit.arguments import is_integer
from fisherkit.arithmetic import all_finite
from fisherkit.data import Batch
from fisherkit.errors import (
    DataError,
    FileFormatError,
    InvalidArgumentError,
    InvalidTypeError,
    MissingFileError,
    NonFiniteError,
)
from fisherkit.model_state import tensors_hash

FORMAT = "fisherkit-retraining"
VERSION = 1
_OUTPUTS = "outputs."
_EVALUATED = 256
"""Examples that are measured at once."""

Labelled = tuple[Batch, Tensor]
"""Examples and their targets, of which a batch by itself may have none."""


@dataclass(frozen=True)
class Retraining:
    """The outputs of models trained on subsets of the data.

    Args:
        masks: ``[S, N]``, which training examples each subset has.
        seeds: R of them; each subset was trained once from each.
        outputs: by measurement, ``[S, R, Q]``, float64 on the CPU, larger = better.
        train_losses: ``[S, R]``, the mean loss of each trained model on its own subset.
        settings: what it was made with, as JSON has it.
    """

    masks: Bool[Tensor, "S N"]
    seeds: tuple[int, ...]
    outputs: dict[str, Float[Tensor, "S R Q"]]
    train_losses: Float[Tensor, "S R"]
    settings: dict[str, Any]

    @staticmethod
    def load(path: str | Path) -> Retraining:
        """From a finished file of `retrain`.

        Args:
            path: the file.

        Raises:
            InvalidTypeError: path is not a path.
            MissingFileError: no such file.
            FileFormatError: damaged, of another kind or version, or unfinished.
        """
        call = f"Retraining.load({str(path)!r})"
        path = io.as_path(path, "Retraining.load")
        if not path.is_file():
            raise MissingFileError(call=call, got="no such file", expected="one written by retrain")
        settings, tensors = _read(path, call)
        done = tensors["done"]
        if not bool(done.all()):
            raise FileFormatError(
                call=call, got=f"an unfinished run, {int(done.sum())} of {done.numel()} models", expected="all of them",
                try_="retrain with the same arguments and path, which goes on from there",
            )  # fmt: skip
        return _result(settings, tensors)


def random_subsets(examples: int, subsets: int, *, fraction: float = 0.5, seed: int = 0) -> Bool[Tensor, "S N"]:
    """Random subsets of one size, ⌊fraction · N⌋ examples without repetition.

    Args:
        examples: N.
        subsets: S.
        fraction: of the examples that each subset has.
        seed: of the draw; the first subsets of a longer list are those of a shorter one.

    Raises:
        InvalidArgumentError: a count below 1, or a fraction that leaves none or all of the examples.
    """
    size = int(fraction * examples)
    if examples < 2 or subsets < 1 or not 0 < size < examples:
        raise InvalidArgumentError(
            call="random_subsets", got=f"examples={examples}, subsets={subsets}, fraction={fraction}",
            expected="subsets ≥ 1 and 1 ≤ fraction · examples < examples",
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(subsets, examples, dtype=torch.bool)
    for row in masks:
        row[torch.randperm(examples, generator=generator)[:size]] = True
    return masks


def retrain(
    build: Build,
    train: tuple[Any, Tensor],
    queries: tuple[Any, Tensor],
    masks: Bool[Tensor, "S N"],
    recipe: TrainingRecipe,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    likelihood: Loss = "categorical",
    measurements: Measurements = ("loss",),
    path: str | Path | None = None,
    save_every: float = 30.0,
    progress: bool = False,
) -> Retraining:
    """Train a model on every subset from every seed, and measure each on the queries.

    A model starts from ``build(seed)`` and is trained on the mean loss of each batch of its own subset. The order of
    the examples, and dropout, depend on the seed alone, so that two subsets' models differ by nothing else. Outputs are
    measured in eval mode.

    Args:
        build: a seed to a model, which is copied. It is called with torch's generators seeded by that seed; they are
            put back afterwards. Parameters that do not require grad stay as they are.
        train: inputs and targets of all N training examples, in memory; inputs may be a dict of the model's keywords.
        queries: inputs and targets to measure on.
        masks: which training examples each subset has.
        recipe: how to train.
        seeds: R distinct integers.
        likelihood: what is trained on: "categorical", "gaussian", "bernoulli" or an object of these classes (as
            everywhere in the package), or a function of outputs and targets that returns a loss for each example.
        measurements: what is recorded, larger = better: "loss" is −ℓ, "margin" is log(p_y / (1 − p_y)) of the labels
            (Park et al. 2023, §3.3), summed over an example's positions or outputs; or a dict of functions of outputs
            and targets. A function returns a number for each example and is read like a loss: its negative is
            recorded.
        path: a file that results are added to as they come in. If it exists and was written with the same arguments,
            the run goes on from it; functions are told apart by their names only.
        save_every: seconds between writes of the file, at least; 0 writes after every model.
        progress: show a progress bar.

    Returns:
        Outputs, subsets and seeds.

    Raises:
        InvalidTypeError: arguments of a wrong type.
        InvalidArgumentError: masks, seeds, names or sizes that do not fit; a path whose file belongs to another run.
        DataError: batches without targets, or targets that do not fit the outputs.
        NonFiniteError: a model diverged; the message names its subset and seed.
        FileFormatError: the file is damaged or of another kind.

    Cost: S · R trainings, one after the other.
    """
    call = "retrain"
    data, targets = _batch_of(train, f"{call}, train")
    asked, wanted = _batch_of(queries, f"{call}, queries")
    check_masks(masks, call, data.size)
    _check_training(recipe, seeds, call)
    loss = loss_of(likelihood, call)
    measured = measurements_of(measurements, likelihood, call)
    masks = masks.cpu()
    untrained = [built(build, seed, call) for seed in seeds]
    settings = {
        "recipe": asdict(recipe),
        "seeds": list(seeds),
        "likelihood": _recorded(likelihood),
        "measurements": {name: _name(function) for name, function in measured.items()},
        "data": _hash([*data.batched, targets, *asked.batched, wanted]),
        "subsets": _hash([masks]),
        "models": _hash([tensor for model in untrained for tensor in model.state_dict().values()]),
    }
    device = next(untrained[0].parameters()).device
    data, asked, targets, wanted = data.to(device), asked.to(device), targets.to(device), wanted.to(device)
    file = RunsFile(path, settings, masks, measured, (len(masks), len(seeds), asked.size), save_every, call)
    bar = tqdm(
        total=file.done.numel() * recipe.epochs, initial=int(file.done.sum()) * recipe.epochs, desc=call,
        unit="epoch", disable=not progress,
    )  # fmt: skip
    with file, bar:
        for subset, place in (~file.done).nonzero().tolist():
            model, mask = copy.deepcopy(untrained[place]), masks[subset]
            train_model(model, seeds[place], data, targets, mask, recipe, loss, bar.update)
            outputs = _measured(model, asked, wanted, measured)
            own = _measured(model, data, targets, {"training loss": loss})["training loss"][mask.to(device)].mean()
            for name, values in {**outputs, "training loss": own}.items():
                if not all_finite(values):
                    raise NonFiniteError(
                        call=call, got=f"NaN or infinity as {name} of subset {subset} from seed {seeds[place]}",
                        expected="finite numbers", why="training diverged, or the measurement is not finite",
                        try_="a smaller learning rate",
                    )  # fmt: skip
            file.put(subset, place, outputs, own)
    return file.result()


@torch.no_grad()
def _measured(
    model: nn.Module, batch: Batch, targets: Tensor, functions: Mapping[str, PerExample]
) -> dict[str, Float[Tensor, " B"]]:
    """Every function of a trained model's outputs, in eval mode."""
    model.eval()
    parts: dict[str, list[Tensor]] = {name: [] for name in functions}
    for start in range(0, batch.size, _EVALUATED):
        part = slice(start, start + _EVALUATED)
        z = batch.take(part).call(model)
        for name, function in functions.items():
            parts[name].append(function(z, targets[part]))
    return {name: torch.cat(found) for name, found in parts.items()}


def train_models(
    build: Build,
    train: tuple[Any, Tensor],
    recipe: TrainingRecipe,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    mask: Bool[Tensor, " N"] | None = None,
    likelihood: Loss = "categorical",
    progress: bool = False,
) -> list[nn.Module]:
    """One trained model for each seed, as `retrain` trains them.

    Args:
        build: a seed to an untrained model.
        train: inputs and targets of all N training examples, in memory.
        recipe: how to train.
        seeds: one model each.
        mask: which examples to train on; None is all of them.
        likelihood: what is trained on: a likelihood's name or object, torch's loss module, or a function of outputs and
            targets that returns a loss for each example.
        progress: show a progress bar.

    Raises:
        InvalidTypeError: arguments of a wrong type.
        InvalidArgumentError: a mask or seeds that do not fit.
        DataError: no targets, or targets that do not fit the outputs.
    """
    call = "train_models"
    data, targets = _batch_of(train, f"{call}, train")
    _check_training(recipe, seeds, call)
    kept = torch.ones(data.size, dtype=torch.bool) if mask is None else _only_mask(mask, call, data.size)
    loss = loss_of(likelihood, call)
    models = [built(build, seed, call) for seed in seeds]
    device = next(models[0].parameters()).device
    data, targets = data.to(device), targets.to(device)
    with tqdm(total=len(seeds) * recipe.epochs, desc=call, unit="epoch", disable=not progress) as bar:
        for model, seed in zip(models, seeds, strict=True):
            train_model(model, seed, data, targets, kept, recipe, loss, bar.update)
    return models


class RunsFile:
    """Results as they come in, on disk if there is a path; a file that another run has left there is refused.

    Args:
        path: the file; need not exist. None: results are kept in memory only.
        settings: what the run is made with.
        masks: the subsets.
        measurements: names.
        shape: (subsets, seeds, queries).
        every: seconds between writes.
        call: for errors.
    """

    def __init__(
        self, path: str | Path | None, settings: dict[str, Any], masks: Bool[Tensor, "S N"],
        measurements: Iterable[str], shape: tuple[int, int, int], every: float, call: str,
    ) -> None:  # fmt: skip
        self.settings, self.every = settings, every
        self.path = None if path is None else io.as_path(path, call)
        self._last, self._unsaved = time.monotonic(), False
        self.tensors = {
            "masks": masks.clone(),
            "done": torch.zeros(shape[:2], dtype=torch.bool),
            "train_losses": torch.full(shape[:2], float("nan"), dtype=torch.float64),
        } | {_OUTPUTS + name: torch.full(shape, float("nan"), dtype=torch.float64) for name in measurements}
        if self.path is None:
            return
        call = f"{call}(path={str(path)!r})"
        io.check_folder(self.path, call)
        if self.path.exists():
            found, tensors = _read(self.path, call)
            differing = sorted(k for k in settings.keys() | found.keys() if settings.get(k) != found.get(k))
            if differing:
                raise InvalidArgumentError(
                    call=call, got=f"the file of another run, which differs in {differing}",
                    expected="no file yet, or that of a run with the same arguments",
                    why="going on from there would mix two runs; the file has been left as it is",
                    try_="another path, or delete the file if that run is no longer wanted",
                )  # fmt: skip
            self.tensors = tensors

    @property
    def done(self) -> Bool[Tensor, "S R"]:
        """Which models are trained and measured."""
        return self.tensors["done"]

    def put(self, subset: int, seed: int, outputs: dict[str, Tensor], train_loss: Tensor) -> None:
        """Add a model by the places of its subset and seed, and write the file if it is time to."""
        for name, values in outputs.items():
            self.tensors[_OUTPUTS + name][subset, seed] = values.double().cpu()
        self.tensors["train_losses"][subset, seed] = train_loss.double().cpu()
        self.done[subset, seed] = self._unsaved = True
        if time.monotonic() - self._last >= self.every:
            self._write()

    def __enter__(self) -> RunsFile:
        """Nothing; leaving writes what is not on disk yet, also after an exception."""
        return self

    def __exit__(self, *exception: object) -> None:
        if self._unsaved:
            self._write()

    def _write(self) -> None:
        """Put the file in place; an interruption meanwhile leaves the one before it."""
        if self.path is not None:
            header = {"format": FORMAT, "version": str(VERSION), "settings": json.dumps(self.settings, sort_keys=True)}
            io.replace_checked_file(self.path, self.tensors, header)
        self._last, self._unsaved = time.monotonic(), False

    def result(self) -> Retraining:
        """What is there."""
        return _result(self.settings, self.tensors)


def _read(path: Path, call: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header, tensors = io.read_tensors(path, "cpu", call, "retrain")
    if header.get("format") != FORMAT:
        raise FileFormatError(
            call=call, got="a file of another kind, which has been left as it is", expected="one written by retrain"
        )
    try:
        version, settings = int(header["version"]), dict(io.parse(header["settings"]))
        if missing := [name for name in ("masks", "done", "train_losses") if name not in tensors]:
            raise ValueError(f"no tensor {missing[0]!r}")
        tuple(settings["seeds"])
    except (LookupError, ValueError, TypeError) as error:
        raise FileFormatError(
            call=call, got=f"a file that cannot be read ({error})", expected="one written by retrain",
            try_="another path, or delete the file",
        ) from error  # fmt: skip
    if version > VERSION:
        raise FileFormatError(
            call=call, got=f"format version {version}", expected=f"at most {VERSION}", try_="a newer fisherkit"
        )
    return settings, tensors


def _result(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Retraining:
    outputs = {n.removeprefix(_OUTPUTS): t for n, t in tensors.items() if n.startswith(_OUTPUTS)}
    return Retraining(tensors["masks"], tuple(settings["seeds"]), outputs, tensors["train_losses"], settings)


def _batch_of(raw: Any, call: str) -> Labelled:
    """Inputs and targets as users pass them."""
    batch = Batch.of(raw, call)
    if batch.targets is None:
        raise DataError(call=call, got="no targets", expected="a pair (inputs, targets)")
    return batch, batch.targets


def _check_training(recipe: object, seeds: Sequence[int], call: str) -> None:
    """Refuse what no training can use."""
    if not isinstance(recipe, TrainingRecipe):
        raise InvalidTypeError(call=call, got=f"a {type(recipe).__name__} as recipe", expected="a TrainingRecipe")
    whole = all(is_integer(seed) and seed >= 0 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise InvalidArgumentError(call=call, got=f"seeds={list(seeds)}", expected="distinct integers, 0 or more")


def _recorded(likelihood: Loss) -> str:
    """As the file of a run has it."""
    known = resolved_loss(likelihood)
    return f"function {_name(likelihood)}" if known is None else known.recorded


def _hash(tensors: Sequence[Tensor]) -> str:
    return tensors_hash({f"{place:06d}": tensor for place, tensor in enumerate(tensors)})


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _only_mask(mask: object, call: str, examples: int) -> Bool[Tensor, " N"]:
    """Which examples are in the one subset there is."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"a mask of {mask.dtype}" if isinstance(mask, Tensor) else f"a mask of type {type(mask).__name__}"
        raise InvalidTypeError(call=call, got=got, expected="a boolean tensor [N]", try_="torch.tensor(mask).bool()")
    return check_masks(mask[None] if mask.ndim == 1 else mask, call, examples)[0].cpu()
