"""`merge_layers` by its definition: a layer at a time, by Fishers of models whose earlier layers are merged."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from tests.snapshot import of_model

merge, merge_layers = fk.merging.merge, fk.merging.merge_layers
F64 = torch.float64


def trained(count: int = 3, *, norm: bool = False) -> tuple[list[nn.Module], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    models: list[nn.Module] = []
    for _ in range(count):
        layers = [nn.Linear(5, 4), *([nn.BatchNorm1d(4)] if norm else []), nn.Tanh(), nn.Linear(4, 3)]
        models.append(nn.Sequential(*layers).double().eval())
    if norm:
        for model in models:
            model[1].running_mean += torch.randn(4)
    return models, [(torch.randn(n, 5, dtype=F64), torch.randint(3, (n,))) for n in (9, 12, 20)[:count]]


def regmean_plus_plus(models: list[nn.Module], data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Layer after layer in loops: W of the least squares on the merged network's own features."""
    features, result = [x for x, _ in data], {}
    for place in (0, 2):
        left, right = 0.0, 0.0
        for model, x in zip(models, features, strict=True):
            x1 = torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)
            own = torch.cat([model[place].weight, model[place].bias.unsqueeze(1)], 1).detach()
            left, right = left + x1.T @ x1 / len(x), right + own @ (x1.T @ x1) / len(x)
        solution = torch.linalg.solve(left, right.T).T
        result |= {f"{place}.weight": solution[:, :-1], f"{place}.bias": solution[:, -1]}
        features = [torch.tanh(x @ solution[:, :-1].T + solution[:, -1]) for x in features]
    return result


def test_merge_layers__of_activations_alone_is_regmean_plus_plus() -> None:
    models, data = trained()
    found = merge_layers(models, data, normalize="output", output_damping=1e9, damping=1e-12)
    for name, tensor in regmean_plus_plus(models, data).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("structure", ["diagonal", "block", "kfac"])
def test_merge_layers__measures_each_stage_where_the_earlier_ones_are_merged(structure: str) -> None:
    models, data = trained()
    fisher = partial(fk.EmpiricalFisher, structure=structure)
    settings = {"output_damping": 0.5, "damping": 0.1}
    first = merge(
        [{n: p for n, p in m.state_dict().items() if n.startswith("0")} for m in models],
        [fisher(m, own, params=["0.weight", "0.bias"]) for m, own in zip(models, data, strict=True)], **settings,
    )  # fmt: skip
    between = copy.deepcopy(models)
    for model in between:
        model.load_state_dict(first, strict=False)
    last = merge(
        [{n: p for n, p in m.state_dict().items() if n.startswith("2")} for m in models],
        [fisher(m, own, params=["2.weight", "2.bias"]) for m, own in zip(between, data, strict=True)], **settings,
    )  # fmt: skip
    before = [of_model(model) for model in models]
    found, info = merge_layers(models, data, fisher=fisher, return_info=True, **settings)
    assert all(torch.equal(found[name], tensor) for name, tensor in {**first, **last}.items())
    assert {name for block in info.blocks for name in block.names} == set(found)
    assert info.damping == 0.1
    assert [of_model(model) for model in models] == before


def test_merge_layers__stages_buffers_and_the_rest_are_by_policy() -> None:
    models, data = trained(2, norm=True)
    with pytest.raises(fk.InvalidArgumentError, match=r"buffers.*'1.running_mean'"):
        merge_layers(models, data)
    policy = fk.merging.MergePolicy(buffers="average", uncovered="average")
    found, info = merge_layers(models, data, stages=[["3.weight", "3.bias"]], policy=policy, return_info=True)
    assert info.names["1.running_mean"] == info.names["0.weight"] == "averaged"
    between = copy.deepcopy(models)
    for model in between:
        model.load_state_dict(
            {n: t for n, t in fk.merging.average(models, policy=policy).items() if n[0] != "3"}, strict=False
        )
    fishers = [
        fk.ExactFisher(m, own, structure="kfac", params=["3.weight", "3.bias"])
        for m, own in zip(between, data, strict=True)
    ]
    states = [{n: t for n, t in m.state_dict().items() if n[0] == "3"} for m in models]
    expected = merge(states, fishers, damping=fk.RelativeDamping(0.01), output_damping=3.0)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("word", ["skip", "first"])
def test_merge_layers__heads_of_different_labels_are_by_policy(word: str) -> None:
    models, data = trained(2)
    torch.manual_seed(0)
    models[1][-1], data[1] = nn.Linear(4, 5).double(), (data[1][0], torch.randint(5, (len(data[1][0]),)))
    with pytest.raises(fk.InvalidArgumentError, match=r"mismatched.*'2.weight' \(shapes \[3, 4\], \[5, 4\]\)"):
        merge_layers(models, data)
    found = merge_layers(models, data, policy=fk.merging.MergePolicy(mismatched=word))
    fishers = [fk.ExactFisher(m, d, structure="kfac", params="0.*") for m, d in zip(models, data, strict=True)]
    states = [{n: t for n, t in m.state_dict().items() if n[0] == "0"} for m in models]
    expected = merge(states, fishers, damping=fk.RelativeDamping(0.01))
    assert set(found) == {*expected, *([] if word == "skip" else ["2.weight", "2.bias"])}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected.get(name, models[0].state_dict()[name]))


def test_merge_layers__refuses_what_it_cannot_use(tmp_path) -> None:
    models, data = trained(2)
    cases = [
        ((["a", "b"], data), {}, fk.InvalidTypeError, "no modules"),
        ((models[0], data), {}, fk.InvalidTypeError, "no modules"),
        ((models, data[:1]), {}, fk.InvalidArgumentError, "2 models and 1 data"),
        ((models, None), {}, fk.InvalidArgumentError, "2 models and a NoneType as data"),
        (
            (models, data),
            {"stages": [["0.bias"], ["x"]]},
            fk.InvalidArgumentError,
            "no trained parameter, or twice: 'x'",
        ),
        ((models, data), {"stages": [["0.bias"], ["0.bias"]]}, fk.InvalidArgumentError, "twice: '0.bias', '0.bias'"),
        ((models, data), {"stages": []}, fk.InvalidArgumentError, "no trained parameter"),
        ((models, data), {"stages": [["0.weight"]]}, fk.InvalidArgumentError, r"not every Fisher covers.*'0.bias'"),
        ((models, data), {"weights": [1.0]}, fk.InvalidArgumentError, "1 weights"),
    ]
    for arguments, settings, error, text in cases:
        with pytest.raises(error, match=text):
            merge_layers(*arguments, **settings)
    path = merge_layers(models, data, out=tmp_path / "merged")
    assert path.name == "model.safetensors"
