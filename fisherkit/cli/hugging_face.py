"""A Hugging Face folder and a file of texts as the model and the data of a Fisher.

Owns which model class a folder asks for, how its tokenizer makes batches, and which likelihood its loss belongs to.
Knows nothing of Fisher matrices. Nothing is downloaded: a folder is all there is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisherkit.arguments import is_integer
from fisherkit.cli.texts import Text
from fisherkit.errors import DataError, InvalidArgumentError

IGNORE = -100
"""The label that a categorical likelihood leaves out."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)

LIKELIHOODS = {
    "regression": "gaussian",
    "multi_label_classification": "bernoulli",
    "single_label_classification": "categorical",
}
"""Of a sequence classifier's ``problem_type``."""


@dataclass(frozen=True)
class Pretrained:
    """A model with its tokenizer.

    Args:
        model: in eval mode.
        config: its own.
        tokenizer: the folder's.
        likelihood: of the model's own loss.
        causal: a causal language model, whose labels are its inputs.
        max_length: tokens a text is cut to.
    """

    model: nn.Module
    config: Any
    tokenizer: Any
    likelihood: str
    causal: bool
    max_length: int


@dataclass(frozen=True)
class Folder:
    """A folder that ``save_pretrained`` wrote, before its weights are read.

    Args:
        path: with config.json, weights and tokenizer.
        config: of the model.
        tokenizer: beside it.
        causal: a causal language model; else a sequence classifier.
    """

    path: Path
    config: Any
    tokenizer: Any
    causal: bool

    @classmethod
    def open(cls, path: Path, call: str) -> Folder:
        """Read config and tokenizer.

        Args:
            path: the folder.
            call: the command, for errors.

        Raises:
            InvalidArgumentError: no config, no tokenizer, an adapter alone, or a model for another purpose.
        """
        import transformers

        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        if (path / "adapter_config.json").exists():
            raise InvalidArgumentError(
                call=call, got=f"{path}, an adapter without its model", expected="the folder of a whole model",
                try_="peft: AutoPeftModelForSequenceClassification.from_pretrained(folder).merge_and_unload()"
                ".save_pretrained(other), or a module:function that returns the model with its adapter",
            )  # fmt: skip
        # Where there is no tokenizer, transformers would make one that knows no word.
        if not any((path / name).exists() for name in TOKENIZER_FILES):
            raise InvalidArgumentError(
                call=call, got=f"{path}, which has no tokenizer", expected=f"one of {', '.join(TOKENIZER_FILES)}",
                try_="tokenizer.save_pretrained(folder), or a module:function",
            )  # fmt: skip
        try:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(
                call=call, got=f"{path}, from which transformers cannot load config and tokenizer",
                expected="a folder that model.save_pretrained and tokenizer.save_pretrained wrote", why=str(error),
                try_="tokenizer.save_pretrained(folder), or a module:function",
            ) from error  # fmt: skip
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise InvalidArgumentError(
                    call=call, got=f"{path}, whose tokenizer has no padding token", expected="one",
                    try_="tokenizer.pad_token = ...; tokenizer.save_pretrained(folder)",
                )  # fmt: skip
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
        tokenizer.padding_side = "right"
        return cls(path, config, tokenizer, _is_causal(config, path, call))

    def load(self, *, device: str, dtype: str | None, max_length: int | None) -> Pretrained:
        """Read the weights.

        Args:
            device: where the model goes.
            dtype: of its weights; None for that of the file.
            max_length: tokens a text is cut to; None for the most that tokenizer and model allow.
        """
        import transformers

        loader = transformers.AutoModelForCausalLM if self.causal else transformers.AutoModelForSequenceClassification
        model: Any = loader.from_pretrained(self.path, local_files_only=True, dtype=dtype or "auto")
        model = model.to(device).eval()
        if not self.causal and model.config.pad_token_id is None:
            # Decoders classify at the last token that is not padding.
            model.config.pad_token_id = self.tokenizer.pad_token_id
        likelihood = "categorical" if self.causal else LIKELIHOODS[_problem(self.config)]
        most = min(self.tokenizer.model_max_length, getattr(self.config, "max_position_embeddings", None) or 512)
        return Pretrained(model, model.config, self.tokenizer, likelihood, self.causal, min(max_length or most, most))


@dataclass
class TextBatches:
    """Batches of tokenized texts, made anew in every pass.

    Args:
        pretrained: the model whose inputs they are.
        texts: with labels, unless the model is causal.
        size: texts a batch.
        call: the command, for errors.

    Attributes:
        cut: how many texts were longer than the model allows and have been cut, after a first pass.
    """

    pretrained: Pretrained
    texts: Sequence[Text]
    size: int
    call: str
    cut: int = 0

    def __post_init__(self) -> None:
        """Read every label before the work begins."""
        self._labels = [] if self.pretrained.causal else [self._label(text) for text in self.texts]

    def __len__(self) -> int:
        return -(-len(self.texts) // self.size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.cut = 0
        for start in range(0, len(self.texts), self.size):
            yield self._batch(slice(start, start + self.size))

    def _batch(self, place: slice) -> dict[str, Tensor]:
        texts, own = self.texts[place], self.pretrained
        pairs = [text.pair for text in texts if text.pair is not None]
        encoded = own.tokenizer(
            [text.text for text in texts], pairs or None, padding=True, truncation=True, max_length=own.max_length,
            return_tensors="pt",
        )  # fmt: skip
        lengths = encoded["attention_mask"].sum(1)
        self.cut += int((lengths >= own.max_length).sum())
        batch = dict(encoded)
        if own.causal:
            batch["labels"] = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, IGNORE)
        else:
            batch["labels"] = torch.stack(self._labels[place])
        return batch

    def _label(self, text: Text) -> Tensor:
        """A text's label as the model's loss takes it."""
        config, dtype = self.pretrained.config, next(self.pretrained.model.parameters()).dtype
        readers: dict[str, Callable[[], Tensor]] = {
            "categorical": lambda: torch.tensor(self._class(text, config.label2id, config.num_labels)),
            "gaussian": lambda: torch.tensor(_numbers(text.label), dtype=dtype).reshape(config.num_labels),
            "bernoulli": lambda: torch.tensor(_numbers(text.label), dtype=dtype).reshape(config.num_labels),
        }
        try:
            return readers[self.pretrained.likelihood]()
        except DataError:  # says what is wrong by itself
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                call=self.call, got=f"label {text.label!r} in {text.place}",
                expected=f"{config.num_labels} number(s), as the model's {self.pretrained.likelihood} loss takes them",
            ) from error  # fmt: skip

    def _class(self, text: Text, names: dict[str, int], count: int) -> int:
        """The class's number, for its number or its name."""
        label = text.label
        if isinstance(label, str) and label in names:
            return int(names[label])
        number = int(label) if isinstance(label, str) and label.strip().isdecimal() else label
        if not is_integer(number) or not 0 <= number < count:
            known = list(names)[:12]
            raise DataError(
                call=self.call, got=f"label {label!r} in {text.place}",
                expected=f"a class from 0 to {count - 1}, or a name of the model's config: {known}",
                try_="--label-column for another column",
            )  # fmt: skip
        return number


def _numbers(label: Any) -> Any:
    """A number or a list of numbers, which a csv file holds as text."""
    return json.loads(label) if isinstance(label, str) else label


def _is_causal(config: Any, folder: Path, call: str) -> bool:
    """Whether the folder holds a causal language model, by the class that saved it."""
    names = config.architectures or []
    if any(name.endswith("ForSequenceClassification") for name in names):
        return False
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return True
    raise InvalidArgumentError(
        call=call, got=f"{folder}, a model of {names or 'no architecture'}",
        expected="…ForSequenceClassification or …ForCausalLM", try_="a module:function that returns (model, data)",
    )  # fmt: skip


def _problem(config: Any) -> str:
    """The sequence classifier's loss; as transformers choose it where the config is silent."""
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
