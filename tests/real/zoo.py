"""Architectures of transformers, small and built from configurations alone, each with data that its users would bring.

Owns how a model is made, its batches, and what a likelihood's argument of ``data`` is for it. Parameters are moved away
from their initialization, where gains are one and biases zero, so that a term that is missing shows. It knows nothing
of Fisher matrices.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

IGNORE = -100
EXAMPLES = 4
POSITIONS = 5
VOCABULARY = 8
CLASSES = 3

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """One model with its data.

    Attributes:
        family: What it is: decoder, encoder, encoder-decoder, mixture, vision, audio, state space, peft.
        make: Makes the model.
        inputs: Makes ``number`` examples: keyword arguments of the model.
        task: "causal" for labels that belong to the position before theirs, "tokens" for one a position, "class" for
            one an example.
        dtype: Of parameters and floating-point inputs.
    """

    family: str
    make: Callable[[], Any]
    inputs: Callable[[int], Inputs]
    task: str = "class"
    dtype: torch.dtype = torch.float64

    def model(self) -> nn.Module:
        """In eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = self.make().to(self.dtype).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    def labels(self, inputs: Inputs) -> Tensor:
        """Labels of examples: of classes, or of few positions, none of them padding."""
        number = len(next(iter(inputs.values())))
        draw = torch.Generator().manual_seed(1)
        if self.task == "class":
            return torch.randint(CLASSES, (number,), generator=draw)
        labels = torch.randint(1, VOCABULARY, (number, POSITIONS), generator=draw)
        labels[:, : POSITIONS - 3] = IGNORE  # a prompt
        mask = inputs.get("attention_mask")
        # An encoder's padding says nothing about its decoder's labels.
        return labels if mask is None or "decoder_input_ids" in inputs else labels.masked_fill(mask == 0, IGNORE)

    def batch(self, number: int = EXAMPLES) -> tuple[Inputs, Tensor]:
        """That many examples with their labels."""
        inputs = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in self.inputs(number).items()}
        return inputs, self.labels(inputs)


def tokens(number: int, padding: str = "none") -> Inputs:
    """Token ids, padded: "right" or "left", every other sequence; "later", all but the first two; or "none"."""
    ids = torch.randint(2, VOCABULARY, (number, POSITIONS), generator=torch.Generator().manual_seed(2))
    if padding == "none":
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    rows = slice(2, None) if padding == "later" else slice(1, None, 2)
    mask[rows, slice(0, 2) if padding == "left" else slice(POSITIONS - 2, POSITIONS)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def images(number: int, *, size: int = 8, channels: int = 3) -> Inputs:
    """Noise of that size."""
    shape = (number, channels, size, size)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)}


def sounds(number: int, *, length: int = 160) -> Inputs:
    """Noise of that length."""
    draw = torch.Generator().manual_seed(4)
    return {"input_values": torch.randn((number, length), generator=draw, dtype=torch.float64)}


def with_decoder(inputs: Inputs) -> Inputs:
    """The inputs of an encoder with those of its decoder, as a collator prepares them."""
    number = len(next(iter(inputs.values())))
    ids = torch.randint(2, VOCABULARY, (number, POSITIONS), generator=torch.Generator().manual_seed(5))
    return {**inputs, "decoder_input_ids": ids}


ARCHITECTURES: dict[str, Architecture] = {}

# -- decoders ----------------------------------------------------------------------------------------------------------

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
SHARED_KEYS: dict[str, Any] = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}


def _of(kind: str, config: str, **options: Any) -> Callable[[], Any]:
    """Makes a model of a class of transformers from a configuration of another."""
    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**options))


def _decoder(
    kind: str, config: str | None = None, *, family: str = "decoder", padding: str = "right",
    dtype: torch.dtype = torch.float64, **own: Any,
) -> Architecture:  # fmt: skip
    config = config or kind.replace("ForCausalLM", "Config").replace("LMHeadModel", "Config")
    inputs = functools.partial(tokens, padding=padding)
    return Architecture(family, _of(kind, config, **own), inputs, "causal", dtype)


GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 24,
    "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
OPT: dict[str, Any] = {
    **{name: TEXT[name] for name in TEXT if name != "intermediate_size"}, "ffn_dim": 24, "word_embed_proj_dim": 16
}  # fmt: skip
ARCHITECTURES |= {
    "gpt2": _decoder("GPT2LMHeadModel", **GPT2),
    "gpt2, not padded": _decoder("GPT2LMHeadModel", padding="none", **GPT2),
    "gpt2, padded later": _decoder("GPT2LMHeadModel", padding="later", **GPT2),
    "llama": _decoder("LlamaForCausalLM", **SHARED_KEYS),
    "llama, padded left": _decoder("LlamaForCausalLM", padding="left", **SHARED_KEYS),
    "qwen2": _decoder("Qwen2ForCausalLM", tie_word_embeddings=True, **SHARED_KEYS),
    "qwen3": _decoder("Qwen3ForCausalLM", **SHARED_KEYS),
    "gemma": _decoder("GemmaForCausalLM", **SHARED_KEYS),
    "gemma2": _decoder("Gemma2ForCausalLM", **{**SHARED_KEYS, "num_hidden_layers": 2}, query_pre_attn_scalar=8),
    "gemma3": _decoder("Gemma3ForCausalLM", "Gemma3TextConfig", sliding_window=2, **SHARED_KEYS),
    "mistral": _decoder("MistralForCausalLM", sliding_window=3, **SHARED_KEYS),
    "phi": _decoder("PhiForCausalLM", **TEXT),
    "phi3": _decoder("Phi3ForCausalLM", **{**TEXT, "num_key_value_heads": 1}),
    "opt": _decoder("OPTForCausalLM", **OPT),
    "gpt-neox": _decoder("GPTNeoXForCausalLM", **TEXT),
    "bloom": _decoder("BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2, pad_token_id=0),
    "falcon": _decoder("FalconForCausalLM", **TEXT, multi_query=True, alibi=False),
    "olmo2": _decoder("Olmo2ForCausalLM", **{**TEXT, "num_key_value_heads": 1}),
    "llama classifier": Architecture(
        "decoder", _of("LlamaForSequenceClassification", "LlamaConfig", **SHARED_KEYS, num_labels=CLASSES),
        lambda n: tokens(n, "right"),
    ),
}  # fmt: skip

# -- mixtures of experts -----------------------------------------------------------------------------------------------

# The grouped product that is these models' default knows no float64.
EXPERTS: dict[str, Any] = {**SHARED_KEYS, "num_experts_per_tok": 2}
MIXTURES: dict[str, Callable[..., Architecture]] = {
    "deepseek-v3": functools.partial(_decoder, "DeepseekV3ForCausalLM",
        **EXPERTS | {"num_key_value_heads": 2, "head_dim": 4}, moe_intermediate_size=12, n_routed_experts=4, n_group=1,
        topk_group=1, n_shared_experts=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8, first_k_dense_replace=0),
    "mixtral": functools.partial(_decoder, "MixtralForCausalLM", num_local_experts=4, **EXPERTS),
    "qwen2-moe": functools.partial(_decoder, "Qwen2MoeForCausalLM", num_experts=4, moe_intermediate_size=12,
        shared_expert_intermediate_size=12, **EXPERTS),
    "qwen3-moe": functools.partial(_decoder, "Qwen3MoeForCausalLM", num_experts=4, moe_intermediate_size=12, **EXPERTS),
    "gpt-oss": functools.partial(_decoder, "GptOssForCausalLM", num_local_experts=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **EXPERTS),
}  # fmt: skip
ARCHITECTURES |= {name: make(family="mixture", experts_implementation="eager") for name, make in MIXTURES.items()}
ARCHITECTURES |= {
    "mixtral, grouped": MIXTURES["mixtral"](family="mixture", dtype=torch.float32),
    "gpt-oss, grouped": MIXTURES["gpt-oss"](family="mixture", dtype=torch.float32),
    "mixtral, batched": MIXTURES["mixtral"](family="mixture", experts_implementation="batched_mm"),
    "switch": Architecture(
        "mixture",
        _of(
            "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", vocab_size=VOCABULARY, d_model=16,
            d_kv=8, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=2, num_experts=2,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, pad_token_id=0, decoder_start_token_id=0,
            expert_capacity=64,
        ),
        lambda n: with_decoder(tokens(n)), "tokens", torch.float32,  # its router sets itself to float32
    ),
}  # fmt: skip

# -- encoders ----------------------------------------------------------------------------------------------------------


def _encoder(kind: str, *, padding: str = "right", **own: Any) -> Architecture:
    config = kind.split("For")[0] + "Config"
    return Architecture("encoder", _of(kind, config, **own, num_labels=CLASSES), lambda n: tokens(n, padding))


ENCODER: dict[str, Any] = {**TEXT, "max_position_embeddings": 24}
ARCHITECTURES |= {
    "bert": _encoder("BertForSequenceClassification", **ENCODER),
    "bert, not padded": _encoder("BertForSequenceClassification", padding="none", **ENCODER),
    "bert, padded later": _encoder("BertForSequenceClassification", padding="later", **ENCODER),
    "bert masked": Architecture(
        "encoder", _of("BertForMaskedLM", "BertConfig", **ENCODER), lambda n: tokens(n, "right"), "tokens"
    ),
    "roberta": _encoder("RobertaForSequenceClassification", **ENCODER),
    "distilbert": _encoder(
        "DistilBertForSequenceClassification", vocab_size=VOCABULARY, dim=16, n_layers=1, n_heads=2, hidden_dim=24,
        max_position_embeddings=16,
    ),
    "modernbert": _encoder(
        "ModernBertForSequenceClassification", **{**ENCODER, "num_hidden_layers": 2}, cls_token_id=1, sep_token_id=1,
        global_attn_every_n_layers=2, local_attention=4,
    ),
    "deberta-v2": _encoder(
        "DebertaV2ForSequenceClassification", **ENCODER, relative_attention=True, position_buckets=4,
        pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
    ),
    "albert": _encoder(
        "AlbertForSequenceClassification", **{**ENCODER, "num_hidden_layers": 2}, embedding_size=8, num_hidden_groups=1
    ),
    "electra": _encoder("ElectraForSequenceClassification", **ENCODER, embedding_size=8),
    "xlnet, language model": Architecture(
        "encoder",
        _of(
            "XLNetLMHeadModel", "XLNetConfig", vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24,
            pad_token_id=0,
        ),
        tokens, "tokens",
    ),
    "xlnet": Architecture(
        "encoder",
        _of(
            "XLNetForSequenceClassification", "XLNetConfig", vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2,
            d_inner=24, num_labels=CLASSES, pad_token_id=0,
        ),
        lambda n: tokens(n, "right"),
    ),
}  # fmt: skip

# -- encoder-decoders --------------------------------------------------------------------------------------------------

SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1,
    "num_heads": 2, "pad_token_id": 0, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 8,
}  # fmt: skip


def sound_features(number: int) -> Inputs:
    """Noise in the shape of log-mel spectra."""
    draw = torch.Generator().manual_seed(6)
    return {"input_features": torch.randn((number, 4, 12), generator=draw, dtype=torch.float64)}


ARCHITECTURES |= {
    "t5": Architecture(
        "encoder-decoder", _of("T5ForConditionalGeneration", "T5Config", **T5),
        lambda n: with_decoder(tokens(n, "right")), "tokens",
    ),
    "t5 gated": Architecture(
        "encoder-decoder", _of("T5ForConditionalGeneration", "T5Config", **T5, feed_forward_proj="gated-gelu"),
        lambda n: with_decoder(tokens(n)), "tokens",
    ),
    "bart": Architecture(
        "encoder-decoder",
        _of("BartForConditionalGeneration", "BartConfig", **SEQ2SEQ, max_position_embeddings=16),
        lambda n: with_decoder(tokens(n, "right")), "tokens",
    ),
    "whisper": Architecture(
        "audio",
        _of(
            "WhisperForConditionalGeneration", "WhisperConfig", **SEQ2SEQ, num_mel_bins=4, max_source_positions=6,
            max_target_positions=8,
        ),
        lambda n: with_decoder(sound_features(n)), "tokens",
    ),
}  # fmt: skip

# -- vision ------------------------------------------------------------------------------------------------------------

VISION: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def _vision(kind: str, *, size: int = 8, **own: Any) -> Architecture:
    config = kind.split("For")[0] + "Config"
    return Architecture("vision", _of(kind, config, **own, num_labels=CLASSES), lambda n: images(n, size=size))


class _CLIPClassifier(nn.Module):
    """CLIP's image tower under a linear head, as it is tuned."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.CLIPVisionConfig(**VISION, projection_dim=8)
        self.tower = transformers.CLIPVisionModelWithProjection(config)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.tower(pixel_values=pixel_values).image_embeds)


ARCHITECTURES |= {
    "vit": _vision("ViTForImageClassification", **VISION),
    "deit": _vision("DeiTForImageClassification", **VISION),
    "beit": _vision("BeitForImageClassification", **VISION, use_relative_position_bias=True),
    "beit, absolute positions": _vision(
        "BeitForImageClassification", **VISION, use_absolute_position_embeddings=True,
        use_shared_relative_position_bias=True
    ),
    "dinov2": _vision("Dinov2ForImageClassification", **{**VISION, "mlp_ratio": 2}),
    "swin": _vision(
        "SwinForImageClassification", size=16, image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2],
        window_size=4, mlp_ratio=2.0, use_absolute_embeddings=True,
    ),
    "swinv2": _vision(
        "Swinv2ForImageClassification", size=16, image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2],
        window_size=4, mlp_ratio=2.0,
    ),
    "convnext": _vision(
        "ConvNextForImageClassification", size=16, image_size=16, patch_size=2, hidden_sizes=[8, 12], depths=[1, 1],
        num_stages=2, layer_scale_init_value=0.5,
    ),
    "convnextv2": _vision(
        "ConvNextV2ForImageClassification", size=16, image_size=16, patch_size=2, hidden_sizes=[8, 12], depths=[1, 1],
        num_stages=2,
    ),
    "resnet": _vision(
        "ResNetForImageClassification", size=16, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1],
        layer_type="basic",
    ),
    "segformer": _vision(
        "SegformerForImageClassification", size=16, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
        hidden_sizes=[8, 12], patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
    ),
    "clip vision": Architecture("vision", _CLIPClassifier, images),
}  # fmt: skip


def images_in_text(number: int) -> Inputs:
    """A prompt that an image's four patches are part of."""
    ids = tokens(number)["input_ids"].clamp(max=IMAGE - 1)
    ids[:, :4] = IMAGE
    return {"input_ids": ids, **images(number)}


IMAGE = VOCABULARY - 1
ARCHITECTURES |= {
    "llava": Architecture(
        "vision",
        lambda: transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(**VISION),
                text_config=transformers.LlamaConfig(**SHARED_KEYS), image_token_index=IMAGE, vision_feature_layer=-1,
            )
        ),
        images_in_text, "causal",
    ),
}  # fmt: skip

# -- audio -------------------------------------------------------------------------------------------------------------

AUDIO: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8, 8),
    "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "vocab_size": VOCABULARY, "num_labels": CLASSES,
    "mask_time_prob": 0.0, "apply_spec_augment": False,
}  # fmt: skip
ARCHITECTURES |= {
    "wav2vec2": Architecture("audio", _of("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **AUDIO), sounds),
    "hubert": Architecture(
        "audio",
        _of(
            "HubertForSequenceClassification", "HubertConfig", **AUDIO, feat_extract_norm="layer",
            do_stable_layer_norm=True,
        ),
        sounds,
    ),
    "audio spectrogram": Architecture(
        "audio",
        _of(
            "ASTForAudioClassification", "ASTConfig", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24, patch_size=4, frequency_stride=4, time_stride=4, max_length=12, num_mel_bins=8,
            num_labels=CLASSES,
        ),
        lambda n: {"input_values": sound_features(3 * n)["input_features"].reshape(n, 12, 12)[:, :, :8].contiguous()},
    ),
}  # fmt: skip

# -- state spaces and other recurrences --------------------------------------------------------------------------------

MAMBA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
ARCHITECTURES |= {
    "mamba": _decoder("MambaForCausalLM", family="state space", padding="none", **MAMBA),
    "mamba2": _decoder(
        "Mamba2ForCausalLM", family="state space", padding="none", **MAMBA, num_heads=4, head_dim=8, n_groups=1,
        chunk_size=4,
    ),
    "rwkv": _decoder(
        "RwkvForCausalLM", family="state space", padding="none", vocab_size=VOCABULARY, hidden_size=16,
        num_hidden_layers=2, context_length=8, attention_hidden_size=16, intermediate_size=24, bos_token_id=1,
        eos_token_id=1, use_cache=False, rescale_every=0,
    ),
    "recurrent gemma": _decoder(
        "RecurrentGemmaForCausalLM", family="state space", padding="none", **{**SHARED_KEYS, "num_hidden_layers": 2},
        lru_width=16, attention_window_size=4, block_types=["recurrent", "attention"],
    ),
    "qwen3-next": _decoder(
        "Qwen3NextForCausalLM", family="state space", **{**EXPERTS, "num_hidden_layers": 2}, num_experts=4,
        moe_intermediate_size=12, shared_expert_intermediate_size=12, linear_key_head_dim=4, linear_value_head_dim=4,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_conv_kernel_dim=2,
        layer_types=["linear_attention", "full_attention"], experts_implementation="eager",
    ),
    "falcon mamba": _decoder("FalconMambaForCausalLM", family="state space", padding="none", **MAMBA),
}  # fmt: skip

# -- tuned with PEFT: most of the model is frozen ----------------------------------------------------------------------


def _tuned(kind: str, config: dict[str, Any], base: str) -> Architecture:
    """An architecture under adapters of PEFT."""

    def make() -> Any:
        return peft.get_peft_model(ARCHITECTURES[base].make(), getattr(peft, kind)(**config))

    return replace(ARCHITECTURES[base], family="peft", make=make)


ARCHITECTURES |= {
    "gpt2, LoRA": _tuned("LoraConfig", {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}, "gpt2"),
    "llama, LoRA": _tuned("LoraConfig", {"r": 2, "target_modules": ["q_proj", "v_proj"]}, "llama"),
    "llama, DoRA": _tuned("LoraConfig", {"r": 2, "target_modules": ["q_proj"], "use_dora": True}, "llama"),
    "llama, IA3": _tuned(
        "IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, "llama"
    ),
    "vit, LoRA": _tuned(
        "LoraConfig", {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}, "vit"
    ),
}

# -- with labels alone, as a collator leaves them ----------------------------------------------------------------------


@dataclass(frozen=True)
class Collated:
    """An encoder-decoder with batches as a collator makes them: the decoder's inputs are left to the model's labels.

    Attributes:
        make: Makes the model.
        inputs: As in `Architecture`.
    """

    make: Callable[[], Any]
    inputs: Callable[[int], Inputs]

    def model(self) -> nn.Module:
        """As in `Architecture`."""
        return Architecture("encoder-decoder", self.make, self.inputs).model()

    def batch(self, length: int) -> Inputs:
        """Examples with labels of that length; the last are ignored in every other example."""
        inputs = self.inputs(EXAMPLES)
        draw = torch.Generator().manual_seed(7)
        labels = torch.randint(2, VOCABULARY, (EXAMPLES, length), generator=draw)
        labels[1::2, length - 1 :] = IGNORE
        return {**inputs, "labels": labels}


def _image_captioner() -> Any:
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), transformers.GPT2Config(**GPT2, add_cross_attention=True)
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.VisionEncoderDecoderModel(config)


def _padded(number: int) -> Inputs:
    return tokens(number, "right")


COLLATED = {
    "t5": Collated(ARCHITECTURES["t5"].make, _padded),
    "bart": Collated(ARCHITECTURES["bart"].make, _padded),
    "mbart": Collated(_of("MBartForConditionalGeneration", "MBartConfig", **SEQ2SEQ, max_position_embeddings=16),
        _padded),
    "whisper": Collated(ARCHITECTURES["whisper"].make, sound_features),
    "image captioner": Collated(_image_captioner, images),
}  # fmt: skip
