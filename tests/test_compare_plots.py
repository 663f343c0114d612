"""Pictures and averages of `compare`'s tables."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

import fisherkit as fk
from fisherkit.evaluation import QualityTable, average, compare, plot_damping
from tests.test_compare import data, network


def tables() -> list[QualityTable]:
    kinds, structures = ("sgd", "ef", "ief"), ("full", "diagonal")
    return [
        compare(network(), data(seed=s), kinds=kinds, structures=structures, gram_dampings=(1e-3, 1e-1)) for s in (1, 2)
    ]


def test_average__is_mean_and_deviation_over_batches() -> None:
    both = tables()
    found = average(both)
    values = [table.rows[1].relative_gamma for table in both]
    assert found["ef", "full", 1e-3] == pytest.approx((statistics.fmean(values), statistics.stdev(values)))
    assert found["sgd", "none", None] == (1.0, 0.0)
    assert average(both[:1])["ef", "full", 1e-3] == (values[0], 0.0)


def test_average__refuses_tables_of_different_updates() -> None:
    one, two = tables()
    with pytest.raises(fk.InvalidArgumentError, match="different kinds"):
        average([one, replace(two, rows=two.rows[1:])])
    with pytest.raises(fk.InvalidArgumentError, match="no table"):
        average([])


def test_plots__are_files(tmp_path: Path) -> None:
    both = tables()
    plot_damping(both[0], tmp_path / "one.png")
    plot_damping(both, tmp_path / "two.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.svg"]
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "two.svg").read_text(encoding="utf-8")


def test_plots__say_what_they_cannot_draw(tmp_path: Path) -> None:
    table = tables()[0]
    alone = replace(table, rows=table.rows[:1])
    with pytest.raises(fk.InvalidArgumentError, match="alone"):
        plot_damping(alone, tmp_path / "run.png")
    with pytest.raises(fk.InvalidArgumentError, match="a folder that does not exist"):
        plot_damping(table, tmp_path / "none" / "run.png")
    assert list(tmp_path.iterdir()) == []
