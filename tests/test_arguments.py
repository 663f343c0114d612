"""Checks of numbers and devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fisherkit as fk
from fisherkit.arguments import check_count, check_positive, is_integer
from fisherkit.merging import MergePolicy
from fisherkit.operators import DiagonalOperator, open_file


def test_is_integer__takes_no_truth_values() -> None:
    assert is_integer(0)
    assert is_integer(-3)
    assert not any(is_integer(value) for value in (True, False, 1.0, "1", None))


@pytest.mark.parametrize("value", [1, 7, None])
def test_checks__let_counts_pass(value: int | None) -> None:
    check_positive("call", "name", value)
    check_count("call", "name", value, optional=True)


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, fk.InvalidArgumentError), (True, fk.InvalidTypeError), (2.0, fk.InvalidTypeError), ("3", fk.InvalidTypeError)],
)
def test_checks__refuse_all_else_with_the_argument_s_name(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"call: got name.* or None"):
        check_positive("call", "name", value)
    with pytest.raises(fk.InvalidArgumentError, match=f"call: got name={value!r}; expected an integer, 1 or more, or"):
        check_count("call", "name", value, optional=True)
    with pytest.raises(fk.InvalidArgumentError, match=r"1 or more\.$"):
        check_count("call", "name", None)


@pytest.mark.parametrize(
    ("device", "why"), [("foo", "no such kind of device"), ("meta", "have no values"), ("cuda:99", "")], ids=str
)
def test_device__that_is_not_there_is_refused_with_those_that_are(device: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    DiagonalOperator(fk.ParameterSpace(("w",), ((2,),)), torch.ones(2)).save(path)
    for call in (
        lambda: fk.load(path, device=device), lambda: open_file(path, device=device),
        lambda: MergePolicy(device=device),
    ):  # fmt: skip
        with pytest.raises(fk.InvalidArgumentError, match=rf"device='{device}'(?s:.*)this machine: cpu(?s:.*){why}"):
            call()
