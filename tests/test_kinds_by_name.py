"""Kinds and structures by their names."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fisherkit as fk
from fisherkit.structures import structures
from fisherkit.vectors import rule_of, spelled, spellings

CASES = {
    "ef": ("ef", {}),
    "ief": ("ief", {}),
    "ief:0.5": ("ief", {"power": 0.5}),
    "sf": ("sf", {}),
    "sf:4": ("sf", {"draws": 4}),
    "truncated": ("truncated", {}),
    "truncated:3": ("truncated", {"rank": 3}),
    "truncated:0.01": ("truncated", {"tolerance": 0.01}),
    "exact": ("exact", {}),
}


@pytest.mark.parametrize(("text", "written"), CASES.items())
def test_parse__says_what_the_optimizers_keywords_say(text: str, written: tuple[str, dict[str, Any]]) -> None:
    assert sorted(text.partition(":")[0] for text in spellings()) == sorted(name for name, _ in CASES.values())
    name, options = written
    by_text, by_keyword = rule_of(text, call="test"), rule_of(name, call="test", options=options)
    assert type(by_text) is type(by_keyword)
    assert by_text.kind_options() == by_keyword.kind_options()
    model, data = nn.Linear(3, 4), (torch.ones(2, 3), torch.tensor([0, 1]))
    metadata = fk.FisherApproximation(model, data, text).metadata
    assert {**metadata, "kind": name, **by_keyword.kind_options()} == metadata


@pytest.mark.parametrize("text", [*CASES, "ief:0", "truncated:0", "truncated:1e-5"])
def test_spelled__is_read_back_as_the_same_kind(text: str) -> None:
    model, data = nn.Linear(3, 4), (torch.ones(2, 3), torch.tensor([0, 1]))
    if text == "truncated:0":
        metadata = fk.TruncatedFisher(model, data, tolerance=0).metadata
    else:
        metadata = fk.FisherApproximation(model, data, text).metadata
    again = fk.FisherApproximation(model, data, spelled(metadata)).metadata
    assert again | {"tolerance": ""} == metadata | {"tolerance": ""}
    assert ("tolerance" in metadata) == ("tolerance" in again)


def test_spelled__names_what_it_knows() -> None:
    assert spelled({}) == "unknown"
    assert spelled({"kind": "ief", "power": "0.5"}) == "ief:0.5"
    assert spelled({"kind": "ief", "power": "1.0"}) == "ief"
    assert spelled({"kind": "sf", "draws": "4", "seed": "3"}) == "sf:4"
    assert spelled({"kind": "likely", "rank": "3"}) == "likely"


def test_step__takes_a_setting_and_a_seed() -> None:
    assert rule_of("sf:4", call="test", options={"seed": 3}).kind_options() == {"draws": "4", "seed": "3"}
    model = nn.Linear(3, 4)
    for kind in ("truncated:2", "sf:2"):
        fk.optim.NaturalGradient(model, lr=0.1, kind=kind, damping=1e-2).close()
        fk.optim.Preconditioner(model, kind=kind, damping=1e-2).close()
    assert fk.optim.RowDamped("truncated:1", 0.1).kind_options() == {"rank": "1", "row_damping": "0.1"}


# -- the list of structures --------------------------------------------------------------------------------------------


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
