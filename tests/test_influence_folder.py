"""Training rows in a folder: the same scores, the same bytes after an interruption, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit import io
from fisherkit.influence import InfluenceScores
from tests.conformance_cases import build, problem
from tests.influence_cases import data
from tests.small_data import X, Y, cut, mlp, same

QUERIES = (X[:3] + 1, Y[:3])


def influence(structure: str = "full", **options: Any) -> InfluenceScores:
    model = mlp()
    return InfluenceScores(fk.EmpiricalFisher(model, (X, Y), structure=structure), model, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("structure", ["full", "block", "diagonal", "kfac", "ekfac"])
def test_scores__from_a_folder_are_those_from_memory(structure: str, tmp_path: Path) -> None:
    scores = influence(structure, memory_budget=20_000)
    prepared = scores.prepare(cut(2, 4, 1), folder=tmp_path / "rows")
    same(scores.scores(QUERIES, prepared), influence(structure).scores(QUERIES, (X, Y)))
    same(scores.self_influence(prepared), influence(structure).self_influence((X, Y)))
    assert {"manifest.json", "rows-000000.safetensors"} < contents(tmp_path / "rows").keys()


@pytest.mark.parametrize("family", ["conv2d", "embedding", "token_attention", "mapping_batch", "tied_linears", "rnn"])
def test_every_form_of_rows__comes_back(family: str, tmp_path: Path) -> None:
    of = problem(family)
    scores = InfluenceScores(build(family, "ef", "ekfac"), of.model)
    prepared = scores.prepare(data(of), folder=tmp_path / "rows")
    same(scores.scores(data(of), prepared), scores.scores(data(of), data(of)))
    tokens = scores.prepare(data(of), folder=tmp_path / "tokens", by="token")
    same(scores.scores(data(of), tokens, by="token"), scores.scores(data(of), data(of), by="token"))


def test_an_interrupted_run__goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = influence()
    scores.prepare(cut(2, 3, 2), folder=tmp_path / "whole")
    written: list[str] = []
    original = io.replace_checked_file

    def killed(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> str:
        written.append(Path(path).name)
        if len(written) == 2:
            raise KeyboardInterrupt
        return original(path, tensors, header)

    monkeypatch.setattr(io, "replace_checked_file", killed)
    with pytest.raises(KeyboardInterrupt):
        scores.prepare(cut(2, 3, 2), folder=tmp_path / "rows")
    assert contents(tmp_path / "rows").keys() == {"manifest.json", "rows-000000.safetensors"}
    # Another budget would cut otherwise; the run goes on as it began.
    prepared = influence(memory_budget=3_000).prepare(cut(2, 3, 2), folder=tmp_path / "rows")
    assert written[2:] == ["rows-000001.safetensors", "rows-000002.safetensors"]
    assert contents(tmp_path / "rows") == contents(tmp_path / "whole")
    influence().prepare(cut(2, 3, 2), folder=tmp_path / "rows")
    assert len(written) == 4
    same(scores.scores(QUERIES, prepared), scores.scores(QUERIES, (X, Y)))


def test_rows_of_something_else__are_refused_and_left(tmp_path: Path) -> None:
    influence().prepare(cut(3, 4), folder=tmp_path / "rows")
    before = contents(tmp_path / "rows")
    with pytest.raises(fk.InvalidArgumentError, match="other data from example 3 on"):
        influence().prepare([(X[:3], Y[:3]), (X[3:], Y[3:].flip(0))], folder=tmp_path / "rows")
    for batches, words in (
        (cut(4, 3), "3 examples from example 0 on and not 4"),
        (cut(3, 2, 2), "4 examples from example 3 on and not 2"),
    ):
        with pytest.raises(fk.InvalidArgumentError, match=rf"rows of other batches \({words}\).*Try: the same batches"):
            influence().prepare(batches, folder=tmp_path / "rows")
    with pytest.raises(fk.InvalidArgumentError, match="different token"):
        influence().prepare(cut(3, 4), folder=tmp_path / "rows", by="token")
    model = mlp()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    other = InfluenceScores(fk.EmpiricalFisher(model, (X, Y)), model)
    with pytest.raises(fk.InvalidArgumentError, match="different parameters_hash"):
        other.prepare(cut(3, 4), folder=tmp_path / "rows")
    assert contents(tmp_path / "rows") == before


def test_folders_that_cannot_be_used__are_refused(tmp_path: Path) -> None:
    scores = influence()
    with pytest.raises(fk.InvalidArgumentError, match="in a folder that exists"):
        scores.prepare((X, Y), folder=tmp_path / "none" / "rows")
    (tmp_path / "file").write_text("")
    with pytest.raises(fk.InvalidArgumentError, match="expected a folder"):
        scores.prepare((X, Y), folder=tmp_path / "file")
    with pytest.raises(fk.InvalidArgumentError, match="holds other files"):
        scores.prepare((X, Y), folder=tmp_path)
    with pytest.raises(fk.InvalidTypeError, match=r"an? int"):
        scores.prepare((X, Y), folder=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"format": "x", "version": 3, "settings": {}, "limit": 1}',
        '{"format": "fisherkit-rows", "version": 2, "settings": {}, "limit": 1}',
    ],
)
def test_a_damaged_manifest__is_refused(text: str, tmp_path: Path) -> None:
    scores = influence()
    scores.prepare((X, Y), folder=tmp_path / "rows")
    (tmp_path / "rows" / "manifest.json").write_text(text)
    with pytest.raises(fk.FileFormatError, match=r"manifest.*Try: another folder, or delete this one"):
        scores.prepare((X, Y), folder=tmp_path / "rows")


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_cut_or_missing_block__is_an_error_and_made_again(length: int, tmp_path: Path) -> None:
    scores, folder = influence(), tmp_path / "rows"
    prepared = scores.prepare(cut(3, 4), folder=folder)
    before, block = contents(folder), folder / "rows-000000.safetensors"
    block.write_bytes(before[block.name][:length]) if length else block.unlink()
    with pytest.raises(fk.FileFormatError, match="missing or damaged"):
        scores.scores(QUERIES, prepared)
    scores.prepare(cut(3, 4), folder=folder)
    assert contents(folder) == before


def test_a_damaged_block__is_left_where_the_others_are_of_other_data(tmp_path: Path) -> None:
    influence().prepare(cut(3, 4), folder=tmp_path / "rows")
    block = tmp_path / "rows" / "rows-000000.safetensors"
    block.write_bytes(block.read_bytes()[:100])
    before = contents(tmp_path / "rows")
    with pytest.raises(fk.InvalidArgumentError, match="other data from example 3 on"):
        influence().prepare([(X[:3], Y[:3]), (X[3:], Y[3:].flip(0))], folder=tmp_path / "rows")
    assert contents(tmp_path / "rows") == before


def test_swapped_blocks__are_an_error(tmp_path: Path) -> None:
    prepared = influence().prepare([(X[:3], Y[:3]), (X[3:6], Y[3:6])], folder=tmp_path / "rows")
    first, second = (tmp_path / "rows" / f"rows-00000{number}.safetensors" for number in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(fk.FileFormatError, match="not the block of the manifest"):
        list(prepared)


def test_the_manifest__says_what_there_is(tmp_path: Path) -> None:
    influence().prepare(cut(3, 4), folder=tmp_path / "rows")
    manifest = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert manifest["format"] == "fisherkit-rows"
    assert manifest["settings"]["space"] == {"0.weight": [5, 4], "0.bias": [5], "2.weight": [3, 5], "2.bias": [3]}
    assert [entry["examples"] for entry in manifest["blocks"]] == [3, 4]


def test_a_fixed_budget__holds_whatever_the_number_of_examples(tmp_path: Path) -> None:
    """Scaled down: no block, and no set of solutions, takes more than its share of the budget."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    x, y = torch.randn(600, 64, generator=torch.Generator().manual_seed(0)), torch.arange(600) % 10
    budget = 400_000
    fisher = fk.EmpiricalFisher(model, (x, y), structure="kfac")
    scores = InfluenceScores(fisher, model, memory_budget=budget)
    prepared = scores.prepare((x, y), folder=tmp_path / "rows")
    sizes = [block.rows.nbytes for block in prepared]
    assert len(sizes) > 5
    assert max(sizes) <= budget // 8
    blocks = list(scores._query_blocks((x[:50], y[:50]), prepared, "loss"))
    assert all(4 * 4 * fisher.size * block.size <= budget // 4 or block.size == 1 for block, _, _ in blocks)
    assert len(blocks) > 5
    whole = InfluenceScores(fisher, model).scores((x[:50], y[:50]), (x, y))
    torch.testing.assert_close(
        scores.scores((x[:50], y[:50]), prepared), whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max())
    )
