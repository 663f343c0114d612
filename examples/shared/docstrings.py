"""Labelled text that every installation has: what scipy's functions say of themselves, and the subpackage they are in.

Owns how the examples are collected and how a user's own file is read. Knows no model and no tokenizer.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

LEAST = 25
"""Examples of a class; smaller classes are left out."""

LEGACY = ("fftpack", "misc", "odr")
"""Subpackages that are kept for old code: fftpack says of its functions what fft says of its own."""


def collect() -> list[tuple[str, str]]:
    """Pairs (first sentence of a docstring, scipy's subpackage), in alphabetical order.

    Texts that several subpackages share are left out, and repeated ones are kept once. The examples depend on scipy's
    version alone.
    """
    import scipy

    found: dict[str, set[str]] = {}
    for module in sorted(pkgutil.iter_modules(scipy.__path__), key=lambda m: m.name):
        if module.ispkg and not module.name.startswith("_") and module.name not in LEGACY:
            for text in _summaries(module.name):
                found.setdefault(text, set()).add(module.name)
    pairs = [(text, next(iter(names))) for text, names in sorted(found.items()) if len(names) == 1]
    return _without_small_classes(pairs)


def read(path: Path) -> list[tuple[str, str]]:
    """Pairs (text, label) of a user's file: one example a line, the label after the last tab.

    Raises:
        ValueError: a line without a tab, or no class with enough examples.
    """
    pairs = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        text, tab, label = line.rpartition("\t")
        if not (tab and text.strip() and label.strip()):
            raise ValueError(f"{path}, line {number}: should be text<TAB>label, not {line[:80]!r}")
        pairs[text.strip()] = label.strip()
    kept = _without_small_classes(sorted(pairs.items()))
    if len({label for _, label in kept}) < 2:
        raise ValueError(f"{path}: should have two or more labels with at least {LEAST} different texts each")
    return kept


def _without_small_classes(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    count = Counter(label for _, label in pairs)
    return [(text, label) for text, label in pairs if count[label] >= LEAST]


def _summaries(subpackage: str) -> Iterator[str]:
    """First sentences of the public functions and classes of a subpackage."""
    module = importlib.import_module(f"scipy.{subpackage}")
    for name in sorted(getattr(module, "__all__", None) or dir(module)):
        member = getattr(module, name, None)
        # Numbers and strings have the docstrings of their types.
        if name.startswith("_") or inspect.ismodule(member) or not callable(member):
            continue
        sentence = summary(inspect.getdoc(member) or "", name)
        if sentence:
            yield sentence


def summary(docstring: str, name: str) -> str:
    """The first sentence, without signatures and without the function's own name; empty if there is none."""
    for paragraph in docstring.split("\n\n"):
        text = " ".join(paragraph.split())
        # Compiled functions begin with their signatures: "ellipj(u, m, out=None)" or "y = f(x)".
        if not text or re.match(r"^([\w, ]+ = )?[\w.]+\(.*\)", text) or text.startswith((".. ", "Parameters", "---")):
            continue
        sentence = re.split(r"(?<=[a-z)])\. |\.$", text)[0]
        sentence = re.sub(r":\w+:(?=`)", "", sentence).replace("`", "")
        sentence = re.sub(rf"\b{re.escape(name)}\b", "it", sentence).strip()
        # A sentence that names scipy mostly names the subpackage as well.
        return sentence if len(sentence.split()) >= 3 and "scipy" not in sentence else ""
    return ""


def windows(subpackage: str, length: int) -> list[list[list[str]]]:
    """Stretches of so many words, in lower case, of what each public function of a subpackage says of itself.

    Args:
        subpackage: of scipy; its own name is left out.
        length: of a stretch; what is left of a docstring is left out.

    Returns:
        By function, in alphabetical order; functions that say less are left out.
    """
    module, found = importlib.import_module(f"scipy.{subpackage}"), []
    for name in sorted(getattr(module, "__all__", None) or dir(module)):
        member = getattr(module, name, None)
        if name.startswith("_") or inspect.ismodule(member) or not callable(member):
            continue
        words = [
            w for w in re.findall(r"[a-z]+", (inspect.getdoc(member) or "").lower()) if w not in (name, subpackage)
        ]
        own = [words[start : start + length] for start in range(0, len(words) - length + 1, length)]
        if own:
            found.append(own)
    return found
