"""Architectures of transformers as people have them, each against one autograd call an example on the model itself.

The truth knows nothing of layers: an example alone, padding and all, through the model, its log-probabilities through
autograd. A parameter that goes the generic way is exact too but costs a pass an example or an output; which ones do is
pinned here, so that a rule that is lost shows.
"""

import functools
import re
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.rows import generic
from tests.real.zoo import ARCHITECTURES, COLLATED, IGNORE, POSITIONS, Architecture, Inputs
from tests.snapshot import untouched

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning"),  # PEFT's, and a newer name
]


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is taken where it is needed, not where it was found faster on a busy machine."""
    monkeypatch.setattr(generic, "QUICK", float("inf"))


TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
ROUNDED = re.compile("bloom|deepseek|gemma|gpt-oss|llama|llava|mamba|mistral|mixtral|modernbert|olmo|phi3|qwen|rwkv|t5")
"""Models that compute norms, rotary positions or attention's softmax in float32, whatever their dtype."""

SLOW = {"falcon mamba", "recurrent gemma", "rwkv"}


def parametrized(failing: dict[str, str] | None = None) -> pytest.MarkDecorator:
    """Over all architectures; of those that fail today, why."""
    marks: dict[str, list[pytest.MarkDecorator]] = {name: [] for name in ARCHITECTURES}
    for name, why in (failing or {}).items():
        marks[name].append(pytest.mark.xfail(reason=why))
    for name in SLOW:
        marks[name].append(pytest.mark.slow)
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=own) for name, own in marks.items()], scope="module"
    )


def take(tensors: Inputs, some: slice) -> Inputs:
    return {name: tensor[some] for name, tensor in tensors.items()}


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out.logits


def counted(architecture: Architecture, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """An example's outputs and labels, position by position, without those that are ignored."""
    if architecture.task == "class":
        return z.unsqueeze(0), y.unsqueeze(0)
    if architecture.task == "causal":
        z, y = z[:-1], y[1:]
    return z[y != IGNORE], y[y != IGNORE]


def squares(outputs: Tensor, model: nn.Module, vector: Tensor | None = None) -> Tensor:
    """Squared entries of one gradient; [D]."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(outputs, chosen, vector, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found]).square()


class Diagonals(NamedTuple):
    """Of the empirical and the exact Fisher; [D] each."""

    empirical: Tensor
    exact: Tensor


def by_loop(architecture: Architecture, model: nn.Module, inputs: Inputs, labels: Tensor) -> Diagonals:
    """One example at a time: its loss's gradient, and one gradient for each column of a root of its Hessian."""
    empirical = exact = torch.zeros(())
    for n in range(len(labels)):
        z, y = counted(architecture, logits(model, take(inputs, slice(n, n + 1)))[0], labels[n])
        empirical = empirical + squares(F.cross_entropy(z, y, reduction="sum"), model)
        for position in z:
            p = position.detach().softmax(0)
            for column in (p.sqrt().diag() - torch.outer(p, p.sqrt())).T:
                exact = exact + squares(position, model, column)
    return Diagonals(empirical / len(labels), exact / len(labels))


class Case(NamedTuple):
    """A model with its data in two batches, and its Fishers."""

    model: nn.Module
    expected: Diagonals
    fishers: list[fk.FisherApproximation]
    tolerance: float

    def rules(self) -> dict[str, str]:
        """The rule of each parameter."""
        return {name: e.rule for e in self.fishers[0].coverage().entries for name in e.parameters}


@functools.cache
def case(name: str) -> Case:
    """Everything that is tested of one architecture, made once."""
    architecture = ARCHITECTURES[name]
    model, (inputs, labels) = architecture.model(), architecture.batch()
    batches = [(take(inputs, some), labels[some]) for some in (slice(0, 2), slice(2, None))]
    expected = by_loop(architecture, model, inputs, labels)
    with untouched(model, batches):
        fishers = [kind(model, batches, structure="diagonal") for kind in (fk.EmpiricalFisher, fk.ExactFisher)]
    rounded = torch.float32 if ROUNDED.search(name) else architecture.dtype
    return Case(model, expected, fishers, TOLERANCE[rounded])


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float(expected.norm()) > 0
    assert float((got - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "clip vision"])
def test_reference__is_the_model_s_own_loss(name: str) -> None:
    """Which label belongs to which position, and which ones count, is the library's word."""
    architecture = ARCHITECTURES[name]
    model, (inputs, labels) = architecture.model(), architecture.batch(2)
    for n in range(2):
        single = take(inputs, slice(n, n + 1))
        with torch.no_grad():
            z, y = counted(architecture, logits(model, single)[0], labels[n])
            own = model(**single, labels=labels[n : n + 1]).loss
        assert abs(float(F.cross_entropy(z, y) - own)) <= 1e-5  # the library's loss is in float32


@parametrized()
def test_ef_and_exact__equal_a_loop_and_touch_nothing(name: str) -> None:
    found = case(name)
    for fisher, expected in zip(found.fishers, found.expected, strict=True):
        close(fisher.diagonal(), expected, found.tolerance)


GENERIC = {
    "switch": "a layer is cast in place",
    "rwkv": "decays under a maximum that cancels out, where rounding is all that is left",
    "qwen3-next": "a batch whose entries rounding to float32 does not let tell apart",
}


@parametrized(GENERIC)
def test_coverage__every_parameter_has_a_rule(name: str) -> None:
    generic = ("loop", "torch.func")
    assert [parameter for parameter, rule in case(name).rules().items() if rule in generic] == []


# -- checkpointed activations ------------------------------------------------------------------------------------------


def checkpointed(name: str, *, reentrant: bool) -> Any:
    """In train mode, where checkpoints are active, but without dropout."""
    model: Any = ARCHITECTURES[name].model().train()
    for module in model.modules():
        for attribute in ("p", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "llama, LoRA"])
def test_checkpointing__changes_nothing(name: str) -> None:
    found, model = case(name), checkpointed(name, reentrant=False)
    data = ARCHITECTURES[name].batch()
    with untouched(model, data):
        fisher = fk.EmpiricalFisher(model, data, structure="diagonal")
    close(fisher.diagonal(), found.expected.empirical, found.tolerance)


@pytest.mark.parametrize("inputs_require_grad", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "llama, LoRA"])
def test_checkpointing__that_is_reentrant_is_exact_or_refused(name: str, inputs_require_grad: bool) -> None:
    found, model = case(name), checkpointed(name, reentrant=True)
    if inputs_require_grad:
        model.enable_input_require_grads()
    data = ARCHITECTURES[name].batch()
    try:
        diagonal = fk.EmpiricalFisher(model, data, structure="diagonal").diagonal()
    except fk.FisherkitError as error:
        refusal, diagonal = str(error), found.expected.empirical
    else:
        refusal = "use_reentrant=False"
    assert "use_reentrant=False" in refusal
    close(diagonal, found.expected.empirical, found.tolerance)


# -- batches of collators ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [POSITIONS, POSITIONS - 1])
@pytest.mark.parametrize("name", COLLATED)
def test_ef__of_an_encoder_decoder_s_own_loss(name: str, length: int) -> None:
    """Decoder inputs are labels shifted right by the model itself; sources and targets of one length or two."""
    model, batch = COLLATED[name].model(), COLLATED[name].batch(length)
    expected = torch.zeros(())
    for n in range(len(batch["labels"])):
        single = take(batch, slice(n, n + 1))
        expected = expected + squares(model(**single).loss * (single["labels"] != IGNORE).sum(), model)
    with untouched(model, batch):
        fisher = fk.EmpiricalFisher(model, batch, structure="diagonal")
    close(fisher.diagonal(), expected / len(batch["labels"]), TOLERANCE[torch.float32])
