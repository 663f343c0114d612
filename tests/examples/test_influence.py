"""The influence experiments run, on tiny sizes, and go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from examples.influence import outcomes, run, scoring
from examples.influence.methods import cosine, dot, methods
from examples.influence.run import main
from examples.influence.settings import SETTINGS, tiny
from examples.influence.summary import aims, curves
from examples.shared.results import markers


@pytest.mark.smoke
def test_main__writes_files_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--tiny", "--setting", "digits-0", "--subsets", "6", "--seeds", "2", "--out", str(tmp_path)]
    main([*arguments, "--only-retrain"])
    assert [file.name for file in tmp_path.iterdir()] == ["digits-0-6x2.safetensors"]
    main([*arguments, "--method", "dot product", "full, EF", "--damping", "0.1", "1"])
    found = json.loads((tmp_path / "digits-0.json").read_text("utf-8"))
    expected = [("dot product", None), ("full, EF", 0.1), ("full, EF", 1.0)]
    assert [(row["method"], row["damping"]) for row in found["rows"]] == expected
    assert "| dot product | " in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "methods", dict)  # nothing is scored again
        main([*arguments, "--method", "dot product"])
    again = json.loads((tmp_path / "digits-0.json").read_text("utf-8"))
    assert again["rows"] == found["rows"]


def test_report__fills_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, assets = tmp_path / "page.md", tmp_path / "assets"
    page.write_text("before\n" + "\n".join(markers(run.SECTION)) + "\nafter\n", "utf-8")
    monkeypatch.setattr(run, "PAGE", page)
    monkeypatch.setattr(run, "ASSETS", assets)
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--docs"]
    with pytest.raises(SystemExit, match="no results"):
        main([*arguments, "--report"])
    sizes = ["--tiny", "--setting", "softmax", "--subsets", "6", "--seeds", "2"]
    main([*arguments, *sizes, "--method", "full, EF", "full, exact", "--damping", "1e-6", "1", "10"])
    main([*arguments, "--report"])
    text = page.read_text("utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("| full, exact | ") == 3  # a table of scores, of aims, of dampings
    assert {file.name for file in assets.iterdir()} == {"softmax.json", "time.png", "damping.png"}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings__train_and_are_scored(name: str) -> None:
    setting = tiny(SETTINGS[name]())
    models = outcomes.scored_models(setting)
    assert len(models) == outcomes.SCORED
    assert 0 <= outcomes.accuracy(setting, models) <= 1
    model, (x, y), (a, b) = models[0], setting.train, setting.queries

    def gradient(inputs: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(model(inputs.unsqueeze(0)), label.unsqueeze(0))
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])

    q, n = gradient(a[1], b[1]), gradient(x[2], y[2])
    found = dot(model, setting.train)(setting.queries, None)[1, 2]
    torch.testing.assert_close(found, q @ n / 60, rtol=1e-4, atol=1e-7)
    found = cosine(model, setting.train)(setting.queries, None)[1, 2]
    torch.testing.assert_close(found, F.cosine_similarity(q, n, dim=0), rtol=1e-4, atol=1e-6)


def test_methods__with_a_damping_refuse_to_go_without() -> None:
    setting = tiny(SETTINGS["digits-0"]())
    model = setting.build(0)
    for name in ("full, EF", "full, exact, N rows"):
        with pytest.raises(ValueError, match="needs a damping"):
            methods()[name](model, setting.train)(setting.queries, None)


def test_aims__are_those_of_all_three() -> None:
    def row(method: str, damping: float, mean: float, seconds: float) -> dict[str, object]:
        return {"method": method, "damping": damping, "mean": mean, "fit_seconds": 0.0, "seconds": seconds}

    rows = [row("full, exact", 1.0, 0.6, 9.0), row("full, EF", 1.0, 0.5, 1.0)]
    rows += [row("good", d, mean, 1.9) for d, mean in ((1e-6, 0.45), (1.0, 0.595), (10.0, 0.5))]
    rows += [row("slow", d, mean, 2.1) for d, mean in ((1e-6, 0.45), (1.0, 0.595), (10.0, 0.5))]
    rows += [row("frail", d, mean, 1.9) for d, mean in ((1e-6, 0.3), (1.0, 0.595), (10.0, 0.5))]
    rows += [row("narrow", d, mean, 1.9) for d, mean in ((1e-3, 0.5), (1.0, 0.595), (10.0, 0.5))]
    found = aims(curves({"rows": rows}))
    assert [name for name, aim in found.items() if aim.reached] == ["good"]
    assert found["narrow"].robustness is None
    assert found["frail"].robustness == pytest.approx(0.3 / 0.595)
