"""`fk.from_optimizer`: Adam's second moment against the recursion by hand, what it says that it is, and its uses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk

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
    own = []
    for x, y in zip(inputs, targets, strict=True):
        gradients = torch.autograd.grad(nn.functional.cross_entropy(model(x[None]), y[None]), list(model.parameters()))
        own.append(torch.cat([gradient.flatten() for gradient in gradients]))
    single = torch.stack(own)
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
