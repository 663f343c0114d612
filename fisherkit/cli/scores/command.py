"""The options of ``fisherkit scores``; what it does is `run`'s, imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisherkit.cli.command import Command, readable_errors, require
from fisherkit.cli.options import (
    AsJson,
    BatchSize,
    Device,
    Dtype,
    LabelColumn,
    LikelihoodName,
    MaxLength,
    Overwrite,
    PairColumn,
    TextColumn,
)


def scores(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help='A Hugging Face folder, or "package.module:function" that returns (model, train, queries) or (model, '
            "train, queries, show).",
        ),
    ],
    train: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A folder's training texts and labels: .jsonl, .csv or .tsv.", show_default="none"
        ),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Texts and labels that are asked about, likewise.", show_default="none"),
    ] = None,
    fisher: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A Fisher file of this model.", show_default="one is built")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Of the Fisher that is built: ef, ief[:POWER], sf[:DRAWS], truncated[:RANK or :TOLERANCE], exact.",
            show_default="truncated:2",
        ),
    ] = None,
    structure: Annotated[
        str | None, typer.Option(metavar="NAME", help="full, block, diagonal, kfac or ekfac.", show_default="ekfac")
    ] = None,
    params: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help='Its parameters by name, such as "classifier.*"; may be repeated.',
            show_default="all that require grad",
        ),
    ] = None,
    save_fisher: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the Fisher that is built.", show_default="none")
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(
            metavar="λ",
            help="A multiple of the mean eigenvalue, or λ itself with --absolute-damping.",
            show_default="full, block: 1; kfac, ekfac: 0.1; diagonal: 0.01",
        ),
    ] = None,
    absolute_damping: Annotated[bool, typer.Option("--absolute-damping", help="--damping is λ itself.")] = False,
    measurement: Annotated[str, typer.Option(metavar="NAME", help="What is asked of a query: loss or margin.")] = (
        "loss"
    ),
    normalize: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="relatif: outliers with large gradients lead no list.", show_default="none"),
    ] = None,
    top: Annotated[int, typer.Option(metavar="K", min=1, help="Most helpful, and most harmful, a query.")] = 5,
    worst: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only the N queries with the largest loss.", show_default="all"),
    ] = None,
    own: Annotated[int, typer.Option("--self", metavar="N", min=0, help="List the N largest self-influences too.")] = 0,
    likelihood: LikelihoodName = None,
    text_column: TextColumn = "text",
    pair_column: PairColumn = None,
    label_column: LabelColumn = "label",
    examples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Draw so many of the training texts.", show_default="all")
    ] = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of drawn texts and sampled labels.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write scores.html, a page to show, and scores.json there.", show_default="none"
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Say which training examples each prediction hangs on: the most helpful and the most harmful ones.

    A score is (1/N) ∇ℓ_qᵀ(F + λI)⁻¹∇ℓ_n, about how much the query's loss would rise without the training example. The
    function's show(split, index) returns example number index of "train" or "queries" as a text, a picture (an array),
    a pair of both, or None. Inputs of shape [1 or 3, H, W] are pictures without it.
    """
    with readable_errors():
        if Path(model).is_dir():
            require("hf", {"transformers": "transformers"})
        from fisherkit.cli.scores.run import ScoresSettings, run
        from fisherkit.cli.scores.sources import TextOptions
        from fisherkit.cli.texts import Columns

        columns = Columns(text_column, pair_column, label_column)
        run(
            ScoresSettings(
                model, TextOptions(train, queries, columns, examples, batch_size, max_length, dtype), fisher, kind,
                structure, tuple(params or ()), save_fisher, likelihood, damping, absolute_damping, measurement,
                normalize, top, worst, own, device, seed, out, overwrite, as_json,
            )
        )  # fmt: skip


SCORES = Command(
    scores,
    "Which training examples predictions hang on, as a table or a page.",
    (
        "fisherkit scores my-model --train train.jsonl --queries test.jsonl --out scores",
        "fisherkit scores my-model --train train.csv --queries test.csv --fisher f.safetensors --worst 20 --json",
        "fisherkit scores mymodule:make --kind exact --structure full --top 10 --self 20 --out scores",
    ),
)
