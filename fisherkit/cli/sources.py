"""The model and the data that a command works on: a Hugging Face folder with files of texts, or a user's function.

Owns which model class a folder asks for, how its tokenizer makes batches, which likelihood its loss belongs to, how
texts are read, and the options for all that. Knows nothing of Fisher matrices. Nothing is downloaded: a folder is all
there is.
"""

from __future__ import annotations

import csv
import fnmatch
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisherkit.arguments import is_integer
from fisherkit.cli.command import given as typed
from fisherkit.cli.command import require
from fisherkit.cli.options import LIKELIHOOD, Device, dtype_check, likelihood_check, option
from fisherkit.errors import DataError, InvalidArgumentError, listed
from fisherkit.likelihoods import Likelihood, resolve

IGNORE = -100
"""The label that a categorical likelihood leaves out."""

SEPARATORS = {".csv": ",", ".tsv": "\t"}

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model",
)  # fmt: skip

OF_FOLDERS = {
    name: f"--{name.replace('_', '-')}"
    for name in ("text_column", "pair_column", "label_column", "examples", "batch_size", "max_length", "dtype")
}
"""Options of how a folder's model and texts are read."""

LIKELIHOODS = {
    "regression": "gaussian",
    "multi_label_classification": "bernoulli",
    "single_label_classification": "categorical",
}
"""Of a sequence classifier's ``problem_type``."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What commands have in common that run a model on data."""

    text_column: str = option("text", "NAME", "Column of the text.")
    pair_column: str | None = option(None, "NAME", "Column of a second text.")
    label_column: str = option("label", "NAME", "Column of the label; causal models need none.")
    examples: int | None = option(None, "N", "Draw this many of the (training) texts.", "all", min=1)
    batch_size: int = option(32, "N", "Texts in a batch; no effect on the result.", min=1)
    max_length: int | None = option(None, "N", "Tokens that a text is cut to.", "the most that the model allows", min=1)
    params: list[str] | None = option(
        None, "PATTERN", 'Parameters by name, such as "classifier.*"; may be repeated.', "all that require grad"
    )
    likelihood: str | None = option(
        None, "NAME", LIKELIHOOD, "a folder's own loss; else categorical", parser=likelihood_check
    )
    device: Device = "cpu"
    dtype: str | None = option(
        None, "NAME", "Of a folder's weights: float32, float64, ...", "the file's", parser=dtype_check
    )
    seed: int = option(0, "N", "Seed of drawn texts and sampled labels.", min=0)

    def texts(self, spec: str, files: Mapping[str, Path | None], call: str) -> list[TextBatches] | None:
        """The batches of each file of texts, if the model is a folder; None if it is a user's function.

        ``files`` are by the option that names each; ``--examples`` is of the first.

        Raises:
            InvalidArgumentError: neither a folder nor a function; files that are missing, or beside a function.
        """
        given = {flag: file for flag, file in files.items() if file is not None}
        if not Path(spec).is_dir():
            if ":" not in spec:
                raise InvalidArgumentError(
                    call, repr(spec), 'a Hugging Face folder, or "package.module:function"',
                    why="there is no such folder",
                )  # fmt: skip
            if given or (beside := [flag for name, flag in OF_FOLDERS.items() if name in typed()]):
                raise InvalidArgumentError(
                    call, f"{' and '.join(given or beside)} with a function", "one of them",
                    why="the function returns its own data, and its model as it is",
                )  # fmt: skip
            return None
        require("hf", "transformers")
        if missing := [f"{flag} FILE" for flag in files if flag not in given]:
            raise InvalidArgumentError(
                call, f"{spec} without texts", " and ".join(missing), try_="a .jsonl with text and label"
            )
        folder = Folder.open(Path(spec), call)
        columns = [self.text_column, self.pair_column, None if folder.causal else self.label_column]
        texts = {flag: read_texts(file, columns, f"{call} {flag}") for flag, file in given.items()}
        first = next(iter(texts))
        if self.examples is not None and self.examples < len(texts[first]):
            order = torch.randperm(len(texts[first]), generator=torch.Generator().manual_seed(self.seed))
            texts[first] = [texts[first][i] for i in sorted(order[: self.examples].tolist())]
        model = folder.load(self.device, self.dtype)
        return [
            TextBatches(folder, model, found, self.batch_size, self.max_length, f"{call} {flag}")
            for flag, found in texts.items()
        ]

    def selection(self, model: nn.Module, call: str) -> list[str] | None:
        """The parameters whose names match one of the patterns; None without patterns."""
        names = [name for name, _ in model.named_parameters()]
        for pattern in self.params or ():
            if not fnmatch.filter(names, pattern):
                raise InvalidArgumentError(
                    call, f"--params {pattern!r}, which matches no parameter",
                    f"a pattern of names such as {names[-1]!r}", try_="quotes, so that the shell leaves * alone",
                )  # fmt: skip
        return [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in self.params)] if self.params else None


# -- a user's function -------------------------------------------------------------------------------------------------


def load_likelihood(text: str, call: str) -> Likelihood:
    """A likelihood by name, or a loss module or likelihood as the user's function returns it."""
    own = ":" in text and "(" not in text
    try:
        return resolve(call_factory(text, call) if own else text)
    except InvalidArgumentError as error:
        if own:
            raise
        raise InvalidArgumentError(
            f"{call} --likelihood", repr(text), error.expected,
            why="a name says nothing of weights and other settings" if "(" in text else "",
            try_='"package.module:function", a function that returns a loss module such as nn.CrossEntropyLoss(...)',
        ) from error  # fmt: skip


def call_factory(spec: str, call: str) -> Any:
    """What the user's function "package.module:function" returns; the current folder's modules are found too."""
    module, colon, name = spec.partition(":")
    if not (module and colon and name):
        raise InvalidArgumentError(call, repr(spec), '"package.module:function"', try_="mymodule:make")
    function = getattr(_module(module, call), name, None)
    if not callable(function):
        there = "no such name" if function is None else f"something of type {type(function).__name__} there"
        raise InvalidArgumentError(
            call, repr(spec), f"a function {name!r} in the module {module!r}", why=f"the module has {there}"
        )
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise InvalidArgumentError(
            call, f"{spec!r}, a function that needs arguments ({error})", "one that needs none",
            try_="a default for each of them",
        ) from error  # fmt: skip
    except ValueError:  # no signature to be read: let it be called
        pass
    return function()


def _module(name: str, call: str) -> Any:
    """A module by name, the current folder's own before others of that name."""
    folder = os.getcwd()
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is there and cannot import something else says so itself.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise InvalidArgumentError(
            call, repr(name), "a module that can be imported",
            why=f"there is no {error.name!r} in the current folder or among the installed packages",
            try_="run the command in the folder that holds it",
        ) from error  # fmt: skip


# -- texts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """One line of a file; the label is a string, a number or a list, as the file has it."""

    text: str
    pair: str | None
    label: Any
    place: str


def read_texts(path: Path, columns: Sequence[str | None], call: str) -> list[Text]:
    """The lines of a .jsonl, .csv or .tsv file, with the columns of the text, of a second text and of the label."""
    suffix = path.suffix.lower()
    if not path.is_file():
        raise InvalidArgumentError(call, f"no file at {path}", "a .jsonl, .csv or .tsv file", try_="check the path")
    if suffix not in {".jsonl", ".json", *SEPARATORS}:
        raise InvalidArgumentError(call, f"{path}", "a .jsonl, .csv or .tsv file", try_="another file, or rename it")
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(
            call, f"{path}, which is not UTF-8 ({error.reason} at byte {error.start:,})", "UTF-8",
            try_=f"iconv -f ENCODING -t utf-8 {path} > other{suffix}, with the encoding that it has",
        ) from error  # fmt: skip
    wanted, texts = [name for name in columns if name is not None], []
    for number, record in _table(path, wanted, call) if suffix in SEPARATORS else _objects(path, call):
        place = f"line {number} of {path.name}"
        absent = [repr(name) for name in wanted if record.get(name) is None]
        if absent:
            raise DataError(
                call, f"{place}, where {' and '.join(absent)} is null or not there", "a value in every line",
                why="a line without it is no example",
                try_="leave the line out; --text-column, --pair-column, --label-column for other columns",
            )  # fmt: skip
        text, pair, label = (None if name is None else record[name] for name in columns)
        if not isinstance(text, str) or not isinstance(pair, (str, type(None))):
            raise DataError(call, f"a text that is no string in {place}", "strings")
        if re.search(r"[\ud800-\udfff]", f"{text}{pair}"):
            raise DataError(
                call, f"half of a surrogate pair in {place}", "Unicode characters",
                why="no tokenizer takes what stands for no character", try_="leave it out",
            )  # fmt: skip
        texts.append(Text(text, pair, label, place))
    if not texts:
        raise DataError(call, f"{path}, which has no line", "a text a line")
    return texts


def _objects(path: Path, call: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of lines and their JSON objects."""
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            got = f"line {number} of {path.name}, which is not JSON ({error})"
            raise DataError(call, got, "an object a line") from error
        if not isinstance(found, dict):
            got = f"a {type(found).__name__} in line {number} of {path.name}"
            raise DataError(call, got, "an object a line")
        yield number, found


def _table(path: Path, wanted: list[str], call: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers of lines and their cells by the header's names, each of which is there once."""
    separator = SEPARATORS[path.suffix.lower()]
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=separator, strict=True)
        try:
            names = list(reader.fieldnames or [])
            if not names:
                raise DataError(call, f"{path}, which is empty", "a header and a text a line")
            if absent := [name for name in wanted if name not in names]:
                shown = listed((repr(name if len(name) <= 40 else f"{name[:39]}…") for name in names), 4)
                raise DataError(
                    call, f"{path}, whose first line is {shown}",
                    f"a header with the columns {wanted}, of which {absent} are missing",
                    why="the first line of a table names its columns; without a header it would be lost as a text",
                    try_=f"a first line with {separator.join(wanted)!r} if there is no header; else --text-column, "
                    "--pair-column, --label-column",
                )  # fmt: skip
            if twice := [name for name in wanted if names.count(name) > 1]:
                raise DataError(call, f"{path} with two columns {twice[0]!r}", "one of each name")
            for record in reader:
                if beyond := record.pop(None, None):  # where csv's reader puts them
                    place = f"line {reader.line_num} of {path.name}"
                    raise DataError(
                        call, f"{place} with {len(beyond)} more cells than the header", "as many",
                        why="the separator parts cells unless the cell is in quotes",
                        try_='"…" around texts that have one',
                    )  # fmt: skip
                yield reader.line_num, record
        except csv.Error as error:
            raise DataError(
                call, f"line {reader.reader.line_num} of {path.name}, which cannot be read ({error})",
                "cells in quotes where they hold a separator, a quote or a line break",
                why="a quote that is not closed takes the lines below it into its cell",
                try_='""" for a quote that begins a cell; .jsonl, whose texts may be as long as you like',
            ) from error  # fmt: skip


# -- a Hugging Face folder ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """A folder that ``save_pretrained`` wrote."""

    path: Path
    config: Any
    tokenizer: Any
    causal: bool

    @classmethod
    def open(cls, path: Path, call: str) -> Folder:
        """Read config and tokenizer, and no weights."""
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        if (path / "adapter_config.json").exists():
            raise InvalidArgumentError(
                call, f"{path}, an adapter without its model", "the folder of a whole model",
                try_="peft: AutoPeftModelForSequenceClassification.from_pretrained(folder).merge_and_unload()"
                ".save_pretrained(other), or a module:function that returns the model with its adapter",
            )  # fmt: skip
        # Where there is no tokenizer, transformers would make one that knows no word.
        if not any((path / name).exists() for name in TOKENIZER_FILES):
            raise InvalidArgumentError(
                call, f"{path}, which has no tokenizer", f"one of {', '.join(TOKENIZER_FILES)}",
                try_="tokenizer.save_pretrained(folder), or a module:function",
            )  # fmt: skip
        try:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(
                call, f"{path}, from which transformers cannot load config and tokenizer",
                "a folder that model.save_pretrained and tokenizer.save_pretrained wrote", why=str(error),
                try_="tokenizer.save_pretrained(folder), or a module:function",
            ) from error  # fmt: skip
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise InvalidArgumentError(
                    call, f"{path}, whose tokenizer has no padding token", "one",
                    try_="tokenizer.pad_token = ...; tokenizer.save_pretrained(folder)",
                )  # fmt: skip
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
        tokenizer.padding_side = "right"
        names = config.architectures or []
        causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
        if not causal and not any(name.endswith("ForSequenceClassification") for name in names):
            raise InvalidArgumentError(
                call, f"{path}, a model of {names or 'no architecture'}", "…ForSequenceClassification or …ForCausalLM",
                try_="a module:function that returns (model, data)",
            )  # fmt: skip
        return cls(path, config, tokenizer, causal)

    @property
    def likelihood(self) -> str:
        """That of the model's own loss, as transformers choose it where the config is silent."""
        silent = "regression" if self.config.num_labels == 1 else "single_label_classification"
        return "categorical" if self.causal else LIKELIHOODS[self.config.problem_type or silent]

    def load(self, device: str, dtype: str | None) -> nn.Module:
        """The model in eval mode; its dtype is the file's by default."""
        import transformers

        loader = transformers.AutoModelForCausalLM if self.causal else transformers.AutoModelForSequenceClassification
        model: Any = loader.from_pretrained(self.path, local_files_only=True, dtype=dtype or "auto")
        if not self.causal and model.config.pad_token_id is None:
            # Decoders classify at the last token that is not padding.
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.to(device).eval()


class TextBatches:
    """Batches of tokenized texts, made anew in every pass.

    Attributes:
        cut: how many texts were longer than that and have been cut, after a first pass.
    """

    def __init__(
        self, folder: Folder, model: nn.Module, texts: list[Text], size: int, max_length: int | None, call: str
    ) -> None:
        self.folder, self.model, self.texts, self.size, self.call = folder, model, texts, size, call
        config = folder.config
        # Tables of positions with a padding row begin behind it, as RoBERTa's.
        tables: Any = (m for n, m in model.named_modules() if n.endswith("position_embeddings"))
        padded = [table for table in tables if getattr(table, "padding_idx", None) is not None]
        rows = [table.num_embeddings - table.padding_idx - 1 for table in padded]
        most = min(folder.tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 512, *rows)
        self.max_length, self.cut = min(max_length or most, most), 0
        self._labels = [] if folder.causal else [self._label(text) for text in texts]

    def __len__(self) -> int:
        return -(-len(self.texts) // self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.cut = 0
        yield from (self._batch(slice(start, start + self.size)) for start in range(0, len(self.texts), self.size))

    def _batch(self, place: slice) -> dict[str, Tensor]:
        texts = self.texts[place]
        pairs = [text.pair for text in texts if text.pair is not None]
        encoded = self.folder.tokenizer(
            [text.text for text in texts], pairs or None, padding=True, truncation=True, max_length=self.max_length,
            return_tensors="pt",
        )  # fmt: skip
        lengths = encoded["attention_mask"].sum(1)
        if not lengths.all():
            raise DataError(
                self.call, f"a text without a token in {texts[int(lengths.argmin())].place}", "at least one",
                why="what a model says of padding alone depends on the batch", try_="leave the line out",
            )  # fmt: skip
        self.cut += int((lengths >= self.max_length).sum())
        labels = (
            encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORE)
            if self.folder.causal
            else torch.stack(self._labels[place])
        )
        return {**encoded, "labels": labels}

    def _label(self, text: Text) -> Tensor:
        """A text's label as the model's loss takes it."""
        config, label, likelihood = self.folder.config, text.label, self.folder.likelihood
        names, count = config.label2id, config.num_labels
        expected = f"{count} number(s), as the model's {likelihood} loss takes them"
        if likelihood == "categorical":
            expected = f"a class from 0 to {count - 1}, or a name of the model's config: {list(names)[:12]}"
        try:
            if likelihood == "categorical" and isinstance(label, str) and label in names:
                return torch.tensor(int(names[label]))
            if isinstance(label, str):  # a csv file holds a number or a list of numbers as text
                label = int(label) if label.strip().isdecimal() else json.loads(label)
            if likelihood != "categorical":
                return torch.tensor(label, dtype=next(self.model.parameters()).dtype).reshape(count)
            if not is_integer(label):
                raise TypeError("no class")
            return torch.tensor(range(count).index(label))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DataError(
                self.call, f"label {f'{text.label!r}':.80} in {text.place}", expected,
                try_="--label-column for another column",
            ) from error  # fmt: skip
