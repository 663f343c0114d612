"""The influence experiments run, on tiny sizes, and go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from examples.influence import outcomes
from examples.influence.methods import cosine, dot
from examples.influence.run import main
from examples.influence.settings import SETTINGS, tiny


def test_main__writes_files_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--tiny", "--setting", "digits-0", "--subsets", "6", "--seeds", "2", "--out", str(tmp_path)]
    main([*arguments, "--only-retrain"])
    assert [file.name for file in tmp_path.iterdir()] == ["digits-0-6x2.safetensors"]
    main([*arguments, "--method", "dot product", "cosine"])
    found = json.loads((tmp_path / "digits-0.json").read_text("utf-8"))
    assert [row["method"] for row in found["rows"]] == ["dot product", "cosine"]
    assert "| dot product | – |" in capsys.readouterr().out
    monkeypatch.setattr("examples.influence.run.methods", lambda damping: {"dot product": None})
    main([*arguments, "--method", "dot product"])  # nothing is scored again
    again = json.loads((tmp_path / "digits-0.json").read_text("utf-8"))
    assert again["rows"] == found["rows"][:1]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings__train_and_are_scored(name: str) -> None:
    setting = tiny(SETTINGS[name]())
    models = outcomes.scored_models(setting)
    assert len(models) == outcomes.SCORED
    assert 0 <= outcomes.accuracy(setting, models) <= 1
    model, (x, y), (a, b) = models[0], setting.train, setting.queries

    def gradient(inputs: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(model(inputs.unsqueeze(0)), label.unsqueeze(0))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    q, n = gradient(a[1], b[1]), gradient(x[2], y[2])
    torch.testing.assert_close(dot(model, setting.train, setting.queries)[1, 2], q @ n / 60, rtol=1e-4, atol=1e-7)
    expected = F.cosine_similarity(q, n, dim=0)
    torch.testing.assert_close(cosine(model, setting.train, setting.queries)[1, 2], expected, rtol=1e-4, atol=1e-6)
