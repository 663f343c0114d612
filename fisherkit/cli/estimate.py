"""``fisherkit estimate``: the Fisher of a model on a file of texts, or on data of a user's function, into a file."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from fisherkit import io
from fisherkit.cli.command import refuse_existing, say
from fisherkit.cli.options import AsJson, Example, Kind, MaxShardSize, Overwrite, Structure, argument, choice, option
from fisherkit.cli.sources import ModelOptions, TextBatches, call_factory, load_likelihood
from fisherkit.cli.text import number, pairs
from fisherkit.data import Data, Source
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.fisher import FisherApproximation
from fisherkit.io.fisher_file import index_of, refuse_others
from fisherkit.processes import Share, started
from fisherkit.structures import structure_named
from fisherkit.vectors import rule_of

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
        torchrun --nproc-per-node 2 -m fisherkit estimate my-model --data train.jsonl --out f.safetensors
    """

    model: Annotated[
        str,
        argument(
            "MODEL",
            "A Hugging Face folder (sequence classification or causal language model), or "
            '"package.module:function" that returns (model, data).',
        ),
    ]
    out: Annotated[Path, option("FILE", "The Fisher file to write.")]
    data: Annotated[Path | None, option("FILE", "A folder's texts and labels: .jsonl, .csv or .tsv.", "none")] = None
    kind: Kind = "truncated:2"
    structure: Structure = "diagonal"
    example: Example = "sequence"
    normalization: Annotated[str, choice("Over examples", ("mean", "sum"))] = "mean"
    kfac_positions: Annotated[str, choice("How kfac and ekfac take positions", ("expand", "reduce"))] = "expand"
    max_shard_size: MaxShardSize = None
    overwrite: Overwrite = False
    as_json: AsJson = False

    def run(self) -> None:
        """Load, build, save, report; in several processes, each with its share of the batches, by the first one."""
        check_fisher_file(self.out, f"{CALL} --out", overwrite=self.overwrite)
        with started(self.device) as (rank, size):
            if size > 1 and structure_named(self.structure, CALL).keeps_rows:
                raise InvalidArgumentError(
                    call=CALL, got=f"structure={self.structure!r} in {size} processes", expected="one process",
                    why="each process would keep rows of its own, and one file has all", try_='structure="ekfac"',
                )  # fmt: skip
            model, data, likelihood = self._model_and_data()
            params = self.selection(model, CALL)
            if rank == 0:
                say(f"{self.model}: {_size(model, params, data)}. Estimating {self.kind}, {self.structure} ...")
            start = time.perf_counter()
            fisher = FisherApproximation(
                model, data if size == 1 else Share(Source(data).batches, rank, size),
                rule_of(self.kind, call=CALL).with_seed(self.seed),
                likelihood=load_likelihood(self.likelihood or likelihood, CALL),
                structure=self.structure, params=params, example=self.example, normalization=self.normalization,
                kfac_positions=self.kfac_positions, progress=True,
            )  # fmt: skip
            seconds = time.perf_counter() - start
            if rank == 0:
                fisher.save(self.out, max_shard_size=self.max_shard_size)
                found = self._summary(fisher, data, seconds)
                typer.echo(json.dumps(found, ensure_ascii=False) if self.as_json else _as_text(found))

    def _model_and_data(self) -> tuple[nn.Module, Data, str]:
        """The model, its data, and the likelihood of its own loss."""
        texts = self.texts(self.model, {"--data": self.data}, CALL)
        if texts is not None:
            return texts[0].model, texts[0], texts[0].folder.likelihood
        model, data = load_pair(self.model, CALL)
        return model.to(self.device), data, "categorical"

    def _summary(self, fisher: FisherApproximation, data: Data, seconds: float) -> dict[str, Any]:
        trace = float(fisher.trace())
        found = {
            "file": str(self.out),
            "kind": self.kind,
            "structure": fisher.structure,
            "examples": fisher.examples,
            "rows": fisher.rows,
            "parameters": fisher.size,
            "trace": trace,
            "mean_eigenvalue": trace / fisher.size,
            "dtype": str(fisher.dtype).removeprefix("torch."),
            "seconds": seconds,
            "likelihood": fisher.metadata["likelihood"],
        }
        if isinstance(data, TextBatches):
            found |= {"texts_at_max_length": data.cut, "max_length": data.max_length}
        return found


def load_pair(spec: str, call: str) -> tuple[nn.Module, Data]:
    """A model with its data, one batch or a re-iterable of batches, as the user's function returns them.

    Raises:
        InvalidTypeError: it returned something else.
    """
    made = call_factory(spec, call)
    if not (isinstance(made, (tuple, list)) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise InvalidTypeError(
            call=call, got=f"a {type(made).__name__} from {spec}()", expected="a pair (model, data)",
            try_="return model.eval(), [(inputs, targets), ...]",
        )  # fmt: skip
    return made[0], made[1]


def check_fisher_file(path: Path, call: str, *, overwrite: bool) -> None:
    """Find out before the work is done whether a Fisher file can be written.

    Raises:
        InvalidArgumentError: its folder does not exist, or something is there that may not be replaced.
    """
    io.check_folder(path, call)
    refuse_existing((path, index_of(path)), call, overwrite=overwrite)
    refuse_others(path, call)


def _size(model: nn.Module, params: list[str] | None, data: Data) -> str:
    """How much there is to do."""
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
        ("time", f"{found['seconds']:.1f} s"),
    ]
    lines = [pairs(cells)]
    if found.get("texts_at_max_length"):
        lines.append(f"{found['texts_at_max_length']:,} texts fill all {found['max_length']} tokens: some may be cut.")
    return "\n".join([*lines, "", f"Wrote {found['file']}."])
