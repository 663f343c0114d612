"""Options that several commands have, so that they read alike everywhere. Owns their words, not what they do."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from fisherkit.structures import structures

*_MOST, _LAST = structures()
STRUCTURES = f"{', '.join(_MOST)} or {_LAST}"
"""By name, for help texts."""

TextColumn: TypeAlias = Annotated[str, typer.Option(metavar="NAME", help="Column of the text.")]
PairColumn: TypeAlias = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of a second text.", show_default="none")
]
LabelColumn: TypeAlias = Annotated[
    str, typer.Option(metavar="NAME", help="Column of the label; causal models need none.")
]
BatchSize: TypeAlias = Annotated[int, typer.Option(metavar="N", min=1, help="Texts a batch; no effect on the result.")]
MaxLength: TypeAlias = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Tokens a text is cut to.", show_default="the most that the model allows"),
]
LikelihoodName: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="categorical, gaussian, bernoulli, poisson, or package.module:function, which returns a loss module.",
        show_default="a folder's own loss; else categorical",
    ),
]
Device: TypeAlias = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...")]
Dtype: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of a folder's weights: float32, float64, ...", show_default="the file's"),
]
MaxShardSize: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="BYTES", min=1, help="Write several files of at most this size.", show_default="one file of any size"
    ),
]
Overwrite: TypeAlias = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
