"""Commands about Fisher files: ``show`` says what one holds, ``audit`` how another compares, ``export`` hands one on.

``show`` gives each layer's trace and the largest eigenvalues, for people and as JSON, and reads one block at a time, so
that a file need not fit in memory. ``audit`` takes a Fisher of any origin, in a file, beside the exact one in a Fisher
file. ``export`` owns the options alone; the folder is `fisherkit.merging`'s.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
import typer
from torch import Tensor

from fisherkit import io, merging
from fisherkit.cli.command import expect, make_folder, require
from fisherkit.cli.options import REQUIRED, AsJson, MaxShardSize, Overwrite, argument, choice, option
from fisherkit.cli.text import WIDTH, pairs, progress, table
from fisherkit.errors import MemoryBudgetError, NoClosedFormError
from fisherkit.evaluation import audit
from fisherkit.io import replace_text, replacing
from fisherkit.merging.export import UNCOVERED
from fisherkit.merging.policy import WORDS
from fisherkit.operators import FisherOperator, load, open_file
from fisherkit.words import number, readable

SHOWN = 10
"""How many of the largest eigenvalues ``fisherkit show`` prints as text; the JSON has `KEPT` of them."""
KEPT = 200
"""How many of the largest eigenvalues are computed for the JSON and the picture."""
LARGEST_SIDE = 4096
"""Of a matrix that is decomposed: seconds, not hours."""
MOST_BARS = 40
_BLUE, _ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's, told apart with any colour vision


# -- show --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Show:
    """Show what a Fisher file holds.

    What was recorded, each layer's trace, and the largest eigenvalues. Reads one block at a time, so that a file need
    not fit in memory. The picture needs the packages of fisherkit[demo].

    Examples:
        fisherkit show fisher.safetensors
        fisherkit show fisher.safetensors.index.json --json > fisher.json
        fisherkit show fisher.safetensors --out picture
    """

    file: Path = argument("FILE", "A Fisher file, or the index of one in shards.")
    as_json: AsJson = False
    out: Path | None = option(None, "FOLDER", "Write show.json and show.png there; made if missing.")
    overwrite: Overwrite = False

    def run(self) -> None:
        """Add up, print, write."""
        if self.out is not None:
            require("demo", "matplotlib")
            make_folder(self.out, ("show.json", "show.png"), "fisherkit show", overwrite=self.overwrite)
        found = summarize(self.file)
        text = json.dumps(asdict(found), indent=2, ensure_ascii=False)
        if self.out is not None:
            replace_text(self.out / "show.json", text + "\n")
            _draw(found, self.out / "show.png")
        typer.echo(text if self.as_json else _as_text(found))
        if self.out is not None:
            typer.echo(f"wrote {self.out / 'show.json'} and {self.out / 'show.png'}", err=self.as_json)


@dataclass(frozen=True)
class Layer:
    """One module's own parameters; ``block`` says which blocks they lie in, "joint" where one goes beyond the layer."""

    name: str
    parameters: tuple[str, ...]
    block: str
    size: int
    trace: float
    share: float
    mean_eigenvalue: float


@dataclass(frozen=True)
class Summary:
    """What a Fisher file holds; ``eigenvalues`` are the largest, None where ``no_eigenvalues`` says why."""

    file: str
    files: int
    bytes: int
    operator: str
    blocks: int
    size: int
    dtype: str
    metadata: dict[str, str]
    checksums: bool
    trace: float
    layers: tuple[Layer, ...]
    eigenvalues: tuple[float, ...] | None
    no_eigenvalues: str


def summarize(path: Path) -> Summary:
    """Read a Fisher file block by block and add it up."""
    file = open_file(path)
    layer_of = {name: layer for layer, names in file.space.blocks.items() for name in names}
    traces: dict[str, float] = {}
    tags: dict[str, str] = {}
    spectra: list[Tensor] = []
    refused: list[str] = []
    dtype = ""
    for names in progress(file.blocks):
        block = file.read(names)
        dtype = str(block.dtype).removeprefix("torch.")
        joint = len({layer_of[name] for name in names}) > 1
        tags.update(dict.fromkeys(names, f"{block.tag}, joint" if joint else block.tag))
        pieces = block.space.unflatten(block.diagonal().double())
        traces.update({name: float(piece.sum()) for name, piece in pieces.items()})
        if block.decomposed_side > LARGEST_SIDE:
            refused.append(
                f"a {block.tag} block would have to decompose a matrix of side {block.decomposed_side:,}, above "
                f"{LARGEST_SIDE:,} (fk.estimators.lanczos_eigenvalues needs products alone)"
            )
            continue
        try:
            spectra.append(block.eigenvalues(min(KEPT, block.size)).cpu())
        except (NoClosedFormError, MemoryBudgetError) as error:
            refused.append(error.why or error.got)
    largest = torch.cat(spectra).sort(descending=True).values[:KEPT] if spectra else torch.zeros(0)
    reason = (
        f"none in closed form for {len(refused)} of {len(file.blocks)} blocks, because {refused[0]}" if refused else ""
    )
    total = sum(traces.values())
    sizes = dict(zip(file.space.names, file.space.sizes, strict=True))
    layers = []
    for layer, names in file.space.blocks.items():
        trace, size = sum(traces[name] for name in names), sum(sizes[name] for name in names)
        tag = " + ".join(dict.fromkeys(tags[name] for name in names))
        share = trace / total if total else 0.0
        layers.append(Layer(layer or ", ".join(names), names, tag, size, trace, share, trace / size))
    return Summary(
        file=str(path), files=len(file.files), bytes=file.nbytes, operator=file.header.root.tag,
        blocks=len(file.blocks), size=file.space.size, dtype=dtype, metadata=file.metadata,
        checksums=file.has_checksums, trace=total, layers=tuple(layers),
        eigenvalues=None if refused else tuple(largest.tolist()), no_eigenvalues=reason,
    )  # fmt: skip


def _as_text(found: Summary) -> str:
    files = "1 file" if found.files == 1 else f"{found.files} files"
    lines = {
        "file": f"{found.file} ({readable(found.bytes)} in {files})",
        "operator": f"{found.operator}, {found.blocks:,} independent block{'s' if found.blocks > 1 else ''}",
        "D": f"{found.size:,} parameters, {found.dtype}",
        "trace": f"{found.trace:.4g}, mean eigenvalue {found.trace / found.size:.3g}",
        "checksums": "those of all values compared" if found.checksums else "none, so that damage may go unnoticed",
        **{key: value for key, value in found.metadata.items() if key not in ("coverage", "checksums")},
    }
    rows = [
        (
            layer.name, layer.block, f"{layer.size:,}", f"{layer.trace:.3g}", f"{layer.share:.1%}",
            f"{layer.mean_eigenvalue:.3g}",
        )
        for layer in found.layers
    ]  # fmt: skip
    spectrum = f"Eigenvalues: {found.no_eigenvalues}."
    if found.eigenvalues is not None:
        spectrum = "Largest eigenvalues: " + ", ".join(f"{value:.3g}" for value in found.eigenvalues[:SHOWN])
        spectrum = fill(spectrum, WIDTH)
    layers = table(("layer", "block", "parameters", "trace", "share", "mean eigenvalue"), rows, left=2)
    return f"{pairs(lines.items())}\n\n{layers}\n\n{spectrum}"


def _draw(found: Summary, path: Path) -> None:
    """Each layer's trace as a bar, of many layers the largest ones, and the eigenvalues, as a PNG file."""
    from matplotlib.figure import Figure

    kept = sorted(found.layers, key=lambda layer: -layer.trace)[:MOST_BARS]
    layers = [layer for layer in found.layers if layer in kept]
    positive = [value for value in found.eigenvalues or () if value > 0]
    figure = Figure(figsize=(9, max(3.2, 1.2 + 0.26 * len(layers))), layout="constrained", dpi=150)
    bars, spectrum = figure.subplots(1, 2)
    bars.barh([layer.name for layer in layers], [layer.trace for layer in layers], color=_BLUE)
    bars.invert_yaxis()
    left_out = len(found.layers) - len(layers)
    bars.set_xlabel("trace" + (f" (the largest; {left_out} layers left out)" if left_out else ""))
    if positive:
        spectrum.plot(range(1, len(positive) + 1), positive, color=_ORANGE, marker=".")
        spectrum.set(xscale="log", yscale="log")
        spectrum.grid(visible=True, color="#E8E8E8")
    else:
        spectrum.text(0.5, 0.5, "no eigenvalues\nin closed form" if found.no_eigenvalues else "all are 0", ha="center")
        spectrum.set(xticks=[], yticks=[])
    spectrum.set(xlabel="number, largest first", ylabel="eigenvalue")
    for axes in (bars, spectrum):
        axes.spines[["top", "right"]].set_visible(False)
    title = " ".join(found.metadata[key] for key in ("kind", "structure", "model") if key in found.metadata)
    figure.suptitle(f"{title or found.operator}, D = {found.size:,}")
    with replacing(path) as part:
        figure.savefig(part, format="png")


# -- audit -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Audit:
    """Compare a Fisher of any origin with an exact one.

    Says how alike they are, and by which factor OTHER is larger: a penalty's strength that was tuned for EXACT is
    divided by it to do the same with OTHER.

    Examples:
        fisherkit audit theirs.safetensors exact.safetensors
        fisherkit audit squared-gradients.safetensors exact.safetensors --batch-size 32
    """

    other: Path = argument("OTHER", "A Fisher file, or any safetensors file of a diagonal: parameter name -> tensor.")
    exact: Path = argument("EXACT", "A Fisher file.")
    compare: str | None = choice(None, "What is compared", ("diagonal", "matrix"), "the matrix where both have one")
    batch_size: int | None = option(
        None, "B", "Size of the batches behind OTHER, to recognise their squares.", "unknown", min=1
    )
    as_json: AsJson = False

    def run(self) -> None:
        """Compare and print."""
        found = audit(_read(self.other), load(self.exact), compare=self.compare, batch_size=self.batch_size)
        if self.as_json:
            shown = asdict(found) | {"strength_ratio": found.strength_ratio}
            typer.echo(json.dumps(_plain(shown), ensure_ascii=False, allow_nan=False))
            return
        header = ("parameters", "cosine", "scale", "trace ratio")
        rows = [
            (part.name, f"{part.cosine:.4f}", number(part.scale), number(part.trace_ratio))
            for part in (*found.parts, found.total)
        ]
        typer.echo(f"{table(header, rows)}\n\n{found}")


def _plain(value: Any) -> Any:
    """The same with null for what JSON has no number: the likeness of a part that is zero."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(path: Path) -> FisherOperator | dict[str, Tensor]:
    """An operator from a Fisher file, named tensors from another safetensors file."""
    if not path.is_file() or path.suffix == ".json":
        return load(path)
    header, tensors = io.read_tensors(path, "cpu", "fisherkit audit", "fisher.save, or safetensors.torch.save_file")
    return load(path) if header.get("format") == io.FORMAT else tensors


# -- export ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Export:
    """Write a Fisher's diagonal in a form that another tool reads.

    For mergekit a model folder: the model's names, shapes, config and tokenizer, with the diagonal as weights, so that
    it can be listed as another model. One block at a time is in memory.

    Examples:
        fisherkit export a.safetensors --to mergekit --model A --out fisher-of-a
    """

    file: Path = argument("FILE", "A Fisher file, or the index of one in shards.")
    model: Path = option(REQUIRED, "PATH", "The Hugging Face folder of the model that it was measured on.")
    out: Path = option(REQUIRED, "PATH", "The folder to write.")
    to: str = choice("mergekit", "The tool", ("mergekit",))
    uncovered: str = choice("refuse", "Tensors of the model that the Fisher lacks", UNCOVERED)
    other_weights: str = choice("refuse", "A Fisher measured at other weights than the model's", WORDS["other_weights"])
    max_shard_size: MaxShardSize = None
    overwrite: Overwrite = False

    def run(self) -> None:
        """Check, write, tell."""
        expect([self.out])
        header = io.read_header(self.file, "fisherkit export")
        merging.to_mergekit(
            self.file, self.model, self.out, uncovered=self.uncovered, other_weights=self.other_weights,
            max_shard_size=self.max_shard_size, overwrite=self.overwrite,
        )  # fmt: skip
        kind = " ".join(header.metadata[key] for key in ("kind", "structure") if key in header.metadata)
        typer.echo(f"Wrote {self.out}: the diagonal of {self.file} ({kind}) in the shapes of {self.model}.")
