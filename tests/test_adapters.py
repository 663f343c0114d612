"""LoRA adapters as the change of weight that they are, against the same model with the change written into its weights.

The truth is PEFT's own ``merge_and_unload``, and autograd with respect to the merged weights, one call a row.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fisherkit as fk
from fisherkit.kinds import KINDS
from tests.reference import fisher as reference
from tests.reference.kronecker import kronecker
from tests.reference.outputs import EF, EXACT, Kind
from tests.snapshot import of_model, untouched

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Tied weights:UserWarning"),
]

TEXT = torch.randint(0, 7, (4, 3), generator=torch.Generator().manual_seed(1))


class Words(nn.Module):
    """Tokens, a layer with a bias and a head, of which each position has an output."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(self.words(tokens)).tanh())  # type: ignore[no-any-return]


class Picture(nn.Module):
    """Two convolutions, one of them strided and padded, and their mean."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3, stride=2, padding=1, **options), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).mean((2, 3))  # type: ignore[no-any-return]


class Logits(nn.Module):
    """A language model of transformers, without the labels' shift."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(input_ids=tokens).logits  # type: ignore[no-any-return]


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=7, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=6,
    )  # fmt: skip
    return Logits(transformers.LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=7, n_positions=6, n_embd=4, n_layer=1, n_head=2, n_inner=6)
    return Logits(transformers.GPT2LMHeadModel(config))


def tuned(make: Callable[[], nn.Module], seed: int = 0, adapters: int = 1, **config: Any) -> Any:
    """In float64 and eval mode, away from B = 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.5} | config
        model = peft.get_peft_model(make(), peft.LoraConfig(**settings))
        for number in range(1, adapters):
            model.add_adapter(f"other {number}", peft.LoraConfig(**settings | {"r": 1, "use_rslora": True}))
        if adapters > 1:
            model.base_model.set_adapter(["default", *(f"other {number}" for number in range(1, adapters))])
        move(model)
    return model.double().eval()


def move(model: nn.Module) -> None:
    """All that adapters have, somewhere else."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.4)


MODELS: dict[str, tuple[Callable[[], Any], Tensor, Tensor]] = {
    "embedding and linear": (lambda: tuned(Words, target_modules=["words", "hidden"]), TEXT, TEXT % 3),
    "with biases": (lambda: tuned(Words, target_modules=["hidden"], lora_bias=True, bias="none"), TEXT, TEXT % 3),
    "base biases are trained": (lambda: tuned(Words, target_modules=["hidden"], bias="all"), TEXT, TEXT % 3),
    "a head beside": (lambda: tuned(Words, target_modules=["hidden"], modules_to_save=["head"]), TEXT, TEXT % 3),
    "two adapters": (lambda: tuned(Words, adapters=2, target_modules=["words", "hidden"]), TEXT, TEXT % 3),
    "convolutions": (
        lambda: tuned(Picture, target_modules=["first", "second"]),
        torch.randn(4, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
        torch.tensor([0, 2, 1, 0]),
    ),
    "Conv1D of transformers": (lambda: tuned(gpt2, target_modules=["c_attn"], fan_in_fan_out=True), TEXT, TEXT),
    "llama": (lambda: tuned(llama, target_modules=["q_proj", "v_proj", "down_proj"]), TEXT, TEXT),
}


def merged(model: Any) -> nn.Module:
    """A copy whose weights are the products."""
    found: nn.Module = copy.deepcopy(model).merge_and_unload()
    return found.requires_grad_(True)


def plain(name: str) -> str:
    """A name of the adapted model in the merged one."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".modules_to_save.default", "")


def close(got: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape
    assert float((got - expected).norm()) <= relative * float(expected.norm())


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights__are_the_weights_of_the_merged_model(name: str) -> None:
    model = MODELS[name][0]()
    with untouched(model, None):
        found = fk.adapters.merged_weights(model)
    expected = dict(merged(model).named_parameters())
    for own, value in found.items():
        close(value, expected[plain(own)])
    adapted = [own for own in found if ".base_layer." in own and not model.get_parameter(own).requires_grad]
    beside = {own for own, p in model.named_parameters() if p.requires_grad and "lora_" not in own}
    assert set(found) == beside | set(adapted)


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(MODELS, (EF, EXACT))), ids=str)
def test_fisher__of_the_products_is_that_of_the_merged_weights(name: str, kind: Kind) -> None:
    """By brute force: full, diagonal, kfac and ekfac."""
    make, inputs, targets = MODELS[name]
    model = make()
    names = fk.adapters.merged_weights(model)
    wanted = tuple(map(plain, names))
    problem = reference.Problem(merged(model).double(), inputs, targets, params=wanted)
    assert list(problem.chosen()) == list(wanted)  # one flat order
    rows = reference.rows(problem, kind)
    tolerance = 1e-6 if name == "llama" else 1e-10  # its norms and rotary positions are computed in float32

    def built(structure: str) -> fk.FisherOperator:
        return fk.FisherApproximation(
            model, (inputs, targets), kind.name, params=names, structure=structure, shift_labels=False
        )

    close(built("full").to_dense(), reference.full(rows), tolerance)
    close(built("diagonal").diagonal(), reference.diagonal(rows), tolerance)
    for structure in ("kfac", "ekfac"):
        if "words" not in " ".join(names):  # of embeddings the reference has a block where the package has a diagonal
            close(built(structure).to_dense(), kronecker(problem, kind, structure), 10 * tolerance)  # type: ignore[arg-type]
    assert all(not p.requires_grad for own, p in model.named_parameters() if own.endswith("base_layer.weight"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["diagonal", "kfac", "ekfac"])
def test_fisher__of_the_products_is_one_for_every_kind(kind: str, structure: str) -> None:
    make, inputs, targets = MODELS["embedding and linear"]
    model = make()
    names = fk.adapters.merged_weights(model)
    options: dict[str, Any] = {"kind": kind, "structure": structure}
    fisher = fk.FisherApproximation(model, (inputs, targets), params=names, **options)
    expected = fk.FisherApproximation(merged(model), (inputs, targets), params=map(plain, names), **options)
    close(fisher.to_dense(), expected.to_dense())


# -- elastic weight consolidation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("structure", ["diagonal", "kfac"])
def test_ewc__holds_the_products_and_reaches_the_adapters(name: str, structure: str) -> None:
    """Its value is the merged model's, its gradient the one in the merged weights times the products' derivatives."""
    make, inputs, targets = MODELS[name]
    model = make()
    options: dict[str, Any] = {"structure": structure, "shift_labels": False}
    names = fk.adapters.merged_weights(model)
    ewc, whole = fk.continual.EWC(model), merged(model)
    ewc.consolidate(fk.ExactFisher(model, (inputs, targets), params=names, **options))
    other = fk.continual.EWC(whole)
    fisher = fk.ExactFisher(whole, (inputs, targets), params=map(plain, names), **options)
    other.consolidate(fisher, uncovered="free")
    assert float(ewc.penalty()) == 0
    move(model)
    found = fk.adapters.merged_weights(model)
    with torch.no_grad():
        for own, value in found.items():
            whole.get_parameter(plain(own)).copy_(value)
    tolerance = 1e-6 if name == "llama" else 1e-10
    whole.requires_grad_(True)
    penalty, expected = ewc.penalty(), other.penalty()
    close(penalty, expected, tolerance)
    penalty.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    trained = {own: p for own, p in model.named_parameters() if p.requires_grad}
    outer = [whole.get_parameter(plain(own)).grad for own in found]
    chained = torch.autograd.grad(list(found.values()), list(trained.values()), outer)  # type: ignore[arg-type]
    for parameter, gradient in zip(trained.values(), chained, strict=True):
        assert parameter.grad is not None
        close(parameter.grad, gradient, 10 * tolerance)


def test_ewc__of_the_products_does_not_see_another_basis_of_the_adapters() -> None:
    make, inputs, targets = MODELS["embedding and linear"]
    model = make()
    ewc = fk.continual.EWC(model)
    ewc.consolidate(fk.EmpiricalFisher(model, (inputs, targets), params=fk.adapters.merged_weights(model)))
    state = ewc.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(4.0 if "_A" in name else 0.25)
    assert float(ewc.penalty()) < 1e-25
    again = fk.continual.EWC(model)
    again.load_state_dict(state)
    move(model)
    assert float(again.penalty()) == float(ewc.penalty()) > 0


def test_ewc__holds_the_head_of_the_adapter_that_is_in_use() -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"target_modules": ["hidden"], "modules_to_save": ["head"]}
    model = tuned(Words, **settings)
    names = fk.adapters.merged_weights(model)
    ewc = fk.continual.EWC(model, 0.1)
    fisher = fk.ExactFisher(model, (TEXT, TEXT % 3), params=names, structure="diagonal")
    ewc.consolidate(fisher)
    kept = {plain(name): value.detach().clone() for name, value in names.items()}

    model.add_adapter("next", peft.LoraConfig(r=1, **settings))
    model.set_adapter("next")
    model.double()
    move(model)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["next"].weight.add_(0.3)
    now = {plain(name).replace(".modules_to_save.next", ""): w for name, w in fk.adapters.merged_weights(model).items()}
    parts = {plain(name): value for name, value in fisher.space.unflatten(fisher.diagonal()).items()}
    expected = 0.05 * sum((parts[name] * (now[name] - kept[name]).square()).sum() for name in parts)
    torch.testing.assert_close(ewc.penalty(), expected)
    ewc.penalty().backward()
    assert float(model.base_model.model.head.modules_to_save["next"].weight.grad.norm()) > 0


def test_ewc__refuses_what_would_hold_one_change_twice() -> None:
    make, inputs, targets = MODELS["embedding and linear"]
    model = make()
    ewc = fk.continual.EWC(model)
    ewc.consolidate(fk.EmpiricalFisher(model, (inputs, targets), params=fk.adapters.merged_weights(model)))
    with pytest.raises(fk.InvalidArgumentError, match="adapters"):
        ewc.consolidate(fk.EmpiricalFisher(model, (inputs, targets)), uncovered="free")
    assert ewc.consolidations == 1


def test_ewc__tells_no_learning_rate_of_products() -> None:
    make, inputs, targets = MODELS["embedding and linear"]
    model = make()
    ewc = fk.continual.EWC(model)
    ewc.consolidate(fk.EmpiricalFisher(model, (inputs, targets), params=fk.adapters.merged_weights(model)))
    with pytest.raises(fk.NoClosedFormError, match=r"largest_stable_lr: .*no quadratic"):
        ewc.largest_stable_lr()


# -- merging -----------------------------------------------------------------------------------------------------------


def test_merge__of_adapters_says_that_products_are_not_averaged() -> None:
    make, inputs, targets = MODELS["embedding and linear"]
    models = [make(), make()]
    fishers = [fk.EmpiricalFisher(model, (inputs, targets), structure="diagonal") for model in models]
    parts = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
    with pytest.warns(UserWarning, match=r"A and B are merged apart.*merged_weights"):
        fk.merging.merge(parts, fishers)
    with pytest.warns(UserWarning, match="A and B are merged apart"):
        fk.merging.average(parts)


def test_merge_layers__of_adapters_says_once_what_merges_their_products() -> None:
    make, inputs, targets = MODELS["embedding and linear"]
    with pytest.warns(UserWarning, match="A and B are merged apart") as said:
        fk.merging.merge_layers([make(), make()], [(inputs, targets)] * 2)
    (text,) = [str(one.message) for one in said]
    assert text.startswith("merge_layers: ")
    assert "Try: fk.merging.merge" in text


def test_merge__of_products_is_that_of_merged_models_and_fits_into_adapters() -> None:
    make, inputs, targets = MODELS["embedding and linear"]
    models = [make(), make()]
    move(models[1])
    weights = [fk.adapters.merged_weights(model) for model in models]
    fishers = [
        fk.EmpiricalFisher(model, (inputs, targets), params=own, structure="diagonal")
        for model, own in zip(models, weights, strict=True)
    ]
    got, info = fk.merging.merge(weights, fishers, damping=1e-3, return_info=True)
    assert info.unverified == ()  # each Fisher knows the products that it was measured at
    wholes = [merged(model) for model in models]
    options: dict[str, Any] = {"params": list(map(plain, weights[0])), "structure": "diagonal"}
    expected = fk.merging.merge(
        wholes, [fk.EmpiricalFisher(whole, (inputs, targets), **options) for whole in wholes], damping=1e-3
    )
    for name, value in got.items():
        close(value, expected[plain(name)])
    with pytest.raises(fk.InvalidArgumentError, match="other parameters"):
        fk.merging.merge(weights, fishers[::-1])

    errors = fk.adapters.write_merged_weights(models[0], got)
    written = fk.adapters.merged_weights(models[0])
    for name, error in errors.items():
        change = got[name] - models[0].get_parameter(name)
        assert error == pytest.approx(float((written[name] - got[name]).norm() / change.norm()), rel=1e-6)
        singular = torch.linalg.svdvals(change)
        assert error == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "two adapters"])
def test_write__gives_back_what_has_the_rank(name: str) -> None:
    model = MODELS[name][0]()
    wanted = {own: value.detach().clone() for own, value in fk.adapters.merged_weights(model).items()}
    move(model)
    errors = fk.adapters.write_merged_weights(model, wanted)
    assert errors
    assert max(errors.values()) < 1e-10
    for own, value in fk.adapters.merged_weights(model).items():
        close(value, wanted[own])


def test_write__refuses_what_it_cannot_write_and_changes_nothing() -> None:
    def made(**options: Any) -> tuple[Any, dict[str, Tensor]]:
        model = tuned(Words, target_modules=["hidden"], **options)
        return model, {name: value.detach() for name, value in fk.adapters.merged_weights(model).items()}

    model, own = made()
    before = of_model(model)
    cases: list[tuple[Any, type[Exception], str]] = [
        ({name: value * float("nan") for name, value in own.items()}, fk.NonFiniteError, "NaN or infinite entries"),
        ([own], fk.InvalidTypeError, "weights of type list"),
        (dict.fromkeys(own, 1.0), fk.InvalidTypeError, "a dict of name -> tensor"),
    ]
    for weights, error, words in cases:
        with pytest.raises(error, match=words):
            fk.adapters.write_merged_weights(model, weights)
    assert of_model(model) == before
    model, own = made(lora_alpha=0)
    with pytest.raises(fk.InvalidArgumentError, match=r"adapters of scale 0 on .*hidden"):
        fk.adapters.write_merged_weights(model, own)
    model, own = made()
    with pytest.raises(fk.NonFiniteError, match="beyond the range"):
        fk.adapters.write_merged_weights(model.half(), {name: value + 1e12 for name, value in own.items()})


# -- what has no product -----------------------------------------------------------------------------------------------


def tied() -> nn.Module:
    """A head that shares the embedding's weight."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    return model


IA3 = peft.IA3Config(target_modules=["hidden"], feedforward_modules=["hidden"])

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: tuned(Words, target_modules=["hidden"], use_dora=True), "DoraLinearVariant"),
    "dilation": (lambda: tuned(lambda: Picture(dilation=2), target_modules=["first"]), "dilation"),
    "tied": (lambda: tuned(tied, target_modules=["1"]), "tied"),
    "another method": (lambda: peft.get_peft_model(Words(), IA3), "not of LoRA"),
    "no adapters": (Words, "without active LoRA adapters"),
    "merged": (lambda: merged_in_place(), "without active LoRA adapters"),
}  # fmt: skip


def merged_in_place() -> Any:
    model = tuned(Words, target_modules=["hidden"])
    model.merge_adapter()
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_merged_weights__refuses_what_is_no_product(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(fk.InvalidArgumentError, match=words):
        fk.adapters.merged_weights(make())


def test_merged_weights__in_half_precision_are_summed_in_float32() -> None:
    """A change that bfloat16 would round away."""
    model = tuned(Words, target_modules=["hidden"]).bfloat16()
    name = "base_model.model.hidden.base_layer.weight"
    layer = model.base_model.model.hidden
    a, b = (part["default"].weight.float() for part in (layer.lora_A, layer.lora_B))
    expected = model.get_parameter(name).float() + 1.5 * (b @ a)
    found = fk.adapters.merged_weights(model)[name]
    assert found.dtype == torch.float32
    close(found, expected, 1e-6)


# -- what it costs -----------------------------------------------------------------------------------------------------

SIDE = 96
"""Of the frozen weights; adapters have SIDE × 2 numbers, and a batch of 4 × 3 positions SIDE × 12."""


class Made(TorchDispatchMode):
    """Which kernels have made tensors of a frozen weight's size."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        large = [one for one in tree_leaves(made) if isinstance(one, Tensor) and one.numel() >= SIDE**2]
        known = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        self.found += [str(func) for one in large if one.untyped_storage().data_ptr() not in known]
        return made


class Dequantised(torch.autograd.Function):
    """A product with a weight of whole numbers, as quantised layers have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: Tensor, scale: float) -> Tensor:
        ctx.whole, ctx.scale = whole, scale
        return x @ (whole.to(x.dtype) * scale).mT

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return outer[0] @ (ctx.whole.to(outer[0].dtype) * ctx.scale), None, None


class Quantised(nn.Linear):
    """A linear layer whose weight is int8."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = float(layer.weight.abs().max()) / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return Dequantised.apply(x, self.weight, self.scale)  # type: ignore[no-any-return, no-untyped-call]


class Deep(nn.Module):
    """Two wide layers, perhaps within checkpoints, with weights that are perhaps quantised."""

    def __init__(self, *, quantised: bool = False, checkpoints: bool = False) -> None:
        super().__init__()
        wide = [nn.Linear(SIDE, SIDE, bias=False) for _ in range(2)]
        self.first, self.second = map(Quantised, wide) if quantised else wide
        self.head, self.checkpoints = nn.Linear(SIDE, 3), checkpoints

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
            x = x.tanh()
        return self.head(x)  # type: ignore[no-any-return]


def deep(dtype: torch.dtype, **options: bool) -> tuple[Any, tuple[Tensor, Tensor]]:
    model = tuned(lambda: Deep(**options), target_modules=["first", "second"], lora_dropout=0.0)
    x = torch.randn(4, 3, SIDE, generator=torch.Generator().manual_seed(0))
    return model.to(dtype), (x.to(dtype), TEXT % 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpoints"])
@pytest.mark.parametrize("structure", ["diagonal", "full"])
def test_fisher__of_adapters_makes_nothing_of_a_frozen_weight_s_size(
    dtype: torch.dtype, checkpoints: bool, structure: str
) -> None:
    model, data = deep(dtype, checkpoints=checkpoints)
    with Made() as made:
        fisher = fk.EmpiricalFisher(model, data, structure=structure)
    assert made.found == []
    assert all("lora" in name for name in fisher.space.names)
    assert {entry.rule for entry in fisher.coverage().entries} == {"linear"}


@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpoints"])
def test_fisher__of_the_products_makes_factors_and_no_dense_gradient(checkpoints: bool) -> None:
    """Beyond the two examples on which a model's rules are verified once."""
    model, data = deep(torch.float32, checkpoints=checkpoints)
    names = fk.adapters.merged_weights(model)
    first = fk.EmpiricalFisher(model, data, params=names, structure="kfac")
    with Made() as made:
        again = fk.EmpiricalFisher(model, data, params=names, structure="kfac")
    values = 2 * ["aten.mm.default", "aten.mul.Tensor", "aten.add.Tensor"]  # the record of where it was measured
    factors = 4 * ["aten.mm.default"]  # scaled in place
    assert sorted(name for name in made.found if "empty" not in name) == sorted(values + factors)
    assert torch.equal(again.trace(), first.trace())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpoints"])
def test_fisher__of_adapters_on_quantised_weights_is_that_on_their_values(
    dtype: torch.dtype, checkpoints: bool
) -> None:
    model, data = deep(dtype, quantised=True, checkpoints=checkpoints)
    whole, _ = deep(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            own = whole.get_parameter(name)
            module = model.get_submodule(name.rpartition(".")[0])
            own.copy_(p.double() * module.scale if isinstance(module, Quantised) else p)
    for structure in ("diagonal", "ekfac"):
        fisher, expected = (fk.EmpiricalFisher(m, data, structure=structure) for m in (model, whole))
        close(fisher.diagonal(), expected.diagonal(), 1e-10 if dtype == torch.float64 else 5e-2)
        assert {entry.rule for entry in fisher.coverage().entries} == {"linear"}
        assert fisher.held.nbytes == expected.held.nbytes  # of few vectors no matrix is made
    with pytest.raises(fk.InvalidArgumentError, match="quantised"):
        fk.adapters.merged_weights(model)


def test_scores__of_the_products_are_those_of_the_merged_model() -> None:
    make, inputs, targets = MODELS["embedding and linear"]
    model, data = make(), (inputs, targets)
    names, whole = fk.adapters.merged_weights(model), merged(model)
    pairs = ((model, list(names)), (whole, list(map(plain, names))))
    got, expected = (
        fk.influence.InfluenceScores(
            fk.ExactFisher(one, data, params=own, structure="ekfac"), one, damping=1e-3
        ).scores((inputs[:2], targets[:2]), data)
        for one, own in pairs
    )  # fmt: skip
    close(got, expected)
