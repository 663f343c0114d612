"""What all errors share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

import fisherkit as fk
from examples.influence.evaluation import Retraining
from fisherkit import errors
from fisherkit.errors import FisherkitError, MissingFileError, listed
from fisherkit.operators import open_file


def test_errors__are_a_builtin_exception_too() -> None:
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, FisherkitError) and error is not FisherkitError:
            builtin = [base for base in error.__mro__ if base.__module__ == "builtins"]
            assert set(builtin) - {object, BaseException, Exception}, error


READ: dict[str, Callable[[Path], object]] = {
    "load": fk.load,
    "open_file": open_file,
    "merge": lambda path: fk.merging.merge([str(path), nn.Linear(2, 1)], None),
    "retraining": Retraining.load,
}


@pytest.mark.parametrize("name", READ)
def test_missing_file__is_a_file_not_found_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    with pytest.raises(FileNotFoundError, match=r"got no such file") as caught:
        READ[name](path)
    error = caught.value
    assert isinstance(error, MissingFileError)
    assert isinstance(error, fk.FileFormatError)  # and so a ValueError, as any file that cannot be read
    assert str(error).startswith(error.call)
    assert str(path) in str(error)
    assert error.at("outer").call == "outer"


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (1, "a"), (3, "a; b; c"), (4, "a; b; c and 1 more"), (26, "a; b; c and 23 more")]
)
def test_listed__shows_the_first_and_counts_the_others(count: int, text: str) -> None:
    assert listed(iter("abcdefghijklmnopqrstuvwxyz"[:count]), 3, "; ") == text
