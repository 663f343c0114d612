"""``fisherkit export``: a Fisher in a form that another tool reads.

Owns the options; the folder is `fisherkit.merging`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fisherkit import io, merging
from fisherkit.cli.command import expect
from fisherkit.cli.options import MaxShardSize, Overwrite, argument, choice, option
from fisherkit.merging.export import UNCOVERED
from fisherkit.merging.policy import WORDS


@dataclass(frozen=True)
class Export:
    """Write a Fisher's diagonal in a form that another tool reads.

    For mergekit a model folder: the model's names, shapes, config and tokenizer, with the diagonal as weights, so that
    it can be listed as another model. One block at a time is in memory.

    Examples:
        fisherkit export a.safetensors --to mergekit --model A --out fisher-of-a
    """

    file: Annotated[Path, argument("FILE", "A Fisher file, or the index of one in shards.")]
    model: Annotated[Path, option("PATH", "The Hugging Face folder of the model that it was measured on.")]
    out: Annotated[Path, option("PATH", "The folder to write.")]
    to: Annotated[str, choice("The tool", ("mergekit",))] = "mergekit"
    uncovered: Annotated[str, choice("Tensors of the model that the Fisher lacks", UNCOVERED)] = "refuse"
    other_weights: Annotated[
        str, choice("A Fisher measured at other weights than the model's", WORDS["other_weights"])
    ] = "refuse"
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
