"""The commands that make and compare Fisher files.

Owns their options; what each does lives in a module of its own, imported when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisherkit.cli.command import Command, readable_errors, require
from fisherkit.cli.options import (
    STRUCTURES,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    LabelColumn,
    LikelihoodName,
    MaxLength,
    MaxShardSize,
    Overwrite,
    PairColumn,
    TextColumn,
)


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
        Path | None,
        typer.Option(
            metavar="FILE", help="Texts and labels, .jsonl, .csv or .tsv; a folder needs it.", show_default="none"
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(metavar="KIND", help="ef, ief[:POWER], sf[:DRAWS], truncated[:RANK or :TOLERANCE], exact.")
    ] = "truncated:2",
    structure: Annotated[str, typer.Option(metavar="NAME", help=f"{STRUCTURES}.")] = "diagonal",
    text_column: TextColumn = "text",
    pair_column: PairColumn = None,
    label_column: LabelColumn = "label",
    examples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Draw so many of the texts.", show_default="all")
    ] = None,
    batch_size: BatchSize = 32,
    max_length: MaxLength = None,
    params: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help='Parameters by name, such as "classifier.*"; may be repeated.',
            show_default="all that require grad",
        ),
    ] = None,
    likelihood: LikelihoodName = None,
    example: Annotated[str, typer.Option(metavar="NAME", help="sequence or token.")] = "sequence",
    normalization: Annotated[str, typer.Option(metavar="NAME", help="mean or sum.")] = "mean",
    kfac_positions: Annotated[str, typer.Option(metavar="NAME", help="expand or reduce.")] = "expand",
    device: Device = "cpu",
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of drawn texts and sampled labels.")] = 0,
    max_shard_size: MaxShardSize = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
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
                seed, max_shard_size, overwrite, as_json,
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
        str | None,
        typer.Option(metavar="WHAT", help="diagonal or matrix.", show_default="the matrix where both have one"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="B", min=1, help="Of the batches behind OTHER, to recognise their squares.", show_default="unknown"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how alike two Fishers are, and by which factor one is larger.

    A penalty's strength that was tuned for one must be divided by that factor for the other.
    """
    with readable_errors():
        from fisherkit.cli.audit import run

        run(other, exact, compare=compare, batch_size=batch_size, as_json=as_json)


def merge(
    model: Annotated[
        list[Path], typer.Option(metavar="PATH", help="A Hugging Face folder, or a safetensors file; twice or more.")
    ],
    out: Annotated[Path, typer.Option(metavar="PATH", help="The folder (or, for files, the file) to write.")],
    fisher: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A Fisher file for each model, in their order.", show_default="none"),
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="auto, direct or cg; or average, task-arithmetic, regmean.")
    ] = "auto",
    weights: Annotated[
        str | None,
        typer.Option(metavar="LIST", help='Of the models, such as 1,2; or "examples".', show_default="equal"),
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(
            metavar="λ",
            help="A multiple of the mean eigenvalue; see --absolute-damping.",
            show_default="0.03; regmean: 1e-06",
        ),
    ] = None,
    absolute_damping: Annotated[bool, typer.Option("--absolute-damping", help="--damping is λ itself.")] = False,
    output_damping: Annotated[
        float | None,
        typer.Option(
            metavar="ρ", min=0, help="How much of each Fisher's average over outputs is added.", show_default="3.0"
        ),
    ] = None,
    normalize: Annotated[
        str | None, typer.Option(metavar="NAME", help="block, output, trace, norm or none.", show_default="block")
    ] = None,
    center: Annotated[
        str | None,
        typer.Option(metavar="PATH", help='Where damping pulls to: "average" or a model.', show_default="average"),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="task-arithmetic needs it: the common start.", show_default="none"),
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(metavar="S", help="task-arithmetic needs it: of the sum of changes.", show_default="none"),
    ] = None,
    shrink: Annotated[
        float | None,
        typer.Option(
            metavar="α", min=0, max=1, help="regmean: share of the off-diagonal that is kept.", show_default="0.9"
        ),
    ] = None,
    uncovered: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Parameters without a Fisher: refuse, average, first or center.",
            show_default="refuse; regmean: average",
        ),
    ] = None,
    buffers: Annotated[
        str | None, typer.Option(metavar="NAME", help="Float buffers, likewise.", show_default="refuse")
    ] = None,
    integers: Annotated[
        str | None, typer.Option(metavar="NAME", help="Other tensors: refuse or first.", show_default="refuse")
    ] = None,
    mismatched: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Names or shapes that differ: refuse, skip or first.", show_default="refuse"),
    ] = None,
    other_weights: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Fishers measured at other weights than their models': refuse or warn.",
            show_default="refuse",
        ),
    ] = None,
    config_from_first: Annotated[
        bool, typer.Option("--config-from-first", help="Where configs or vocabularies differ, take the first.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the result, such as bfloat16.", show_default="the models'")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where blocks are solved.", show_default="cpu")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="ε", help="Largest relative residual of a block's solution.", show_default="1e-12"),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Of conjugate gradients in each block.", show_default="2000"),
    ] = None,
    max_shard_size: MaxShardSize = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print how every block was solved.")] = False,
) -> None:
    """Merge models by their Fishers: Σ (θ − θ_t)ᵀF_t(θ − θ_t), damped towards their average, made least.

    Reads and writes one block at a time. The folder loads with from_pretrained, like the first model's; merge.json in
    it says how every block was solved.
    """
    with readable_errors():
        from fisherkit.cli.merge import MergeSettings, options, run

        keywords = options(
            damping=damping, absolute_damping=absolute_damping, normalize=normalize, weights=weights, dtype=dtype,
            output_damping=output_damping, center=center, shrink=shrink, uncovered=uncovered, buffers=buffers,
            integers=integers, mismatched=mismatched, device=device, tolerance=tolerance, max_shard_size=max_shard_size,
            other_weights=other_weights, max_steps=max_steps,
        )  # fmt: skip
        run(
            MergeSettings(
                tuple(model), tuple(fisher or ()), out, method, base, scale, config_from_first, overwrite, as_json,
                verbose, keywords,
            )
        )  # fmt: skip


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
MERGE = Command(
    merge,
    "Merge models by their Fishers into a folder that loads like the first.",
    (
        "fisherkit merge --model A --fisher a.safetensors --model B --fisher b.safetensors --out merged",
        "fisherkit merge --model A --model B --method average --out merged",
        "fisherkit merge --model A --fisher a --model B --fisher b --uncovered average --weights examples --out merged",
    ),
)
