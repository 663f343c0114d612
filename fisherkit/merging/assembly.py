"""From a plan to a result: every name gets its tensor and goes where the result goes, one after the other.

Owns what all ways of merging share: the names that are not merged, and the choice between a state dict and files.
Knows no Fisher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.io.model_files import targets, written
from fisherkit.merging.info import MergeInfo
from fisherkit.merging.models import ModelSource, weighted_average
from fisherkit.merging.policy import MergePolicy, Plan
from fisherkit.progress import bar

Merged = Iterable[tuple[str, Tensor]]
"""Names and float64 tensors that a way of merging computes."""


@dataclass(frozen=True)
class Job:
    """What every way of merging is given.

    Args:
        call: the public call, for errors.
        models: θ_t.
        weights: w_t, of averages.
        center: where damping pulls to, and for names that take its value; None for the average.
        policy: what is allowed.
        out: a folder or file; None for a state dict.
        overwrite: whether a model that is there may be replaced.
        return_info: whether there is a `MergeInfo`.
        progress: show progress bars.
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

    def result(self, plan: Plan, merged: Merged, costs: Mapping[str, float] | None = None, **info: Any) -> Any:
        """What the public call returns.

        Args:
            plan: what becomes of every name.
            merged: the tensors of the merged names, in any order; computed when they are asked for.
            costs: what a name's tensor costs; by default the numbers that it has.
            **info: more of the `MergeInfo`; read when all is computed.

        Raises:
            InvalidArgumentError: the target cannot be written to.
            InvalidTypeError: a target that is no path.
        """
        found = self._assembled(plan, merged, costs or {})
        if not self.return_info:
            return found
        names = {name: str(entry) for name, entry in plan.items()}
        info["blocks"] = tuple(info.get("blocks", ()))
        return found, MergeInfo(**{"method": self.call, "weights": self.weights, "names": names, **info})

    def _assembled(self, plan: Plan, merged: Merged, costs: Mapping[str, float]) -> dict[str, Tensor] | Path:
        ties = {name: entry.owner for name, entry in plan.items() if entry.action == "tied"}
        made = {name: entry for name, entry in plan.items() if entry.action not in ("tied", "skipped")}
        found: dict[str, Tensor] = {}
        put: Callable[[str, Tensor], None] = found.__setitem__
        with ExitStack() as stack:
            if self.out is not None:
                out = self._path()
                forms = {name: (entry.shape, entry.dtype) for name, entry in made.items()}
                size = self.policy.max_shard_size
                put = stack.enter_context(written(out, forms, ties, size, overwrite=self.overwrite, call=self.call))
            costs = {name: costs.get(name, entry.size) for name, entry in made.items()}
            title = f"{self.call}, {sum(entry.size for entry in made.values()):,} numbers"
            with bar(sum(costs.values()), title, "", shown=self.progress, steps=False) as shown:
                for name, tensor in self._all(plan, merged):
                    entry, device = made[name], self.models[0].devices.get(name, tensor.device)
                    put(name, tensor.reshape(entry.shape).to(device, entry.dtype))
                    shown.update(costs[name])
        if self.out is None:
            return {name: found[ties.get(name, name)] for name in plan if name in made or name in ties}
        return next(path for path in targets(out) if path.exists())

    def _all(self, plan: Plan, merged: Merged) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the result, none of which shares memory with a model."""
        yield from merged
        for name, entry in plan.items():
            if entry.action == "averaged":
                yield name, weighted_average(self.models, self.weights, name)
            elif entry.action in ("equal", "first"):
                yield name, self.models[0].read(name).clone()
            elif entry.action == "center" and self.center is not None:
                yield name, self.center.read(name).clone()

    def _path(self) -> Path:
        """The target's path, which must not be a model's."""
        if not isinstance(self.out, (str, Path)):
            raise InvalidTypeError(
                call=self.call, got=f"out of type {type(self.out).__name__}", expected="a path or None"
            )
        ours = {place.resolve() for place in targets(Path(self.out))}
        for model in (*self.models, *([self.center] if self.center else [])):
            if ours & {file.resolve() for file in model.files}:
                raise InvalidArgumentError(
                    call=self.call, got=f"out={str(self.out)!r}, which is the place of {model.label}",
                    expected="another place", why="it would be overwritten while it is read",
                )  # fmt: skip
        return Path(self.out)
