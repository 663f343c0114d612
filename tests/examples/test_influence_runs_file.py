"""The file of a long retraining: going on, refusing, replacing whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fisherkit as fk
from examples.influence.evaluation import Retraining, retrain
from examples.influence.evaluation import retraining as module
from tests.examples.retraining_cases import ADAMW, MASKS, QUERIES, SGD, TRAIN, mlp


def interrupted(monkeypatch: pytest.MonkeyPatch, path: Path, models: int, **options: Any) -> None:
    """Stop a run after some models."""
    train, count = module.train_model, 0

    def stopping(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > models:
            raise KeyboardInterrupt
        return train(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train_model", stopping)
        with pytest.raises(KeyboardInterrupt):
            retrain(mlp, TRAIN, QUERIES, MASKS, SGD, path=path, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("save_every", [0.0, 1e9])
def test_retrain__goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, save_every: float) -> None:
    options: dict[str, Any] = {"seeds": (0, 5), "save_every": save_every}
    path = tmp_path / "runs.safetensors"
    whole = retrain(mlp, TRAIN, QUERIES, MASKS, SGD, **options)
    interrupted(monkeypatch, path, 4, **options)
    with pytest.raises(fk.errors.FileFormatError, match="unfinished run, 4 of 10"):
        Retraining.load(path)
    calls: list[int] = []
    train = module.train_model
    monkeypatch.setattr(module, "train_model", lambda *args: calls.append(1) or train(*args))
    finished = retrain(mlp, TRAIN, QUERIES, MASKS, SGD, path=path, **options)
    assert sum(calls) == 6
    assert torch.equal(finished.outputs["loss"], whole.outputs["loss"])
    again = retrain(mlp, TRAIN, QUERIES, MASKS, SGD, path=path, **options)
    assert sum(calls) == 6
    loaded = Retraining.load(path)
    for other in (again, loaded):
        assert torch.equal(other.outputs["loss"], whole.outputs["loss"])
        assert torch.equal(other.train_losses, whole.train_losses)
    assert torch.equal(loaded.masks, MASKS)
    assert loaded.seeds == (0, 5)
    assert [file.name for file in tmp_path.iterdir()] == ["runs.safetensors"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": ADAMW}, "recipe"),
        ({"seeds": (0, 2)}, "models"),
        ({"masks": ~MASKS | MASKS[[1, 2, 3, 4, 0]]}, "subsets"),
        ({"train": (TRAIN[0] + 1, TRAIN[1])}, "data"),
        ({"measurements": ("margin",)}, "measurements"),
        ({"build": lambda seed: nn.Linear(5, 3).double()}, "models"),
    ],
)
def test_retrain__refuses_the_file_of_another_run(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = tmp_path / "runs.safetensors"
    arguments: dict[str, Any] = {
        "build": mlp, "train": TRAIN, "queries": QUERIES, "masks": MASKS, "recipe": SGD, "seeds": (0, 1), "path": path,
    }  # fmt: skip
    retrain(**arguments)
    content = path.read_bytes()
    with pytest.raises(fk.errors.InvalidArgumentError, match=f"another run, which differs in .*{named}"):
        retrain(**{**arguments, **change})
    assert path.read_bytes() == content


def test_files__of_other_kinds_are_refused_and_left(tmp_path: Path) -> None:
    broken, fisher = tmp_path / "broken", tmp_path / "fisher"
    broken.write_bytes(b"nothing")
    fk.EmpiricalFisher(mlp(0), TRAIN).save(fisher)
    for path in (broken, fisher):
        content = path.read_bytes()
        with pytest.raises(fk.errors.FileFormatError):
            retrain(mlp, TRAIN, QUERIES, MASKS, SGD, path=path)
        with pytest.raises(fk.errors.FileFormatError):
            Retraining.load(path)
        assert path.read_bytes() == content
    with pytest.raises(fk.errors.FileFormatError, match="no such file"):
        Retraining.load(tmp_path / "none")
    with pytest.raises(fk.errors.InvalidArgumentError, match="does not exist"):
        retrain(mlp, TRAIN, QUERIES, MASKS, SGD, path=tmp_path / "no" / "runs")
