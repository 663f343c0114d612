"""The model, the training data and the queries: of a Hugging Face folder, or of a user's function.

Owns what each needs and what it brings to be shown. Knows no Fisher and no score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from fisherkit.cli.factories import call_factory
from fisherkit.cli.scores.describe import Show
from fisherkit.cli.texts import Columns, Text, read_texts
from fisherkit.data import Data, Source
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.rows.record import refuse_train_mode


@dataclass(frozen=True)
class TextOptions:
    """How files of texts are read.

    Args:
        train: the training texts.
        queries: the queries.
        columns: of both.
        examples: training texts to draw; None for all.
        batch_size: texts a batch.
        max_length: tokens a text is cut to.
        dtype: of the folder's weights.
    """

    train: Path | None
    queries: Path | None
    columns: Columns
    examples: int | None
    batch_size: int
    max_length: int | None
    dtype: str | None


@dataclass(frozen=True)
class Subject:
    """What is asked about.

    Args:
        name: of the model.
        model: in eval mode.
        train: training data.
        queries: data.
        likelihood: of the model's own loss.
        classes: names of the outputs, by number.
        show: an example as text or picture; None to show inputs that are images.
        places: for "train" and "queries", where each example stands; "train 3" where there is no entry.
    """

    name: str
    model: nn.Module
    train: Data
    queries: Data
    likelihood: str
    classes: Mapping[int, str]
    show: Show | None
    places: Mapping[str, list[str]]

    def place(self, split: str, index: int) -> str:
        """Where an example stands, in words."""
        known = self.places.get(split)
        return f"{'train' if split == 'train' else 'query'} {index}" if known is None else known[index]


def of_folder(folder: Path, options: TextOptions, *, device: str, seed: int, call: str) -> Subject:
    """A Hugging Face folder with files of texts.

    Args:
        folder: of a sequence classifier or a causal language model.
        options: of the texts.
        device: where the model goes.
        seed: of drawn texts.
        call: the command, for errors.

    Raises:
        InvalidArgumentError: a file is missing, or the folder cannot be used.
        DataError: a line or a label that cannot be used.
    """
    from fisherkit.cli.hugging_face import Folder, TextBatches

    missing = [
        name for name, path in (("--train FILE", options.train), ("--queries FILE", options.queries)) if path is None
    ]
    if options.train is None or options.queries is None:
        raise InvalidArgumentError(
            call=call, got=f"{folder} without texts", expected=" and ".join(missing),
            try_="a .jsonl with text and label for each",
        )  # fmt: skip
    found = Folder.open(folder, call)
    columns = replace(options.columns, label=None) if found.causal else options.columns
    texts: dict[str, list[Text]] = {
        "train": read_texts(options.train, columns, f"{call} --train", examples=options.examples, seed=seed),
        "queries": read_texts(options.queries, columns, f"{call} --queries"),
    }
    own = found.load(device=device, dtype=options.dtype, max_length=options.max_length)
    train, queries = (TextBatches(own, texts[split], options.batch_size, call) for split in texts)

    def show(split: str, index: int) -> str:
        text = texts[split][index]
        return text.text if text.pair is None else f"{text.text}\n{text.pair}"

    names = {} if found.causal else {int(k): v for k, v in own.config.id2label.items()}
    places = {split: [text.place for text in texts[split]] for split in texts}
    return Subject(str(folder), own.model, train, queries, own.likelihood, names, show, places)


def of_function(spec: str, options: TextOptions, *, device: str, call: str) -> Subject:
    """What a user's function returns: (model, train, queries) or (model, train, queries, show).

    Args:
        spec: "package.module:function".
        options: of texts, which a function has none of.
        device: where the model goes.
        call: the command, for errors.

    Raises:
        InvalidArgumentError: neither a folder nor a function, or files beside a function.
        InvalidTypeError: the function returned something else.
        ModelError: dropout or batch norm in train mode.
        DataError: a loader that shuffles.
    """
    if ":" not in spec:
        raise InvalidArgumentError(
            call=call, got=repr(spec), expected='a Hugging Face folder, or "package.module:function"',
            why="there is no such folder",
        )  # fmt: skip
    _refuse_files(options, "a function", "the function returns its own data", call)
    made = call_factory(spec, call)
    fits = isinstance(made, (tuple, list)) and len(made) in (3, 4) and isinstance(made[0], nn.Module)
    if not fits or (len(made) == 4 and not (made[3] is None or callable(made[3]))):
        size = f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
        raise InvalidTypeError(
            call=call, got=f"a {type(made).__name__}{size} from {spec}()",
            expected="(model, train, queries) or (model, train, queries, show)",
            try_='show = lambda split, index: ..., a text or a picture for split "train" or "queries"',
        )  # fmt: skip
    model, train, queries, show = (*made, None)[:4]
    refuse_train_mode(model)  # a first look at its losses would move running statistics
    for name, data in (("train", train), ("queries", queries)):
        Source(data, model).refuse_shuffling(call, name)
    return Subject(spec, model.to(device), train, queries, "categorical", {}, show, {})


def _refuse_files(options: TextOptions, beside: str, why: str, call: str) -> None:
    given = [name for name, path in (("--train", options.train), ("--queries", options.queries)) if path is not None]
    if given:
        raise InvalidArgumentError(call=call, got=f"{' and '.join(given)} with {beside}", expected="neither", why=why)
