"""What ``fisherkit scores`` found, and how it is told: as JSON, as text for the terminal, and as one HTML page.

The page needs nothing beside it and has no script: pictures are in it, as PNG files. `scores.html` is its template, in
which every text is escaped.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from textwrap import fill
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor

from fisherkit.cli.text import WIDTH, pairs, table
from fisherkit.errors import InvalidArgumentError
from fisherkit.influence import Compression
from fisherkit.words import duration

WIDEST = 60
"""Characters of a text that a row of the table shows."""


@dataclass(frozen=True)
class Example:
    """One training example or query, as a person sees it: None for what there is none of; the picture is a data URI."""

    index: int
    place: str
    label: str | None
    prediction: str | None
    probability: float | None
    loss: float
    text: str | None
    picture: str | None
    score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Its entries in the JSON, which has no pictures."""
        entries = {name: value for name, value in vars(self).items() if name not in ("picture", "score")}
        return entries if self.score is None else {"score": self.score, **entries}

    @property
    def is_wrong(self) -> bool:
        """Whether the model predicts something else than the label."""
        return self.probability is not None and self.label != self.prediction

    @property
    def predicted(self) -> str:
        """The prediction with its probability."""
        sure = "" if self.probability is None else f" ({self.probability:.2f})"
        return f"{self.prediction or ''}{sure}"

    @property
    def described(self) -> str:
        """Label, prediction and loss, as far as there are any."""
        parts = [] if self.label is None else [f"label {self.label}"]
        parts += [] if self.prediction is None else [f"predicted {self.predicted}"]
        return ", ".join([*parts, f"loss {self.loss:.3g}"])


@dataclass(frozen=True)
class Query:
    """A query with the largest scores above 0 and the least below 0, the largest in size first."""

    example: Example
    helpful: tuple[Example, ...]
    harmful: tuple[Example, ...]

    def to_dict(self) -> dict[str, Any]:
        """Its entries in the JSON."""
        sides = {"helpful": self.helpful, "harmful": self.harmful}
        return self.example.to_dict() | {side: [one.to_dict() for one in some] for side, some in sides.items()}

    @property
    def largest(self) -> float:
        """The largest size of any of its scores; 1 where all are 0, so that bars can be relative to it."""
        return max((abs(one.score or 0.0) for one in (*self.helpful, *self.harmful)), default=0.0) or 1.0

    @property
    def title(self) -> str:
        """Its place and, short, label and prediction."""
        e = self.example
        return e.place if e.label is None else f"{e.place}: {_cut(e.label, 24)} → {_cut(e.prediction or '', 24)}"


@dataclass(frozen=True)
class Report:
    """What the command found; ``computed`` has the names of the JSON, ``notes`` are for the reader."""

    computed: SimpleNamespace
    queries: tuple[Query, ...]
    self_influence: tuple[Example, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """The report as JSON, without pictures."""
        found = {
            "computed": vars(self.computed),
            "notes": self.notes,
            "queries": [query.to_dict() for query in self.queries],
            "self_influence": [one.to_dict() for one in self.self_influence],
        }
        return json.dumps(found, indent=1, ensure_ascii=False)

    def to_page(self) -> str:
        """The report as a whole HTML document."""
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.policies["truncate.leeway"] = 0
        template = environment.from_string(files("fisherkit.cli").joinpath("scores.html").read_text("utf-8"))
        return template.render(vars(self), facts=self.facts, unit=self.unit)

    def to_text(self) -> str:
        """The report for the terminal, with a table for each query."""
        parts = [pairs(self.facts.items()), *(fill(text, WIDTH) for text in (self.unit, *self.notes))]
        for query in self.queries:
            title = f"{query.example.place}: {query.example.described}"
            if query.example.text is not None:
                title += f"\n{_line(query.example.text)}"
            rows = [_row("helpful", one) for one in query.helpful] + [_row("harmful", one) for one in query.harmful]
            measured = self.computed.measurement
            parts.append(f"{title}\n\n" + (_table(rows) if rows else f"No training example moves its {measured}."))
        if self.self_influence:
            title = (
                "Training examples whose own loss depends most on themselves. Wrong labels are often among them; so "
                "are rare and hard examples."
            )
            parts.append(f"{fill(title, WIDTH)}\n\n" + _table([_row("", one) for one in self.self_influence]))
        # Texts come from anywhere: nothing in them may steer the terminal.
        return "".join(c if c.isprintable() or c == "\n" else "�" for c in "\n\n".join(parts))

    @property
    def facts(self) -> dict[str, str]:
        """What was computed, in words."""
        c = self.computed
        relative = "" if c.relative_damping is None else f", {c.relative_damping:g} × the mean eigenvalue"
        built = f"the file {c.fisher_file}" if c.fisher_seconds is None else f"built in {duration(c.fisher_seconds)}"
        rows = {} if c.compression is None else {"Rows": str(Compression(**c.compression))}
        score_time = duration(c.score_seconds)
        normalized = "" if c.normalize is None else f", normalized by {c.normalize}"
        return {
            "Model": f"{c.model}, D = {c.parameters:,} parameters",
            "Data": f"{c.train:,} training examples, {c.queries:,} queries",
            "Fisher": f"{c.kind}, {c.structure}, N = {c.examples:,}, {built}",
            "Damping": f"λ = {c.damping:.3g}{relative}",
            "Scores": f"{c.measurement} of each query{normalized}, likelihood {c.likelihood}, {score_time}",
            **rows,
            "Versions": ", ".join(f"{name} {version}" for name, version in c.versions.items()),
        }

    @property
    def unit(self) -> str:
        """What a score says, in a sentence."""
        moves = {
            "loss": "the query's loss (in nats) would rise",
            "margin": "the query's margin, the log odds of its label, would fall",
        }[self.computed.measurement]
        text = (
            f"A score is how much, to first order, {moves} if the training example were left out and the model trained "
            "on: above 0 the example helps the query, below 0 it harms."
        )
        if self.computed.normalize is not None:
            text += " Each is divided by the example's own size in the metric of the Fisher (RelatIF)."
        return text


def _row(side: str, one: Example) -> tuple[str, ...]:
    score = f"{one.score:+.3g}"
    return side, one.place, one.label or "", one.predicted, _line(one.text or ""), score, f"{one.loss:.3g}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """A table of examples, without the columns that no row fills."""
    header = ("", "training example", "label", "predicted", "text", "score", "loss")
    filled = [i for i in range(len(header)) if any(row[i] for row in rows)]
    left = sum(i < header.index("score") for i in filled)
    return table([header[i] for i in filled], [[row[i] for i in filled] for row in rows], left=left)


def _line(text: str) -> str:
    return _cut(" ".join(text.split()), WIDEST)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


# -- pictures as PNG files in the page ---------------------------------------------------------------------------------


LARGEST = 320
"""Pixels of the longer side; larger pictures are averaged down."""

COLOR_TYPES = {1: 0, 3: 2, 4: 6}
"""Channels to PNG's numbers for grey, RGB and RGB with alpha."""


def is_image(shape: torch.Size) -> bool:
    """Whether an example of this shape is taken for a picture without being asked: ``[1 or 3, H, W]``."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1


def data_uri(image: Any, call: str) -> str:
    """A picture as a URI that holds all of it.

    It is a tensor, or what numpy makes an array of: ``[H, W]``, ``[C, H, W]`` or ``[H, W, C]`` with C = 1, 3 or 4.
    Bytes are 0 to 255, booleans black and white. Other numbers are 0 to 1; where some lie outside, the least becomes
    black and the largest white.

    Raises:
        InvalidArgumentError: no such shape.
    """
    found = image.detach().cpu() if isinstance(image, Tensor) else torch.as_tensor(np.array(image))
    values = found
    if values.ndim == 2:
        values = values.unsqueeze(-1)
    elif values.ndim == 3 and values.shape[0] in COLOR_TYPES:
        values = values.movedim(0, -1)
    if values.ndim != 3 or values.shape[-1] not in COLOR_TYPES or 0 in values.shape or values.is_complex():
        raise InvalidArgumentError(
            call, f"a picture of shape {list(found.shape)} and {found.dtype}",
            "real numbers [H, W], [C, H, W] or [H, W, C] with C = 1, 3 or 4",
        )  # fmt: skip
    return "data:image/png;base64," + base64.b64encode(_png(_bytes(values))).decode()


def _bytes(image: Tensor) -> Tensor:
    if image.dtype == torch.uint8:
        values = image.double() / 255
    else:
        values = image.double().nan_to_num(0.0, 0.0, 0.0)
        low, high = values.min(), values.max()
        if low < 0 or high > 1:
            values = (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
    longest = max(values.shape[:2])
    if longest > LARGEST:
        height, width = (max(1, round(side * LARGEST / longest)) for side in values.shape[:2])
        values = torch.nn.functional.adaptive_avg_pool2d(values.movedim(-1, 0), (height, width)).movedim(0, -1)
    return (values * 255).round().clamp(0, 255).to(torch.uint8).contiguous()


def _png(image: Tensor) -> bytes:
    """The file: signature, header, the filtered rows in one compressed chunk, end (W3C, Portable Network Graphics)."""
    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, COLOR_TYPES[channels], 0, 0, 0)
    # Each row begins with the number of its filter: 0, none.
    rows = np.zeros((height, 1 + width * channels), dtype=np.uint8)
    rows[:, 1:] = image.reshape(height, -1).numpy()
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + _chunk(b"IEND", b"")
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
