"""What is trained and asked: data, models and recipes. Knows no scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from examples.influence.evaluation import TrainingRecipe

Pair = tuple[Tensor, Tensor]
QUERIES = 180


@dataclass(frozen=True)
class Setting:
    """A classification task with cross-entropy.

    Args:
        name: of its files.
        title: what it is.
        build: a seed to an untrained model.
        train: all training examples.
        queries: held-out examples.
        recipe: how models are trained, on all the data as on subsets.
    """

    name: str
    title: str
    build: Callable[[int], nn.Module]
    train: Pair
    queries: Pair
    recipe: TrainingRecipe


def digits_mlp(weight_decay: float) -> Setting:
    """An MLP 64-64-32-10 on scikit-learn's digits, trained by SGD until nearly every example is fit."""

    def build(seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))

    train, queries = _digits()
    recipe = TrainingRecipe(
        epochs=40, learning_rate=0.1, momentum=0.9, weight_decay=weight_decay, batch_size=64, schedule="linear"
    )
    title = f"MLP 64-64-32-10 with GELU on digits, weight decay {weight_decay:g}"
    return Setting(f"digits-{weight_decay:g}", title, build, train, queries, recipe)


def softmax() -> Setting:
    """A linear softmax on digits, convex with its weight decay, trained to its optimum."""

    def build(seed: int) -> nn.Module:
        return nn.Linear(64, 10)

    train, queries = _digits()
    recipe = TrainingRecipe(epochs=300, learning_rate=0.5, momentum=0.9, weight_decay=1e-3)
    return Setting("softmax", "softmax regression on digits, weight decay 0.001", build, train, queries, recipe)


def mnist1d() -> Setting:
    """Three convolutions and a linear layer on MNIST-1D, trained by AdamW."""
    from examples.shared.tasks import mnist1d as task

    found = task()
    pairs = []
    for split in (found.train, found.test):
        if not isinstance(split.inputs, Tensor):
            raise TypeError("MNIST-1D's inputs should be one tensor")
        pairs.append((split.inputs, split.labels))
    train, (inputs, labels) = pairs
    recipe = TrainingRecipe(
        epochs=30, learning_rate=3e-3, optimizer="adamw", weight_decay=1e-2, batch_size=64, schedule="linear"
    )
    title, queries = "three convolutions and a linear layer on MNIST-1D", (inputs[:QUERIES], labels[:QUERIES])
    return Setting("mnist1d", title, found.build, train, queries, recipe)


def minilm() -> Setting:
    """MiniLM's last two layers with LoRA and a linear head, trained by AdamW to tell scipy's subpackages apart."""
    from examples.influence import text

    train, queries, classes = text.data()
    recipe = TrainingRecipe(
        epochs=10, learning_rate=3e-3, optimizer="adamw", weight_decay=1e-2, batch_size=32, schedule="linear"
    )
    title = f"MiniLM with LoRA of rank {text.RANK} in its last two layers on docstrings of scipy, {classes} classes"
    return Setting("minilm", title, lambda seed: text.build(seed, classes), train, queries, recipe)


def tiny(setting: Setting) -> Setting:
    """The same with few examples and epochs: does everything work?"""
    train, queries = ((x[:n], y[:n]) for (x, y), n in ((setting.train, 60), (setting.queries, 5)))
    return replace(setting, train=train, queries=queries, recipe=replace(setting.recipe, epochs=2))


def _digits() -> tuple[Pair, Pair]:
    """1,437 examples to learn from, and queries among the other 360."""
    from sklearn.datasets import load_digits

    found = load_digits()
    inputs = torch.as_tensor(found.data, dtype=torch.float32) / 16
    labels = torch.as_tensor(found.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    count = int(0.8 * len(labels))
    train, queries = order[:count], order[count : count + QUERIES]
    return (inputs[train], labels[train]), (inputs[queries], labels[queries])


SETTINGS: Mapping[str, Callable[[], Setting]] = {
    "digits-0": lambda: digits_mlp(0.0),
    "digits-0.001": lambda: digits_mlp(1e-3),
    "softmax": softmax,
    "mnist1d": mnist1d,
    "minilm": minilm,
}
"""By name."""
