"""What ``fisherkit scores`` found, and how it is shown as one HTML page that needs nothing beside it.

No script, no font, no file, nothing from the network: pictures are PNG in the page itself. Owns the markup and its
style; every text that comes from data or options is escaped.
"""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherkit.errors import InvalidArgumentError

LARGEST = 320
"""Pixels of the longer side; larger pictures are averaged down."""

_CHANNELS = (1, 3, 4)
_COLOR_TYPES = {1: 0, 3: 2, 4: 6}
"""PNG's numbers for grey, RGB and RGB with alpha."""

LONGEST = 800
"""Characters of a text that the page shows; the JSON has all."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1e; --soft: #5b6167; --line: #d9dde1; --back: #fff; --card: #f6f7f9;
  --helpful: #0072b2; --harmful: #c24a00; --wrong: #b00020; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a0a7ae; --line: #3a4046; --back: #15181b;
  --card: #1e2226; --helpful: #56b4e9; --harmful: #f0915a; --wrong: #ff8a8a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 0 0 .5rem; }
.soft { color: var(--soft); }
.small { font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .75rem 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; }
nav a { display: flex; align-items: center; gap: .4rem; padding: .2rem .6rem; border: 1px solid var(--line);
  border-radius: 1rem; color: inherit; text-decoration: none; font-size: .85rem; }
nav img { width: 1.5rem; height: 1.5rem; object-fit: contain; image-rendering: pixelated; }
section { margin-top: 2rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
.query { display: flex; gap: 1rem; align-items: flex-start; margin-bottom: 1rem; }
.query img { width: 7rem; }
img { display: block; height: auto; image-rendering: pixelated; border-radius: 4px; border: 1px solid var(--line); }
.columns { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.columns > div { flex: 1 1 20rem; min-width: 0; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: .5rem; align-content: start; }
.own ol { display: flex; flex-wrap: wrap; }
.own li { flex: 1 1 22rem; }
li { display: flex; gap: .75rem; background: var(--card); border-radius: 6px; padding: .6rem; }
li img { width: 3.5rem; flex: none; align-self: flex-start; }
li > div { flex: 1; min-width: 0; }
.text { margin: .25rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.score { display: flex; align-items: center; gap: .5rem; font-variant-numeric: tabular-nums; font-weight: 600; }
.score > span { min-width: 3.6rem; }
.track { flex: 1; height: .5rem; border-radius: .25rem; background: var(--line); overflow: hidden; }
.track span { display: block; height: 100%; }
.helpful .track span { background: var(--helpful); }
.helpful .score, h3.helpful { color: var(--helpful); }
.harmful .track span { background: var(--harmful); }
.harmful .score, h3.harmful { color: var(--harmful); }
.formula { white-space: nowrap; }
.wrong { color: var(--wrong); }
"""


@dataclass(frozen=True)
class Example:
    """One training example or query, as a person sees it.

    Args:
        index: its place in the data, from 0.
        place: where it stands, in words.
        label: the observed one; None where labels are not one for each example (language models).
        prediction: the model's; None likewise.
        probability: of the prediction; None where there is no single one.
        loss: −log p(y | z), summed over positions.
        text: the text, or the words under the picture.
        picture: as a data URI.
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
        return {name: value for name, value in vars(self).items() if name != "picture"}


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
    """A query with the largest scores above 0 and the least below 0, the largest in size first."""

    example: Example
    helpful: tuple[Scored, ...]
    harmful: tuple[Scored, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        sides = {"helpful": self.helpful, "harmful": self.harmful}
        return self.example.to_dict() | {side: [scored.to_dict() for scored in some] for side, some in sides.items()}


@dataclass(frozen=True)
class Computed:
    """What was computed, and of what: the JSON has these names."""

    model: str
    kind: str
    structure: str
    likelihood: str
    measurement: str
    normalize: str | None
    relative_damping: float | None  # a multiple of the mean eigenvalue; None if λ was given itself
    damping: float
    examples: int  # N, on which the Fisher was measured
    parameters: int
    train: int
    queries: int  # that there are; as many or fewer are shown
    fisher_seconds: float | None  # None if the Fisher came from a file
    score_seconds: float
    fisher_file: str | None
    versions: dict[str, str]


@dataclass(frozen=True)
class Result:
    """All of it: queries in the order in which they are shown, the largest self-influences, notes for the reader."""

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


def described(example: Example) -> str:
    """Label, prediction and loss, as far as there are any."""
    parts = [] if example.label is None else [f"label {example.label}"]
    if example.prediction is not None:
        sure = "" if example.probability is None else f" ({example.probability:.2f})"
        parts.append(f"predicted {example.prediction}{sure}")
    return ", ".join([*parts, f"loss {example.loss:.3g}"])


def page(found: Result) -> str:
    """All of it as a whole HTML document, in UTF-8."""
    body = [_header(found)]
    if len(found.queries) > 1:
        body.append(_contents(found))
    body += [_query(query, found.computed) for query in found.queries]
    if found.self_influence:
        body.append(_own(found.self_influence))
    title = f"Influence scores – {found.computed.model}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _header(found: Result) -> str:
    c = found.computed
    relative = "" if c.relative_damping is None else f", {c.relative_damping:g} × the mean eigenvalue"
    source = f"built in {c.fisher_seconds:.1f} s" if c.fisher_seconds is not None else f"from the file {c.fisher_file}"
    facts = {
        "Model": f"{c.model}, D = {c.parameters:,} parameters",
        "Data": f"{c.train:,} training examples, {c.queries:,} queries",
        "Fisher": f"{c.kind}, {c.structure}, N = {c.examples:,}, {source}",
        "Damping": f"λ = {c.damping:.3g}{relative}",
        "Of what": f"{c.measurement} of each query, likelihood {c.likelihood}"
        + ("" if c.normalize is None else f", normalized by {c.normalize}"),
        "Scores": f"computed in {c.score_seconds:.1f} s",
        "Versions": ", ".join(f"{name} {version}" for name, version in c.versions.items()),
    }
    rows = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    notes = "\n".join(f"<p>{escape(note)}</p>" for note in found.notes)
    return (
        "<header>\n<h1>Influence scores</h1>\n"
        '<p class="soft">Which training examples these predictions depend on.</p>\n'
        f"<dl>\n{rows}\n</dl>\n"
        f"<p><strong>How to read it.</strong> {escape(unit(c))} "
        '<span class="formula">score = (1/N) ∇ℓ<sub>q</sub>ᵀ (F + λI)⁻¹ ∇ℓ<sub>n</sub>.</span> '
        "Read scores as a ranking: how far a loss really moves depends on how the model is trained on, and training "
        "anew often changes it by more than one example does. "
        "Bars are relative to the largest score of their query.</p>\n"
        f"{notes}\n</header>"
    )


def _contents(found: Result) -> str:
    links = []
    for query in found.queries:
        e = query.example
        words = e.place if e.label is None else f"{e.place}: {_short(e.label, 24)} → {_short(e.prediction or '', 24)}"
        links.append(f'<a href="#query-{e.index}">{_picture(e)}{escape(words)}</a>')
    return '<nav aria-label="Queries">\n' + "\n".join(links) + "\n</nav>"


def _query(query: Query, computed: Computed) -> str:
    largest = max((abs(s.score) for s in (*query.helpful, *query.harmful)), default=1.0)
    columns = [
        f'<div class="{side}">\n<h3 class="{side}">{title}</h3>\n{_list(scored, largest, empty)}\n</div>'
        for side, title, scored, empty in (
            ("helpful", "Helpful: without it the query fares worse", query.helpful, "No score is above 0."),
            ("harmful", "Harmful: without it the query fares better", query.harmful, "No score is below 0."),
        )
    ]
    e = query.example
    return (
        f'<section id="query-{e.index}">\n<div class="query">{_picture(e)}<div>\n<h2>{escape(_capital(e.place))}</h2>\n'
        f"{_text(e)}<p>{_described(e)}</p>\n</div></div>\n"
        '<div class="columns">\n' + "\n".join(columns) + "\n</div>\n</section>"
    )


def _own(scored: tuple[Scored, ...]) -> str:
    largest = max(abs(s.score) for s in scored) or 1.0
    return (
        '<section id="self" class="own harmful">\n<h2>Training examples that stand alone</h2>\n'
        "<p>The largest self-influence: how much an example's own loss would rise without it. Wrong labels are often "
        "among them; so are rare and hard examples. The loss beside it says much the same.</p>\n"
        f"{_list(scored, largest, '')}\n</section>"
    )


def _list(scored: tuple[Scored, ...], largest: float, empty: str) -> str:
    if not scored:
        return f'<p class="soft small">{escape(empty)}</p>'
    return "<ol>\n" + "\n".join(_item(one, largest) for one in scored) + "\n</ol>"


def _item(scored: Scored, largest: float) -> str:
    e, share = scored.example, 100 * abs(scored.score) / (largest or 1.0)
    return (
        f'<li>{_picture(e)}<div><div class="score"><span>{escape(f"{scored.score:+.3g}")}</span>'
        f'<div class="track"><span style="width: {share:.1f}%"></span></div></div>'
        f'{_text(e)}<div class="small">{_described(e)}</div>'
        f'<div class="small soft">{escape(e.place)}</div></div></li>'
    )


def _described(example: Example) -> str:
    """Label, prediction and loss; marked where the first two differ."""
    wrong = example.prediction is not None and example.probability is not None and example.label != example.prediction
    text = escape(described(example))
    return f'<span class="wrong">{text}</span>' if wrong else text


def _text(example: Example) -> str:
    return "" if example.text is None else f'<p class="text">{escape(_short(example.text, LONGEST))}</p>'


def _picture(example: Example) -> str:
    if example.picture is None:
        return ""
    return f'<img src="{escape(example.picture)}" alt="{escape(_capital(example.place))}">'


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# -- pictures ----------------------------------------------------------------------------------------------------------


def is_image(shape: torch.Size) -> bool:
    """Whether an example of this shape is taken for a picture without being asked: ``[1 or 3, H, W]``."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1


def data_uri(image: Any, call: str) -> str:
    """A picture that stands in the page itself.

    It is a tensor, or what numpy makes an array of: ``[H, W]``, ``[C, H, W]`` or ``[H, W, C]`` with C = 1, 3 or 4.
    Bytes are 0 to 255, booleans black and white. Other numbers are 0 to 1; where some lie outside, the least becomes
    black and the largest white.

    Raises:
        InvalidArgumentError: no such shape.
    """
    return "data:image/png;base64," + base64.b64encode(_png(_bytes(_channels_last(image, call)))).decode()


def _channels_last(image: Any, call: str) -> Tensor:
    values = image.detach().cpu() if isinstance(image, Tensor) else torch.as_tensor(np.array(image))
    if values.is_complex() or 0 in values.shape:
        shape = None
    elif values.ndim == 2:
        shape = values.unsqueeze(-1)
    elif values.ndim == 3 and values.shape[0] in _CHANNELS:
        shape = values.movedim(0, -1)
    else:
        shape = values if values.ndim == 3 and values.shape[-1] in _CHANNELS else None
    if shape is None:
        raise InvalidArgumentError(
            call=call, got=f"a picture of shape {list(values.shape)} and {values.dtype}",
            expected="real numbers [H, W], [C, H, W] or [H, W, C] with C = 1, 3 or 4",
        )  # fmt: skip
    return shape


def _bytes(image: Tensor) -> Tensor:
    """``[H, W, C]`` as bytes."""
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
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
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
