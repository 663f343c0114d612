"""Fishers from torch's optimizers, and into files that transformers loads."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import fisherkit as fk
from fisherkit.cli import app
from fisherkit.operators import DiagonalOperator, KroneckerOperator
from fisherkit.operators.composite import join
from fisherkit.space import ParameterSpace
from tests import by_hand
from tests.text_models import make_classifier, make_tokenizer, saved

BETA = 0.9
STEPS = 5


def trained(
    make: Callable[..., torch.optim.Optimizer], steps: int = STEPS, **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Tensor]]:
    """A model after some steps, its optimizer, and (1 − β₂) Σ β₂^(k − i) ĝᵢ² / (1 − β₂ᵏ), by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    optimizer = make(model.parameters(), betas=(0.8, BETA), **settings)
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for step in range(steps):
        inputs, targets = torch.randn(6, 4).double(), torch.randint(2, (6,))
        loss = nn.functional.cross_entropy(model(inputs), targets)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for name, gradient in zip(sums, gradients, strict=True):
            sums[name] += (1 - BETA) * BETA ** (steps - 1 - step) * gradient.square()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return model, optimizer, {name: total / (1 - BETA**steps) for name, total in sums.items()}


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {"weight_decay": 0.1}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    ],
)
def test_the_bias_corrected_mean_of_squares(make: Any, settings: dict[str, Any]) -> None:
    model, optimizer, expected = trained(make, **settings)
    for parameters in (model, dict(model.named_parameters()), model.named_parameters(), torch.compile(model)):
        fisher = fk.from_optimizer(optimizer, parameters)  # type: ignore[arg-type]
        assert fisher.space.names == tuple(expected)
        by_name = fisher.space.unflatten(fisher.diagonal())
        for name, values in expected.items():
            torch.testing.assert_close(by_name[name], values, rtol=1e-12, atol=0)
    six = fk.from_optimizer(optimizer, model, batch_size=6)
    torch.testing.assert_close(six.diagonal(), 6 * fisher.diagonal(), rtol=1e-15, atol=0)


def test_the_factor_between_squared_batch_gradients_and_the_fisher() -> None:
    """E[ĝ²] = (1/B) E[g²] + (1 − 1/B) (E[g])², over all pairs of examples, drawn with replacement."""
    torch.manual_seed(1)
    model, inputs, targets = nn.Linear(3, 2).double(), torch.randn(5, 3).double(), torch.randint(2, (5,))
    single = by_hand.rows(model, (inputs, targets))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 1 - 1e-9))
    for i in range(5):
        for j in range(5):
            mean = (single[i] + single[j]) / 2
            model.weight.grad, model.bias.grad = mean[:6].reshape(2, 3), mean[6:]
            optimizer.step()
    second = fk.from_optimizer(optimizer, model, batch_size=2).diagonal()
    exact = fk.EmpiricalFisher(model, (inputs, targets), structure="diagonal").diagonal()
    torch.testing.assert_close(second, exact + (2 - 1) * single.mean(0).square(), rtol=1e-6, atol=0)


def test_metadata_say_what_it_is_and_files_keep_them(tmp_path: Path) -> None:
    model, optimizer, _ = trained(torch.optim.AdamW)
    fisher = fk.from_optimizer(optimizer, model, batch_size=6)
    fisher.save(tmp_path / "f.safetensors")
    found = fk.load(tmp_path / "f.safetensors")
    assert found.metadata["kind"] == "second-moment"
    assert found.metadata["optimizer"] == "torch.optim.adamw.AdamW"
    assert found.metadata["batch_size"] == "6"
    assert found.metadata["steps"] == "5"
    assert "no Fisher of single examples" in found.metadata["measures"]
    assert found.metadata["parameters_hash"] == fk.parameters_hash(model)
    assert torch.equal(found.diagonal(), fisher.diagonal())
    assert "second-moment" in repr(found)


def test_it_is_a_copy_and_changes_nothing() -> None:
    model, optimizer, _ = trained(torch.optim.Adam)
    before = copy.deepcopy(optimizer.state_dict())
    fisher = fk.from_optimizer(optimizer, model)
    values = fisher.diagonal()
    assert str(optimizer.state_dict()) == str(before)
    for state in optimizer.state.values():
        state["exp_avg_sq"].zero_()
    assert torch.equal(fisher.diagonal(), values)


def test_merging_checks_whose_it_is_and_merges_entry_by_entry() -> None:
    models, fishers = [], []
    for steps in (3, 5):
        model, optimizer, _ = trained(torch.optim.AdamW, steps)
        models.append(model)
        fishers.append(fk.from_optimizer(optimizer, model))
    options: dict[str, Any] = {"normalize": None, "output_damping": 0, "damping": 0}
    merged, info = fk.merging.merge(models, fishers, return_info=True, **options)
    assert not info.unverified
    a, b = (fisher.space.unflatten(fisher.diagonal()) for fisher in fishers)
    for name, tensor in merged.items():
        x, y = (model.state_dict()[name] for model in models)
        torch.testing.assert_close(tensor, (a[name] * x + b[name] * y) / (a[name] + b[name]), rtol=1e-12, atol=1e-14)
    with pytest.raises(fk.InvalidArgumentError, match="Fisher 1 was measured at other parameters"):
        fk.merging.merge(models, fishers[::-1], **options)
    with pytest.raises(fk.InvalidArgumentError, match="do not say on how many examples"):
        fk.merging.merge(models, fishers, "examples", **options | {"normalize": "trace"})


def test_ewc_takes_it() -> None:
    model, optimizer, expected = trained(torch.optim.AdamW)
    ewc = fk.continual.EWC(model, strength=2.0, normalize=None)
    ewc.consolidate(fk.from_optimizer(optimizer, model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    by_hand = sum(float(values.sum()) for values in expected.values()) * 0.25
    assert float(ewc.penalty().detach()) == pytest.approx(by_hand, rel=1e-10)


def test_half_precision_is_in_float32_and_some_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).bfloat16()
    optimizer = torch.optim.AdamW(model[1].parameters())
    model(torch.ones(1, 2).bfloat16()).sum().backward()
    optimizer.step()
    fisher = fk.from_optimizer(optimizer, model)
    assert fisher.dtype == torch.float32
    assert fisher.space.names == ("1.weight", "1.bias")


def refused(match: str, *arguments: Any, error: type[Exception] = fk.InvalidArgumentError, **options: Any) -> None:
    with pytest.raises(error, match=match):
        fk.from_optimizer(*arguments, **options)


def test_what_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.requires_grad_(True)

    def stepped(make: Any, **settings: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = make(model.parameters(), **settings)
        model.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return optimizer

    refused("before its first step", torch.optim.AdamW(model.parameters()), model)
    refused("SGD, which keeps momentum_buffer", stepped(torch.optim.SGD, lr=0.1, momentum=0.9), model)
    refused("SGD, which keeps nothing", torch.optim.SGD(model.parameters(), lr=0.1), model)
    refused("RMSprop, which keeps square_avg, step", stepped(torch.optim.RMSprop), model)
    refused("Adamax, which keeps exp_avg, exp_inf, step", stepped(torch.optim.Adamax), model)
    refused("weight_decay=0.1", stepped(torch.optim.Adam, weight_decay=0.1), model)
    adam = stepped(torch.optim.AdamW)
    refused("of which it changes none", adam, nn.Linear(2, 2))
    refused("a Linear as optimizer", model, adam, error=fk.InvalidTypeError)
    refused("parameters of type int", adam, 3, error=fk.InvalidTypeError)
    refused("batch_size=0", adam, model, batch_size=0)
    both = nn.Sequential(model, nn.Linear(2, 2))
    adam.add_param_group({"params": list(both[1].parameters())})
    refused("without a second moment of '1.weight', '1.bias'", adam, both)
    adam.state[model.weight]["exp_avg_sq"][0, 0] = torch.nan
    refused("second moment of 'weight' with NaN", adam, model, error=fk.NonFiniteError)


# -- `to_mergekit` and ``fisherkit export`` ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    saved(make_classifier(0), make_tokenizer(tmp_path_factory.mktemp("words")), root / "a")
    return root / "a"


def fisher_of(folder: Path) -> tuple[fk.FisherOperator, dict[str, Tensor]]:
    """Kronecker products for matrices and diagonals for the rest, and the diagonal by hand."""
    weights, parts, expected = load_file(folder / "model.safetensors"), [], {}
    torch.manual_seed(0)
    for name, tensor in weights.items():
        space = ParameterSpace((name,), (tuple(tensor.shape),))
        if tensor.ndim == 2 and tensor.shape[0] < 40:
            x, y = torch.randn(3, tensor.shape[1]), torch.randn(3, tensor.shape[0])
            parts.append(KroneckerOperator(space, x.T @ x, y.T @ y))
            expected[name] = torch.outer(y.square().sum(0), x.square().sum(0))
        else:
            expected[name] = torch.rand(tensor.shape)
            parts.append(DiagonalOperator(space, expected[name].flatten()))
    space = ParameterSpace(tuple(weights), tuple(tuple(tensor.shape) for tensor in weights.values()))
    fisher = join(space, parts)
    fisher.metadata = {"kind": "ef", "structure": "kfac"}
    return fisher, expected


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shard", [None, 400])
def test_command_writes_a_model_that_transformers_loads(folder: Path, tmp_path: Path, shard: int | None) -> None:
    fisher, expected = fisher_of(folder)
    fisher.save(tmp_path / "f.safetensors")
    out = tmp_path / "out"
    options = [] if shard is None else ["--max-shard-size", str(shard)]
    arguments = [
        "export",
        str(tmp_path / "f.safetensors"),
        "--to",
        "mergekit",
        "--model",
        str(folder),
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(app, [*arguments, *options])
    assert result.exit_code == 0, result.output
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == (shard is not None)
    same({name: tensor for file in files for name, tensor in load_file(file).items()}, expected)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    same({name: tensor.detach() for name, tensor in model.named_parameters()}, expected)
    assert json.loads((out / "fisher.json").read_text())["kind"] == "ef"
    assert {path.name for path in folder.glob("*.json")} <= {path.name for path in out.glob("*.json")} | {
        "model.safetensors.index.json"
    }
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0


def test_of_a_model_in_half_precision_the_diagonal_stays_in_float32(folder: Path, tmp_path: Path) -> None:
    half = transformers.AutoModelForSequenceClassification.from_pretrained(folder).bfloat16()
    half.save_pretrained(tmp_path / "half")
    fisher, _ = fisher_of(folder)
    small = 1e-12 * fisher
    fk.merging.to_mergekit(small, tmp_path / "half", tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    by_name = small.space.unflatten(small.diagonal())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), by_name[name])


def test_a_full_disk_leaves_no_part_of_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fisher, _ = fisher_of(folder)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    for name in ("os.replace", "shutil.copy2", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(name, fail)
            with pytest.raises(OSError, match="no space left"):
                fk.merging.to_mergekit(fisher, folder, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_export__what_is_refused(folder: Path, tmp_path: Path) -> None:
    fisher, _ = fisher_of(folder)
    names = fisher.space.names
    part = DiagonalOperator(fisher.space.restrict(names[1:]), torch.ones(fisher.space.restrict(names[1:]).size))

    def refused(match: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(fk.FisherkitError, match=match):
            fk.merging.to_mergekit(*arguments, **options)

    out = tmp_path / "out"
    refused(f"does not cover: '{names[0]}'", part, folder, out)
    refused("which has no config.json", fisher, tmp_path, out)
    refused("the name of another folder", fisher, folder, folder)
    refused(
        "lacks or has in another shape: 'x'",
        DiagonalOperator(ParameterSpace(("x",), ((2,),)), torch.ones(2)),
        folder,
        out,
    )
    odd, _ = fisher_of(folder)
    odd.metadata = {"covered_hash": "float32:0"}
    refused("measured at other parameters", odd, folder, out)
    assert not out.exists()
    fk.merging.to_mergekit(part, folder, out, uncovered="skip")
    assert load_file(out / "model.safetensors").keys() == set(names[1:])
    save_file({"x": torch.ones(1)}, out / "model.safetensors")
    refused("a place without a model", fisher, folder, out)
