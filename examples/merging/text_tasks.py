"""Three tasks of labelled docstrings, as files of one JSON object a line: subsets of the classes of one label set.

Owns which class belongs to which task, the split, and the files. Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from examples.shared import docstrings

Pairs = Sequence[tuple[str, str]]
"""(text, label)."""

TASKS: Mapping[str, tuple[str, ...]] = {
    "functions": ("fft", "linalg", "special"),
    "data": ("integrate", "signal", "stats"),
    "shapes": ("interpolate", "ndimage", "optimize", "sparse"),
}
"""Labels of each task, scipy's subpackages."""

LABELS = tuple(sorted(label for labels in TASKS.values() for label in labels))
"""The one label set, in the order of the models' outputs."""


def write(folder: Path, seed: int, most: int | None = None) -> None:
    """Write ``<task>-train.jsonl`` and ``<task>-test.jsonl`` of every task, and ``all-train.jsonl``.

    Args:
        folder: made if it is not there.
        seed: of the split: a random fifth of each label's texts is held out.
        most: texts of each label; None for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    collected = docstrings.collect()
    kept = [pair for label in LABELS for pair in [own for own in collected if own[1] == label][:most]]
    train, test = _split(kept, seed)
    for name, labels in TASKS.items():
        for suffix, pairs in (("train", train), ("test", test)):
            _write(folder / f"{name}-{suffix}.jsonl", [pair for pair in pairs if pair[1] in labels])
    _write(folder / "all-train.jsonl", train)


def read(path: Path) -> list[tuple[str, str]]:
    """Pairs (text, label) of a file."""
    objects = map(json.loads, path.read_text("utf-8").splitlines())
    return [(found["text"], found["label"]) for found in objects]


def _split(pairs: Pairs, seed: int) -> tuple[Pairs, Pairs]:
    generator = torch.Generator().manual_seed(seed)
    held: set[str] = set()
    for label in LABELS:
        texts = [text for text, own in pairs if own == label]
        order = torch.randperm(len(texts), generator=generator).tolist()
        held.update(texts[place] for place in order[: len(texts) // 5])
    return [pair for pair in pairs if pair[0] not in held], [pair for pair in pairs if pair[0] in held]


def _write(path: Path, pairs: Pairs) -> None:
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in pairs]
    path.write_text("\n".join(lines) + "\n", "utf-8")
