"""Families on sequences: embeddings, attention, recurrence, tied heads, token labels, layouts, mapping batches."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.outputs import IGNORE_INDEX
from tests.reference.zoo import Built, Compose, family, labels, parameter


def _tokens(vocabulary: int, *shape: int) -> Tensor:
    """Token ids; the small vocabulary makes tokens repeat within a sequence."""
    return torch.randint(vocabulary, shape)


def _token_labels(outputs: int, *shape: int) -> Tensor:
    """Token labels with ignored ones: some in the first element, all in the third, none in the others."""
    found = labels(outputs, *shape)
    found[0, :2] = IGNORE_INDEX
    found[2] = IGNORE_INDEX
    return found


@family("embedding")
def _embedding() -> Built:
    """The padding row is used, and is not zero, yet takes no gradient."""
    model = Compose(
        lambda m, x: m.head(torch.tanh(m.emb(x)).mean(1)), emb=nn.Embedding(6, 4, padding_idx=1), head=nn.Linear(4, 3)
    )
    ids = _tokens(6, 5, 4)
    ids[:, -1], ids[0, :2] = 1, 3
    return model, ids, labels(3, 5)


@family("attention_batch_first")
def _attention_batch_first() -> Built:
    model = Compose(
        lambda m, x: m.head(m.attn(x, x, x, need_weights=False)[0].mean(1)),
        attn=nn.MultiheadAttention(4, 2, batch_first=True),
        head=nn.Linear(4, 3),
    )
    return model, torch.randn(4, 3, 4), labels(3, 4)


@family("attention_sequence_first")
def _attention_sequence_first() -> Built:
    def function(m: Any, x: Tensor) -> Any:
        h = x.transpose(0, 1)
        return m.head(m.attn(h, h, h)[0].mean(0))

    model = Compose(function, attn=nn.MultiheadAttention(4, 2), head=nn.Linear(4, 3))
    return model, torch.randn(4, 3, 4), labels(3, 4)


def _cross(attention: nn.Module, memory: int) -> Built:
    """Attention from the first two positions to the others, whose features are projected to ``memory``."""

    def function(m: Any, x: Tensor) -> Any:
        keys = m.memory(x[:, 2:])
        return m.head(m.attn(x[:, :2], keys, keys, need_weights=False)[0].sum(1))

    model = Compose(function, memory=nn.Linear(4, memory), attn=attention, head=nn.Linear(4, 3))
    return model, torch.randn(4, 5, 4), labels(3, 4)


@family("attention_cross")
def _attention_cross() -> Built:
    return _cross(nn.MultiheadAttention(4, 2, batch_first=True), memory=4)


@family("attention_cross_widths")
def _attention_cross_widths() -> Built:
    return _cross(nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True), memory=3)


@family("transformer_layer")
def _transformer_layer() -> Built:
    layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=6, dropout=0.0, batch_first=True)
    model = Compose(
        lambda m, x: m.head(m.layer(m.emb(x) + m.position).mean(1)),
        position=parameter(4, 4),
        emb=nn.Embedding(6, 4),
        layer=layer,
        head=nn.Linear(4, 3),
    )
    return model, _tokens(6, 4, 4), labels(3, 4)


@family("rnn")
def _rnn() -> Built:
    model = Compose(lambda m, x: m.head(m.rnn(x)[0][:, -1]), rnn=nn.RNN(3, 4, batch_first=True), head=nn.Linear(4, 3))
    return model, torch.randn(4, 4, 3), labels(3, 4)


@family("lstm")
def _lstm() -> Built:
    model = Compose(lambda m, x: m.head(m.rnn(x)[0].mean(1)), rnn=nn.LSTM(3, 3, batch_first=True), head=nn.Linear(3, 3))
    return model, torch.randn(4, 4, 3), labels(3, 4)


@family("gru_sequence_first")
def _gru_sequence_first() -> Built:
    model = Compose(lambda m, x: m.head(m.rnn(x.transpose(0, 1))[0][-1]), rnn=nn.GRU(3, 4), head=nn.Linear(4, 3))
    return model, torch.randn(4, 4, 3), labels(3, 4)


@family("tied_head_parameter")
def _tied_head_parameter() -> Built:
    emb, head = nn.Embedding(5, 4), nn.Linear(4, 5)
    head.weight = emb.weight
    model = Compose(
        lambda m, x: m.head(torch.tanh(m.body(m.emb(x) + m.position))),
        position=parameter(3, 4),
        emb=emb,
        body=nn.Linear(4, 4),
        head=head,
    )
    return model, _tokens(5, 4, 3), _token_labels(5, 4, 3)


@family("tied_head_functional")
def _tied_head_functional() -> Built:
    model = Compose(
        lambda m, x: F.linear(torch.tanh(m.body(m.emb(x) + m.position)), m.emb.weight),
        position=parameter(3, 4),
        emb=nn.Embedding(5, 4),
        body=nn.Linear(4, 4),
    )
    return model, _tokens(5, 4, 3), _token_labels(5, 4, 3)


@family("token_mlp", example="sequence")
@family("token_mlp_by_token", example="token")
def _token_mlp() -> Built:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.randn(5, 4, 3), _token_labels(3, 5, 4)


@family("token_attention", example="sequence")
@family("token_attention_by_token", example="token")
def _token_attention() -> Built:
    def function(m: Any, x: Tensor) -> Any:
        h = m.emb(x) + m.position
        return m.head(m.norm(h + m.attn(h, h, h, need_weights=False)[0]))

    model = Compose(
        function,
        position=parameter(4, 4),
        emb=nn.Embedding(6, 4),
        attn=nn.MultiheadAttention(4, 2, batch_first=True),
        norm=nn.LayerNorm(4),
        head=nn.Linear(4, 3),
    )
    return model, _tokens(6, 4, 4), _token_labels(3, 4, 4)


@family("token_conv_by_token", example="token")
def _token_conv() -> Built:
    """Positions share a convolution, so that one token's row uses its neighbours' inputs."""
    model = Compose(
        lambda m, x: m.head(torch.tanh(m.conv(x.mT)).mT), conv=nn.Conv1d(3, 5, 3, padding=1), head=nn.Linear(5, 3)
    )
    return model, torch.randn(4, 4, 3), _token_labels(3, 4, 4)


@family("gaussian_tokens", "gaussian", example="sequence")
@family("gaussian_by_token", "gaussian", example="token")
def _gaussian_tokens() -> Built:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(4, 3, 3), torch.randn(4, 3, 2)


@family("bernoulli_tokens", "bernoulli", example="sequence")
@family("bernoulli_by_token", "bernoulli", example="token")
def _bernoulli_tokens() -> Built:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    return model, torch.randn(4, 3, 3), torch.randint(2, (4, 3, 2)).float()


@family("flattened_positions")
def _flattened_positions() -> Built:
    """(B, T, D) becomes (B·T, D) before a Linear, and (B, T, C) again after it."""

    def function(m: Any, x: Tensor) -> Any:
        h = torch.tanh(m.body(x.reshape(-1, x.shape[-1])))
        return m.head(h).reshape(*x.shape[:2], -1)

    model = Compose(function, body=nn.Linear(3, 7), head=nn.Linear(7, 3))
    return model, torch.randn(5, 4, 3), _token_labels(3, 5, 4)


@family("sequence_first_layout")
def _sequence_first_layout() -> Built:
    """The Linear layers see (T, B, D)."""

    def function(m: Any, x: Tensor) -> Any:
        return m.head(torch.tanh(m.body(x.transpose(0, 1))).mean(0))

    return Compose(function, body=nn.Linear(3, 6), head=nn.Linear(6, 3)), torch.randn(5, 5, 3), labels(3, 5)


class _Output(NamedTuple):
    """A model output with its logits under a name."""

    logits: Tensor


class _MappingModel(nn.Module):
    """A token classifier called by keywords: embedding, masked mean pooling, head."""

    def __init__(self, named_output: bool) -> None:
        super().__init__()
        self.named_output = named_output
        self.emb = nn.Embedding(8, 4, padding_idx=0)
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor | _Output:
        h = torch.tanh(self.body(self.emb(input_ids)))
        weight = attention_mask.unsqueeze(-1).to(h.dtype)
        pooled = (h * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        z = self.head(torch.tanh(h + pooled))
        return _Output(z) if self.named_output else z


def _mapping(named_output: bool) -> Built:
    # A token that repeats would tie two pivots of the truncated kind: without positions its outputs repeat too.
    ids = torch.stack([torch.randperm(7)[:4] + 1 for _ in range(4)])
    mask = torch.ones(4, 4, dtype=torch.int64)
    ids[0, 2:], mask[0, 2:], ids[3, 3:], mask[3, 3:] = 0, 0, 0, 0
    targets = labels(3, 4, 4).masked_fill(mask == 0, IGNORE_INDEX)
    return _MappingModel(named_output), {"input_ids": ids, "attention_mask": mask}, targets


@family("mapping_batch")
def _mapping_batch() -> Built:
    return _mapping(named_output=False)


@family("mapping_batch_logits")
@family("mapping_batch_by_token", example="token")
def _mapping_batch_logits() -> Built:
    return _mapping(named_output=True)
