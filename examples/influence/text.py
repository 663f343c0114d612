"""MiniLM with LoRA on docstrings, as the small model that is trained: what lies below it is computed once.

Without dropout the frozen layers give the same hidden states in every epoch of every training, so that those are the
inputs. The model is what follows: the last two layers, the mean over tokens, and a linear head. Knows no scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from examples.shared.tasks import Split, docstring_text, minilm

LAYERS = (4, 5)
"""Those with LoRA, the last two of six."""
RANK = 4
TRAIN, QUERIES = 400, 60
"""Examples; a retraining takes seconds, so that they are few."""
TOKENS = 24
"""The longest text; 19 of 20 are shorter."""

Pair = tuple[Tensor, Tensor]


class Tail(nn.Module):
    """The end of an encoder, averaged over tokens, and a linear head.

    Args:
        layers: of the encoder, the last ones.
        width: of its hidden states.
        classes: C.
    """

    def __init__(self, layers: nn.ModuleList, width: int, classes: int) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[B, C]`` of hidden states ``[B, T, width + 1]``; the last column is 1 for a token, 0 for padding."""
        hidden, real = inputs[..., :-1], inputs[..., -1:]
        # Added to attention's logits.
        mask = (1 - real).mul(torch.finfo(inputs.dtype).min)[:, None, None, :, 0]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.head((hidden * real).sum(1) / real.sum(1))


def data() -> tuple[Pair, Pair, int]:
    """Training examples and queries, hidden states before the first layer that is trained, and C."""
    task = docstring_text(tokens=TOKENS)
    classes = int(torch.cat([task.train.labels, task.test.labels]).max()) + 1
    encoder: Any = minilm().eval()
    encoder.encoder.layer = encoder.encoder.layer[: LAYERS[0]]
    train, queries = (
        (_hidden(encoder, split, count), split.labels[:count])
        for split, count in ((task.train, TRAIN), (task.test, QUERIES))
    )
    return train, queries, classes


def build(seed: int, classes: int) -> nn.Module:
    """An untrained model; LoRA and head require grad, the rest does not.

    Args:
        seed: of the head and of LoRA.
        classes: C.
    """
    from peft import LoraConfig, get_peft_model

    # Plain operations, which vmap knows.
    encoder: Any = minilm(attn_implementation="eager")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=["query", "value"],
        layers_to_transform=list(LAYERS),
    )  # fmt: skip
    adapted: Any = get_peft_model(encoder, config)
    layers = adapted.base_model.model.encoder.layer[LAYERS[0] :]
    return Tail(layers, encoder.config.hidden_size, classes).eval()


@torch.no_grad()
def _hidden(encoder: nn.Module, split: Split, count: int) -> Tensor:
    inputs = split.inputs
    if isinstance(inputs, Tensor):
        raise TypeError("texts should be tokens and a mask")
    ids, mask = inputs["input_ids"][:count], inputs["attention_mask"][:count]
    hidden: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return torch.cat([hidden, mask.unsqueeze(2).to(hidden.dtype)], 2)
