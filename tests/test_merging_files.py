"""Merging from and to files: what is read, what is written, and that nothing is lost or half there."""

import json
import os
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

import fisherkit as fk
from examples.merging import out_of_core
from fisherkit.io.model_files import ModelFiles
from fisherkit.merging import MergePolicy, blocks, models
from fisherkit.operators import DiagonalOperator
from fisherkit.operators.files import FisherFile
from tests.test_merging_policies import Tied

merging = fk.merging
State = dict[str, Tensor]
LAYERS = 6


def state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    g = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(50, 40, generator=g).to(dtype) for i in range(LAYERS)}


def fisher(seed: int) -> DiagonalOperator:
    model = state(0)
    space = fk.ParameterSpace(tuple(model), tuple(tuple(t.shape) for t in model.values()))
    return DiagonalOperator(space, torch.rand(space.size, generator=torch.Generator().manual_seed(seed)) + 0.1)


def write_sharded(folder: Path, model: State) -> Path:
    folder.mkdir()
    weight_map = {}
    for i, (name, tensor) in enumerate(model.items(), 1):
        file = f"model-{i:05}-of-{len(model):05}.safetensors"
        save_file({name: tensor}, folder / file)
        weight_map[name] = file
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Model 1 in one file of a folder, model 2 in shards, and Fisher files of both."""
    (tmp_path / "a").mkdir()
    save_file(state(0), tmp_path / "a" / "model.safetensors")
    write_sharded(tmp_path / "b", state(1))
    for seed in (0, 1):
        fisher(seed).save(tmp_path / f"f{seed}.safetensors")
    return [tmp_path / name for name in ("a", "b", "f0.safetensors", "f1.safetensors")]


def load_folder(folder: Path) -> State:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [None, 20_000, 1])
def test_merge__to_files_is_bitwise_what_is_returned(paths, tmp_path, size, dtype) -> None:
    policy = MergePolicy(dtype=dtype, max_shard_size=size)
    expected = merging.merge([state(0), state(1)], [fisher(0), fisher(1)], policy=policy)
    out = tmp_path / "out"
    written = merging.merge(paths[:2], paths[2:], out=out, policy=policy)
    assert written == out / ("model.safetensors" if size is None else "model.safetensors.index.json")
    got = load_folder(out)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) and got[name].dtype == dtype for name, tensor in expected.items())
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    if size == 20_000:
        assert all(sum(t.nbytes for t in load_file(f).values()) <= size for f in out.glob("*.safetensors"))
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("form", ["file", "index", "folder", "string"])
def test_merge__takes_every_form_of_a_checkpoint(paths, tmp_path, form) -> None:
    a, b = {
        "file": (paths[0] / "model.safetensors", paths[1]),
        "index": (paths[0], paths[1] / "model.safetensors.index.json"),
        "folder": (paths[0], paths[1]),
        "string": (str(paths[0]), str(paths[1])),
    }[form]
    expected = merging.merge([state(0), state(1)], [fisher(0), fisher(1)])
    got = merging.merge([a, b], [str(paths[2]), fisher(1)])
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_average_and_task_arithmetic__write_files_too(paths, tmp_path) -> None:
    merging.average(paths[:2], out=tmp_path / "average.safetensors")
    got = load_file(tmp_path / "average.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in merging.average([state(0), state(1)]).items())
    merging.task_arithmetic(paths[:2], paths[0], 0.4, out=tmp_path / "arithmetic")
    for name, tensor in load_folder(tmp_path / "arithmetic").items():
        assert torch.allclose(tensor, state(0)[name] + 0.4 * (state(1)[name] - state(0)[name]), atol=1e-6)


def test_average__writes_more_shards_than_files_may_be_open(tmp_path) -> None:
    resource = pytest.importorskip("resource")
    states = [{f"{i}.weight": torch.full((2,), float(seed + i)) for i in range(120)} for seed in (0, 2)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(2)  # the lowest number that no open file has
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 60, hard))
    try:
        merging.average(states, out=tmp_path / "out", policy=MergePolicy(max_shard_size=8))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    got = load_folder(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 120
    assert all(torch.equal(got[f"{i}.weight"], torch.full((2,), i + 1.0)) for i in range(120))


def test_merge__tied_weights_are_written_once(tmp_path) -> None:
    models = [Tied(0), Tied(1)]
    data = (torch.randint(6, (5, 1)), torch.randint(6, (5, 1)))
    fishers = [fk.EmpiricalFisher(m, data, structure="diagonal") for m in models]
    path = merging.merge(models, fishers, out=tmp_path / "tied")
    assert list(load_file(path)) == ["embed.weight"]
    model = Tied(2)
    load_model(model, path)
    expected = merging.merge(models, fishers)
    assert torch.equal(model.head.weight, expected["head.weight"])
    # A file has one of two tied names; a module that has both fits it.
    with pytest.warns(UserWarning, match="Fisher 1 was measured at other parameters"):
        merging.merge([path, models[1]], fishers, policy=MergePolicy(other_weights="warn"))


def test_task_arithmetic__tied_weights_stay_tied(tmp_path) -> None:
    models = [Tied(0), Tied(1), Tied(2)]
    save_file({"embed.weight": models[2].embed.weight.detach()}, tmp_path / "base.safetensors")  # as Hugging Face does
    for base in (models[2], tmp_path / "base.safetensors"):
        found, info = merging.task_arithmetic(models[:2], base, 0.4, return_info=True)
        assert found["head.weight"] is found["embed.weight"]
        assert info.names["head.weight"] == "tied to embed.weight"


def test_merge__reads_every_block_of_a_model_beside_the_same_of_the_others(paths, monkeypatch) -> None:
    order: list[str] = []
    read = ModelFiles.read
    monkeypatch.setattr(ModelFiles, "read", lambda self, name: order.append(name) or read(self, name))
    merging.merge(paths[:2], paths[2:])
    firsts = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert len(firsts) == LAYERS


def test_merge__reads_every_model_three_times_and_every_fisher_twice(tmp_path, monkeypatch) -> None:
    given, data = [], (torch.randn(8, 4), torch.randint(3, (8,)))
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        save_file(model.state_dict(), tmp_path / f"m{seed}.safetensors")
        fk.EmpiricalFisher(model, data, structure="kfac").save(tmp_path / f"f{seed}.safetensors")
        given.append((tmp_path / f"m{seed}.safetensors", tmp_path / f"f{seed}.safetensors"))
    read = Counter()

    def counted(cls: type, method: str) -> None:
        original = getattr(cls, method)

        def counting(self: Any, names: Any) -> Any:
            read[cls, id(self), names] += 1
            return original(self, names)

        monkeypatch.setattr(cls, method, counting)

    counted(ModelFiles, "read")
    counted(FisherFile, "read")
    for merge, readings in ((merging.merge, 2), (merging.regmean, 3)):
        read.clear()
        merge(*zip(*given, strict=True))
        assert {count for (cls, *_), count in read.items() if cls is ModelFiles} == {3}
        assert {count for (cls, *_), count in read.items() if cls is FisherFile} == {readings}


def test_merge__to_files_keeps_one_block_alive(paths, tmp_path, monkeypatch) -> None:
    alive, most = [0], [0]

    def watch(tensor: Tensor) -> Tensor:
        size = tensor.nbytes
        alive[0] += size
        most[0] = max(most[0], alive[0])
        weakref.finalize(tensor, lambda: alive.__setitem__(0, alive[0] - size))
        return tensor

    read, convert = models.read_double, blocks.convert

    def watched_read(*arguments: Any) -> Tensor:
        return watch(read(*arguments))

    def watched_convert(*arguments: Any) -> Any:
        operator = convert(*arguments)
        watch(operator._entries)
        return operator

    for module in (models, blocks):
        monkeypatch.setattr(module, "read_double", watched_read)
    monkeypatch.setattr(blocks, "convert", watched_convert)
    merging.merge(paths[:2], paths[2:], out=tmp_path / "out")
    block = 50 * 40 * 8
    assert 0 < most[0] <= 5 * block  # of LAYERS blocks of two models and two Fishers


# -- refusals and interruptions ----------------------------------------------------------------------------------------


def test_merge__refuses_files_that_are_missing_or_damaged(paths, tmp_path) -> None:
    fishers = paths[2:]
    index = paths[1] / "model.safetensors.index.json"
    whole, shard = index.read_text(), paths[1] / "model-00002-of-00006.safetensors"
    content = shard.read_bytes()

    def refused(text: str, models: list[Path] = paths[:2]) -> None:
        with pytest.raises(fk.FileFormatError) as caught:
            merging.merge(models, fishers, out=tmp_path / "out")
        assert text in str(caught.value)
        assert not (tmp_path / "out").exists()

    refused("no such file or folder", [tmp_path / "none", paths[1]])
    (tmp_path / "empty").mkdir()
    refused("a folder without model.safetensors", [tmp_path / "empty", paths[1]])
    shard.write_bytes(content[:-100])
    refused("cannot be read")
    shard.unlink()
    refused("which is not there")
    shard.write_bytes(content)
    index.write_text(whole[:50])
    refused("an index that cannot be read")
    index.write_text(json.dumps({"weight_map": {"layers.9.weight": shard.name}}))
    refused("an index that names ['layers.9.weight']")
    index.write_text(whole)
    fishers[1].write_bytes(fishers[1].read_bytes()[:-100])
    refused("cannot be read")


@pytest.mark.parametrize("zipped", [True, False])
def test_merge__says_what_a_file_is_that_is_no_model(zipped, paths, tmp_path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    for path, text, advice in (
        (tmp_path / "m.pt", "m.pt, which torch.save wrote", "safetensors.torch.save_file"),
        (paths[2], f"{paths[2].name}, which is a Fisher file", "this file in fishers="),
    ):
        with pytest.raises(fk.FileFormatError) as caught:
            merging.merge([path, paths[1]], paths[2:])
        assert text in caught.value.got
        assert advice in caught.value.try_


def test_merge__refuses_to_write_where_a_model_is(paths, tmp_path) -> None:
    settings: dict[str, Any] = {"models": paths[:2], "fishers": paths[2:]}
    with pytest.raises(fk.InvalidArgumentError, match=r"which is the place of model 1"):
        merging.merge(**settings, out=paths[0], overwrite=True)
    with pytest.raises(fk.InvalidArgumentError, match=r"which is the place of model 2"):
        merging.merge(**settings, out=paths[1], overwrite=True)
    with pytest.raises(fk.InvalidArgumentError, match=r"a folder that does not exist"):
        merging.merge(**settings, out=tmp_path / "no" / "such")
    for size in (None, 20_000, None):
        merging.merge(**settings, out=tmp_path / "out", policy=MergePolicy(max_shard_size=size), overwrite=True)
        with pytest.raises(fk.InvalidArgumentError, match=r"A model would be lost.*overwrite=True"):
            merging.merge(**settings, out=tmp_path / "out")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert ("model.safetensors" in names) == (size is None)
        assert len(names) == (1 if size is None else 4)
    odd = [{**state(seed), "phase": torch.ones(2, dtype=torch.complex64)} for seed in (0, 1)]
    with pytest.raises(fk.InvalidTypeError, match=r"'phase' of torch.complex64"):
        merging.merge(odd, paths[2:], out=tmp_path / "o")
    with pytest.raises(fk.InvalidTypeError, match=r"max_shard_size of type str; expected an integer"):
        MergePolicy(max_shard_size="5GB")  # type: ignore[arg-type]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("size", [None, 20_000])
def test_merge__interrupted_leaves_the_old_model_or_none(paths, tmp_path, monkeypatch, size) -> None:
    out = tmp_path / "out"

    def interrupted(at: int) -> None:
        def some(self: Any, *_: Any) -> Iterator[Any]:
            yield from list(solutions(self))[:at]
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(blocks.BlockwiseMerge, "solutions", some)
            with pytest.raises(KeyboardInterrupt):
                merging.merge(paths[:2], paths[2:], out=out, policy=MergePolicy(max_shard_size=size), overwrite=True)

    solutions = blocks.BlockwiseMerge.solutions
    interrupted(3)
    assert not out.exists()
    merging.average(paths[:2], out=out, policy=MergePolicy(max_shard_size=size))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    interrupted(4)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with monkeypatch.context() as patch:  # between the shards and the index
        patch.setattr("fisherkit.io.tensors.replace_text", interrupt)
        if size is not None:
            with pytest.raises(KeyboardInterrupt):
                merging.merge(paths[:2], paths[2:], out=out, policy=MergePolicy(max_shard_size=size), overwrite=True)
            old = load_folder(out)
            average = merging.average([state(0), state(1)])
            assert all(torch.equal(old[name], tensor) for name, tensor in average.items())
            assert {path.name for path in out.iterdir()} == before.keys()


def test_merge__of_a_module_and_its_file_verifies_what_it_can(tmp_path) -> None:
    torch.manual_seed(0)
    models = [nn.Linear(3, 2), nn.Linear(3, 2)]
    data = (torch.randn(5, 3), torch.randint(2, (5,)))
    for i, model in enumerate(models):
        fk.EmpiricalFisher(model, data, structure="kfac").save(tmp_path / f"f{i}.safetensors")
        save_file(model.state_dict(), tmp_path / f"m{i}.safetensors")
    files = [tmp_path / f"f{i}.safetensors" for i in (0, 1)]
    result, info = merging.merge([models[0], tmp_path / "m1.safetensors"], files, "examples", return_info=True)
    assert info.unverified == ()
    with pytest.warns(UserWarning, match="Fisher 2 was measured at other parameters"):
        merging.merge([models[0], tmp_path / "m0.safetensors"], files, policy=MergePolicy(other_weights="warn"))
    assert info.weights == (5.0, 5.0)
    model = nn.Linear(3, 2)
    model.load_state_dict(result)
    assert torch.isfinite(model(data[0])).all()


@pytest.mark.skipif(not out_of_core.STATUS.exists(), reason="measured by /proc")
def test_out_of_core__measures_every_way(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(out_of_core, "SIDE", 32)
    for seed, name in enumerate("ab"):
        out_of_core.write_model(tmp_path / name, 20_000, seed)
    for way in out_of_core.WAYS:
        out_of_core.child(tmp_path, way)
        found = json.loads(capsys.readouterr().out)
        assert found.keys() == {"anonymous", "resident", "seconds"}
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
