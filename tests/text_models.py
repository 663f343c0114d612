"""Tiny Hugging Face folders: a tokenizer of a few words, and models from configurations."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sparse", "dense", "matrix", "of", "a", "graph", "integral"]
SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS), "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 4,
    "intermediate_size": 6, "max_position_embeddings": 16,
}  # fmt: skip
TEXTS = ["a sparse matrix", "integral of a graph", "dense matrix", "graph", "a dense integral of a dense graph"]
CLASSES = ("linalg", "integrate", "fft")
LABELS = ["linalg", "integrate", "linalg", "integrate", "linalg"]


def make_tokenizer(folder: Path) -> Any:
    """A tokenizer of `WORDS`."""
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS))
    return transformers.BertTokenizerFast(vocab_file=str(vocabulary), model_max_length=12)


def make_classifier(seed: int = 0, **options: Any) -> Any:
    """A BERT with a class for each of `CLASSES`."""
    torch.manual_seed(seed)
    names = dict(enumerate(CLASSES))
    config = transformers.BertConfig(**SIZES, label2id={n: i for i, n in names.items()}, id2label=names, **options)
    return transformers.BertForSequenceClassification(config)


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    """The folder of a model with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    """A file with an object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
