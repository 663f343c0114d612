"""The list of structures: what the documentation and the help texts say of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fisherkit as fk
from fisherkit.structures import structures

PAGE = Path(__file__).parents[1] / "docs" / "choose-a-structure.md"
OWN = {name: one.meaning for name, one in structures().items() if one.__module__.startswith("fisherkit.")}


def test_page__has_the_names_and_meanings_of_the_registry() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("|---|")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \|", table, re.MULTILINE)
    assert dict(rows) == OWN
    assert list(OWN) == ["full", "block", "diagonal", "kfac", "ekfac", "nkp"]


def test_name__that_is_not_known_is_refused_with_the_list() -> None:
    with pytest.raises(fk.InvalidArgumentError, match=r"structure='kfak'.*'full', 'block', 'diagonal'"):
        fk.structures.structure_named("kfak", "here")
