"""The commands that make and compare Fisher files.

Owns their options; what each does lives in a module of its own, imported when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisherkit.cli.command import Command, readable_errors, require

_JSON = typer.Option("--json", help="Print one JSON object instead of text.")


def estimate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder (sequence classification or causal language model), or "
            '"package.module:function" that returns (model, data).',
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The Fisher file.")],
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts and labels for a folder: .jsonl, .csv or .tsv.")
    ] = None,
    kind: Annotated[
        str, typer.Option(metavar="KIND", help="ef, ief[:POWER], sf[:DRAWS], truncated[:RANK or :TOLERANCE], exact.")
    ] = "truncated:2",
    structure: Annotated[str, typer.Option(metavar="NAME", help="full, block, diagonal, kfac or ekfac.")] = "diagonal",
    text_column: Annotated[str, typer.Option(metavar="NAME", help="Column of the text.")] = "text",
    pair_column: Annotated[str | None, typer.Option(metavar="NAME", help="Column of a second text.")] = None,
    label_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of the label; causal models need none.")
    ] = "label",
    examples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Draw so many of the texts; all unless told.")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Texts a batch; no effect on the result.")] = 32,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tokens a text is cut to; what the model allows unless told.")
    ] = None,
    params: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help='Parameters by name, such as "classifier.*"; may be repeated.'),
    ] = None,
    likelihood: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="categorical, gaussian or bernoulli; that of the model's loss unless told."),
    ] = None,
    example: Annotated[str, typer.Option(metavar="NAME", help="sequence or token.")] = "sequence",
    normalization: Annotated[str, typer.Option(metavar="NAME", help="mean or sum.")] = "mean",
    kfac_positions: Annotated[str, typer.Option(metavar="NAME", help="expand or reduce.")] = "expand",
    device: Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a folder's weights: float32, float64; the file's unless told."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of drawn texts and sampled labels.")] = 0,
    max_shard_size: Annotated[
        int | None, typer.Option(metavar="BYTES", min=1, help="Write several files of at most this size.")
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Estimate the Fisher of a model and write it to a file that needs no model.

    Read it with fisherkit.load, look at it with "fisherkit show", merge models by it with "fisherkit merge".
    """
    with readable_errors():
        if Path(model).is_dir():
            require("hf", {"transformers": "transformers"})
        from fisherkit.cli.estimate import EstimateSettings, run
        from fisherkit.cli.texts import Columns

        run(
            EstimateSettings(
                model, out, data, Columns(text_column, pair_column, label_column), examples, batch_size, max_length,
                kind, structure, likelihood, example, normalization, tuple(params or ()), kfac_positions, device, dtype,
                seed, max_shard_size, as_json,
            )
        )  # fmt: skip


def audit(
    other: Annotated[
        Path,
        typer.Argument(
            metavar="OTHER", help="A Fisher file, or any safetensors file of a diagonal: parameter name -> tensor."
        ),
    ],
    exact: Annotated[Path, typer.Argument(metavar="EXACT", help="A Fisher file.")],
    compare: Annotated[
        str | None, typer.Option(metavar="WHAT", help="diagonal or matrix; the matrix where both have one.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="B", min=1, help="Of the batches behind OTHER, to recognise their squares.")
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Say how alike two Fishers are, and by which factor one is larger.

    A penalty's strength that was tuned for one must be divided by that factor for the other.
    """
    with readable_errors():
        from fisherkit.cli.audit import run

        run(other, exact, compare=compare, batch_size=batch_size, as_json=as_json)


ESTIMATE = Command(
    estimate,
    "Estimate a model's Fisher on a file of texts, or on data of yours.",
    (
        "fisherkit estimate my-model --data train.jsonl --kind ief --structure diagonal --out f.safetensors",
        "fisherkit estimate my-model --data train.csv --text-column body --params 'head.*' --out f.safetensors",
        "fisherkit estimate mymodule:make --kind truncated:2 --structure full --out f.safetensors",
    ),
)
AUDIT = Command(
    audit,
    "Compare a Fisher of any origin with an exact one.",
    (
        "fisherkit audit theirs.safetensors exact.safetensors",
        "fisherkit audit squared-gradients.safetensors exact.safetensors --batch-size 32",
    ),
)
