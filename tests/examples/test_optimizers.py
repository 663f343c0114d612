"""The comparison of optimizers: grids of one size, a schedule that ends at 0, and a run of each method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.optimizers.__main__ import chosen, main
from examples.optimizers.methods import METHODS, share
from examples.optimizers.tasks import TASKS
from examples.paper.optimisation_training import fit
from examples.shared.tasks import Split, Task


@pytest.fixture(scope="module")
def few() -> Task:
    task = TASKS["digits"][0]()
    return replace(task, train=Split(*task.train.take(torch.arange(128))))


def test_share__warms_up_and_ends_at_zero() -> None:
    shares = [share(step, 100) for step in range(101)]
    assert shares[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert shares[100] == pytest.approx(0)
    assert shares[5:] == sorted(shares[5:], reverse=True)


@pytest.mark.parametrize("key", METHODS)
def test_method__lowers_the_loss_of_a_few_examples(key: str, few: Task) -> None:
    method = METHODS[key]
    assert len(method.rates) == 4
    found = fit(few, lambda model, steps: method.start(model, method.rates[1], steps), seed=0, epochs=2)
    assert found["diverged"] is None
    assert found["losses"][-1] < found["losses"][0]


def test_chosen__is_the_least_loss_of_runs_that_ended() -> None:
    runs = {
        0.1: {"losses": [2, 1], "diverged": None},
        0.3: {"losses": [2, 0.5], "diverged": None},
        1.0: {"losses": [2, 0.1], "diverged": "loss 30 at step 9"},
    }
    assert chosen(runs) == 0.3
    assert chosen({1.0: runs[1.0]}) is None


@pytest.mark.smoke
def test_command__goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--tasks", "digits", "--methods", "muon", "--epochs", "1"]
    main(arguments)
    first = capsys.readouterr().out
    assert first.count("digits-muon-") == 7
    main(arguments)
    second = capsys.readouterr().out
    assert "digits-muon-" not in second
    assert "| Muon |" in second
    assert first.endswith(second)
