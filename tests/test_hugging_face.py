"""Models of transformers, built from configurations: the Fisher belongs to the model's own loss.

The truth here is ``model(**batch, labels=labels).loss`` and autograd, so that label shifts, ignored labels, padding and
averaging are the library's word and not this package's.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import fisherkit as fk
from fisherkit.kinds import KINDS
from tests import by_hand
from tests.reference import fisher as reference
from tests.reference.outputs import EXACT, IGNORE_INDEX, Kind, truncated_kind

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap over fused attention

Batch = dict[str, Tensor]

SIZES = {"vocab_size": 9, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 4, "intermediate_size": 6}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Configurations are enough; a download would be a hidden dependency."""

    def refuse(*_: object) -> None:
        raise AssertionError("a test wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return


def build(make: Callable[[], Any], seed: int = 0) -> Any:
    """The model in float64 and eval mode, away from its initialization, where gains are one and biases zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(batch: int, positions: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 9, (batch, positions), generator=torch.Generator().manual_seed(seed))


def padded() -> Batch:
    """Three sequences, two of them with padding at the end."""
    tokens, mask = ids(3, 5), torch.ones(3, 5, dtype=torch.long)
    mask[1, 3:] = 0
    mask[2, 4:] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def bert_classifier() -> tuple[Any, Batch]:
    config = transformers.BertConfig(**SIZES, num_labels=3, max_position_embeddings=6)
    return build(lambda: transformers.BertForSequenceClassification(config)), {
        **padded(),
        "labels": torch.tensor([2, 0, 1]),
    }


def bert_masked() -> tuple[Any, Batch]:
    """Labels at the outputs' own positions; the decoder is tied to the embedding."""
    config = transformers.BertConfig(**SIZES, max_position_embeddings=6)
    labels = torch.full((3, 5), IGNORE_INDEX)
    labels[0, 1], labels[1, 0], labels[1, 2] = 4, 8, 1  # nothing to predict in the last sequence
    return build(lambda: transformers.BertForMaskedLM(config)), {**padded(), "labels": labels}


def gpt2() -> tuple[Any, Batch]:
    """Conv1D layers, a head tied to the embedding, labels shifted by the model's own loss."""
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=6, n_embd=4, n_layer=1, n_head=2, n_inner=6, bos_token_id=0, eos_token_id=0
    )
    batch = padded()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE_INDEX)
    labels[0, :2] = IGNORE_INDEX  # a prompt
    labels[2, 1:] = IGNORE_INDEX  # only the first label is left, and no output belongs to it
    return build(lambda: transformers.GPT2LMHeadModel(config)), {**batch, "labels": labels}


def gpt2_classifier() -> tuple[Any, Batch]:
    """One label a sequence, at its last token that is not padding."""
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=6, n_embd=4, n_layer=1, n_head=2, n_inner=6, num_labels=3, **ends
    )
    return build(lambda: transformers.GPT2ForSequenceClassification(config)), {
        **padded(),
        "labels": torch.tensor([2, 0, 1]),
    }


def llama() -> tuple[Any, Batch]:
    """RMS norms, rotary positions, gates, keys and values shared by heads, an untied head."""
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=1, max_position_embeddings=6, tie_word_embeddings=False
    )
    tokens = ids(3, 4)
    return build(lambda: transformers.LlamaForCausalLM(config)), {"input_ids": tokens, "labels": tokens.clone()}


def vit() -> tuple[Any, Batch]:
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=4, patch_size=2, num_channels=2, num_labels=3)
    pixels = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return build(lambda: transformers.ViTForImageClassification(config)), {
        "pixel_values": pixels,
        "labels": torch.tensor([1, 0, 2]),
    }


MODELS: dict[str, Callable[[], tuple[Any, Batch]]] = {
    "bert classifier": bert_classifier,
    "bert masked": bert_masked,
    "gpt2": gpt2,
    "gpt2 classifier": gpt2_classifier,
    "llama": llama,
    "vit": vit,
}
CAUSAL = {"gpt2", "llama"}
# The library's causal loss converts logits to float32; Llama's norms and rotary positions are computed in it as well.
LOSS_TOLERANCE = {"gpt2": 1e-6, "llama": 1e-6}
FORWARD_TOLERANCE = {"llama": 1e-6}


def one(batch: Mapping[str, Tensor], n: int) -> Batch:
    return {name: tensor[n : n + 1] for name, tensor in batch.items()}


def counted(labels: Tensor, causal: bool) -> int:
    """Over how many labels the model's loss of one sequence is averaged."""
    used = labels[:, 1:] if causal and labels.ndim == 2 else labels
    return int((used != IGNORE_INDEX).sum())


def own_loss_rows(model: nn.Module, batch: Batch, causal: bool) -> Tensor:
    """Gradients of each example's summed loss: the model's mean times the number of labels in it; [N, D]."""
    rows = []
    for n in range(len(batch["labels"])):
        single = one(batch, n)
        number = counted(single["labels"], causal)
        if number == 0:
            continue
        loss = number * model(**single).loss
        rows.append(by_hand.gradient(loss, model))
    return torch.stack(rows)


def by_token(batch: Batch, causal: bool) -> Batch:
    """Every label in a sequence of its own, all others ignored."""
    parts = []
    for n in range(len(batch["labels"])):
        single = one(batch, n)
        for place in range(int(causal), single["labels"].shape[1]):
            if single["labels"][0, place] != IGNORE_INDEX:
                alone = torch.full_like(single["labels"], IGNORE_INDEX)
                alone[0, place] = single["labels"][0, place]
                parts.append({**single, "labels": alone})
    return {name: torch.cat([part[name] for part in parts]) for name in batch}


def close(got: Tensor, expected: Tensor, relative: float = 1e-9) -> None:
    assert got.shape == expected.shape
    error, scale = float((got - expected).norm()), float(expected.norm())
    assert error <= relative * scale, (error, scale)


@pytest.mark.parametrize("name", MODELS)
def test_ef__is_made_of_the_gradients_of_the_model_s_own_loss(name: str) -> None:
    model, batch = MODELS[name]()
    rows = own_loss_rows(model, batch, name in CAUSAL)
    assert bool((rows.norm(dim=1) > 0).all())
    fisher = fk.EmpiricalFisher(model, batch)
    assert fisher.examples == len(rows)
    expected = rows.T @ rows / len(rows)
    tolerance = LOSS_TOLERANCE.get(name, 1e-9)
    close(fisher.to_dense(), expected, tolerance)
    close(fisher.gram(), rows @ rows.T / len(rows), tolerance)
    close(fk.EmpiricalFisher(model, batch, structure="diagonal").diagonal(), expected.diagonal(), tolerance)
    close(fk.EmpiricalFisher(model, batch, structure="ekfac").trace(), expected.trace(), tolerance)


@pytest.mark.parametrize("name", ["bert masked", "gpt2", "llama"])
def test_ef__of_tokens_is_made_of_single_labels(name: str) -> None:
    model, batch = MODELS[name]()
    rows = own_loss_rows(model, by_token(batch, name in CAUSAL), name in CAUSAL)
    fisher = fk.EmpiricalFisher(model, batch, example="token")
    assert fisher.examples == len(rows)
    close(fisher.to_dense(), rows.T @ rows / len(rows), LOSS_TOLERANCE.get(name, 1e-9))


@pytest.mark.parametrize("name", ["bert classifier", "gpt2"])
def test_ef__is_the_same_from_parts_in_other_containers(name: str) -> None:
    model, batch = MODELS[name]()
    expected = fk.EmpiricalFisher(model, batch).to_dense()
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    encoded = transformers.BatchEncoding(batch)
    forms: list[Any] = [
        (inputs, batch["labels"]),
        encoded,
        [one(batch, n) for n in range(3)],
        [one(encoded, 0), one(encoded, 1), one(batch, 2)],
    ]
    for form in forms:
        close(fk.EmpiricalFisher(model, form).to_dense(), expected)
    assert "labels" in encoded


def test_shift__can_be_said_by_hand() -> None:
    model, batch = gpt2()
    shifted = torch.cat([batch["labels"][:, 1:], torch.full((3, 1), IGNORE_INDEX)], 1)
    by_model = fk.EmpiricalFisher(model, batch)
    by_hand = fk.EmpiricalFisher(model, {**batch, "labels": shifted}, shift_labels=False)
    close(by_hand.to_dense(), by_model.to_dense())
    assert by_hand.examples == by_model.examples == 2

    class Wrapped(nn.Module):
        """Nothing tells that this is a language model."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Tensor) -> Tensor:
            return self.model(**inputs).logits

    close(fk.EmpiricalFisher(Wrapped(), batch, shift_labels=True).to_dense(), by_model.to_dense())
    plain = fk.EmpiricalFisher(Wrapped(), batch).to_dense()
    assert float((plain - by_model.to_dense()).norm()) > 0.1 * float(plain.norm())


class Tuned(transformers.GPT2LMHeadModel):  # type: ignore[name-defined,misc]
    """A user's own class."""


@pytest.mark.parametrize("wrap", ["subclass", "compiled", "parallel"])
def test_shift__a_language_model_in_disguise_is_still_one(wrap: str) -> None:
    """Subclasses and wrappers hide the class's name, not the model's loss."""
    model, batch = gpt2()
    expected = fk.EmpiricalFisher(model, batch)
    disguised: nn.Module
    if wrap == "subclass":
        disguised = build(lambda: Tuned(model.config))
        disguised.load_state_dict(model.state_dict())
    else:
        disguised = nn.DataParallel(model) if wrap == "parallel" else torch.compile(model)
    with torch.compiler.set_stance("force_eager"):
        got = fk.EmpiricalFisher(disguised, batch)
    assert got.examples == expected.examples == 2
    close(got.to_dense(), expected.to_dense())


REFERENCE_KINDS: dict[str, tuple[str, dict[str, Any], Kind]] = {
    "ief": ("ief", {}, Kind("ief")),
    "exact": ("exact", {}, EXACT),
    "truncated 1": ("truncated", {"rank": 1}, truncated_kind(1)),
    "truncated 2": ("truncated", {"rank": 2}, truncated_kind(2)),
}


def as_reference(name: str, model: nn.Module, batch: Batch, example: str = "sequence") -> reference.Problem:
    """The same problem with labels moved to their outputs' positions, as the reference knows no shift."""
    inputs = {key: tensor for key, tensor in batch.items() if key != "labels"}
    labels = batch["labels"]
    if name in CAUSAL:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], 1)
    return reference.Problem(model, inputs, labels, example=example)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", REFERENCE_KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_kinds__equal_the_reference(name: str, kind: str) -> None:
    model, batch = MODELS[name]()
    ours, options, theirs = REFERENCE_KINDS[kind]
    expected = reference.full(reference.rows(as_reference(name, model, batch), theirs))
    close(KINDS[ours](model, batch, **options).to_dense(), expected, FORWARD_TOLERANCE.get(name, 1e-8))


def test_coverage__layers_and_tied_weights_have_rules() -> None:
    model, batch = gpt2()
    rules = {
        name: entry.rule for entry in fk.EmpiricalFisher(model, batch).coverage().entries for name in entry.parameters
    }
    assert rules["transformer.h.0.attn.c_attn.weight"] == rules["transformer.h.0.mlp.c_proj.bias"] == "addmm"
    assert rules["transformer.ln_f.weight"] == "layer_norm"
    assert not {"torch.func", "loop"}.intersection(rules.values())
    assert rules["transformer.wte.weight"] == "embedding + linear"
    model, batch = llama()
    rules = {
        name: entry.rule for entry in fk.EmpiricalFisher(model, batch).coverage().entries for name in entry.parameters
    }
    assert rules["model.layers.0.self_attn.k_proj.weight"] == "linear"
    assert rules["model.embed_tokens.weight"] == "embedding"


def test_params__a_frozen_body_leaves_the_head() -> None:
    model, batch = bert_classifier()
    whole = fk.ExactFisher(model, batch, structure="block")
    model.bert.requires_grad_(False)
    head = fk.ExactFisher(model, batch)
    assert head.space.names == ("classifier.weight", "classifier.bias")
    places = torch.cat([torch.arange(whole.size)[whole.space.slices[name]] for name in head.space.names])
    close(head.to_dense(), whole.to_dense()[places][:, places])


def test_train_mode__is_refused_by_the_dropout_s_name() -> None:
    model, batch = gpt2()
    with pytest.raises(fk.ModelError, match=r"Dropout 'transformer\.drop' in train mode"):
        fk.EmpiricalFisher(model.train(), batch)


def test_padding__does_not_matter() -> None:
    model, batch = bert_classifier()
    longer = {name: nn.functional.pad(tensor, (0, 1)) if tensor.ndim == 2 else tensor for name, tensor in batch.items()}
    longer["input_ids"][:, -1] = 5  # whatever stands there
    close(fk.EmpiricalFisher(model, longer).to_dense(), fk.EmpiricalFisher(model, batch).to_dense())
    for structure in ("kfac", "ekfac"):
        head = ["classifier.weight", "classifier.bias"]
        got = [fk.EmpiricalFisher(model, data, structure=structure, params=head).to_dense() for data in (longer, batch)]
        close(*got)


@pytest.mark.parametrize("positions", ["expand", "reduce"])
def test_padding__is_left_out_of_kronecker_factors(positions: str) -> None:
    """The same sequences with one more column of padding have the same factors in every layer."""
    model, batch = bert_classifier()
    longer = {name: nn.functional.pad(tensor, (0, 1)) if tensor.ndim == 2 else tensor for name, tensor in batch.items()}
    layers = [name for name, _ in model.named_parameters() if "layer.0" in name and "LayerNorm" not in name]
    options: dict[str, Any] = {"structure": "kfac", "params": layers, "kfac_positions": positions}
    close(
        fk.EmpiricalFisher(model, longer, **options).to_dense(), fk.EmpiricalFisher(model, batch, **options).to_dense()
    )


def test_lora__adapters_have_the_fisher_of_their_own_gradients() -> None:
    model, batch = gpt2()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        ).double()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    rows = own_loss_rows(adapted.eval(), batch, causal=True)
    # The model computes its own loss from logits in float32.
    close(fk.EmpiricalFisher(adapted, batch).to_dense(), rows.T @ rows / len(rows), relative=1e-6)
