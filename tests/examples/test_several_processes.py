"""The example of several processes and the command in several processes, as their page starts them."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

import fisherkit as fk

SCRIPT = Path(__file__).parents[2] / "examples/several_processes.py"


@pytest.mark.parametrize("sharded", [[], ["--fully-shard"]], ids=["whole", "sharded"])
def test_script__saves_the_fisher_of_all_examples(tmp_path: Path, sharded: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT), "--epochs", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "f.safetensors"), "--structure", "diagonal", *sharded],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fisher = fk.load(tmp_path / "f.safetensors")
    number = len(load_digits().target)
    assert fisher.metadata["examples"] == str(number)
    assert f"{number} examples in 2 processes" in done.stdout
    assert bool(torch.isfinite(fisher.diagonal()).all())


MODULE = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(11, 4).double(), torch.randint(0, 3, (11,))
    return model, list(zip(x.split(3), y.split(3)))
"""


def test_command__estimates_with_a_share_of_the_batches_in_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_here.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fisherkit", "estimate"]
    done = subprocess.run(
        [*launch, "made_here:make", "--kind", "sf:2", "--structure", "ekfac", "--out", str(tmp_path / "f.safetensors")],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{SCRIPT.parents[1]}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == 1
    model, batches = importlib.import_module("made_here").make()
    ranked = [batches[i] for i in (0, 2, 1, 3)]  # the order of the ranks
    expected = fk.SampledFisher(model, ranked, draws=2, structure="ekfac").to_dense()
    torch.testing.assert_close(fk.load(tmp_path / "f.safetensors").to_dense(), expected)


def test_command__scores_as_one_process(tmp_path: Path) -> None:
    (tmp_path / "to_score.py").write_text(
        f"{MODULE}\ndef ask():\n    model, data = make()\n    return model, data, data[:1]\n"
    )
    command = ["-m", "fisherkit", "scores", "to_score:ask", "--structure", "ekfac", "--top", "4", "--self", "3"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    found = []
    for name, start in (("one", []), ("two", launch)):
        own = [*command, "--out", str(tmp_path / name), "--rows", str(tmp_path / f"rows-{name}")]
        done = subprocess.run(
            [sys.executable, *start, *own], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{tmp_path}:{SCRIPT.parents[1]}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / name / "scores.json").read_text())
        sides = [q[side] for q in report["queries"] for side in ("helpful", "harmful")] + [report["self_influence"]]
        found.append([(one["index"], one["score"]) for side in sides for one in side])
    assert [index for index, _ in found[0]] == [index for index, _ in found[1]]
    assert [score for _, score in found[1]] == pytest.approx([score for _, score in found[0]], rel=1e-10)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / f"rows-{name}").iterdir()} for name in ("one", "two"))
    assert one == two
