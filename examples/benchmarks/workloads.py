"""The models and minibatches that are measured. Owns sizes and seeds; knows nothing of Fishers or of peers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """A model with one minibatch.

    Args:
        name: W1 to W4.
        title: what it is, with its sizes.
        model: in eval mode, float32.
        inputs: along axis 0.
        targets: class indices, one an example or one a position.
        attention: whether the model attends, so that peers that use forward mode need attention by plain matmuls.
    """

    name: str
    title: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    attention: bool = False
    names: tuple[str, ...] = field(init=False)
    layered: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(name for name, _ in self.model.named_parameters()))
        object.__setattr__(self, "layered", _layered(self.model))

    @property
    def examples(self) -> int:
        """N."""
        return self.inputs.shape[0]

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """The minibatch as a pair."""
        return self.inputs, self.targets

    @property
    def sequence(self) -> bool:
        """Whether every position has a label."""
        return self.targets.ndim > 1

    @property
    def size(self) -> int:
        """D."""
        return sum(p.numel() for p in self.model.parameters())

    def loss(self, model: nn.Module) -> Tensor:
        """The mean cross-entropy of the minibatch, as training has it."""
        return F.cross_entropy(model(self.inputs).flatten(0, -2), self.targets.flatten())

    def unit(self) -> Callable[[], None]:
        """One forward and backward pass, the unit of every figure."""
        model = copy.deepcopy(self.model)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            self.loss(model).backward()

        return step

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Workload:
        """The same elsewhere, or in another precision."""
        inputs = self.inputs.to(device, dtype if self.inputs.is_floating_point() else None)
        model = copy.deepcopy(self.model).to(device, dtype)
        return Workload(self.name, self.title, model, inputs, self.targets.to(device), self.attention)

    def take(self, count: int) -> Workload:
        """The first examples of the minibatch."""
        return Workload(self.name, self.title, self.model, self.inputs[:count], self.targets[:count], self.attention)


def _layered(model: nn.Module) -> tuple[str, ...]:
    """Parameters of the linear and convolution layers that hooks see; attention calls none of its own."""
    inside = {id(m) for a in model.modules() if isinstance(a, nn.MultiheadAttention) for m in a.modules()}
    found = []
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and id(module) not in inside:
            found += [f"{prefix}.{name}" for name, _ in module.named_parameters()]
    return tuple(found)


class Encoder(nn.Module):
    """A transformer encoder over vectors, averaged over positions.

    Args:
        inputs: numbers a position.
        width: of the residual stream.
        heads: of attention.
        layers: blocks.
        positions: T.
        classes: C.
    """

    def __init__(self, inputs: int, width: int, heads: int, layers: int, positions: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.position = nn.Parameter(0.02 * torch.randn(positions, width))
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, C]``."""
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


class LanguageHead(nn.Module):
    """Embedding, one residual block at every position, and an untied head over a large vocabulary.

    Args:
        vocabulary: C.
        width: of the residual stream.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, C]``."""
        x = self.embed(tokens)
        return self.head(x + self.down(F.gelu(self.up(x))))


class Decoder(nn.Module):
    """A decoder in GPT-2's shape, its head tied to the embedding.

    Args:
        vocabulary: C.
        width: of the residual stream.
        heads: of attention.
        layers: blocks.
        positions: T.
    """

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, positions: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, T, C]``."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


class DecoderBlock(nn.Module):
    """Causal attention, with one matrix for queries, keys and values, and an MLP.

    Args:
        width: of the residual stream.
        heads: of attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream ``[B, T, width]``."""
        q, k, v = self.attend(self.before_attention(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


def mlp(*, width: int = 1024, inputs: int = 784, classes: int = 10, examples: int = 512) -> Workload:
    """W1."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )
    title = f"MLP {inputs}-{width}-{width}-{classes}, N = {examples}"
    return Workload("W1", title, model.eval(), torch.randn(examples, inputs), torch.randint(classes, (examples,)))


def cnn(*, channels: int = 32, side: int = 32, hidden: int = 128, examples: int = 256) -> Workload:
    """W2."""
    torch.manual_seed(0)
    flat = 2 * channels * (side // 4) ** 2
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    )  # fmt: skip
    title = (
        f"CNN, 3×3 convolutions 3-{channels}-{2 * channels}, linear {flat}-{hidden}-10, {side}×{side}, N = {examples}"
    )
    return Workload("W2", title, model.eval(), torch.randn(examples, 3, side, side), torch.randint(10, (examples,)))


def transformer(
    *, width: int = 256, heads: int = 8, layers: int = 4, positions: int = 64, examples: int = 32
) -> Workload:
    """W3."""
    torch.manual_seed(0)
    model = Encoder(32, width, heads, layers, positions, 10).eval()
    title = f"transformer encoder, {layers} blocks, width {width}, T = {positions}, N = {examples}"
    return Workload(
        "W3", title, model, torch.randn(examples, positions, 32), torch.randint(10, (examples,)), attention=True
    )


def language(*, vocabulary: int = 8192, width: int = 128, positions: int = 64, examples: int = 8) -> Workload:
    """W4."""
    torch.manual_seed(0)
    model = LanguageHead(vocabulary, width).eval()
    title = f"language-model head, vocabulary {vocabulary:,}, width {width}, T = {positions}, N = {examples}"
    shape = (examples, positions)
    return Workload("W4", title, model, torch.randint(vocabulary, shape), torch.randint(vocabulary, shape))


FULL: dict[str, Callable[[], Workload]] = {"W1": mlp, "W2": cnn, "W3": transformer, "W4": language}
"""The sizes that are reported."""

TINY: dict[str, Callable[[], Workload]] = {
    "W1": lambda: mlp(width=12, inputs=10, classes=4, examples=24),
    "W2": lambda: cnn(channels=3, side=8, hidden=6, examples=40),
    "W3": lambda: transformer(width=8, heads=2, layers=1, positions=5, examples=6),
    "W4": lambda: language(vocabulary=13, width=4, positions=5, examples=6),
}
"""Sizes for tests: every path, no figure."""
