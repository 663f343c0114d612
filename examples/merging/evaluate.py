"""The accuracy of a Hugging Face sequence classifier, a folder, on files of labelled texts.

Knows nothing of Fishers or of merging. Run ``python -m examples.merging.evaluate --help``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from examples.merging.text_tasks import read


def evaluate(folder: Path, files: Sequence[Path]) -> list[dict[str, float]]:
    """Accuracy in percent and mean cross-entropy, for each file.

    Args:
        folder: a model with its tokenizer.
        files: texts and labels.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [_on(model, tokenizer, read(path)) for path in files]


def _on(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> dict[str, float]:
    right, loss = 0, 0.0
    for begin in range(0, len(pairs), 64):
        chosen = pairs[begin : begin + 64]
        inputs = tokenizer([text for text, _ in chosen], padding=True, truncation=True, return_tensors="pt")
        labels = torch.tensor([model.config.label2id[label] for _, label in chosen])
        with torch.no_grad():
            z = model(**inputs).logits
        right += int((z.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(z, labels, reduction="sum"))
    return {"accuracy": 100 * right / len(pairs), "loss": loss / len(pairs)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.merging.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help=".jsonl files with text and label")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(json.dumps(evaluate(options.model, options.data)))


if __name__ == "__main__":
    main()
