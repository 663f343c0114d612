"""What is asked of a step's Fisher, checked before anything is done; both optimizers take it from their arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from torch import nn

from fisherkit import likelihoods
from fisherkit.arguments import check_choice, check_count, check_number
from fisherkit.errors import InvalidArgumentError, InvalidTypeError
from fisherkit.likelihoods import Likelihood
from fisherkit.operators import RelativeDamping
from fisherkit.optim.averages import LayerDamping
from fisherkit.outputs import OutputRule
from fisherkit.structures import Structure, structure_named
from fisherkit.vectors import EmpiricalVectors, rule_of
from fisherkit.wrappers import PARALLEL, reshard, without_prefix


@dataclass(frozen=True)
class StepSettings:
    """Settings that stay as they are in all steps; by what names they are arguments, `NaturalGradient` says.

    ``call`` is the optimizer's name. ``gram`` says whether the damping is the paper's, in the space of examples.
    """

    call: str
    kind: OutputRule
    likelihood: Likelihood
    structure: type[Structure]
    gram: bool
    reduction: str
    ema: float
    update_every: int
    refresh_every: int
    kfac_positions: str
    max_rank: int | None
    gradient_momentum: float = 0.0

    @classmethod
    def of(cls, call: str, arguments: Mapping[str, Any]) -> StepSettings:
        """Of an optimizer's arguments by name, if they fit."""
        o = SimpleNamespace(**{"gradient_momentum": 0.0, **arguments})
        if not isinstance(o.model, nn.Module):
            raise InvalidTypeError(
                call, f"a {type(o.model).__name__} as model", "a torch.nn.Module",
                why="per-example gradients come from its forward pass", try_=f"{call}(model, ..., params=names)",
            )  # fmt: skip
        kind = rule_of(o.kind, call=call, options=o.options)  # first: a misspelt argument is among its options
        check_damping_choice(o.damping, o.gram_damping, call)
        check_trust_region(o.trust_region, call)
        check_choice(call, "reduction", o.reduction, ("mean", "sum"))
        check_choice(call, "kfac_positions", o.kfac_positions, ("expand", "reduce"))
        structure = structure_named(o.structure, call)
        if not structure.in_steps:
            raise InvalidArgumentError(
                call, f"structure={o.structure!r}", "a LayerStructure or a RowStructure",
                why="steps average the records of layers, or take the rows of a batch",
            )  # fmt: skip
        likelihood = likelihoods.resolve(o.likelihood, o.model)
        own = likelihood.reduction
        if not likelihood.gradient_scale_free and own not in (None, o.reduction):
            raise InvalidArgumentError(
                call, f"reduction={o.reduction!r} with a loss module of reduction {own!r}", "the same",
                why="targets are read off the loss gradient and its scale", try_=f"reduction={own!r}",
            )  # fmt: skip
        check_count(call, "update_every", o.update_every)
        check_count(call, "refresh_every", o.refresh_every)
        check_count(call, "max_rank", o.max_rank, optional=True)
        for name, value in (("ema", o.ema), ("gradient_momentum", o.gradient_momentum)):
            check_number(call, name, value, most=1, below=True)
        if structure.keeps_rows and (o.ema > 0 or o.update_every > 1 or o.gradient_momentum > 0):
            momentum = f" and gradient_momentum={o.gradient_momentum}" if o.gradient_momentum else ""
            raise InvalidArgumentError(
                call, f"structure={o.structure!r} with ema={o.ema} and update_every={o.update_every}{momentum}",
                f"ema=0 and update_every=1{' and gradient_momentum=0' if momentum else ''}",
                why="its rows are those of one batch", try_='structure="kfac" or "ekfac"',
            )  # fmt: skip
        found = {"call": call, "kind": kind, "likelihood": likelihood, "structure": structure}
        given = {**vars(o), **found, "gram": o.gram_damping is not None}
        return cls(**{field.name: given[field.name] for field in fields(cls)})

    @property
    def power(self) -> float | None:
        """The power of the loss gradient's norm, of the paper's update of a batch's rows; None of any other."""
        return self.kind.gradient_power if self.gram and self.structure.keeps_rows else None

    @property
    def captured(self) -> OutputRule:
        """Whose rows are captured."""
        return self.kind if self.power is None else EmpiricalVectors()

    @property
    def recorded(self) -> dict[str, Any]:
        """What a state says, and must be of for steps to go on from it."""
        return {
            "kind": self.kind.kind_name, "options": self.kind.kind_options(), "structure": self.structure.name,
            "gram": self.gram, "likelihood": self.likelihood.recorded, "kfac_positions": self.kfac_positions,
        }  # fmt: skip

    @property
    def compared(self) -> dict[str, object]:
        """What several processes must have alike."""
        names = ["reduction", "ema", "update_every", "refresh_every", "gradient_momentum", "max_rank"]
        return {"gram_damping": self.gram, **self.recorded, **{name: getattr(self, name) for name in names}}


def check_damping_choice(damping: object, gram_damping: object, call: str) -> None:
    """Exactly one of the two dampings, and a fitting one."""
    if (damping is None) == (gram_damping is None):
        raise InvalidArgumentError(
            call, f"damping={damping!r} and gram_damping={gram_damping!r}", "one of them",
            why="F + λI and the Gram matrix + λI are different updates",
            try_="gram_damping=1e-3 for the paper's update, damping=1e-2 for (F + λI)⁻¹ times the mean gradient",
        )  # fmt: skip
    if gram_damping is not None:
        check_number(call, "gram_damping", gram_damping)
    elif not isinstance(damping, RelativeDamping | LayerDamping):
        check_number(call, "damping", damping)


def check_trust_region(trust_region: object, call: str) -> None:
    """A positive number, None, or infinity, which shortens nothing."""
    if not (isinstance(trust_region, float) and trust_region == math.inf):
        check_number(call, "trust_region", trust_region, above=True, optional=True)


def whole_model(model: nn.Module, params: Any) -> tuple[nn.Module, Any]:
    """The module inside `DistributedDataParallel`, which calls it, and parameters by its own names.

    None is for all, also those that do not require a gradient yet. Of a model that `fully_shard` has sharded,
    parameters are shards afterwards, which have the gradients.
    """
    params = (lambda _name, _parameter: True) if params is None else params
    if isinstance(model, nn.Module):
        reshard(model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module, without_prefix(params, PARALLEL)
    return model, params
