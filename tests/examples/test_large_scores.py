"""The scripts of examples/influence run, at small sizes, and compute what they say."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_large_scores__measures_its_steps_and_goes_on_from_its_rows(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "influence" / "large_scores.py"), str(tmp_path)]
    command += ["--train", "300", "--queries", "12", "--width", "20", "--rank", "30", "--budget-mb", "1", "--exact"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=None)
        first, *steps = [json.loads(line) for line in done.stdout.splitlines()]
        assert first["parameters"] == 2 * (20 * 20 + 20) + 20 * 10 + 10
        assert [step["step"] for step in steps] == ["prepare", "low rank", "top 10", "exact"]
        assert steps[1]["median_error"] < 1e-5  # a rank above the layers' own
    assert (tmp_path / "300-20-kfac" / "rows" / "manifest.json").exists()
