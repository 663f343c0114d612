"""What files say of the weights that were measured, and of the labels."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.errors import InvalidTypeError
from tests.small_data import X, Y, mlp, normal
from tests.snapshot import of_model, untouched


def by_hand(model: nn.Module) -> str:
    """The definition on the page of the file format, in NumPy."""
    tensors = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}
    listed = [[name, str(t.dtype)[6:], list(t.shape)] for name, t in sorted(tensors.items())]
    digest = hashlib.sha256(json.dumps(listed).encode())
    for _, t in sorted(tensors.items()):
        data = bytes(t.contiguous().flatten().view(torch.uint8).numpy())
        whole = len(data) // 8192 * 8192
        if whole:
            words = np.frombuffer(data[:whole], dtype="<u8").reshape(-1, 1024)
            digest.update(words.sum(1, dtype="<u8").tobytes() + words.sum(0, dtype="<u8").tobytes())
        digest.update(data[whole:])
    return digest.hexdigest()


def large() -> nn.Module:
    """Tensors below and above 8,192 bytes, buffers, a tied weight, an odd number of bytes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 60), nn.BatchNorm1d(60), nn.Linear(60, 60), nn.Linear(60, 60))
    model[3].weight = model[2].weight
    model.register_buffer("mask", torch.tensor([True, False, True]))
    model.register_buffer("brief", normal(5000).to(torch.bfloat16)[3:], persistent=False)
    model.register_buffer("odd", normal(3000).float()[1:])
    return model


def changed(change: Callable[[Any], None], model: nn.Module) -> str:
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return fk.parameters_hash(other)


def test_hash__is_the_documented_one_and_changes_nothing() -> None:
    model = large()
    with untouched(model, None):
        found = fk.parameters_hash(model)
    assert found == by_hand(model) == fk.parameters_hash(copy.deepcopy(model))
    assert fk.parameters_hash(mlp()) == by_hand(mlp())


def swap(tensor: Tensor, i: int, j: int) -> None:
    tensor[[i, j]] = tensor[[j, i]].clone()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight[3, 7].add_(1e-6),
        lambda m: m[0].bias[0].add_(1e-6),
        lambda m: m[0].bias.neg_(),
        lambda m: m[1].running_mean[5].add_(1e-6),
        lambda m: m[1].num_batches_tracked.add_(1),
        lambda m: m.brief[4990].add_(1),
        lambda m: m.mask[0].logical_not_(),
        lambda m: swap(m[0].weight, 0, 1),
        lambda m: swap(m[0].weight.T, 0, 1),
        lambda m: swap(m.odd, 0, 1024 * 2),
        lambda m: m[2].weight.copy_(m[2].weight.T.clone()),
        lambda m: m[0].weight.mul_(1 + 1e-6),
        lambda m: m[0].weight.add_(1e-6),
    ],
    ids=lambda _: "",
)
def test_hash__sees_a_change_of_values(change: Callable[[Any], None]) -> None:
    assert changed(change, large()) != fk.parameters_hash(large())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.double(),
        lambda m: setattr(m, "extra", nn.Parameter(torch.zeros(0))),
        lambda m: setattr(m[0], "bias", nn.Parameter(m[0].bias.reshape(60, 1).clone())),
        lambda m: m.register_module("renamed", m._modules.pop("0")),
    ],
    ids=["dtype", "empty", "shape", "name"],
)
def test_hash__sees_dtypes_shapes_and_names(change: Callable[[Any], None]) -> None:
    assert changed(change, large()) != fk.parameters_hash(large())


def test_hash__does_not_see_what_no_output_depends_on() -> None:
    model = large()
    before = fk.parameters_hash(model)
    model[0].weight.grad = torch.ones(60, 40)
    model.train(not model.training).requires_grad_(False)
    assert fk.parameters_hash(model) == before
    model[0].weight.data = model[0].weight.data.T.contiguous().T
    assert fk.parameters_hash(model) == before


def test_hash__does_not_depend_on_the_order_of_modules() -> None:
    model, reordered = mlp(), nn.Module()
    for name, module in reversed(model._modules.items()):
        reordered.add_module(name, module)
    assert fk.parameters_hash(reordered) == fk.parameters_hash(model)


def test_hash__takes_tensors_of_any_layout() -> None:
    model = nn.Module()
    model.register_buffer("coo", torch.eye(4).to_sparse())
    model.register_buffer("nothing", torch.empty(3, device="meta"))
    model.register_buffer("number", torch.tensor(3))
    model.register_buffer("conjugate", torch.tensor([1 + 2j, 3j]).conj())
    found = fk.parameters_hash(model)
    assert found == fk.parameters_hash(copy.deepcopy(model))
    assert changed(lambda m: m.conjugate.copy_(m.conjugate.conj().clone()), model) != found
    assert changed(lambda m: m.coo.mul_(2), model) != found


def test_hash__refuses_what_is_no_module() -> None:
    with pytest.raises(InvalidTypeError, match=r"a dict; expected a torch\.nn\.Module"):
        fk.parameters_hash({})  # type: ignore[arg-type]


# -- in metadata -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [None, ["0.*"]], ids=["all", "some"])
@pytest.mark.parametrize("width", [16, 600], ids=["small", "large"])
def test_metadata__has_the_hash_of_the_weights_at_build(width: int, params: list[str] | None) -> None:
    """Whenever it is asked for, and whatever was done to the weights since, unseen by their versions."""
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Linear(width, 3)).double().eval()
    x, y, before = normal(5, 4), torch.arange(5) % 3, fk.parameters_hash(model)
    fisher = fk.EmpiricalFisher(model, (x, y), params=params, structure="diagonal")
    copied = copy.deepcopy(fk.EmpiricalFisher(model, (x, y), params=params, structure="diagonal"))
    of_some = fisher.metadata["covered_hash"]
    other = fk.EmpiricalFisher(model, (x, y), params=params, structure="diagonal")
    model[0].weight.data.add_(1)
    assert other.metadata["parameters_hash"] == copied.metadata["parameters_hash"] == before
    assert other.metadata["covered_hash"] == of_some
    assert fk.parameters_hash(model) != before


def test_metadata__names_the_weights_that_were_measured(tmp_path: Path) -> None:
    """Not those that the model has when the file is written."""
    model = mlp()
    before, state = fk.parameters_hash(model), of_model(model)
    fisher = fk.EmpiricalFisher(model, (X, Y), structure="diagonal")
    assert of_model(model) == state
    with torch.no_grad():
        model[0].weight.add_(1)
    fisher.save(tmp_path / "f")
    recorded = fk.load(tmp_path / "f").metadata
    assert recorded["parameters_hash"] == before != fk.parameters_hash(model)
    assert recorded["model"] == "Sequential"


@pytest.mark.parametrize(
    ("kind", "source"),
    [("ef", "observed"), ("ief", "observed"), ("sf", "sampled"), ("exact", "none"), ("truncated", "observed")],
)
def test_metadata__says_where_labels_come_from(kind: str, source: str) -> None:
    fisher = fk.KINDS[kind](mlp(), (X, Y), structure="diagonal")
    assert fisher.metadata["label_source"] == source
    for key in ("kind", "structure", "examples", "rows", "example", "normalization", "likelihood", "coverage"):
        assert key in fisher.metadata
    assert all(isinstance(value, str) for value in fisher.metadata.values())


def test_metadata__of_a_kind_of_ones_own_goes_by_what_it_needs() -> None:
    class Plain(fk.OutputRule):
        def output_vectors(self, outputs: fk.Outputs) -> fk.OutputVectors:
            return fk.OutputVectors(outputs.gradient().unsqueeze(1))

    class Free(fk.OutputRule):
        needs_targets = False

        def output_vectors(self, outputs: fk.Outputs) -> fk.OutputVectors:
            return fk.OutputVectors(torch.ones_like(outputs.z).unsqueeze(1))

    assert fk.FisherApproximation(mlp(), (X, Y), Plain()).metadata["label_source"] == "observed"
    assert fk.FisherApproximation(mlp(), (X, None), Free()).metadata["label_source"] == "none"


def test_metadata__of_a_sum_keeps_what_the_terms_share() -> None:
    a, b = (fk.EmpiricalFisher(mlp(), (X[part], Y[part]), structure="diagonal") for part in (slice(3), slice(3, 7)))
    summed = (a + b).metadata
    assert summed["parameters_hash"] == a.metadata["parameters_hash"]
    assert "examples" not in summed
    assert not {"examples", "rows"} & (a + a).metadata.keys()  # which would be each term's
    with pytest.raises(fk.InvalidArgumentError, match=r"do not say on how many examples.*: 1"):
        fk.merging.merge([mlp(), mlp()], [a + a, a], weights="examples")
    other = mlp()
    with torch.no_grad():
        other[0].weight.add_(1)
    assert "parameters_hash" not in (a + fk.EmpiricalFisher(other, (X, Y), structure="diagonal")).metadata


def test_hash__is_the_same_for_the_model_in_another_place_in_memory() -> None:
    """Views of one buffer at odd offsets, as loaders and flat optimizers make them."""
    model = mlp().float()
    with torch.no_grad():
        model.wide = nn.Parameter(normal(3000).float())
        before = fk.parameters_hash(model)
        store = torch.empty(3001)
        store[1:] = model.wide
        model.wide = nn.Parameter(store[1:])
    assert fk.parameters_hash(model) == before
