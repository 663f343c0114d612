"""Errors, and the checks of arguments that raise them."""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fisherkit as fk
from examples.influence.evaluation import Retraining
from fisherkit import errors
from fisherkit.arguments import check_number, is_integer
from fisherkit.errors import FisherkitError, MissingFileError, listed
from fisherkit.merging import MergePolicy
from fisherkit.operators import DiagonalOperator, open_file
from fisherkit.randomness import untouched_rng


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


INNER = "Fisher.solve: got a vector of float16; expected float64. Nothing is cast. Try: v.double()."


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({"got": f"an error in rank 1 of 2; {INNER}"}, f"call: got an error in rank 1 of 2; {INNER}"),
        ({"got": INNER, "expected": "none"}, f"call: got {INNER[:-1]}; expected none."),
        ({"got": f"{INNER}; {INNER}", "expected": "none."}, f"call: got {INNER[:-1]}; {INNER[:-1]}; expected none."),
        ({"got": "a", "why": f"it said: {INNER}", "try_": "b."}, f"call: got a. It said: {INNER} Try: b."),
        ({"got": f"a thing ({INNER})", "why": "Why."}, f"call: got a thing ({INNER}). Why."),
        ({"got": "a file ../a..b/..", "expected": "[1, ...]"}, "call: got a file ../a..b/..; expected [1, ...]."),
        ({"got": "no file ..", "try_": "f(a, ...)"}, "call: got no file ... Try: f(a, ...)."),
        ({"got": "a count of 3.", "expected": "f(x)."}, "call: got a count of 3; expected f(x)."),
    ],
)  # fmt: skip
def test_text__has_one_stop_where_parts_and_other_errors_end(parts: dict[str, str], text: str) -> None:
    error = FisherkitError("call", **parts)
    assert str(error) == text
    assert str(error.at("call")) == text


def test_text__of_nested_errors_stays_as_it_is_however_deep() -> None:
    error = FisherkitError("call", "a", "b", why="c", try_="d")
    for _ in range(4):
        error = FisherkitError("call", f"an error; {error}", f"none; as in {error}", why=str(error), try_=str(error))
        assert not re.search(r"\.[;.]", str(error)), error


# -- checks of numbers and devices -------------------------------------------------------------------------------------


def test_is_integer__takes_no_truth_values() -> None:
    assert is_integer(0)
    assert is_integer(-3)
    assert not any(is_integer(value) for value in (True, False, 1.0, "1", None))


INF = float("inf")
SPACE = fk.ParameterSpace(("w",), ((2,),))
COUNT = {"least": 1, "integer": True, "optional": True}


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        (0, COUNT, "an integer, 1 or more, or None"), (8, {**COUNT, "most": 7}, "an integer from 1 to 7, or None"),
        (True, COUNT, "an integer or None"), (2.0, COUNT, "an integer or None"), ("3", COUNT, "an integer or None"),
        (None, {"integer": True}, "an integer"), (True, {}, "a number"), (None, {}, "a number"),
        (-0.1, {}, "a finite number, 0 or more"), (INF, {}, "a finite number, 0 or more"),
        (float("nan"), {"least": -INF}, "a finite number"), (0.0, {"above": True}, "a finite number above 0"),
        (1.5, {"most": 1}, "a number from 0 to 1"), (1, {"most": 1, "below": True}, "a number from 0 to below 1"),
        (0, {"most": 1, "above": True, "below": True}, "a number above 0 and below 1"),
    ],
)  # fmt: skip
def test_check_number__says_what_it_takes(value: Any, options: dict[str, Any], expected: str) -> None:
    other = type(value) not in ((int,) if "integer" in options else (int, float))
    got = f"name of type {type(value).__name__}" if other else f"name={value!r}"
    error: type[Exception] = fk.InvalidTypeError if other else fk.InvalidArgumentError
    with pytest.raises(error, match=re.escape(f"call: got {got}; expected {expected}.")):
        check_number("call", "name", value, **options)
    for right in (3, None) if "optional" in options else (3,) if "integer" in options else (0.5,):
        assert check_number("call", "name", right, **options) == right


HUGE = 10**5000  # which Python does not print


@pytest.mark.parametrize(
    "call",
    [
        lambda: check_number("call", "name", HUGE), lambda: check_number("call", "name", -HUGE, least=-INF),
        lambda: check_number("call", "name", 10**309), lambda: check_number("call", "name", HUGE, most=3, integer=True),
        lambda: fk.RelativeDamping(HUGE), lambda: DiagonalOperator(SPACE, torch.ones(2)) * HUGE,
        lambda: DiagonalOperator(SPACE, torch.ones(2)) / HUGE,
        lambda: DiagonalOperator(SPACE, torch.ones(2)).solve(torch.ones(2), damping=HUGE),
        lambda: fk.likelihoods.Gaussian(HUGE), lambda: fk.likelihoods.Categorical(weight=[1, HUGE]),
        lambda: fk.merging.average([nn.Linear(2, 1), nn.Linear(2, 1)], weights=[HUGE, 1]),
    ],
)  # fmt: skip
def test_numbers__beyond_floating_point_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(fk.InvalidArgumentError) as caught:
        call()
    assert len(str(caught.value)) < 500


def test_check_number__takes_what_is_within_floating_point() -> None:
    assert check_number("call", "name", 10**308) == 1e308
    assert check_number("call", "name", HUGE, integer=True) == HUGE


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


# -- global generators are put back wherever they were -----------------------------------------------------------------


LEGACY: Any = np.random  # the global functions that users' code draws from

DRAWS: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None, "torch": lambda: torch.rand(1), "python": random.random,
    "python's normal": lambda: random.gauss(0, 1), "numpy": lambda: LEGACY.rand(), "numpy's normal": LEGACY.randn,
    "numpy, a whole state": lambda: LEGACY.bytes(4 * 624), "numpy, another seed": lambda: LEGACY.seed(3),
}  # fmt: skip


@pytest.fixture(params=["fresh", "a kept normal", "another kind"])
def numpy(request: pytest.FixtureRequest) -> Iterator[str]:
    """NumPy's global generator in several states; a kept normal number is drawn without moving the generator."""
    before, state = LEGACY.get_bit_generator(), LEGACY.get_state()
    LEGACY.seed(0)
    if request.param == "a kept normal":
        LEGACY.randn()
    if request.param == "another kind":
        LEGACY.set_bit_generator(np.random.PCG64(0))
    yield request.param
    LEGACY.set_bit_generator(before)
    LEGACY.set_state(state)


def places() -> list[str]:
    return [str(random.getstate()), str(LEGACY.get_state(legacy=False)), str(torch.get_rng_state().tolist())]


@pytest.mark.parametrize("name", DRAWS)
def test_untouched_rng__puts_back_what_was_drawn_and_says_so(name: str, numpy: str) -> None:
    if numpy == "another kind" and name == "numpy, another seed":
        pytest.skip("NumPy seeds only a Mersenne twister")
    before = places()
    with np.printoptions(threshold=10_000), untouched_rng([]) as draws:
        DRAWS[name]()
        moved = places() != before
    assert places() == before
    assert draws.happened == (name != "nothing")
    assert moved == (name != "nothing")
