"""The scripts of examples/ run, at small sizes, and compute what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fisherkit as fk
from examples import large_solve
from examples.benchmarks import growth


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_exponent__is_the_slope_of_the_larger_half(power: float) -> None:
    # The small half is all fixed cost.
    series: list[dict[str, float | None]] = [
        {"size": n, "seconds": 7.0 if n < 100 else n**power} for n in (1, 10, 100, 1000)
    ]
    assert growth.exponent(series, "seconds") == pytest.approx(power)


def test_exponent__needs_two_points() -> None:
    assert growth.exponent([{"size": 3, "seconds": 1.0}], "seconds") is None
    assert growth.exponent([{"size": n, "bytes": None} for n in (1, 2, 3, 4)], "bytes") is None


@pytest.mark.parametrize("sizes", [growth.Sizes(N=6, width=8, C=3), growth.Sizes(N=4, width=8, C=3, T=20)], ids=str)
def test_kept__is_what_a_fisher_keeps(sizes: growth.Sizes) -> None:
    fisher = fk.EmpiricalFisher(sizes.model(), sizes.data())
    assert fisher.size == sizes.parameters
    stored = sum(entry.memory for entry in fisher.coverage().entries) / 4
    biases = sum(o for _, o in sizes.layers)
    assert sizes.N * growth.kept(sizes) <= stored <= sizes.N * (growth.kept(sizes) + biases)


def test_growth__measures_and_writes_a_page_with_pictures(tmp_path: Path) -> None:
    tiny = {
        axis: (words, [(1, growth.Sizes(4, 8, 3)), (2, growth.Sizes(8, 8, 3))])
        for axis, (words, _) in growth.AXES.items()
    }
    result: dict[str, Any] = growth.run({axis: tiny[axis] for axis in "N"}, limit=60)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{growth.BEGIN}\nold\n{growth.END}\nafter\n")
    growth.write_docs(result, page, tmp_path)
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert all(f"| {name} |" in text for name in growth.OPERATIONS)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["growth-N.png"]


@pytest.mark.smoke
def test_large_solve__is_a_solve_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> str:
        settings = ["--examples", "60", "--budget", "0.1", "--tolerance", "1e-2", *options]
        monkeypatch.setattr("sys.argv", ["large_solve.py", str(tmp_path), *settings])
        large_solve.main()
        return capsys.readouterr().out

    assert "3 steps" in run("--max-steps", "3")
    assert "streamed rows" in run()
    solution = load_file(tmp_path / "ief-streamed.solution")["solution"]
    assert "converged: True" in run("--rows", "stored")
    direct = load_file(tmp_path / "ief-stored.solution")["solution"]
    assert solution.dtype == torch.float32
    assert float((solution - direct).norm()) < 0.1 * float(direct.norm())
