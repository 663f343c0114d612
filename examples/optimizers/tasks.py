"""The tasks: those of `examples.shared.tasks`, an MLP on MNIST-1D, and a causal language model on docstrings.

Owns their data, models and lengths. Knows no optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shared import docstrings, tasks
from examples.shared.tasks import Recipe, Split, Task, seeded, sizes, split

SYMBOLS, LENGTH = 64, 64
"""Of the language model: how many characters it knows, the last for all others, and of how many a sequence is made."""


HELD_OUT = 10_000
"""Examples of MNIST-1D; with the 1,000 that come with it, an accuracy of 70 % is uncertain by 1.4 points."""


def cnn(seed: int = 0) -> Task:
    """The convolutions of `examples.shared.tasks`, tested on more examples of the same generator."""
    of = tasks.mnist1d(seed)
    test = tasks.generated(seed + 1000, HELD_OUT)
    title = f"three convolutions and a linear layer on MNIST-1D, {sizes(of.build(0), of.train, test)}"
    return _with_batch(replace(of, name="cnn", title=title, test=test), 100)


def mlp(seed: int = 0) -> Task:
    """A multilayer perceptron on the same data."""
    of = cnn(seed)
    train, test = (Split(part.inputs.flatten(1), part.labels) for part in (of.train, of.test))  # type: ignore[union-attr]  # one tensor
    build = seeded(
        lambda: nn.Sequential(nn.Linear(40, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    )
    title = f"MLP 40-128-128-10 on MNIST-1D, {sizes(build(0), train, test)}"
    return Task("mlp", title, train, test, build, Recipe("AdamW", 3e-3, 100, ()), torch.float32)


class Block(nn.Module):
    """Causal attention and a perceptron, each after a layer norm and beside a skip connection.

    Args:
        width: of the residual stream.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width]``."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before_attention(x)).chunk(3, -1)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class LanguageModel(nn.Module):
    """Characters to logits of the next ones, with fixed sinusoids as positions.

    Args:
        width: of the residual stream.
        layers: blocks.
    """

    position: Tensor

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, SYMBOLS)
        angle = torch.arange(LENGTH).unsqueeze(1) * torch.exp(-math.log(1e4) * torch.arange(width // 2) * 2 / width)
        self.register_buffer("position", torch.cat([angle.sin(), angle.cos()], 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, T, symbols]``."""
        z: Tensor = self.head(self.norm(self.blocks(self.embedding(x) + self.position[: x.shape[1]])))
        return z


def text(seed: int = 0, *, large: bool = False) -> Task:
    """A causal language model of characters on scipy's docstrings.

    Args:
        seed: of the split.
        large: 1.6 million parameters instead of a tenth of a million.
    """
    whole = "\n".join(text for text, _ in docstrings.collect())
    known = sorted(sorted(set(whole)), key=whole.count, reverse=True)[: SYMBOLS - 1]
    place = {symbol: i for i, symbol in enumerate(known)}
    codes = torch.tensor([place.get(symbol, SYMBOLS - 1) for symbol in whole])
    found = codes[: (len(codes) - 1) // LENGTH * LENGTH + 1]
    train, test = split(found[:-1].view(-1, LENGTH), found[1:].view(-1, LENGTH), seed)
    build = seeded(lambda: LanguageModel(*((192, 4) if large else (64, 2))))
    title = f"transformer on characters of scipy's docstrings, {LENGTH} a sequence, {sizes(build(0), train, test)}"
    return Task("text-large" if large else "text", title, train, test, build, Recipe("AdamW", 3e-3, 16, ()))


def _with_batch(task: Task, batch: int) -> Task:
    return replace(task, recipe=replace(task.recipe, batch=batch))


TASKS: Mapping[str, tuple[Callable[[], Task], int]] = {
    "digits": (tasks.digits, 12),
    "mlp": (mlp, 12),
    "cnn": (cnn, 12),
    "text": (text, 8),
    "lora": (lambda: replace(tasks.docstring_text(), name="lora"), 3),
    "text-large": (lambda: text(large=True), 8),
}
"""By name, how a task is made and how many epochs it is trained."""
