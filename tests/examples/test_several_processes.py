"""The example of several processes, as its page starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import fisherkit as fk

SCRIPT = Path(__file__).parents[2] / "examples/several_processes.py"


def test_script__saves_the_fisher_of_all_examples(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT), "--epochs", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "f.safetensors"), "--structure", "diagonal"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fisher = fk.load(tmp_path / "f.safetensors")
    number = len(load_digits().target)
    assert fisher.metadata["examples"] == str(number)
    assert f"{number} examples in 2 processes" in done.stdout
    assert bool(torch.isfinite(fisher.diagonal()).all())
