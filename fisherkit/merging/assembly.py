"""From what was decided of every name to a result, a state dict or files, and the `MergeInfo` that reports it.

Owns what all ways of merging share. Knows no Fisher.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkit.arguments import check_type
from fisherkit.errors import InvalidArgumentError, NonFiniteError, listed
from fisherkit.io.model_files import targets, written
from fisherkit.merging.models import ModelSource, weighted_average
from fisherkit.merging.policy import Entries, MergePolicy
from fisherkit.operators import Damping
from fisherkit.progress import bar

Merged = Iterable[tuple[str, Tensor]]
"""Names and float64 tensors that a way of merging computes."""


@dataclass(frozen=True)
class BlockInfo:
    """How one independent block was solved.

    Args:
        names: its parameters.
        size: d, how many numbers they are.
        method: "closed_form", "direct", "woodbury" or "conjugate_gradient".
        steps: products of an iterative method; 0 for others.
        residual: ‖(S + λI)δ − b‖₂ / ‖b‖₂ with S = Σ w_t F_t and b = Σ w_t F_t (θ_t − θ_c); 0 where b is 0.
            A diagonal block is divided entry by entry, and has the bound of one rounding, 1.1e-16.
        converged: whether the residual met the tolerance.
        factors: what each Fisher was multiplied by, weight and normalization together.
        against_average: for each model (θ − θ_t)ᵀR_t(θ − θ_t) of the merged θ over the same of the models' plain
            average, R_t being F_t averaged over each layer's outputs: how much the layer's outputs on the model's own
            inputs have moved. Above 1 the average is nearer. Empty for blocks without inputs, such as a lone bias,
            and where R_t takes more than a block's factors: rows and dense matrices with no output damping.
    """

    names: tuple[str, ...]
    size: int
    method: str
    steps: int
    residual: float
    converged: bool
    factors: tuple[float, ...]
    against_average: tuple[float, ...] = ()

    @property
    def worst(self) -> float:
        """The largest of `against_average`; 0 if there is none."""
        return max(self.against_average, default=0.0)


@dataclass(frozen=True)
class MergeInfo:
    """What a merge did.

    Args:
        method: "merge", "merge_layers", "average", "task_arithmetic", "regmean" or "line_search".
        weights: w_t of each model.
        names: each name of the models to what it became: "merged", "averaged", "first", "center", "equal" (the same in
            all models), "tied to NAME" or "skipped".
        normalize: how Fishers were normalized.
        damping: λ, in absolute terms.
        output_damping: ρ; None for the default, which each layer has its own of.
        blocks: how each block was solved, in the order of solving.
        unverified: numbers of models, from 1, that could not be told to be the ones their Fishers were measured at.
        losses: pairs (s, loss) of what `line_search` tried.
        share: the s that it took; None without a search.
    """

    method: str
    weights: tuple[float, ...]
    names: dict[str, str]
    normalize: str | None = None
    damping: float = 0.0
    output_damping: float | None = 0.0
    blocks: tuple[BlockInfo, ...] = ()
    unverified: tuple[int, ...] = ()
    losses: tuple[tuple[float, float], ...] = ()
    share: float | None = None

    @property
    def converged(self) -> bool:
        """Whether every block's residual met the tolerance."""
        return all(block.converged for block in self.blocks)

    @property
    def residual(self) -> float:
        """The largest relative residual of any block."""
        return max((block.residual for block in self.blocks), default=0.0)

    def counts(self) -> dict[str, int]:
        """How many names became what."""
        return dict(Counter(what.partition(" ")[0] for what in self.names.values()))

    def to_json(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        """A table of the blocks under a line on the whole."""
        counted = ", ".join(f"{count} {action}" for action, count in self.counts().items())
        lines = [f"{self.method} of {len(self.weights)} models: {counted}"]
        if self.share is not None:
            least = dict(self.losses)[self.share]
            lines[0] += f"; {self.share:g} of the way of least loss {least:.4g}"
        if self.blocks:
            lines[0] += f"; damping {self.damping:.3g}"
            lines.append(f"{'size':>12}  {'method':<20}{'steps':>6}  {'residual':>9}  {'/average':>8}  parameters")
        for block in self.blocks:
            mark = "" if block.converged else "  NOT CONVERGED"
            names = listed(block.names, 2)
            against = f"{block.worst:.2g}" if block.against_average else "-"
            numbers = f"{block.steps:>6}  {block.residual:>9.1e}  {against:>8}"
            lines.append(f"{block.size:>12,}  {block.method:<20}{numbers}  {names}{mark}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Job:
    """The arguments of one call of a merging function, checked, and how its result is put together.

    ``call`` is the function's name. ``damping``, ``normalize`` and ``output_damping`` are for merging by Fishers alone.
    """

    call: str
    models: Sequence[ModelSource]
    weights: tuple[float, ...]
    center: ModelSource | None
    policy: MergePolicy
    out: str | Path | None
    overwrite: bool
    return_info: bool
    progress: bool
    damping: Damping = 0.0
    normalize: str | None = None
    output_damping: float | None = 0.0

    def result(self, entries: Entries, merged: Merged, **info: Any) -> Any:
        """What the public call returns; ``info`` is more of the `MergeInfo`, read when all tensors are computed."""
        found = self._assembled(entries, merged)
        if not self.return_info:
            return found
        names = {name: str(entry) for name, entry in entries.items()}
        ours = {"method": self.call, "weights": self.weights, "names": names, "normalize": self.normalize}
        info["blocks"] = tuple(info.get("blocks", ()))
        return found, MergeInfo(**{**ours, "output_damping": self.output_damping, **info})

    def _assembled(self, entries: Entries, merged: Merged) -> dict[str, Tensor] | Path:
        ties = {name: entry.owner for name, entry in entries.items() if entry.action == "tied"}
        made = {name: entry for name, entry in entries.items() if entry.action not in ("tied", "skipped")}
        found: dict[str, Tensor] = {}
        put: Callable[[str, Tensor], None] = found.__setitem__
        with ExitStack() as stack:
            if self.out is not None:
                out = self._path()
                forms = {name: (entry.shape, entry.dtype) for name, entry in made.items()}
                size = self.policy.max_shard_size
                put = stack.enter_context(written(out, forms, ties, size, overwrite=self.overwrite, call=self.call))
            total = sum(entry.size for entry in made.values())
            with bar(total, f"{self.call}, {total:,} numbers", "", shown=self.progress, steps=False) as shown:
                for name, tensor in self._all(entries, merged):
                    entry, device = made[name], self.models[0].devices.get(name, tensor.device)
                    put(name, self._cast(name, tensor, entry.dtype).reshape(entry.shape).to(device))
                    shown.update(entry.size)
        if self.out is None:
            return {name: found[ties.get(name, name)] for name in entries if name in made or name in ties}
        return next(path for path in targets(out) if path.exists())

    def _cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the result in its dtype, whose range holds it."""
        if dtype != tensor.dtype and tensor.numel():
            low, high = map(float, tensor.aminmax())
            if torch.finfo(dtype).max < max(-low, high) < math.inf:
                raise NonFiniteError(
                    self.call, f"entries of {name!r} up to {max(-low, high):.3g}, beyond {dtype}",
                    "numbers that the result's dtype holds", try_="policy=MergePolicy(dtype=torch.float32)",
                )  # fmt: skip
        return tensor.to(dtype)

    def _all(self, entries: Entries, merged: Merged) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the result, none of which shares memory with a model."""
        yield from merged
        for name, entry in entries.items():
            if entry.action == "averaged":
                yield name, weighted_average(self.models, self.weights, name)
            elif entry.action in ("equal", "first"):
                yield name, self.models[0].read(name).clone()
            elif entry.action == "center" and self.center is not None:
                yield name, self.center.read(name).clone()

    def _path(self) -> Path:
        check_type(self.call, "out", self.out, (str, Path), "a path")
        out = Path(self.out or "")
        ours = {place.resolve() for place in targets(out)}
        for model in (*self.models, *([self.center] if self.center else [])):
            if ours & {file.resolve() for file in model.files}:
                raise InvalidArgumentError(
                    self.call, f"out={str(self.out)!r}, which is the place of {model.label}", "another place",
                    why="it would be overwritten while it is read",
                )  # fmt: skip
        return out
