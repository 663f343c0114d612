"""Scores of the models by a method at some dampings, kept in files. Owns file names and the clock; knows no retraining.

Seconds are the process's own on the processor, so that other work on the machine shows as little as it can.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from examples.influence import peers
from examples.influence.evaluation import average_scores
from examples.influence.methods import UNDAMPED, methods
from examples.influence.settings import Setting
from fisherkit import io
from fisherkit.model_state import tensors_hash


@dataclass(frozen=True)
class Scored:
    """What a file has.

    Args:
        method: its name.
        damping: in multiples of the mean eigenvalue; None where there is none.
        fit: seconds a model for what does not depend on queries and damping.
        seconds: a model for the rest, a factorization included.
        path: of the file.
    """

    method: str
    damping: float | None
    fit: float
    seconds: float
    path: Path

    def scores(self) -> Tensor:
        """``[Q, N]``, the models' mean."""
        return _read(self.path)[1]


def dampings_of(method: str, dampings: Sequence[float]) -> list[float | None]:
    """All, or None alone for a method that has none."""
    return [None] if method in (*UNDAMPED, *peers.UNDAMPED) else list(dampings)


def score(
    setting: Setting, models: Sequence[nn.Module], method: str, dampings: Sequence[float | None], folder: Path
) -> None:
    """Mean scores of the models, unless their file is there and of the same models.

    Args:
        setting: data and name.
        models: trained ones.
        method: its name.
        dampings: which.
        folder: for the files.
    """
    checksum = checksum_of(models)
    wanted = [d for d in dampings if not _has(_path(folder, setting.name, method, d), checksum)]
    if not wanted:
        return
    found: dict[float | None, list[Tensor]] = {damping: [] for damping in wanted}
    seconds = dict.fromkeys(wanted, 0.0)
    fitted = 0.0
    for model in models:
        begin = time.process_time()
        scorer = methods()[method](model, setting.train)
        fitted += (time.process_time() - begin) / len(models)
        for damping in wanted:
            begin = time.process_time()
            found[damping].append(scorer(setting.queries, damping))
            seconds[damping] += (time.process_time() - begin) / len(models)
    for damping in wanted:
        header = {
            "models": checksum, "method": method, "damping": json.dumps(damping), "fit": json.dumps(fitted),
            "seconds": json.dumps(seconds[damping]),
        }  # fmt: skip
        path = _path(folder, setting.name, method, damping)
        path.parent.mkdir(parents=True, exist_ok=True)
        io.replace_checked_file(path, {"scores": average_scores(found[damping]).float().contiguous()}, header)
        print(
            f"  {setting.name}, {method}, damping {damping}: {fitted:.2f} + {seconds[damping]:.2f} s a model",
            flush=True,
        )


def scored(setting: str, models: Sequence[nn.Module], folder: Path) -> Iterator[Scored]:
    """What the files of a setting have, of these models."""
    checksum = checksum_of(models)
    for path in sorted((folder / f"{setting}-scores").glob("*.safetensors")):
        header = _read(path)[0]
        if header.get("models") == checksum:
            yield Scored(
                header["method"], json.loads(header["damping"]), json.loads(header["fit"]),
                json.loads(header["seconds"]), path,
            )  # fmt: skip


def checksum_of(models: Sequence[nn.Module]) -> str:
    """Of their parameters."""
    return tensors_hash({f"{i}.{name}": p for i, model in enumerate(models) for name, p in model.named_parameters()})


def _path(folder: Path, setting: str, method: str, damping: float | None) -> Path:
    slug = re.sub(r"[^\w.]+", "-", method if damping is None else f"{method}-{damping:g}")
    return folder / f"{setting}-scores" / f"{slug}.safetensors"


def _has(path: Path, checksum: str) -> bool:
    return path.exists() and _read(path)[0].get("models") == checksum


def _read(path: Path) -> tuple[dict[str, str], Tensor]:
    header, tensors = io.read_tensors(path, "cpu", "scores", "examples.influence")
    return header, tensors["scores"]
