"""What the optimizers refuse, when, and in which words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fisherkit as fk
from fisherkit.errors import (
    DataError,
    InvalidArgumentError,
    InvalidTypeError,
    ModelError,
    NonFiniteError,
    SingularMatrixError,
    UnknownParameterError,
)
from tests.bad_input import Case, X, Y, check, ids, mlp, normal, wrapped
from tests.optim_loops import flat, natural

Natural: Any = fk.optim.NaturalGradient
Beside: Any = fk.optim.Preconditioner

ARGUMENTS: dict[str, tuple[Callable[[], object], type[fk.FisherkitError], tuple[str, ...]]] = {
    "parameters": (lambda: Natural(mlp().parameters(), 0.1, damping=1.0), InvalidTypeError,
        ("a generator as model", "a torch.nn.Module", "NaturalGradient(model")),
    "parameters beside": (lambda: Beside(list(mlp().parameters()), damping=1.0), InvalidTypeError,
        ("a list as model", "Preconditioner(model")),
    "no damping": (lambda: Natural(mlp(), 0.1), InvalidArgumentError,
        ("damping=None and gram_damping=None", "one of them", "gram_damping=1e-3")),
    "two dampings": (lambda: Beside(mlp(), damping=1.0, gram_damping=1.0), InvalidArgumentError,
        ("damping=1.0 and gram_damping=1.0", "different updates")),
    "negative damping": (lambda: natural(mlp(), gram_damping=-1.0), InvalidArgumentError,
        ("gram_damping=-1.0", "0 or more")),
    "text damping": (lambda: natural(mlp(), gram_damping="1"), InvalidTypeError, ("gram_damping of type str",)),
    "relative gram damping": (lambda: natural(mlp(), gram_damping=fk.RelativeDamping(1.0)), InvalidTypeError,
        ("gram_damping of type RelativeDamping",)),
    "lr": (lambda: natural(mlp(), lr=-0.1), InvalidArgumentError, ("lr=-0.1", "0 or more")),
    "lr nan": (lambda: natural(mlp(), lr=float("nan")), InvalidArgumentError, ("lr=nan",)),
    "momentum": (lambda: natural(mlp(), momentum="a"), InvalidTypeError, ("momentum of type str",)),
    "text decay": (lambda: natural(mlp(), weight_decay="a"), InvalidTypeError, ("weight_decay of type str",)),
    "trust region": (lambda: natural(mlp(), trust_region=0.0), InvalidArgumentError, ("trust_region=0.0", "above 0")),
    "text trust region": (lambda: Beside(mlp(), trust_region="a"), InvalidTypeError, ("trust_region of type str",)),
    "kind": (lambda: natural(mlp(), kind="kfac"), InvalidArgumentError, ("kind='kfac'", "'ief'")),
    "kind type": (lambda: natural(mlp(), kind=fk.ExactFisher), InvalidTypeError, ("a kind of type", "OutputRule")),
    "kind setting": (lambda: natural(mlp(), kind="truncated:0"), InvalidArgumentError,
        ("kind='truncated:0'", "'truncated:RANK'", "Its rank must be an integer, 1 or more")),
    "kind twice": (lambda: natural(mlp(), kind="truncated:2", rank=3), InvalidArgumentError,
        ("kind='truncated:2' and rank=", "one of them")),
    "options": (lambda: natural(mlp(), kind="ef", draws=2), InvalidArgumentError,
        ("an argument draws=", "its own, and those of kind='ef': none")),
    "structure": (lambda: natural(mlp(), structure="kron"), InvalidArgumentError, ("structure='kron'",)),
    "reduction": (lambda: natural(mlp(), reduction="none"), InvalidArgumentError, ("reduction='none'",)),
    "ema": (lambda: Beside(mlp(), damping=1.0, ema=1.0), InvalidArgumentError, ("ema=1.0", "below 1")),
    "text ema": (lambda: Beside(mlp(), damping=1.0, ema="a"), InvalidTypeError, ("ema of type str",)),
    "own momentum": (lambda: Beside(mlp(), gradient_momentum=1.0), InvalidArgumentError,
        ("gradient_momentum=1.0", "below 1")),
    "momentum of rows": (
        lambda: Beside(mlp(), structure="full", damping=1.0, gradient_momentum=0.5), InvalidArgumentError,
        ("gradient_momentum=0.5", "gradient_momentum=0", '"kfac"'),
    ),
    "the other's momentum": (lambda: Beside(mlp(), momentum=0.9), InvalidArgumentError, ("momentum=", "help(")),
    "layer_rms": (lambda: Beside(mlp(), layer_rms=0.0), InvalidArgumentError, ("layer_rms=0.0", "above 0")),
    "text layer_rms": (lambda: Beside(mlp(), layer_rms="a"), InvalidTypeError, ("layer_rms of type str",)),
    "two lengths": (lambda: Beside(mlp(), layer_rms=0.2, trust_region=0.1), InvalidArgumentError,
        ("layer_rms=0.2", "trust_region=0.1", "how long a step is")),
    "ema of rows": (lambda: natural(mlp(), ema=0.5), InvalidArgumentError, ("structure='full' with ema=0.5", '"kfac"')),
    "update every": (lambda: Beside(mlp(), damping=1.0, update_every=0), InvalidArgumentError, ("update_every=0",)),
    "positions": (lambda: Beside(mlp(), damping=1.0, kfac_positions="mean"), InvalidArgumentError,
        ("kfac_positions='mean'",)),
    "unknown name": (lambda: natural(mlp(), params=["weight"]), UnknownParameterError, ("['weight']", "0.weight")),
    "tensors as params": (lambda: natural(mlp(), params=mlp().parameters()), InvalidTypeError,
        ("params of type Parameter",)),
    "foreign group": (lambda: natural(mlp(), params=[{"params": mlp().parameters()}]), ModelError,
        ("not the model's",)),
    "setting of a group": (lambda: natural(m := mlp(), params=[{"params": m.parameters(), "gram_damping": 1.0}]),
        InvalidArgumentError, ("['gram_damping'] in a parameter group", "'momentum'", "all groups")),
}  # fmt: skip


@pytest.mark.parametrize("name", ids(ARGUMENTS))
def test_arguments__that_do_not_fit_are_named(name: str) -> None:
    check(Case(*ARGUMENTS[name]))


def test_add_param_group__refused_changes_nothing() -> None:
    model = mlp()
    optimizer = natural(model, params=[{"params": model[0].parameters()}])
    with pytest.raises(ModelError, match="not the model's"):
        optimizer.add_param_group({"params": mlp().parameters()})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": model[2].weight, "lr": 0.5})
    before = flat(model)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    assert int((flat(model) != before).sum()) == model[0].weight.numel() + 5 + model[2].weight.numel()


def fit(model: nn.Module, loss: Callable[[Tensor], Tensor], **options: Any) -> Callable[[], None]:
    """One step with a loss of the outputs."""

    def step() -> None:
        optimizer = natural(model, **options)
        loss(model(X)).backward()
        optimizer.step()

    return step


def reentrant(m: Any, x: Tensor) -> Tensor:
    h: Tensor = checkpoint(m.body[0], x.clone().requires_grad_(), use_reentrant=True) if m.training else m.body[0](x)
    return m.body[2](torch.tanh(h))


def always_reentrant(m: Any, x: Tensor) -> Tensor:
    return m.body[2](checkpoint(torch.tanh, m.body[0](x), use_reentrant=True))


def twice(model: nn.Module) -> None:
    optimizer = natural(model)
    loss = F.cross_entropy(model(X), Y)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


def add(group: Any) -> None:
    natural(mlp(), damping=0.1, gram_damping=None).add_param_group(group)


def grouped(**settings: Any) -> None:
    model = mlp()
    Natural(model, 0.1, damping=0.1, params=[{"params": list(model.parameters()), **settings}])


def set_to(cls: Any, name: str, value: Any) -> None:
    """A setting that a loop writes to between steps."""
    model = mlp()
    optimizer = cls(model, damping=0.1, structure="kfac", lr=0.1)
    F.cross_entropy(model(X), Y).backward()
    if cls is Natural:
        optimizer.param_groups[0][name] = value
    else:
        setattr(optimizer, name, value)
    before = flat(model), [p.grad.clone() for p in model.parameters()]
    try:
        optimizer.step()
    finally:
        assert torch.equal(flat(model), before[0])
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before[1], strict=True))


def step_of(value: Any) -> None:
    model = mlp()
    optimizer = natural(model)
    loss = F.cross_entropy(model(X), Y)
    optimizer.step(loss if value is None else value)


NAN = float("nan")
GROUPS: dict[str, tuple[Callable[[], object], type[fk.FisherkitError], tuple[str, ...]]] = {
    "a loss": (lambda: step_of(None), InvalidTypeError, ("Gradient.step: got a Tensor as closure", "backward()")),
    "a number": (lambda: step_of(3), InvalidTypeError, ("got an int as closure",)),
    "no group": (lambda: add(3), InvalidTypeError, ("NaturalGradient.add_param_group: got an int", '"params"')),
    "a list": (lambda: add([nn.Parameter(torch.ones(1))]), InvalidTypeError, ("got a list", '"params"')),
    "no parameters": (lambda: add({}), InvalidTypeError, ("params of type NoneType",)),
    "a number of parameters": (lambda: add({"params": 3}), InvalidTypeError, ("params of type int",)),
    "an lr": (lambda: add({"params": [], "lr": NAN}), InvalidArgumentError, ("['lr']=nan", "a finite number")),
    "made of nothing": (lambda: Natural(mlp(), 0.1, damping=0.1, params=[{}]), InvalidTypeError,
        ("NaturalGradient: got", "params of type NoneType")),
    "made with lr": (lambda: grouped(lr=NAN), InvalidArgumentError, ("['lr']=nan",)),
    "made with text": (lambda: grouped(momentum="a"), InvalidTypeError, ("['momentum'] of type str",)),
    "lr later": (lambda: set_to(Natural, "lr", NAN), InvalidArgumentError, ("step", "['lr']=nan")),
    "decay later": (lambda: set_to(Natural, "weight_decay", float("inf")), InvalidArgumentError, ("decay']=inf",)),
    "damping later": (lambda: set_to(Natural, "damping", NAN), InvalidArgumentError, ("damping=nan",)),
    "trust region later": (lambda: set_to(Natural, "trust_region", NAN), InvalidArgumentError, ("trust_region=nan",)),
    "trust region beside": (lambda: set_to(Beside, "trust_region", NAN), InvalidArgumentError, ("trust_region=nan",)),
    "layer_rms beside": (lambda: set_to(Beside, "layer_rms", NAN), InvalidArgumentError, ("layer_rms=nan",)),
    "damping beside": (lambda: set_to(Beside, "damping", NAN), InvalidArgumentError, ("damping nan",)),
}  # fmt: skip


@pytest.mark.parametrize("name", ids(GROUPS))
def test_groups__of_what_no_step_can_take_are_refused(name: str) -> None:
    check(Case(*GROUPS[name]))


def test_step__takes_an_lr_that_a_schedule_rounded_below_zero_or_made_a_tensor() -> None:
    for rate in (-1e-19, torch.tensor(0.1)):
        model = mlp()
        optimizer = natural(model)
        F.cross_entropy(model(X), Y).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()


def without_forward(model: nn.Sequential, call: Callable[[nn.Sequential], Tensor]) -> None:
    optimizer = natural(model)
    F.cross_entropy(call(model), Y).backward()
    optimizer.step()


def closed(model: nn.Module) -> None:
    optimizer = natural(model)
    F.cross_entropy(model(X), Y).backward()
    optimizer.close()
    optimizer.step()


def late_layer(m: Any, x: Tensor) -> Tensor:
    z: Tensor = m.body(x)
    return z + m.extra(x) if m.extra.weight.requires_grad and getattr(m, "config", {}).get("late") else z


def different_parameters() -> None:
    model = mlp()
    optimizer = natural(model)
    F.cross_entropy(model(X), Y).backward()
    model[0].requires_grad_(False)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


def rewritten(z: Tensor) -> Tensor:
    return F.cross_entropy(z.div_(2.0), Y)


def paused_step() -> None:
    model = mlp()
    optimizer = natural(model)
    with optimizer.paused():
        F.cross_entropy(model(X), Y).backward()
    optimizer.step()


def many_waiting() -> None:
    model = mlp()
    optimizer = natural(model)
    losses = [F.cross_entropy(model(X), Y) for _ in range(9)]
    sum(losses, torch.zeros(())).backward()
    optimizer.step()


def unbatched(make: Any, x: Tensor, model: nn.Module | None = None, *, first: bool = True) -> None:
    """A call with one example that has no batch axis, first or after a step."""
    model = mlp() if model is None else model
    optimizer = make(model)
    if not first:
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    model(x)


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(-3), nn.Linear(144, 3)).double()


def without_tensors() -> None:
    model = wrapped(lambda m, x: m.body(X))
    optimizer = natural(model)
    F.cross_entropy(model(3), Y).backward()
    optimizer.step()


def cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, Y)


TRAINING: dict[str, tuple[Callable[[], object], type[fk.FisherkitError], tuple[str, ...]]] = {
    "label smoothing": (fit(mlp(), lambda z: F.cross_entropy(z, Y, label_smoothing=0.1)), ModelError,
        ("NaturalGradient, backward pass", "no positive multiple", "without label smoothing")),
    "penalty on outputs": (fit(mlp(), lambda z: F.cross_entropy(z, Y) + z.square().mean()), ModelError,
        ("terms in the",)),
    "ascent": (fit(mlp(), lambda z: -F.cross_entropy(z, Y)), ModelError, ("no positive multiple",)),
    "another likelihood": (fit(mlp(), lambda z: z.square().mean()), ModelError, ("of the categorical likelihood",)),
    "soft labels": (fit(mlp(), lambda z: F.cross_entropy(z, torch.full((6, 3), 1 / 3).double())), ModelError,
        ("hard targets",)),
    "outputs in place": (fit(mlp(), rewritten), ModelError, ("changed in place after the forward pass", "temperature")),
    "second backward": (lambda: twice(mlp()), ModelError, ("a forward pass that was used", "optimizer.paused()")),
    "nine waiting": (many_waiting, ModelError, ("no longer known", "at most 8")),
    "only parts": (lambda: without_forward(mlp(), lambda m: m[2](torch.tanh(m[0](X)))), ModelError,
        ("NaturalGradient.step", "no forward and backward pass", "the model's parts", "the very module")),
    "forward itself": (lambda: without_forward(mlp(), lambda m: m.forward(X)), ModelError,
        ("no forward and backward",)),
    "paused": (paused_step, ModelError, ("paused()",)),
    "closed": (lambda: closed(mlp()), ModelError, ("a closed optimizer", "a new NaturalGradient")),
    "frozen between": (different_parameters, ModelError, ("different trainable parameters",)),
    "reentrant checkpointing": (fit(wrapped(reentrant).train(), cross_entropy), ModelError,
        ("use_reentrant=True", "use_reentrant=False")),
    "reentrant checkpointing in both modes": (fit(wrapped(always_reentrant).train(), cross_entropy), ModelError,
        ("use_reentrant=True", "use_reentrant=False")),
    "nan": (fit(mlp(), lambda z: F.cross_entropy(z * float("nan"), Y)), NonFiniteError, ("NaN",)),
    "singular": (fit(mlp(), cross_entropy, kind="ef", gram_damping=0.0, params=["2.bias"]), SingularMatrixError,
        ("gram_damping=0.0", "a larger gram_damping")),
    "scalar outputs": (fit(wrapped(lambda m, x: F.cross_entropy(m.body(x), Y[: len(x)])), lambda z: z), ModelError,
        ("outputs of shape []", "Examples lie along axis 0")),
    "tuple outputs": (fit(wrapped(lambda m, x: (m.body(x), x)), cross_entropy), ModelError, ("a tuple", ".logits")),
    "examples that interact": (fit(wrapped(lambda m, x: m.body(x - x.mean(0))), cross_entropy), ModelError,
        ("influence each",)),
    "two dtypes": (
        fit(wrapped(lambda m, x: m.body[2](torch.tanh(m.body[0](x.float())).double()),
                    nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).apply(
            lambda m: m.float() if isinstance(m, nn.Linear) and m.in_features == 4 else m), cross_entropy),
        ModelError, ("one dtype",),
    ),
    "no tensors": (without_tensors, DataError, ("axis 0",)),
    "one example without an axis": (lambda: unbatched(natural, X[0]), DataError,
        ("shape [4]", "x.unsqueeze(0)", "optimizer.paused()")),
    "one beside": (lambda: unbatched(lambda m: Beside(m, damping=1.0), X[0]), DataError, ("x.unsqueeze(0)",)),
    "one image": (lambda: unbatched(natural, normal(3, 8, 8), images()), DataError, ("3 examples", "x.unsqueeze(0)")),
    "one example of as many outputs": (lambda: unbatched(natural, X[0], mlp(outputs=4)), DataError,
        ("x.unsqueeze(0)",)),
    "one example of as many outputs later": (lambda: unbatched(natural, X[0], mlp(outputs=4), first=False), DataError,
        ("x.unsqueeze(0)",)),
    "one example later": (lambda: unbatched(natural, X[0], first=False), ModelError,
        ("outputs of shape [3]", "axis 0")),
}  # fmt: skip


@pytest.mark.parametrize("name", ids(TRAINING))
def test_training__refuses_what_would_be_wrong(name: str) -> None:
    check(Case(*TRAINING[name]))


@pytest.mark.parametrize("cls", [Natural, Beside], ids=["NaturalGradient", "Preconditioner"])
def test_copies__of_an_optimizer_are_refused(cls: Any) -> None:
    import copy
    import pickle

    optimizer = cls(mlp(), lr=0.1, damping=1.0)
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ModelError, match=f"a copy or pickle of {cls.__name__}.*load_state_dict"):
            duplicate(optimizer)


def test_class_weights__are_accepted_for_one_label_an_example_and_refused_for_sequences() -> None:
    weight = torch.tensor([0.5, 2.0, 1.0]).double()
    fit(mlp(), lambda z: F.cross_entropy(z, Y, weight=weight))()
    tokens = wrapped(lambda m, x: m.body(x.unsqueeze(1).expand(-1, 3, -1)))
    labels = torch.stack([Y, Y.flip(0), Y], 1)
    fit(tokens, lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten()))()
    with pytest.raises(ModelError, match="no positive multiple"):
        fit(tokens, lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten(), weight=weight))()


def test_step__without_gradients_does_nothing() -> None:
    model = mlp()
    before = flat(model)
    natural(model, weight_decay=0.1).step()
    fk.optim.Preconditioner(model, damping=1.0).step()
    assert torch.equal(flat(model), before)


def blown_up(factor: float, **options: Any) -> tuple[nn.Module, Any]:
    """A model whose outputs are so many times what they were in the first step."""
    model = mlp()
    optimizer = natural(model, lr=0.0, **options)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model[2].weight.mul_(factor)
    return model, optimizer


def other_loss(model: nn.Module, optimizer: Any) -> None:
    F.cross_entropy(model(X), Y, label_smoothing=0.1).backward()


def plain_step(model: nn.Module, optimizer: Any) -> None:
    F.cross_entropy(model(X), Y).backward()
    if optimizer.param_groups[0]["gram_damping"] is not None:
        optimizer.param_groups[0]["gram_damping"] = 0.0
    optimizer.step()


DIVERGED: dict[str, tuple[Callable[[nn.Module, Any], None], dict[str, Any], float, type[fk.FisherkitError], str]] = {
    "singular": (plain_step, {"kind": "ef", "params": ["2.bias"]}, 1e9, SingularMatrixError, "a Gram matrix that is"),
    "nan": (plain_step, {}, float("nan"), NonFiniteError, "gradients with NaN or infinite entries"),
    "another loss": (other_loss, {}, 1e9, ModelError, "a loss whose gradient at the outputs is no positive"),
    "kfac": (plain_step, {"structure": "kfac", "gram_damping": None, "damping": 0.1, "ema": 0.5}, float("inf"),
        NonFiniteError, "gradients with NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", ids(DIVERGED))
def test_step__of_a_diverged_run_says_so(name: str) -> None:
    act, options, factor, error, met = DIVERGED[name]
    model, optimizer = blown_up(factor, **options)
    before = flat(model)
    with pytest.raises(error, match=r"a loss that has diverged: outputs of up to .*smaller learning rate") as told:
        act(model, optimizer)
    assert met in str(told.value)
    assert torch.equal(flat(model).nan_to_num(), before.nan_to_num())
    model, optimizer = blown_up(1.0, **options)
    if name in {"singular", "another loss"}:  # the same without it
        with pytest.raises(error) as told:
            act(model, optimizer)
        assert "diverged" not in str(told.value)


@pytest.mark.parametrize("structure", ["full", "block"])
def test_step__refused_for_too_little_damping_can_be_tried_again(structure: str) -> None:
    found = []
    for first in (0.0, 0.1):
        model = mlp()
        optimizer = natural(model, kind="ef", gram_damping=first, structure=structure, params=["2.bias"])
        F.cross_entropy(model(X), Y).backward()
        if not first:
            with pytest.raises(SingularMatrixError):
                optimizer.step()
            optimizer.param_groups[0]["gram_damping"] = 0.1
        optimizer.step()
        found.append(flat(model))
    assert torch.equal(found[0], found[1])


def test_step__refused_for_infinite_gradients_changes_nothing() -> None:
    model = mlp()
    optimizer, before = natural(model, momentum=0.9, weight_decay=0.1), flat(model)
    (F.cross_entropy(model(X), Y) * float("inf")).backward()
    with pytest.raises(NonFiniteError):
        optimizer.step()
    assert torch.equal(flat(model), before)
    assert not optimizer.state
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
