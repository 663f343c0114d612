"""Benches of other modules than perceptrons: a GRU that reads digits, a transformer that reads text, the same by LoRA.

Owns their data and models. How many of them are trained as one, `members` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.continual.benches import digits
from examples.shared.docstrings import windows
from fisherkit.adapters import merged_weights
from fisherkit.randomness import untouched_rng

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One task: examples to learn from, held-out ones, and the head that it uses."""

    train: Pair
    test: Pair
    head: int


class Heads(nn.Module):
    """A body and a linear head for each task, or one for all.

    Args:
        body: ends in a vector of ``width``.
        width: of that vector.
        classes: outputs of each head.
        heads: how many.
    """

    def __init__(self, body: nn.Module, width: int, classes: int, heads: int = 1) -> None:
        super().__init__()
        self.body, self.head = body, 0
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, C]`` of the current head."""
        z: Tensor = self.heads[self.head](self.body(x))
        return z

    def own(self) -> list[str]:
        """The parameters that the current head's task uses."""
        return [name for name in learned(self) if name.startswith(("body.", f"heads.{self.head}."))]


def learned(model: nn.Module) -> list[str]:
    """The parameters that a model learns; of LoRA, the weights that A and B are a change of."""
    if any("lora_" in name for name, _ in model.named_parameters()):
        return list(merged_weights(model))
    return [name for name, p in model.named_parameters() if p.requires_grad]


class LastState(nn.Module):
    """A GRU's state after the last step, written out, so that many can be trained as one.

    Args:
        inputs: I.
        width: of the state.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.ahead, self.back = nn.Linear(inputs, 3 * width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, I]`` to ``[B, width]``."""
        ahead = self.ahead(x)
        state = x.new_zeros(len(x), self.back.in_features)
        for step in range(x.shape[1]):
            (r, z, n), (s, u, m) = ahead[:, step].chunk(3, 1), self.back(state).chunk(3, 1)
            keep = torch.sigmoid(z + u)
            state = keep * state + (1 - keep) * torch.tanh(n + torch.sigmoid(r + s) * m)
        return state


class Reader(nn.Module):
    """A transformer of one layer without places of words, averaged over them.

    Args:
        words: in the vocabulary.
        width: of the hidden states.
    """

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, ids: Tensor) -> Tensor:
        """``[B, T]`` to ``[B, width]``."""
        x = self.words(ids)
        normed = self.first(x)
        scores = self.query(normed) @ self.key(normed).mT / normed.shape[-1] ** 0.5
        mixed = scores.softmax(-1) @ self.value(normed)
        x = x + self.out(mixed)
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return x.mean(1)


@dataclass(frozen=True)
class ModuleBench:
    """A sequence of tasks for a module.

    Args:
        name: short.
        title: what it is.
        model: what learns.
        epochs: a task, as in `benches.Bench`; one regime.
        make_one: model and tasks of a seed.
        seeds: how many are measured; the first ones of the plan's.
        rate: the first step of Adam.
        batch: examples a step.
    """

    name: str
    title: str
    model: str
    epochs: Mapping[str, int]
    make_one: Callable[[int], tuple[Heads, list[Task]]]
    rate: float = 1e-2
    batch: int = 50
    seeds: int = 3

    def make(self, seeds: tuple[int, ...]) -> list[tuple[Heads, list[Task]]]:
        """Model and tasks of each seed."""
        return [self.make_one(seed) for seed in seeds]

    def includes(self, *names: str) -> bool:
        """Whether a method of this kind and structure is measured."""
        return not {"full", "truncated-1", "truncated-2"} & set(names)


def _rows(seed: int) -> tuple[Heads, list[Task]]:
    """Digits with their pixels permuted, 8 rows of 8 pixels, one head."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(y), generator=generator)
    train, test = drawn[:800], drawn[800:]
    tasks = []
    for number in range(4):
        order = torch.randperm(64, generator=generator) if number else torch.arange(64)
        own = x[:, order].unflatten(1, (8, 8))
        tasks.append(Task((own[train], y[train]), (own[test], y[test]), 0))
    with untouched_rng([]):
        torch.manual_seed(seed)
        return Heads(LastState(8, 32), 32, 10), tasks


TEXTS = (("special", "stats"), ("signal", "linalg"), ("ndimage", "optimize"), ("interpolate", "sparse"))
"""Subpackages of scipy, two a task."""
BEFORE = ("fft", "integrate", "spatial")
"""Those that a model learns to tell apart before it gets LoRA."""
WORDS, LENGTH, TRAIN, TEST, WIDTH = 1000, 16, 300, 120, 32


def _texts(seed: int) -> tuple[Heads, list[Task]]:
    """Which of two subpackages does a docstring's window of words come from? A head for each pair."""
    tasks = _pairs(seed, TEXTS)
    with untouched_rng([]):
        torch.manual_seed(seed)
        return Heads(Reader(WORDS, WIDTH), WIDTH, 2, len(TEXTS)), tasks


def _adapted(seed: int) -> tuple[Heads, list[Task]]:
    """The same by LoRA of rank 4 on every linear layer of a body that has learned to tell other subpackages apart."""
    from peft import LoraConfig, inject_adapter_in_model

    first, *tasks = _pairs(seed, (BEFORE, *TEXTS))
    x, y = first.train
    with untouched_rng([]):
        torch.manual_seed(seed)
        before = Heads(Reader(WORDS, WIDTH), WIDTH, len(BEFORE))
        optimizer = torch.optim.Adam(before.parameters(), lr=1e-2)
        for batch in (batch for _ in range(8) for batch in torch.randperm(len(y)).split(50)):
            optimizer.zero_grad()
            F.cross_entropy(before(x[batch]), y[batch]).backward()
            optimizer.step()
        linears = [name for name, module in before.body.named_modules() if isinstance(module, nn.Linear)]
        body = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=linears), before.body)
        return Heads(body, WIDTH, 2, len(TEXTS)), [replace(task, head=task.head - 1) for task in tasks]


def _pairs(seed: int, groups: Sequence[Sequence[str]]) -> list[Task]:
    """A task for each group of subpackages: which of them does a docstring's window of words come from?"""
    sources = {name: windows(name, LENGTH) for group in groups for name in group}
    count: dict[str, int] = {}
    for texts in sources.values():
        for word in (word for function in texts for window in function for word in window):
            count[word] = count.get(word, 0) + 1
    common = sorted(count, key=lambda word: (-count[word], word))[: WORDS - 1]
    number = {word: place for place, word in enumerate(common, 1)}  # 0: any other
    generator, tasks = torch.Generator().manual_seed(seed), []
    for head, group in enumerate(groups):
        parts: list[list[tuple[Tensor, int]]] = [[], []]
        for label, name in enumerate(group):
            functions = sources[name]
            order = torch.randperm(len(functions), generator=generator).tolist()
            cut = round(0.65 * len(order))  # no function in both
            for part, chosen, most in ((0, order[:cut], TRAIN), (1, order[cut:], TEST)):
                own = [window for place in chosen for window in functions[place]]
                kept = torch.randperm(len(own), generator=generator)[:most].tolist()
                parts[part] += [(torch.tensor([number.get(w, 0) for w in own[place]]), label) for place in kept]
        train, test = ((torch.stack([ids for ids, _ in part]), torch.tensor([y for _, y in part])) for part in parts)
        tasks.append(Task(train, test, head))
    return tasks


MODULES: Mapping[str, ModuleBench] = {
    bench.name: bench
    for bench in (
        ModuleBench(
            "gru-rows", "4 tasks: digits with their pixels permuted, read row by row, one head", "GRU 8-32-10",
            {"fit": 8}, _rows,
        ),
        ModuleBench(
            "text-pairs", "4 tasks: which of two scipy subpackages do 16 words of a docstring come from, a head each",
            "transformer, 1 layer of width 32", {"fit": 8}, _texts,
        ),
        ModuleBench(
            "lora-pairs", "those of text-pairs by LoRA; our Fishers are over W + s·BA, others' squares over A and B",
            "LoRA of rank 4 on every linear layer of that transformer, which has learned other text", {"fit": 8},
            _adapted,
        ),
    )
}  # fmt: skip
"""By name."""
