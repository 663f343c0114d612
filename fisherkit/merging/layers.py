"""`merge_layers`: layers merged one after another, each by Fishers measured where the earlier ones are merged already.

Owns the order of the layers and the models in between. What a Fisher is, and how a layer is solved, are others'.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisherkit.data import Data
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, listed
from fisherkit.kinds import ExactFisher
from fisherkit.merging.assembly import BlockInfo, Job
from fisherkit.merging.merge import DEFAULT_OUTPUT_DAMPING, merge
from fisherkit.merging.models import check_weights, open_models, weighted_average
from fisherkit.merging.policy import Entries, MergePolicy, checked, decide
from fisherkit.operators import Damping, FisherOperator, RelativeDamping
from fisherkit.progress import bar
from fisherkit.space import ParameterSpace
from fisherkit.wrappers import unwrapped

KFAC = partial(ExactFisher, structure="kfac")
LAYER_DAMPING = RelativeDamping(0.01)
"""Less than `merge` has: it pulls to an average that was made for no merged layer."""


def merge_layers(
    models: Sequence[nn.Module],
    data: Sequence[Data],
    weights: Sequence[float] | None = None,
    *,
    fisher: Callable[..., FisherOperator] = KFAC,
    stages: Sequence[Sequence[str]] | None = None,
    damping: Damping = LAYER_DAMPING,
    normalize: str | None = "block",
    output_damping: float = DEFAULT_OUTPUT_DAMPING,
    policy: MergePolicy | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    return_info: bool = False,
    progress: bool = False,
) -> Any:
    """`merge`, layer after layer, each by Fishers of models whose earlier layers are the merged ones.

    Fishers of the models as they are do not know what inputs a layer will have once the layers before it are merged.
    Here model t is taken with all earlier stages merged and the later ones its own, and is measured on its own data for
    the parameters of one stage, which is then merged. With activation factors alone (``normalize="output",
    output_damping=1e9, damping=fk.RelativeDamping(1e-6)``) it is RegMean++ (Nguyen et al., arXiv 2508.03121).

    Args:
        models: modules of one architecture, in eval mode. Copies of them are measured; they are never changed.
        data: of each model, in their order: whatever a Fisher takes.
        weights: w_t; None for 1 / T.
        fisher: called as ``fisher(model, data, params=names)``: a kind with its options, such as
            ``functools.partial(fk.EmpiricalFisher, structure="diagonal", likelihood=nn.MSELoss())``.
        stages: names of parameters that are merged together, from the inputs on; those in none are treated as the
            policy's ``uncovered`` says. None for a stage a module, in the order of the model's trained parameters.
        damping: as in `merge`, of each stage.
        normalize: as in `merge`.
        output_damping: as in `merge`.
        policy: as in `merge`.
        out: as in `merge`.
        overwrite: as in `merge`.
        return_info: also return a `MergeInfo`, whose damping is the largest of any stage.
        progress: show a bar of the stages, with the time that is left.

    Returns:
        As `merge`.

    Raises:
        InvalidTypeError: models that are no modules.
        InvalidArgumentError: as many data as models are needed; a stage names what is no parameter, or names it twice.
        FisherkitError: whatever `merge` and the Fisher raise.

    Cost: a Fisher of each model for each stage, over the stage's parameters alone; a copy of every model.
    """
    call = "merge_layers"
    if isinstance(models, (str, Path)) or not all(isinstance(model, nn.Module) for model in models):
        raise InvalidTypeError(
            call=call, got="models that are no modules", expected="a list of nn.Module",
            why="each is run with layers that are merged already", try_="fk.merging.merge for files and state dicts",
        )  # fmt: skip
    if isinstance(data, (str, Tensor)) or len(data) != len(models):
        raise InvalidArgumentError(
            call=call, got=f"{len(models)} models and {len(data)} data", expected="the data of each model",
            why="each model is measured on its own task's data", try_="[data_a, data_b], in the models' order",
        )  # fmt: skip
    sources = open_models(models, call)
    space = ParameterSpace.of(unwrapped(models[0]), None)
    order = list(map(tuple, space.blocks.values() if stages is None else stages))
    _check_stages(order, space, call)
    own = check_weights(weights, len(sources), call)
    allowed = checked(policy, call, "refuse")
    job = Job(call, sources, own, None, allowed, out, overwrite, return_info, progress)
    entries = decide(sources, [name for names in order for name in names], None, allowed, call)
    settings = {"damping": damping, "normalize": normalize, "output_damping": output_damping, "policy": policy}
    work = _Stages(job, [unwrapped(model) for model in models], data, fisher, settings)
    found = job.result(
        entries, work.solutions(order, entries), normalize=normalize, output_damping=output_damping, blocks=work.blocks
    )
    if not return_info:
        return found
    return found[0], replace(found[1], damping=max(work.dampings))


@dataclass(frozen=True)
class _Stages:
    """The stages' merges, one after another.

    Args:
        job: the models, their weights, the policy.
        data: of each model.
        fisher: what measures a stage.
        settings: keywords of `merge`.
        blocks: how each block was solved; filled while `solutions` runs.
        dampings: λ of each stage, likewise.
    """

    job: Job
    models: Sequence[nn.Module]
    data: Sequence[Data]
    fisher: Callable[..., FisherOperator]
    settings: dict[str, Any]
    blocks: list[BlockInfo] = field(default_factory=list)
    dampings: list[float] = field(default_factory=list)

    def solutions(self, order: Sequence[tuple[str, ...]], entries: Entries) -> Iterator[tuple[str, Tensor]]:
        """Every staged name and its merged values."""
        between = [copy.deepcopy(model) for model in self.models]
        for name, entry in entries.items():
            if entry.action == "averaged":
                _put(between, name, weighted_average(self.job.models, self.job.weights, name))
            elif entry.action == "first":
                _put(between, name, self.job.models[0].read(name))
        with bar(len(order), "merge_layers", "stages", shown=self.job.progress) as shown:
            for names in order:
                pairs = zip(between, self.data, strict=True)
                fishers = [self.fisher(model, own, params=list(names)) for model, own in pairs]
                states = [{name: model.get_parameter(name) for name in names} for model in between]
                merged, info = merge(states, fishers, self.job.weights, return_info=True, **self.settings)
                self.blocks.extend(info.blocks)
                self.dampings.append(info.damping)
                for name, tensor in merged.items():
                    _put(between, name, tensor)
                shown.update(1)
                yield from merged.items()


def _put(models: Sequence[nn.Module], name: str, tensor: Tensor) -> None:
    """Give models' parameter or buffer new values, where its shape is theirs."""
    with torch.no_grad():
        for model in models:
            own = model.state_dict(keep_vars=True).get(name)
            if own is not None and own.shape == tensor.shape:
                own.copy_(tensor)


def _check_stages(order: Sequence[tuple[str, ...]], space: ParameterSpace, call: str) -> None:
    names = [name for stage in order for name in stage]
    odd = [repr(name) for name in names if name not in space.names or names.count(name) > 1]
    if odd or not names:
        raise InvalidArgumentError(
            call=f"{call}(stages=...)", got=f"names that are no trained parameter, or twice: {listed(odd)}",
            expected="names of model.named_parameters(), each once", why="each parameter is merged once",
            try_="stages=None, for a stage a module",
        )  # fmt: skip
