"""What many retrainings said, and the file in which a long run keeps it, so that an interrupted one can go on.

Owns the file's format and whether it belongs to the run at hand. Trains nothing. Pickle is never used.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fisherkit import io
from fisherkit.errors import FileFormatError, InvalidArgumentError, MissingFileError

FORMAT = "fisherkit-retraining"
VERSION = 1
_OUTPUTS = "outputs."


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


class RunsFile:
    """Results as they come in, on disk if there is a path.

    Args:
        path: the file; need not exist. None: results are kept in memory only.
        settings: what the run is made with; a file made with others is refused.
        masks: the subsets.
        measurements: names.
        shape: (subsets, seeds, queries).
        every: seconds between writes.
        call: for errors.

    Raises:
        InvalidTypeError: path is not a path.
        InvalidArgumentError: no file can be at the path, or it belongs to another run.
        FileFormatError: there is a file, and it is damaged or not one of these.
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

    def put(self, subsets: Tensor, seeds: Tensor, outputs: dict[str, Tensor], train_losses: Tensor) -> None:
        """Add models, and write the file if it is time to.

        Args:
            subsets: place of each model's subset.
            seeds: place of each model's seed.
            outputs: ``[M, Q]`` by measurement.
            train_losses: ``[M]``.
        """
        for name, values in outputs.items():
            self.tensors[_OUTPUTS + name][subsets, seeds] = values.double().cpu()
        self.tensors["train_losses"][subsets, seeds] = train_losses.double().cpu()
        self.done[subsets, seeds] = self._unsaved = True
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


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """A hash of tensors' types, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
