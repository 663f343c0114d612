"""Compiled models, data parallelism and averaged weights: parameters go by their names without wrappers."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.optim.swa_utils import AveragedModel

import fisherkit as fk
from fisherkit import merging
from fisherkit.continual import EWC
from fisherkit.influence import InfluenceScores
from fisherkit.model_state import tensors_hash
from fisherkit.operators import split
from fisherkit.operators.persistence import renamed
from fisherkit.space import ParameterSpace
from fisherkit.wrappers import PARALLEL, matching, plain, unwrapped, without_prefix, wrapped_in
from tests import by_hand
from tests.axes import paired

F64 = torch.float64


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_within(model: Any) -> nn.Module:
    model.body = compiled(model.body)
    return model


WRAP: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parallel": nn.DataParallel,
    "compiled": compiled,
    "compiled within parallel": lambda model: nn.DataParallel(compiled(model)),
    "parallel within compiled": lambda model: compiled(nn.DataParallel(model)),
    "averaged": AveragedModel,
    "a part compiled": compiled_within,
}
STRUCTURES = ["full", "block", "diagonal", "kfac", "ekfac"]
torch.manual_seed(9)
DATA = torch.randn(20, 4, dtype=F64), torch.randint(3, (20,))
NAMES = tuple(name for name, _ in Net(0).named_parameters())


@pytest.fixture(autouse=True)
def _eager() -> Any:
    with torch.compiler.set_stance("force_eager"):
        yield


def exact_merge(models: Sequence[nn.Module], damping: float) -> dict[str, Tensor]:
    """(Σ F_t + λI)⁻¹ (Σ F_t θ_t + λ θ̄) with F_t written out, one autograd call an example and output."""
    thetas: list[Tensor] = []
    size = sum(p.numel() for p in models[0].parameters())
    left, right = torch.zeros(size, size, dtype=F64), torch.zeros(size, dtype=F64)
    for model in models:
        theta, fisher = by_hand.weights(model), by_hand.fisher(model, DATA, "exact")
        left, right = left + fisher / len(models), right + fisher @ theta / len(models)
        thetas.append(theta)
    center = torch.stack(thetas).mean(0)
    identity = torch.eye(len(center), dtype=F64)
    solution = torch.linalg.solve(left + damping * identity, right + damping * center)
    return ParameterSpace.of(models[0]).unflatten(solution)


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10)


PLAIN: dict[str, Any] = {"normalize": None, "output_damping": 0, "damping": 0.1}


@pytest.mark.parametrize(
    ("wrap", "structure"), paired([name for name in WRAP if name != "a part compiled"], STRUCTURES)
)
def test_fisher__of_a_wrapped_model_is_the_models_own(wrap: str, structure: str) -> None:
    model = Net(0)
    expected = fk.ExactFisher(model, DATA, structure=structure)
    wrapped = WRAP[wrap](copy.deepcopy(model))
    found = fk.ExactFisher(wrapped, DATA, structure=structure)
    assert found.space.names == NAMES
    torch.testing.assert_close(found.to_dense(), expected.to_dense())
    for key in ("model", "parameters_hash", "covered_hash"):
        assert found.metadata[key] == expected.metadata[key]
    chosen = fk.ExactFisher(wrapped, DATA, structure=structure, params=[n for n, _ in wrapped.named_parameters()][2:])
    assert chosen.space.names == NAMES[2:]


@pytest.mark.parametrize("wrap", WRAP)
@pytest.mark.parametrize("where", ["fisher", "model", "state", "both"])
def test_merge__of_wrapped_models_or_fishers_is_the_plain_one(wrap: str, where: str) -> None:
    models = [Net(0), Net(1)]
    expected = exact_merge(models, 0.1)
    wrapped = [WRAP[wrap](copy.deepcopy(models[0])), models[1]]
    fishers = [
        fk.ExactFisher(model, DATA, structure="full") for model in (models if where in ("model", "state") else wrapped)
    ]
    given: list[Any] = models if where == "fisher" else list(wrapped)
    if where == "state":
        given[0] = {name: tensor for name, tensor in wrapped[0].state_dict().items() if name != "n_averaged"}
    if where == "state" and "_orig_mod" not in "".join(given[0]):
        with pytest.raises(fk.InvalidArgumentError, match=r"'module\.' before every name of model 1.*removeprefix"):
            merging.merge(given, fishers, **PLAIN)
        return
    if where == "state" and "parallel" in wrap:  # what is left of the names is a wrapper's still
        with pytest.raises(fk.InvalidArgumentError, match=r"'module\.' before every name of model 1.*removeprefix"):
            merging.merge(given, fishers, **PLAIN)
        return
    result, info = merging.merge(given, fishers, **PLAIN, return_info=True)
    close(result, expected)
    assert info.unverified == ()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_merge__of_older_files_measured_on_wrapped_models(tmp_path: Path, structure: str) -> None:
    """They have the wrapper's names and the hashes of these."""
    models, paths = [Net(0), Net(1)], []
    fishers = [fk.ExactFisher(model, DATA, structure=structure) for model in models]
    for i, (prefix, model) in enumerate(zip(("module.", "_orig_mod."), models, strict=True)):
        old = renamed(fishers[i], {name: prefix + name for name in NAMES})
        with_prefix = {prefix + name: tensor for name, tensor in model.named_parameters()}
        old.metadata |= {
            "covered_hash": f"float64:{tensors_hash(with_prefix)}", "parameters_hash": tensors_hash(with_prefix)
        }  # fmt: skip
        paths.append(tmp_path / f"{i}.fisher")
        old.save(paths[-1])
        assert fk.load(paths[-1]).space.names[0] == f"{prefix}body.0.weight"
    expected = merging.merge(models, fishers)
    found, info = merging.merge(models, paths, return_info=True)
    close(found, expected)
    assert info.unverified == ()
    close(merging.merge(models, [fk.load(path) for path in paths]), expected)
    with pytest.raises(fk.InvalidArgumentError, match="Fisher 1 was measured at other parameters"):
        merging.merge(models[::-1], paths)
    model, loaded = models[0], fk.load(paths[0])
    v = torch.randn(fishers[0].size, dtype=F64)
    torch.testing.assert_close(loaded @ v, fishers[0] @ v)
    scores = InfluenceScores(fishers[0], model, damping=0.1).scores(DATA, DATA)
    for wrapped in (model, nn.DataParallel(model)):
        torch.testing.assert_close(InfluenceScores(loaded, wrapped, damping=0.1).scores(DATA, DATA), scores)
    penalties = []
    for fisher in (fishers[0], loaded):
        ewc = EWC(copy.deepcopy(model), strength=2.0)
        ewc.consolidate(fisher)
        with torch.no_grad():
            dict(ewc.model.named_parameters())["head.weight"].add_(0.1)
        penalties.append(ewc.penalty())
    torch.testing.assert_close(*penalties)


@pytest.mark.parametrize("wrap", WRAP)
def test_influence__of_a_wrapped_model_is_the_plain_one(wrap: str) -> None:
    model = Net(0)
    fisher = fk.ExactFisher(model, DATA, structure="kfac")
    expected = InfluenceScores(fisher, model, damping=0.1).scores(DATA, DATA)
    wrapped = WRAP[wrap](copy.deepcopy(model))
    for own in (fisher, fk.ExactFisher(wrapped, DATA, structure="kfac")):
        torch.testing.assert_close(InfluenceScores(own, wrapped, damping=0.1).scores(DATA, DATA), expected)


@pytest.mark.parametrize("wrap", WRAP)
def test_ewc__takes_the_fisher_of_a_wrapped_model(wrap: str) -> None:
    model = Net(0)
    ewc = EWC(model)
    ewc.consolidate(fk.ExactFisher(WRAP[wrap](copy.deepcopy(model)), DATA, structure="kfac"))
    other = EWC(model)
    other.consolidate(fk.ExactFisher(model, DATA, structure="kfac"))
    with torch.no_grad():
        model.head.weight += 0.1
    torch.testing.assert_close(ewc.penalty(), other.penalty())


@pytest.mark.parametrize("wrap", WRAP)
def test_loss_gradient__is_over_the_parameters_of_the_fisher(wrap: str) -> None:
    wrapped = WRAP[wrap](Net(0))
    for params in (["head.weight"], [n for n, _ in wrapped.named_parameters()][2:], lambda n, _: n.startswith("head")):
        space = fk.ExactFisher(wrapped, DATA, params=params, structure="diagonal").space
        expected = fk.evaluation.loss_gradient(Net(0), DATA, params=space.names)
        torch.testing.assert_close(fk.evaluation.loss_gradient(wrapped, DATA, params=params), expected)


def test_ewc__of_averages_is_refused_since_they_are_not_trained() -> None:
    with pytest.raises(fk.InvalidTypeError, match="got an AveragedModel; expected the model that is trained"):
        EWC(AveragedModel(Net(0)))


@pytest.mark.parametrize("wrap", [name for name in WRAP if name != "averaged"])
def test_ewc__of_a_wrapped_model_holds_the_module_inside(wrap: str) -> None:
    wrapped = WRAP[wrap](Net(0))
    inner = unwrapped(wrapped)
    fisher = fk.ExactFisher(wrapped, DATA, structure="kfac")
    ewc, expected = EWC(wrapped), EWC(inner)
    for own in (ewc, expected):
        own.consolidate(fisher)
    with torch.no_grad():
        inner.head.weight += 0.1
    assert ewc.model is inner
    assert list(ewc.state_dict()) == list(expected.state_dict())
    parameters = list(wrapped.parameters())
    found, right = (torch.autograd.grad(own.penalty(), parameters) for own in (ewc, expected))
    torch.testing.assert_close(found, right)
    assert any(bool(gradient.any()) for gradient in found)


def test_merge__files_of_a_compiled_model_make_files_of_a_plain_one(tmp_path: Path) -> None:
    models = [Net(0), Net(1)]
    for name, model in zip("ab", (compiled(models[0]), models[1]), strict=True):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    fishers = [fk.ExactFisher(model, DATA, structure="full") for model in models]
    path = merging.merge(
        [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], fishers, **PLAIN, out=tmp_path / "m.safetensors"
    )
    close(load_file(path), exact_merge(models, 0.1))
    average = merging.average([tmp_path / "a.safetensors", compiled(models[1])])
    close(average, {n: (t + models[1].state_dict()[n]) / 2 for n, t in models[0].state_dict().items()})
    with pytest.raises(fk.InvalidArgumentError, match="the place of model 1"):
        merging.average([tmp_path / "a.safetensors"], out=tmp_path / "a.safetensors", overwrite=True)


def test_merge__a_module_called_module_is_no_wrapper() -> None:
    class Own(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.module = Net(seed)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    models = [Own(0), Own(1)]
    fishers = [fk.ExactFisher(model, DATA, structure="full") for model in models]
    assert fishers[0].space.names[0] == "module.body.0.weight"
    expected = {f"module.{name}": tensor for name, tensor in exact_merge([m.module for m in models], 0.1).items()}
    close(merging.merge(models, fishers, **PLAIN), expected)
    close(merging.merge([m.state_dict() for m in models], fishers, **PLAIN), expected)


@pytest.mark.parametrize("wrap", WRAP)
def test_hash__is_that_of_the_model_inside(wrap: str) -> None:
    model = Net(0)
    wrapped = WRAP[wrap](copy.deepcopy(model))
    assert fk.parameters_hash(wrapped) == fk.parameters_hash(model)
    if wrap != "a part compiled":
        assert type(unwrapped(wrapped)) is Net
        assert [wrapped_in(wrapped) + name for name in NAMES] == [name for name, _ in wrapped.named_parameters()]


def test_wrapped_in__knows_distributed_data_parallel() -> None:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    try:
        model = Net(0)
        wrapped = compiled(nn.parallel.DistributedDataParallel(model))
        assert wrapped_in(wrapped) == "_orig_mod.module."
        assert unwrapped(wrapped) is model
        assert fk.ExactFisher(wrapped, DATA, structure="diagonal").space.names == NAMES
    finally:
        torch.distributed.destroy_process_group()


def test_vectors__by_the_names_of_a_wrapped_model_are_taken() -> None:
    model = Net(0)
    fisher = fk.ExactFisher(nn.DataParallel(model), DATA, structure="kfac")
    named = {f"module.{name}": torch.randn_like(p) for name, p in model.named_parameters()}
    flat = torch.cat([tensor.flatten() for tensor in named.values()])
    found = fisher @ named
    assert tuple(found) == NAMES
    torch.testing.assert_close(torch.cat([tensor.flatten() for tensor in found.values()]), fisher @ flat)


def test_matching__of_names() -> None:
    known = ("a.weight", "b._orig_mod.weight")
    assert plain("_orig_mod.a._orig_mod.b._orig_mod_c") == "a.b._orig_mod_c"
    assert matching(["module.a.weight", "module.b.weight"], known) == {
        "module.a.weight": "a.weight", "module.b.weight": "b._orig_mod.weight"
    }  # fmt: skip
    assert matching(["a.weight", "x"], known) == {"a.weight": "a.weight", "x": "x"}
    assert matching(["module.a.weight", "x"], known) == {"module.a.weight": "module.a.weight", "x": "x"}
    assert matching(["a.weight"], ["module.a.weight"]) == {"a.weight": "a.weight"}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_renamed__is_the_same_operator(structure: str) -> None:
    fisher = fk.ExactFisher(Net(0), DATA, structure=structure)
    new = renamed(fisher, {name: f"x.{name}" for name in NAMES})
    assert new.space.names == tuple(f"x.{name}" for name in NAMES)
    torch.testing.assert_close(new.to_dense(), fisher.to_dense())
    assert new.metadata == fisher.metadata
    assert [p.space.names for p in split(new)] == [tuple(f"x.{n}" for n in p.space.names) for p in split(fisher)]
    assert renamed(fisher, {name: name for name in NAMES}) is fisher


@pytest.mark.parametrize(
    ("params", "own"), [("module.0.*", "0.*"), (["module.0.weight", "1.bias"], ["0.weight", "1.bias"]), (None, None)]
)
def test_without_prefix__takes_one_name_as_several(params: Any, own: Any) -> None:
    assert without_prefix(params, PARALLEL) == own
