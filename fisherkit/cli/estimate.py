"""``fisherkit estimate``: the Fisher of a model on a file of texts, or on data of a user's function, into a file."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

from fisherkit import io
from fisherkit.cli.command import refuse_existing, say
from fisherkit.cli.options import AsJson, Example, Kind, MaxShardSize, Overwrite, Structure, argument, choice, option
from fisherkit.cli.sources import ModelOptions, TextBatches, call_factory, load_likelihood
from fisherkit.cli.text import pairs
from fisherkit.data import Data, Source
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.fisher import build_file, plan, refuse_unpacked
from fisherkit.io.fisher_file import index_of, refuse_others
from fisherkit.operators import FisherFile
from fisherkit.processes import Share, started
from fisherkit.structures import structure_named
from fisherkit.vectors import rule_of
from fisherkit.words import duration, number

CALL = "fisherkit estimate"


@dataclass(frozen=True, kw_only=True)
class Estimate(ModelOptions):
    """Estimate a model's Fisher on a file of texts, or on data of yours.

    What it writes needs no model: read it with fisherkit.load, look at it with "fisherkit show", merge models by it
    with "fisherkit merge".

    Examples:
        fisherkit estimate my-model --data train.jsonl --kind ief --structure diagonal --out f.safetensors
        fisherkit estimate my-model --data train.csv --text-column body --params 'head.*' --out f.safetensors
        fisherkit estimate mymodule:make --kind truncated:2 --structure full --out f.safetensors
        fisherkit estimate my-model --data train.jsonl --structure ekfac --memory-budget 8e9 --plan
        torchrun --nproc-per-node 2 -m fisherkit estimate my-model --data train.jsonl --out f.safetensors
    """

    model: str = argument(
        "MODEL",
        "A Hugging Face folder (sequence classification or causal language model), or "
        '"package.module:function" that returns (model, data).',
    )
    out: Path | None = option(None, "FILE", "The Fisher file to write.", "none, with --plan")
    data: Path | None = option(None, "FILE", "A folder's texts and labels: .jsonl, .csv or .tsv.")
    kind: Kind = "truncated:2"
    structure: Structure = "diagonal"
    example: Example = "sequence"
    normalization: str = choice("mean", "Over examples", ("mean", "sum"))
    kfac_positions: str = choice("expand", "How kfac and ekfac take positions", ("expand", "reduce"))
    memory_budget: float | None = option(
        None, "BYTES", "For result and sums; beyond it in parts.", "half of what is available", min=1
    )
    plan: bool = option(False, "", "Say parts, passes, bytes and time, and estimate nothing.", name="--plan")
    keep_dtype: str | None = choice(
        None, "What factors and diagonals are kept in", ("bfloat16", "float32"), "that of the sums"
    )
    max_shard_size: MaxShardSize = None
    overwrite: Overwrite = False
    as_json: AsJson = False

    def run(self) -> None:
        """Load, build, save, report; in several processes, each with its share of the batches, by the first one."""
        chosen = structure_named(self.structure, CALL)
        refuse_unpacked(CALL, chosen, self._kept)  # before a model is loaded
        if self.plan:
            self._plan()
            return
        if self.out is None:
            raise typer.BadParameter("Missing option '--out', the file to write; --plan needs none.")
        check_fisher_file(self.out, f"{CALL} --out", overwrite=self.overwrite or io.is_closed(self.out))
        with started(self.device) as (rank, size):
            if size > 1 and chosen.keeps_rows:
                raise InvalidArgumentError(
                    CALL, f"structure={self.structure!r} in {size} processes", "one process",
                    why="each process would keep rows of its own, and one file has all", try_='structure="ekfac"',
                )  # fmt: skip
            model, data, options = self._asked()
            if rank == 0:
                named = _size(model, options["params"], data)
                say(f"{self.model}: {named}. Estimating {self.kind}, {self.structure} ...")
            start = time.perf_counter()
            own = data if size == 1 else Share(Source(data).batches, rank, step=size)
            try:
                found = build_file(
                    self.out, model, own, max_shard_size=self.max_shard_size, overwrite=self.overwrite, **options
                )
            except KeyboardInterrupt:
                if rank == 0 and io.record_of(self.out).exists():
                    parts, done = io.parts_finished(self.out)
                    typer.echo(
                        f"\n{done} of {parts} parts are finished: the same command goes on from there.", err=True
                    )
                raise
            if rank == 0:
                summary = self._summary(found, data, time.perf_counter() - start)
                typer.echo(json.dumps(summary, ensure_ascii=False) if self.as_json else _as_text(summary))

    def _plan(self) -> None:
        if int(os.environ.get("RANK", "0")):  # of torchrun's processes, one says it
            return
        model, data, options = self._asked()
        found = plan(model, data, to_file=True, **options)
        typer.echo(json.dumps(asdict(found)) if self.as_json else str(found))

    def _asked(self) -> tuple[nn.Module, Data, dict[str, Any]]:
        """The model, its data, and the keywords of the package that the options stand for."""
        texts = self.texts(self.model, {"--data": self.data}, CALL)
        if texts is None:
            model, data = load_pair(self.model, CALL)
            model, likelihood = model.to(self.device), "categorical"
        else:
            model, data, likelihood = texts[0].model, texts[0], texts[0].folder.likelihood
        return model, data, {
            "kind": rule_of(self.kind, call=CALL).with_seed(self.seed),
            "likelihood": load_likelihood(self.likelihood or likelihood, CALL),
            "structure": self.structure, "params": self.selection(model, CALL), "example": self.example,
            "normalization": self.normalization, "kfac_positions": self.kfac_positions, "progress": True,
            "memory_budget": None if self.memory_budget is None else int(self.memory_budget),
            "dtype": self._kept,
        }  # fmt: skip

    @property
    def _kept(self) -> torch.dtype | None:
        return None if self.keep_dtype is None else getattr(torch, self.keep_dtype)

    def _summary(self, file: FisherFile, data: Data, seconds: float) -> dict[str, Any]:
        blocks = (file.read(names) for names in file.blocks)  # one by one, as they may not fit together
        traces = [(float(block.trace()), block.dtype) for block in blocks]
        trace, size = sum(own for own, _ in traces), file.space.size
        found = {
            "file": str(self.out),
            "files": len(file.files),
            "kind": self.kind,
            "structure": file.metadata["structure"],
            "examples": int(file.metadata["examples"]),
            "rows": int(file.metadata["rows"]),
            "parameters": size,
            "trace": trace,
            "mean_eigenvalue": trace / size,
            "dtype": str(traces[0][1]).removeprefix("torch."),
            "seconds": seconds,
            "likelihood": file.metadata["likelihood"],
        }
        if isinstance(data, TextBatches):
            found |= {"texts_at_max_length": data.cut, "max_length": data.max_length}
        return found


def load_pair(spec: str, call: str) -> tuple[nn.Module, Data]:
    """A model with its data, one batch or a re-iterable of batches, as the user's function returns them."""
    made = call_factory(spec, call)
    if not (isinstance(made, (tuple, list)) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise InvalidTypeError(
            call, f"a {type(made).__name__} from {spec}()", "a pair (model, data)",
            try_="return model.eval(), [(inputs, targets), ...]",
        )  # fmt: skip
    return made[0], made[1]


def check_fisher_file(path: Path, call: str, *, overwrite: bool) -> None:
    """Find out before the work is done whether a Fisher file can be written."""
    io.check_folder(path, call)
    refuse_existing((path, index_of(path)), call, overwrite=overwrite)
    refuse_others(path, call)


def _size(model: nn.Module, params: list[str] | None, data: Data) -> str:
    count = sum(
        p.numel() for name, p in model.named_parameters() if (p.requires_grad if params is None else name in params)
    )
    texts = f", {len(data.texts):,} texts" if isinstance(data, TextBatches) else ""
    batches = f" in {len(data):,} batch{'es' if len(data) > 1 else ''}" if isinstance(data, (TextBatches, list)) else ""
    return f"{count:,} parameters{texts}{batches}"


def _as_text(found: dict[str, Any]) -> str:
    cells = [
        *((name, found[name]) for name in ("kind", "structure", "likelihood")),
        ("examples N", f"{found['examples']:,}"),
        ("rows R", f"{found['rows']:,}"),
        ("parameters D", f"{found['parameters']:,}"),
        ("trace", number(found["trace"])),
        ("mean eigenvalue", number(found["mean_eigenvalue"])),
        ("time", duration(found["seconds"])),
    ]
    lines = [pairs(cells)]
    if found.get("texts_at_max_length"):
        lines.append(f"{found['texts_at_max_length']:,} texts fill all {found['max_length']} tokens: some may be cut.")
    wrote = f"Wrote {found['file']}"
    if found["files"] > 1:
        wrote += f" in {found['files']} files beside their index, which is loaded by this name"
    return "\n".join([*lines, "", f"{wrote}."])
