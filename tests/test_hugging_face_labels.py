"""Labels that a Hugging Face model takes as inputs too, and positions without: its own loss is the truth."""

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import fisherkit as fk
from tests import by_hand
from tests.test_hugging_face import build

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]

F64 = torch.float64
IGNORED = -100
VOCABULARY = 11


def ids(batch: int, positions: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, positions), generator=torch.Generator().manual_seed(seed))


def labels(batch: int, positions: int) -> Tensor:
    """With padding, and another number of labels in each example."""
    found = ids(batch, positions, seed=2)
    found[1, positions - 2 :] = IGNORED
    found[2, 1] = IGNORED
    return found


BART = {
    "vocab_size": VOCABULARY, "d_model": 4, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 5, "decoder_ffn_dim": 5, "max_position_embeddings": 12,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 5, "max_position_embeddings": 12, "pad_token_id": 0,
}  # fmt: skip
STARTS = {"decoder_start_token_id": 2, "pad_token_id": 1}

Case = tuple[Any, dict[str, Tensor]]


def t5() -> Case:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=4, d_kv=2, d_ff=5, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return build(lambda: transformers.T5ForConditionalGeneration(config)), {
        "input_ids": ids(4, 6),
        "attention_mask": mask,
        "labels": labels(4, 5),
    }


def bart(length: int = 6) -> Case:
    config = transformers.BartConfig(**BART)
    return build(lambda: transformers.BartForConditionalGeneration(config)), {
        "input_ids": ids(4, 6),
        "labels": labels(4, length),
    }


def mbart() -> Case:
    config = transformers.MBartConfig(**BART)
    return build(lambda: transformers.MBartForConditionalGeneration(config)), {
        "input_ids": ids(4, 6),
        "labels": labels(4, 5),
    }


def whisper() -> Case:
    config = transformers.WhisperConfig(
        **{name: BART[name] for name in BART.keys() - {"max_position_embeddings", "forced_eos_token_id"}},
        num_mel_bins=3, max_source_positions=4, max_target_positions=12, begin_suppress_tokens=None,
    )  # fmt: skip
    features = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(3), dtype=F64)
    return build(lambda: transformers.WhisperForConditionalGeneration(config)), {
        "input_features": features,
        "labels": labels(4, 5),
    }


def pictures() -> Tensor:
    return torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=F64)


def vision() -> Case:
    sizes = {name: BERT[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    seen = transformers.ViTConfig(**sizes, intermediate_size=5, image_size=4, patch_size=2, num_channels=2)
    said = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(seen, said)
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    return build(lambda: transformers.VisionEncoderDecoderModel(config)), {
        "pixel_values": pictures(),
        "labels": labels(4, 5),
    }


def two_berts() -> Case:
    said = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(transformers.BertConfig(**BERT), said)
    config.decoder_start_token_id, config.pad_token_id = 2, 1
    return build(lambda: transformers.EncoderDecoderModel(config)), {"input_ids": ids(4, 6), "labels": labels(4, 5)}


MODELS: dict[str, Callable[[], Case]] = {
    "t5": t5, "bart": bart, "bart, another length": lambda: bart(4), "mbart": mbart, "whisper": whisper,
    "vision": vision, "two berts": two_berts,
}  # fmt: skip


def rows(model: nn.Module, batch: dict[str, Tensor], *, shift: bool = False) -> Tensor:
    """Gradients of each example's summed loss by the model's own mean over its labels; [N, D]."""
    found = []
    for n in range(len(batch["labels"])):
        single = {name: tensor[n : n + 1] for name, tensor in batch.items()}
        counted = single["labels"][:, 1:] if shift else single["labels"]
        loss = int((counted != IGNORED).sum()) * model(**single).loss
        found.append(by_hand.gradient(loss, model))
    return torch.stack(found)


def close(got: Tensor, expected: Tensor, relative: float = 1e-8) -> None:
    assert got.shape == expected.shape
    assert float(expected.norm()) > 0
    torch.testing.assert_close(float((got - expected).norm() / expected.norm()), 0.0, atol=relative, rtol=0)


# Losses and some layers are computed in float32 by the library.
LOSS = {"whisper": 1e-6, "vision": 1e-6, "two berts": 1e-6}


@pytest.mark.parametrize("name", MODELS)
def test_ef__of_an_encoder_decoder_is_that_of_its_own_loss(name: str) -> None:
    model, batch = MODELS[name]()
    expected = rows(model, batch)
    fisher = fk.EmpiricalFisher(model, batch)
    assert fisher.examples == 4
    close(fisher.to_dense(), expected.T @ expected / 4, LOSS.get(name, 1e-8))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 4))]
    forms: list[Any] = [(inputs, batch["labels"]), parts, transformers.BatchEncoding(batch)]
    if len(inputs) == 1:
        forms.append((*inputs.values(), batch["labels"]))
    for form in forms:
        close(fk.EmpiricalFisher(model, form, structure="diagonal").diagonal(), fisher.diagonal())


@pytest.mark.parametrize("name", ["t5", "bart", "whisper", "vision"])
def test_encoder_decoder__every_way_uses_the_labels(name: str) -> None:
    """Streamed, exact, kronecker-factored, influence, gradients, comparisons and an optimizer's own passes."""
    model, batch = MODELS[name]()
    expected, tolerance = rows(model, batch), LOSS.get(name, 1e-8)
    given = {**batch, "decoder_input_ids": decoder_inputs(model, batch["labels"])}
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 4))]
    v = torch.randn(expected.shape[1], 2, generator=torch.Generator().manual_seed(4), dtype=F64)
    close(fk.EmpiricalFisher(model, parts, memory_budget=1) @ v, expected.T @ (expected @ v) / 4, tolerance)
    params = [n for n, p in model.named_parameters() if p.ndim == 2 and "decoder" in n and "embed" not in n][:2]
    for structure in ("diagonal", "kfac"):
        got, right = (
            fk.TruncatedFisher(model, data, structure=structure, params=params).to_dense() for data in (batch, given)
        )
        close(got, right)
    close(fk.evaluation.loss_gradient(model, batch), expected.mean(0), tolerance)
    fisher = fk.EmpiricalFisher(model, batch, params=params)
    own = rows_of(model, expected, params)
    scores = fk.influence.InfluenceScores(fisher, model, damping=0.1)
    right = own @ torch.linalg.solve(own.T @ own / 4 + 0.1 * torch.eye(own.shape[1], dtype=F64), own.T) / 4
    close(scores.scores(batch, parts), right, max(tolerance, 1e-7))
    table, same = (fk.evaluation.compare(model, data, kinds=("ef",), params=params) for data in (batch, given))
    close(*(torch.tensor([row.gamma for row in t.rows], dtype=F64) for t in (table, same)), 1e-6)


def decoder_inputs(model: Any, targets: Tensor) -> Tensor:
    """Labels moved one position to the right, behind the start; ignored ones are padding."""
    start = model.config.decoder_start_token_id
    moved = torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1]], 1)
    return moved.masked_fill(moved == IGNORED, model.config.pad_token_id)


def rows_of(model: nn.Module, whole: Tensor, params: list[str]) -> Tensor:
    own = [(n, p.numel()) for n, p in model.named_parameters() if p.requires_grad]
    parts = dict(zip((n for n, _ in own), whole.split([size for _, size in own], 1), strict=True))
    return torch.cat([parts[n] for n, _ in own if n in params], 1)


def test_optimizer__of_an_encoder_decoder_steps_on_its_own_loss() -> None:
    model, batch = t5()
    own = rows(model, batch)
    gradient = own.mean(0)
    optimizer = fk.optim.NaturalGradient(model, lr=1.0, kind="ef", damping=0.5)
    before = by_hand.weights(model)
    z = model(**batch).logits
    loss = nn.functional.cross_entropy(z.flatten(0, 1), batch["labels"].flatten(), reduction="sum") / 4
    loss.backward()
    optimizer.step()
    moved = before - by_hand.weights(model)
    f = own.T @ own / 4
    close(moved, torch.linalg.solve(f + 0.5 * torch.eye(len(f), dtype=F64), gradient), 1e-6)


def test_encoder_decoder__given_decoder_inputs_are_used_as_they_are() -> None:
    model, batch = bart()
    other = ids(4, 6, seed=9)
    close(
        fk.EmpiricalFisher(model, {**batch, "decoder_input_ids": other}, structure="diagonal").diagonal(),
        fk.EmpiricalFisher(model, ({"input_ids": batch["input_ids"], "decoder_input_ids": other}, batch["labels"]),
                           structure="diagonal").diagonal(),
    )  # fmt: skip


def test_encoder_decoder__classes_do_not_go_to_the_decoder() -> None:
    config = transformers.BartConfig(**BART, num_labels=3)
    model = build(lambda: transformers.BartForSequenceClassification(config))
    tokens = ids(4, 6)
    tokens[:, -1] = 2  # the end that it classifies at
    tokens[:, :-1] = tokens[:, :-1].clamp_min(3)
    batch = {"input_ids": tokens, "labels": torch.tensor([0, 2, 1, 1])}
    before = model.config.to_dict()
    got = fk.EmpiricalFisher(model, batch).to_dense()
    assert model.config.to_dict() == before
    expected = rows(model, batch)
    close(got, expected.T @ expected / 4)


def test_encoder_decoder__without_labels_is_told() -> None:
    model, batch = t5()
    with pytest.raises(fk.DataError, match="neither labels nor decoder inputs for an encoder-decoder"):
        fk.ExactFisher(model, {"input_ids": batch["input_ids"], "labels": None})


def test_shift__a_language_model_of_pictures_is_one() -> None:
    """Its name is that of an encoder-decoder's, its loss a causal language model's."""
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=4, intermediate_size=5, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=12,
    )  # fmt: skip
    seen = transformers.CLIPVisionConfig(
        hidden_size=4, intermediate_size=5, num_hidden_layers=2, num_attention_heads=2, image_size=4, patch_size=2,
        num_channels=2,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=seen, text_config=text, image_token_id=1)
    model = build(lambda: transformers.LlavaForConditionalGeneration(config))
    params = [n for n, _ in model.named_parameters() if "language_model.layers" in n]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in params)
    batch = {"input_ids": ids(4, 6), "labels": labels(4, 6)}
    own = rows(model, batch, shift=True)
    close(fk.EmpiricalFisher(model, batch).to_dense(), own.T @ own / 4, 1e-5)


# -- virtual tokens ----------------------------------------------------------------------------------------------------


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=20, n_embd=4, n_layer=1, n_head=2, n_inner=6, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=4, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_ef__of_virtual_tokens_is_that_of_the_model_s_own_loss(name: str) -> None:
    model = build(lambda: peft.get_peft_model(gpt2(), PROMPTS[name]()))
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 4:] = 0
    batch = {"input_ids": ids(4, 6), "attention_mask": mask, "labels": labels(4, 6).masked_fill(mask == 0, IGNORED)}
    # Behind virtual tokens that are positions, the first label has one before it that predicts it.
    own = rows(model, batch, shift=name == "prefix tuning")
    close(fk.EmpiricalFisher(model, batch).to_dense(), own.T @ own / 4, 1e-5)
    parts = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, 4))]
    v = torch.randn(own.shape[1], 2, generator=torch.Generator().manual_seed(4), dtype=F64)
    close(fk.EmpiricalFisher(model, parts, memory_budget=1) @ v, own.T @ (own @ v) / 4, 1e-5)
    close(fk.evaluation.loss_gradient(model, batch), own.mean(0), 1e-5)
    scores = fk.influence.InfluenceScores(fk.EmpiricalFisher(model, batch), model, damping=0.1)
    eye = torch.eye(own.shape[1], dtype=F64)
    close(scores.scores(batch, parts), own @ torch.linalg.solve(own.T @ own / 4 + 0.1 * eye, own.T) / 4, 1e-5)
    if name == "prompt tuning":
        by_hand = {**batch, "labels": torch.cat([torch.full((4, 3), IGNORED), batch["labels"]], 1)}
        close(fk.EmpiricalFisher(model, by_hand).to_dense(), own.T @ own / 4, 1e-5)


def test_ef__of_virtual_tokens_in_a_token_classifier() -> None:
    config = transformers.BertConfig(**BERT, num_labels=4)
    prompts = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="TOKEN_CLS")
    model = build(lambda: peft.get_peft_model(transformers.BertForTokenClassification(config), prompts))
    targets = ids(4, 6, seed=5) % 4
    targets[1, 2:] = IGNORED
    batch = {"input_ids": ids(4, 6), "labels": targets}
    found = []
    for n in range(4):  # this model's own loss does not know its virtual tokens
        z = model(input_ids=batch["input_ids"][n : n + 1]).logits[0, 2:]
        loss = nn.functional.cross_entropy(z, targets[n], reduction="sum")
        found.append(by_hand.gradient(loss, model))
    own = torch.stack(found)
    close(fk.EmpiricalFisher(model, batch).to_dense(), own.T @ own / 4)


def test_ef__of_a_prompted_encoder_decoder() -> None:
    for learnt in (
        peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=1),
        peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM"),
        peft.LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM"),
    ):
        model = build(lambda learnt=learnt: peft.get_peft_model(t5()[0], learnt))  # type: ignore[misc]
        batch = t5()[1]
        own = rows(model, batch)
        close(fk.EmpiricalFisher(model, batch).to_dense(), own.T @ own / 4, 1e-6)


@pytest.mark.parametrize("positions", [6, VOCABULARY])
def test_classes_on_axis_1__of_a_causal_model_are_refused(positions: int) -> None:
    """As torch's own loss has them, which such a model's loss gets flattened outputs of."""
    sizes = {"hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)
    model, x = build(lambda: transformers.LlamaForCausalLM(config)), ids(3, positions)
    data = {"input_ids": x, "labels": x}
    for make in (
        lambda: fk.EmpiricalFisher(model, data, likelihood=nn.CrossEntropyLoss()),
        lambda: fk.optim.Preconditioner(model, likelihood=nn.CrossEntropyLoss()),
    ):
        with pytest.raises(fk.InvalidArgumentError, match=r"expected the last axis"):
            make()
    assert fk.EmpiricalFisher(model, data, likelihood=fk.likelihoods.Categorical(class_axis=-1)).rows == 3


class Wrapped(nn.Module):
    """A causal model in a module of a user's own, which does not say what it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=12, n_positions=16, n_embd=4, n_layer=1, n_head=2)
        self.inner = transformers.GPT2LMHeadModel(config).eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids).logits  # type: ignore[no-any-return]


def test_labels__that_are_the_input_ids_in_their_places_are_warned_of() -> None:
    model, ids = Wrapped(), torch.randint(12, (3, 5), generator=torch.Generator().manual_seed(0))
    padded = ids.clone()
    padded[0, 3:] = -100
    for labels in (ids, padded):
        with pytest.warns(UserWarning, match="shift_labels=True"):
            fk.EmpiricalFisher(model, (ids, labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.EmpiricalFisher(model, (ids, ids.roll(-1, 1)))
        for shift in (True, False):
            fk.EmpiricalFisher(model, (ids, ids), shift_labels=shift)
        fk.EmpiricalFisher(model.inner, (ids, ids))
