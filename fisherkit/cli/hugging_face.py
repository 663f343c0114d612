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

from fisherkit.cli.texts import Text
from fisherkit.errors import DataError, InvalidArgumentError

IGNORE = -100
"""The label that a categorical likelihood leaves out."""

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
        tokenizer: the folder's.
        likelihood: of the model's own loss.
        causal: a causal language model, whose labels are its inputs.
        max_length: tokens a text is cut to.
    """

    model: nn.Module
    tokenizer: Any
    likelihood: str
    causal: bool
    max_length: int


def load(folder: Path, call: str, *, device: str, dtype: str | None, max_length: int | None) -> Pretrained:
    """The model of a folder that ``save_pretrained`` wrote, the tokenizer beside it.

    Args:
        folder: with config.json, weights and tokenizer.
        call: the command, for errors.
        device: where the model goes.
        dtype: of its weights; None for that of the file.
        max_length: tokens a text is cut to; None for the most that tokenizer and model allow.

    Raises:
        InvalidArgumentError: no config, no tokenizer, an adapter alone, or a model for another purpose.
    """
    import transformers

    if (folder / "adapter_config.json").exists():
        raise InvalidArgumentError(
            call=call, got=f"{folder}, an adapter without its model", expected="the folder of a whole model",
            try_="peft: AutoPeftModelForSequenceClassification.from_pretrained(folder).merge_and_unload()"
            ".save_pretrained(other), or a module:function that returns the model with its adapter",
        )  # fmt: skip
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            call=call, got=f"{folder}, from which transformers cannot load config and tokenizer",
            expected="a folder that model.save_pretrained and tokenizer.save_pretrained wrote", why=str(error),
            try_="tokenizer.save_pretrained(folder), or a module:function",
        ) from error  # fmt: skip
    causal = _is_causal(config, folder, call)
    loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    model = loader.from_pretrained(folder, local_files_only=True, dtype=dtype or "auto").to(device).eval()
    likelihood = "categorical" if causal else LIKELIHOODS[_problem(config)]
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InvalidArgumentError(
                call=call, got=f"{folder}, whose tokenizer has no padding token", expected="one",
                try_="tokenizer.pad_token = ...; tokenizer.save_pretrained(folder)",
            )  # fmt: skip
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    if not causal and config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # decoders classify at the last token that is not padding
    tokenizer.padding_side = "right"
    most = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or 512)
    return Pretrained(model, tokenizer, likelihood, causal, min(max_length or most, most))


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
        config, dtype = self.pretrained.model.config, next(self.pretrained.model.parameters()).dtype
        readers: dict[str, Callable[[], Tensor]] = {
            "categorical": lambda: torch.tensor(self._class(text, config.label2id, config.num_labels)),
            "gaussian": lambda: torch.tensor(_numbers(text.label), dtype=dtype).reshape(config.num_labels),
            "bernoulli": lambda: torch.tensor(_numbers(text.label), dtype=dtype).reshape(config.num_labels),
        }
        try:
            return readers[self.pretrained.likelihood]()
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
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
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
