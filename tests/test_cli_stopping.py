"""Commands that are stopped, from outside the process: what they say, and that nothing temporary stays behind."""

import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fisherkit import io
from fisherkit.cli import merge as cli_merge
from fisherkit.io.atomic import part_of
from tests.commands import Running, run

SLOW = """
import pathlib
import time

import torch
from torch import nn


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls = nn.Linear(3, 2), 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 8:
            pathlib.Path("running").touch()
            time.sleep(0.1)
        return self.net(x)


def make():
    return Slow(), [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(300)]


def save_slowly():
    from fisherkit.io import tensors

    def wait(part):
        pathlib.Path("running").touch()
        time.sleep(60)

    tensors.flush = wait
    return nn.Linear(3, 2), [(torch.randn(4, 3), torch.randint(2, (4,)))]
"""


def started(folder: Path, function: str) -> Running:
    """A command that has come to the point where it takes long."""
    (folder / "slow_module.py").write_text(SLOW)
    command = Running(folder, "estimate", f"slow_module:{function}", "--out", "f.safetensors")
    deadline = time.monotonic() + 100
    while not (folder / "running").exists() and command.status is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert command.status is None, command.end()
    return command


@pytest.mark.parametrize(("name", "function"), [("SIGINT", "make"), ("SIGTERM", "make"), ("SIGHUP", "save_slowly")])
def test_signal__stops_and_says_that_nothing_was_written(tmp_path: Path, name: str, function: str) -> None:
    number = getattr(signal, name)
    command = started(tmp_path, function)
    command.send(number)
    out, err = command.end(60)
    assert command.status == 128 + number
    assert err.strip() == "stopped: nothing was written."
    assert out == ""
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != "") == ["slow_module.py"]


def test_kill__what_is_left_is_named_by_the_next_run(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    models = 2 * ["--model", tmp_path / "m.safetensors"]
    with part_of(tmp_path / "f.safetensors") as left:  # as a run that is killed in here leaves it
        assert io.leftovers(tmp_path / "f.safetensors") == [left]
        result = run("merge", *models, "--method", "average", "--out", tmp_path / "f.safetensors")
        assert result.exit_code == 0, result.output
        assert result.stderr.startswith("note: left over from a run that was killed")
        assert f"rm -r {left}\n" in result.stderr
        assert left.exists()


@pytest.mark.parametrize(
    "name",
    ["f.0123abcd.part", "f.safetensors.0123abcd.part", ".f.0123abcd.part", "f-00001-of-00003.safetensors.0123abcd.part",
     "f-0123abcd-00001-of-00003.safetensors.0123abcd.part", "f.safetensors.index.json.0123abcd.part"],
)  # fmt: skip
def test_leftovers__are_those_of_the_path(tmp_path: Path, name: str) -> None:
    for other in (name, f"g{name}", f"{name}s", "f", "f.safetensors", "f.part", "f2.0123abcd.part"):
        (tmp_path / other).touch()
    assert io.leftovers(tmp_path / "f.safetensors") == [tmp_path / name]
    assert io.leftovers(tmp_path / "f") == [tmp_path / name]
    assert io.leftovers(tmp_path / "no" / "f") == []


def test_leftovers__a_model_that_was_being_replaced_is_not_thrown_away(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "m.safetensors")
    kept = tmp_path / ".merged.0123abcd.part" / "replaced"
    kept.mkdir(parents=True)
    (tmp_path / "a").mkdir()
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "a" / "model.safetensors")
    models = 2 * ["--model", str(tmp_path / "a")]
    result = run("merge", *models, "--method", "average", "--out", tmp_path / "merged")
    assert f"mv {kept} {tmp_path / 'merged'}" in result.stderr
    assert "rm -r" not in result.stderr


def test_merge__interrupted_between_two_renames_has_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole, replaced = (tmp_path / name for name in ("out", "whole", "replaced"))
    for folder in (out, whole):
        folder.mkdir()
        (folder / "which").write_text(folder.name)
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if self == whole:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        cli_merge._put_in_place(whole, out, replaced)
    assert (out / "which").read_text() == "out"
    assert not replaced.exists()
