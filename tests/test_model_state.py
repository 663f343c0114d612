"""The hash of a model's weights, and what a Fisher says of itself."""

import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.errors import InvalidTypeError
from fisherkit.operators import BlockDiagonalOperator, DiagonalOperator, LowRankOperator, unwrap
from fisherkit.space import ParameterSpace
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


# -- what one sees first -----------------------------------------------------------------------------------------------


STRUCTURES = ("full", "block", "diagonal", "kfac", "ekfac")
DATA = torch.linspace(-1, 1, 24).reshape(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


# -- repr --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_repr__says_what_it_is_and_where_it_was_measured(structure: str, model: nn.Module, tmp_path: Path) -> None:
    fisher = fk.SampledFisher(model, DATA, structure=structure, draws=2, normalization="sum")
    sizes = f"sf {structure}, D = 15, N = 6, R = {fisher.rows}, "
    where = f"sum, measured at Linear {fk.parameters_hash(model)[:8]}, torch.float32, cpu>"
    assert repr(fisher) == f"<SampledFisher: {sizes}{where}"
    fisher.save(tmp_path / "f.safetensors")
    for other in (fk.load(tmp_path / "f.safetensors"), 0.5 * fisher, fisher.factorize(0.1).operator):
        assert "\n" not in repr(other)
        assert len(repr(other)) < 160
    loaded = repr(fk.load(tmp_path / "f.safetensors"))
    assert sizes in loaded
    assert loaded.endswith(where)


def test_repr__of_operators_without_a_model(model: nn.Module) -> None:
    space = ParameterSpace(("a", "b"), ((2,), (3,)))
    parts = [DiagonalOperator(space.restrict([name]), torch.ones(size)) for name, size in (("a", 2), ("b", 3))]
    assert repr(parts[0]) == "<DiagonalOperator: D = 2, torch.float32, cpu>"
    assert repr(BlockDiagonalOperator(space, parts)) == "<BlockDiagonalOperator: D = 5, 2 blocks, torch.float32, cpu>"
    rows = unwrap(fk.EmpiricalFisher(model, DATA))
    assert isinstance(rows, LowRankOperator)
    assert repr(rows) == "<LowRankOperator: D = 15, R = 6, torch.float32, cpu>"
    total = fk.EmpiricalFisher(model, DATA) + fk.ExactFisher(model, DATA, structure="kfac")
    # Whose examples are the same the sum does not know.
    assert repr(total).startswith("<SumOperator: ef full + exact kfac, D = 15, 2 terms, mean, measured at Linear ")


def test_repr__survives_metadata_that_others_wrote(model: nn.Module) -> None:
    operator = DiagonalOperator(ParameterSpace(("a",), ((2,),)), torch.ones(2))
    operator.metadata = {"examples": "about 1e6", "kind": "mine"}
    assert repr(operator) == "<DiagonalOperator: mine, D = 2, N = about 1e6, torch.float32, cpu>"


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 64])
def test_save__refuses_to_replace_a_model_s_weights(size: int | None, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    weights = path.read_bytes()
    fisher = fk.EmpiricalFisher(model, DATA, structure="kfac")
    with pytest.raises(
        fk.InvalidArgumentError, match=r"something else than a Fisher file|safetensors file of another kind"
    ):
        fisher.save(path, max_shard_size=size)
    assert path.read_bytes() == weights
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_save__takes_the_place_of_an_empty_file_and_of_a_damaged_one(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    path.touch()  # as tempfile leaves it
    fisher = fk.EmpiricalFisher(model, DATA, structure="kfac")
    fisher.save(path)
    path.write_bytes(path.read_bytes()[:-9])
    fisher.save(path)
    assert torch.equal(fk.load(path).diagonal(), fisher.diagonal())


# -- the import --------------------------------------------------------------------------------------------------------


def in_a_new_process(code: str) -> str:
    run = [sys.executable, "-c", code]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


def test_import__brings_nothing_heavy_that_torch_does_not_and_finds_every_name_when_it_is_asked_for() -> None:
    heavy = ["scipy", "matplotlib", "sklearn", "transformers", "typer", "rich", "beartype", "networkx", "pandas"]
    found = in_a_new_process(
        f"""
import sys, torch
before = set(sys.modules)
import fisherkit as fk, fisherkit.testing
print(sorted(name for name in [*{heavy}, "pytest"] if name in sys.modules and name not in before))
print([name for name in fk.__all__ if getattr(fk, name, None) is None])
"""
    )
    assert found.split() == ["[]", "[]"]
    assert set(fk.__all__) <= set(dir(fk))
    with pytest.raises(AttributeError, match="module 'fisherkit' has no attribute 'nothing'"):
        _ = fk.nothing
