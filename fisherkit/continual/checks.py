"""What must hold between a model, a Fisher and what was consolidated before, and what a caller may allow by name.

Owns the checks and their messages. Knows nothing of penalties.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from fisherkit.arguments import check_choice
from fisherkit.arithmetic import all_finite
from fisherkit.errors import (
    InvalidArgumentError,
    InvalidTypeError,
    ModelError,
    NonFiniteError,
    UnknownParameterError,
    listed,
)
from fisherkit.model_state import measured_at
from fisherkit.operators import FisherOperator
from fisherkit.space import ParameterSpace, Selection

CALL = "EWC.consolidate"

SAME_MOMENT = "θ* is taken from the model, so both must be of the same moment"


def check_model(model: object) -> None:
    """Refuse what is no module, and wrappers, which have other names for the same parameters."""
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(call="EWC", got=f"a {type(model).__name__} as model", expected="a torch.nn.Module")
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = "_orig_mod" if "_orig_mod" in model._modules else "module" if parallel else None
    if inner is not None:
        raise InvalidTypeError(
            call="EWC", got=f"a wrapped or compiled model ({type(model).__name__})", expected="the module itself",
            why="parameters go by the names that they have in the Fishers",
            try_=f"EWC(model.{inner}), the very module that the Fishers are built from",
        )  # fmt: skip


def check_fisher(fisher: object, model: nn.Module, uncovered: str, free: Selection) -> None:
    """Refuse a Fisher that is not of the model as it is now, or that leaves out what nobody named as free."""
    if not isinstance(fisher, FisherOperator):
        raise InvalidTypeError(
            call=CALL, got=f"a {type(fisher).__name__}", expected="a FisherOperator",
            try_='fk.ImprovedEmpiricalFisher(model, data, structure="kfac"), or fk.load(path)',
        )  # fmt: skip
    _check_form(fisher, dict(model.named_parameters()))
    _check_values(fisher, model)
    _check_uncovered(fisher, model, uncovered, free)


def _check_form(fisher: FisherOperator, parameters: Mapping[str, nn.Parameter]) -> None:
    """The model has the Fisher's parameters, in these shapes, on this device and in a dtype that loses nothing."""
    space = fisher.space
    if unknown := [name for name in space.names if name not in parameters]:
        raise UnknownParameterError(
            call=CALL, got=f"a Fisher over {listed(map(repr, unknown))}, which the model does not have",
            expected=f"some of {listed(map(repr, parameters))}",
            why="it may be of another model, or of a wrapped or compiled one",
            try_="EWC of the very module that the Fisher was built from",
        )  # fmt: skip
    changed = [
        f"{name!r}: {list(shape)} in the Fisher, {list(parameters[name].shape)} in the model"
        for name, shape in zip(space.names, space.shapes, strict=True) if tuple(parameters[name].shape) != shape
    ]  # fmt: skip
    if changed:
        raise InvalidArgumentError(
            call=CALL, got="; ".join(changed), expected="a Fisher of the model as it is", why=SAME_MOMENT,
            try_="consolidating before a layer grows, or building the Fisher again",
        )  # fmt: skip
    for name in space.names:
        parameter = parameters[name]
        if parameter.device != fisher.device:
            raise InvalidArgumentError(
                call=CALL, got=f"a Fisher on {fisher.device} and {name!r} on {parameter.device}",
                expected="one device", try_=f'fk.load(path, device="{parameter.device}")',
            )  # fmt: skip
        if torch.promote_types(parameter.dtype, fisher.dtype) != fisher.dtype:
            raise InvalidTypeError(
                call=CALL, got=f"a Fisher of {fisher.dtype} and {name!r} of {parameter.dtype}",
                expected=f"one of {parameter.dtype}", why="θ − θ* is formed in the Fisher's dtype",
            )  # fmt: skip


def _check_values(fisher: FisherOperator, model: nn.Module) -> None:
    """The model has the weights that were measured, as far as can be told."""
    # A model of another dtype, which a Fisher of a wider copy may serve, cannot be compared.
    dtype = fisher.metadata.get("covered_hash", str(fisher.dtype).removeprefix("torch.")).partition(":")[0]
    comparable = all(str(parameter.dtype) == f"torch.{dtype}" for parameter in model.parameters())
    if comparable and measured_at(model, fisher.metadata) is False:
        raise ModelError(
            call=CALL, got="a Fisher that was measured at other parameters or buffers than the model has now",
            expected="the same values", why=SAME_MOMENT,
            try_="consolidating before training goes on, loading those weights, or building the Fisher again",
        )  # fmt: skip


def _check_uncovered(fisher: FisherOperator, model: nn.Module, uncovered: str, free: Selection) -> None:
    """Every trainable parameter is in the Fisher, which is not 0 on it, or named as free to change."""
    check_choice(CALL, "uncovered", uncovered, ("refuse", "free"))
    space, allowed = fisher.space, set(_chosen(model, free))
    if held := [name for name in space.names if name in allowed]:
        raise InvalidArgumentError(
            call=CALL, got=f"free=[{listed(map(repr, held))}], which the Fisher covers",
            expected="names that it does not cover",
            try_='a predicate with "and name not in fisher.space.names", or uncovered="free" in place of free=; to let '
            "these change leave them out of the Fisher with params=",
        )  # fmt: skip
    if uncovered == "free":
        return
    covered = {*space.names, *allowed}
    if loose := [name for name, p in model.named_parameters() if p.requires_grad and name not in covered]:
        raise InvalidArgumentError(
            call=CALL, got=f"a Fisher that leaves out {listed(map(repr, loose))}, which the model trains",
            expected="all trainable parameters", why="nothing would keep them near their values",
            try_='free=[names] or free=lambda name, parameter: ... for other tasks\' heads, uncovered="free" for all',
        )  # fmt: skip
    diagonal = fisher.diagonal()
    if not all_finite(diagonal):
        raise NonFiniteError(
            call=CALL, got="a Fisher with NaN or infinite entries on its diagonal", expected="finite numbers",
            why="the penalty would be NaN", try_="building the Fisher again, on data that are finite",
        )  # fmt: skip
    some = torch.stack([diagonal[place].any() for place in space.slices.values()]).tolist()
    unused = [name for name, used in zip(space.names, some, strict=True) if not used]
    if 0 < len(unused) < len(some):  # a Fisher that is 0 altogether is a matter of normalization
        raise InvalidArgumentError(
            call=CALL, got=f"a Fisher that is 0 on {listed(map(repr, unused))}",
            expected="one that says something of each",
            why="the data never reach them: nothing would keep them near their values, and they would count in D",
            try_='params= without them and free=[names], or uncovered="free"',
        )  # fmt: skip


def check_held(
    shapes: Mapping[str, tuple[int, ...]],
    device: torch.device,
    parameters: Mapping[str, nn.Parameter],
    grown: str,
    call: str,
) -> None:
    """The model still has what was consolidated, on the device, in the same shapes or, where allowed, larger ones."""
    for name, shape in shapes.items():
        if name not in parameters:
            raise ModelError(
                call=call, got=f"a model without {name!r}, which was consolidated", expected="every consolidated name",
                try_="keeping the old module, or a new EWC",
            )  # fmt: skip
        now = tuple(parameters[name].shape)
        larger = len(now) == len(shape) and all(a >= b for a, b in zip(now, shape, strict=True))
        if now != shape and not (larger and grown == "leading"):
            raise ModelError(
                call=call, got=f"{name!r} of shape {list(now)}, consolidated as {list(shape)}",
                expected="the same shape" if grown == "refuse" else "that shape, or a larger one, old entries first",
                why="entries would be compared with others' values",
                try_='grown="leading" if it has grown and its old entries come first' if larger else "a new EWC",
            )  # fmt: skip
        if parameters[name].device != device:
            raise InvalidArgumentError(
                call=call, got=f"{name!r} on {parameters[name].device} and its term on {device}",
                expected="one device", try_=f'ewc.to("{parameters[name].device}")',
            )  # fmt: skip


def _chosen(model: nn.Module, selection: Selection) -> list[str]:
    if selection is None:
        return []
    if callable(selection):
        predicate: Callable[[str, nn.Parameter], bool] = selection
        return [name for name, parameter in model.named_parameters() if predicate(name, parameter)]
    names = list(selection) if not isinstance(selection, str) else [selection]
    return list(ParameterSpace.of(model, names).names) if names else []
