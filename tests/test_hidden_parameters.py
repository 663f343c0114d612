"""Parameters that autograd finds in no usual way: behind checkpoints and custom functions, sparse, or not at all."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint, checkpoint_sequential

import fisherkit as fk
from fisherkit.kinds import KINDS
from tests import by_hand

F64 = torch.float64
STRUCTURES = ["full", "block", "diagonal", "kfac", "ekfac"]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double()


def batch(size: int = 7, features: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, features, generator=generator, dtype=F64)
    return x, torch.randint(3, (size,), generator=generator)


def named(model: nn.Module, fisher: Any) -> list[Tensor]:
    """The parameters of a Fisher."""
    return [model.get_parameter(name) for name in fisher.space.names]


# -- reentrant checkpoints ---------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(4, 6), nn.Linear(6, 3)
        self.b = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.way = "reentrant"

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.way == "reentrant":
            h = checkpoint(self.b, h, use_reentrant=True)
        elif self.way == "sequential":
            h = checkpoint_sequential(self.b, 2, h, use_reentrant=True)
        else:
            h = self.b(h)
        return self.c(h)


def plain(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.way = "plain"  # type: ignore[assignment]
    return other


@pytest.mark.parametrize("params", [None, ["b.0.weight"], ["b.2.bias", "c.weight"], ["a.weight"]], ids=str)
@pytest.mark.parametrize("way", ["reentrant", "sequential"])
def test_checkpoint__reentrant_is_as_if_it_were_not(way: str, params: list[str] | None) -> None:
    model, data = seeded(Checkpointed), batch()
    model.way = way  # type: ignore[assignment]
    fisher = fk.EmpiricalFisher(model, data, params=params)
    expected = by_hand.fisher(twin := plain(model), data, of=named(twin, fisher))
    torch.testing.assert_close(fisher.to_dense(), expected)
    gradient = fk.evaluation.loss_gradient(model, data, params=params)
    torch.testing.assert_close(gradient, fk.evaluation.loss_gradient(plain(model), data, params=params))
    v = torch.ones(fisher.size, 2, dtype=F64)
    streamed = fk.ExactFisher(model, data, params=params, memory_budget=1)
    torch.testing.assert_close(streamed @ v, fk.ExactFisher(plain(model), data, params=params) @ v)
    scores = [fk.influence.InfluenceScores(fisher, m, damping=0.1).scores(data, data) for m in (model, plain(model))]
    torch.testing.assert_close(*scores)
    assert "apply" not in vars(CheckpointFunction)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_checkpoint__over_a_frozen_base(structure: str) -> None:
    model, data = seeded(Checkpointed), batch()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("b"))
    fisher = fk.EmpiricalFisher(model, data, structure=structure)
    torch.testing.assert_close(
        fisher.diagonal(), fk.EmpiricalFisher(plain(model), data, structure=structure).diagonal()
    )
    assert float(fisher.trace()) > 0


def test_checkpoint__is_put_back_after_an_exception() -> None:
    class Failing(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fk.EmpiricalFisher(seeded(Failing), batch())
    assert "apply" not in vars(CheckpointFunction)


def test_checkpoint__of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 6}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **off)
    model = seeded(lambda: transformers.GPT2LMHeadModel(config)).train()
    tokens = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))
    data = {"input_ids": tokens, "labels": tokens}
    params = ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.attn.c_proj.bias"]
    expected = fk.EmpiricalFisher(model, data, params=params).diagonal()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    torch.testing.assert_close(fk.EmpiricalFisher(model, data, params=params).diagonal(), expected)
    assert float(expected.sum()) > 0


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ef": {"kind": "ef", "damping": 0.1},
    "ief": {"kind": "ief", "gram_damping": 0.1},
    "kfac": {"kind": "ef", "damping": 0.1, "structure": "kfac"},
    "exact": {"kind": "exact", "damping": 0.1},
}


@pytest.mark.parametrize("trained", ["abc", "bc", "b", "a", "ac"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer__refuses_reentrant_checkpoints_in_its_way(name: str, trained: str) -> None:
    model, (x, y) = seeded(Checkpointed), batch()
    for key, p in model.named_parameters():
        p.requires_grad_(key[0] in trained)
    model.a.register_forward_hook(lambda module, args, out: out if out.requires_grad else out.requires_grad_())
    before = copy.deepcopy(model.state_dict())
    optimizer = fk.optim.NaturalGradient(model, lr=0.1, **OPTIMIZERS[name])
    with pytest.raises(fk.ModelError, match="use_reentrant=False"):
        F.cross_entropy(model(x), y).backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    optimizer.close()


def test_optimizer__takes_what_lies_behind_a_reentrant_checkpoint() -> None:
    steps = []
    for way in ("reentrant", "plain"):
        model, (x, y) = seeded(Checkpointed), batch()
        model.way = way  # type: ignore[assignment]
        optimizer = fk.optim.NaturalGradient(model, params=["c.weight", "c.bias"], lr=0.1, kind="ef", damping=0.1)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.close()
        steps.append(model.c.weight.detach())
    torch.testing.assert_close(*steps)


class _Opaque(torch.autograd.Function):
    """Calls a layer inside and hides it, as other libraries' checkpoints do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            z: Tensor = layer(x)
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            own = x.detach().requires_grad_()
            z = ctx.layer(own)
        return torch.autograd.grad(z, own, gradients[0])[0], None


class Opaque(nn.Module):
    def __init__(self, spare: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.spare = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(_Opaque.apply(self.a(x), self.b))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("params", [None, ["b.weight"], ["b.bias", "c.weight"]], ids=str)
def test_custom_function__that_hides_parameters_is_refused(params: list[str] | None) -> None:
    model, data = seeded(Opaque), batch()
    with pytest.raises(fk.ModelError, match=r"does not see: .*'b\.\w+'"):
        fk.EmpiricalFisher(model, data, params=params)
    with pytest.raises(fk.ModelError, match="does not see"):
        fk.evaluation.loss_gradient(model, data, params=params)


def test_custom_function__leaves_the_rest_and_spare_parameters_alone() -> None:
    model, data = seeded(Opaque), batch()
    names = ["a.weight", "c.weight", "spare"]
    fisher = fk.EmpiricalFisher(model, data, params=names)
    torch.testing.assert_close(fisher.to_dense(), by_hand.fisher(model, data, of=named(model, fisher)))


# -- sparse gradients --------------------------------------------------------------------------------------------------


def words(size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(20, (size, 3), generator=generator), torch.randint(3, (size,), generator=generator)


class Bag(nn.Module):
    def __init__(self, mode: str, sparse: bool) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(20, 4, mode=mode, sparse=sparse), nn.Linear(4, 3)

    def forward(self, tokens: Tensor, offsets: Tensor | None = None) -> Tensor:
        return self.head(self.bag(tokens, offsets))


SPARSE: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3)),
    "padded": lambda: nn.Sequential(nn.Embedding(20, 4, padding_idx=0, sparse=True), nn.Flatten(), nn.Linear(12, 3)),
    "sum": lambda: Bag("sum", True),
    "mean": lambda: Bag("mean", True),
    "dense mean": lambda: Bag("mean", False),
    "dense max": lambda: Bag("max", False),
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse__gradients_give_the_dense_result(name: str) -> None:
    model, data = seeded(SPARSE[name]), words()
    for params in (None, lambda key, p: key.endswith(("2.weight", "head.weight"))):
        fisher = fk.EmpiricalFisher(model, data, params=params)
        expected = by_hand.fisher(model, data, of=named(model, fisher))
        torch.testing.assert_close(fisher.to_dense(), expected)
        for structure in STRUCTURES[1:]:
            diagonal = fk.EmpiricalFisher(model, data, params=params, structure=structure).diagonal()
            if structure != "kfac":  # whose product of averages is no average of products
                assert structure == "ekfac" or torch.allclose(diagonal, expected.diagonal())
        v = torch.ones(fisher.size, 2, dtype=F64)
        exact = fk.ExactFisher(model, data, params=params)
        torch.testing.assert_close(fk.ExactFisher(model, data, params=params, memory_budget=1) @ v, exact @ v)
    gradient = fk.evaluation.loss_gradient(model, data)
    loss = F.cross_entropy(model(data[0]), data[1])
    torch.testing.assert_close(gradient, by_hand.gradient(loss, model))


@pytest.mark.parametrize("name", ["embedding", "mean"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sparse__optimizers_step_as_with_dense_gradients(optimizer: str, name: str) -> None:
    steps = []
    for sparse in (True, False):
        model, (x, y) = seeded(SPARSE[name]), words()
        for module in model.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.sparse = sparse
        o = fk.optim.NaturalGradient(model, lr=0.1, **OPTIMIZERS[optimizer])
        F.cross_entropy(model(x), y).backward()
        o.step()
        o.close()
        steps.append(by_hand.weights(model))
    torch.testing.assert_close(*steps)


def test_bag__with_offsets_says_what_to_do() -> None:
    model = seeded(lambda: Bag("mean", False))
    tokens, offsets = torch.arange(12), torch.tensor([0, 3, 5, 9])
    with pytest.raises(fk.FisherkitError, match="offsets"):
        fk.EmpiricalFisher(model, ((tokens, offsets), torch.tensor([0, 1, 2, 0])))


# -- unused parameters -------------------------------------------------------------------------------------------------


class Spare(nn.Module):
    """A layer and a parameter that no output depends on, between those that are used."""

    def __init__(self, spare: bool = True) -> None:
        super().__init__()
        self.a = nn.Linear(4, 5)
        if spare:
            self.bare = nn.Parameter(torch.ones(2))
            self.other = nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.c = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.scale.exp() * self.a(x).tanh())


def pair() -> tuple[nn.Module, nn.Module]:
    return_spare = seeded(Spare)
    without = seeded(lambda: Spare(False))
    without.load_state_dict(return_spare.state_dict(), strict=False)
    return return_spare, without


def without_spare(fisher: Any, v: Tensor) -> Tensor:
    parts = fisher.space.unflatten(v)
    assert all(not bool(part.any()) for name, part in parts.items() if name.startswith(("bare", "other")))
    return torch.cat([part.flatten() for name, part in parts.items() if not name.startswith(("bare", "other"))])


@pytest.mark.parametrize(
    ("kind", "structure", "example"),
    [*((kind, "full", "sequence") for kind in KINDS), *(("exact", s, "token") for s in STRUCTURES)],
)
def test_unused__parameters_have_zeros_and_change_nothing(kind: str, structure: str, example: str) -> None:
    spare, without = pair()
    options: dict[str, Any] = {"structure": structure, "example": example} | ({"draws": 2} if kind == "sf" else {})
    fisher, other = (KINDS[kind](m, batch(), **options) for m in (spare, without))
    torch.testing.assert_close(without_spare(fisher, fisher.diagonal()), other.diagonal())
    v = torch.linspace(-1, 1, fisher.size, dtype=F64)
    torch.testing.assert_close(without_spare(fisher, fisher @ v), other @ without_part(fisher, v))


def without_part(fisher: Any, v: Tensor) -> Tensor:
    parts = fisher.space.unflatten(v)
    return torch.cat([part.flatten() for name, part in parts.items() if not name.startswith(("bare", "other"))])


def test_unused__parameters_in_streams_scores_and_comparisons() -> None:
    spare, without = pair()
    fisher, other = (fk.ExactFisher(m, batch(), memory_budget=1) for m in (spare, without))
    v = torch.linspace(-1, 1, 2 * fisher.size, dtype=F64).reshape(-1, 2)
    got = torch.stack([without_spare(fisher, column) for column in (fisher @ v).unbind(1)], 1)
    expected = other @ torch.stack([without_part(fisher, column) for column in v.unbind(1)], 1)
    torch.testing.assert_close(got, expected)
    scores = [
        fk.influence.InfluenceScores(fk.ExactFisher(m, batch()), m, damping=0.1).scores(batch(), batch())
        for m in (spare, without)
    ]
    torch.testing.assert_close(*scores)
    tables = [fk.evaluation.compare(m, batch(), kinds=["ef", "truncated:2"]) for m in (spare, without)]
    assert [row.gamma for row in tables[0].rows] == pytest.approx([row.gamma for row in tables[1].rows])


def test_unused__parameters_make_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bare, self.c = nn.Parameter(torch.ones(2)), nn.Linear(4, 3)
            self.sizes: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return self.c(x)

    sizes: list[int] = []
    model = seeded(Only)
    fisher = fk.EmpiricalFisher(model, batch(40))
    assert sizes.count(40) == 1
    assert sizes.count(1) <= 1  # an example by itself, to be compared with others
    rules = {n: e.rule for e in fisher.coverage().entries for n in e.parameters}
    assert rules["bare"] == "unused"


def test_unused__in_the_first_examples_and_used_later() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bare, self.c = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x * self.bare if bool((x[:, 0] > 5).any()) else x)

    x, y = batch()
    data = [(x[:3], y[:3]), (torch.cat([x[3:4] * 0 + 6, x[3:4] * 0 + 7]), y[3:5])]
    model = seeded(Gated)
    fisher = fk.EmpiricalFisher(model, data)
    expected = by_hand.fisher(model, data)
    torch.testing.assert_close(fisher.to_dense(), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer__refuses_layers_whose_checkpoint_cuts_the_graph(name: str) -> None:
    """Without an input that requires grad, torch gives the layers inside no gradient at all."""
    model, (x, y) = seeded(Checkpointed), batch()
    model.a.requires_grad_(False)
    optimizer = fk.optim.NaturalGradient(model, lr=0.1, **OPTIMIZERS[name])
    with (
        pytest.warns(UserWarning, match="None of the inputs"),
        pytest.raises(fk.ModelError, match="use_reentrant=False"),
    ):
        F.cross_entropy(model(x), y).backward()
    optimizer.close()
