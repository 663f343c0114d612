"""What ``fisherkit scores`` found: examples, their neighbours by score, what was computed. Knows no output format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """One training example or query, as a person sees it.

    Args:
        index: its place in the data, from 0.
        place: where it stands, in words.
        label: the observed one; None where labels are not one an example (language models).
        prediction: the model's; None likewise.
        probability: of the prediction; None where there is no single one.
        loss: −log p(y | z), summed over positions.
        text: the text, or the words under the picture; None if there is none.
        picture: as a data URI; None if there is none.
    """

    index: int
    place: str
    label: str | None
    prediction: str | None
    probability: float | None
    loss: float
    text: str | None
    picture: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, without the picture."""
        return {
            "index": self.index, "place": self.place, "label": self.label, "prediction": self.prediction,
            "probability": self.probability, "loss": self.loss, "text": self.text,
        }  # fmt: skip


@dataclass(frozen=True)
class Scored:
    """A training example with a score."""

    score: float
    example: Example

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"score": self.score, **self.example.to_dict()}


@dataclass(frozen=True)
class Query:
    """A query and the training examples that it hangs on.

    Args:
        example: the query.
        helpful: the largest scores above 0, in descending order.
        harmful: the least scores below 0, in ascending order.
    """

    example: Example
    helpful: tuple[Scored, ...]
    harmful: tuple[Scored, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            **self.example.to_dict(),
            "helpful": [scored.to_dict() for scored in self.helpful],
            "harmful": [scored.to_dict() for scored in self.harmful],
        }


@dataclass(frozen=True)
class Computed:
    """What was computed, and of what.

    Args:
        model: as it was named.
        kind: of the Fisher, with its setting.
        structure: of the Fisher.
        likelihood: of the loss.
        measurement: "loss" or "margin".
        normalize: None or "relatif".
        relative_damping: λ as a multiple of the mean eigenvalue; None if λ was given itself.
        damping: λ.
        examples: N, on which the Fisher was measured.
        parameters: D.
        train: training examples that were scored.
        queries: queries there are; as many or fewer are shown.
        fisher_seconds: that the Fisher took; None if it came from a file.
        score_seconds: that the scores took.
        fisher_file: where the Fisher came from.
        versions: of fisherkit, torch and Python.
    """

    model: str
    kind: str
    structure: str
    likelihood: str
    measurement: str
    normalize: str | None
    relative_damping: float | None
    damping: float
    examples: int
    parameters: int
    train: int
    queries: int
    fisher_seconds: float | None
    score_seconds: float
    fisher_file: str | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Result:
    """All of it.

    Args:
        computed: what was computed.
        queries: in the order in which they are shown.
        self_influence: the training examples with the largest, in descending order.
        notes: what a reader should know about these numbers beside their meaning.
    """

    computed: Computed
    queries: tuple[Query, ...]
    self_influence: tuple[Scored, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "computed": vars(self.computed),
            "notes": list(self.notes),
            "queries": [query.to_dict() for query in self.queries],
            "self_influence": [scored.to_dict() for scored in self.self_influence],
        }


def unit(computed: Computed) -> str:
    """What a score says, in a sentence."""
    sides = {
        "loss": "the query's loss (in nats) would rise",
        "margin": "the query's margin, the log odds of its label, would fall",
    }
    text = (
        f"A score is how much, to first order, {sides[computed.measurement]} if the training example were left out and "
        "the model trained on: above 0 the example helps the query, below 0 it harms."
    )
    if computed.normalize is not None:
        text += " Each is divided by the example's own size in the metric of the Fisher (RelatIF)."
    return text
