"""A diagonal Fisher from what Adam has measured anyway: the running mean of squared mini-batch gradients.

Owns what is read from an optimizer, what is refused, and how the result says that it is no per-example Fisher.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fisherkit._version import __version__
from fisherkit.arguments import check_count, check_type
from fisherkit.arithmetic import at_least_single
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError, listed
from fisherkit.model_state import tensors_hash, weight_hashes
from fisherkit.operators.diagonal import DiagonalOperator
from fisherkit.space import ParameterSpace
from fisherkit.wrappers import plain, unwrapped

KIND = "second-moment"
"""What the metadata call it, beside the kinds' names."""

CALL = "from_optimizer"

Parameters: TypeAlias = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""A model, or the names and parameters of one: `named_parameters()`, or a dict of it."""


def from_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Parameters, *, batch_size: int | None = None
) -> DiagonalOperator:
    """The optimizer's running second moment v / (1 − β₂ᵏ) after k steps as a diagonal matrix, without a pass over data.

    v is the running mean of ĝ², the squared gradient of a mini-batch's mean loss. It is no Fisher matrix of examples:
    of B examples drawn independently, with g_n the gradient of one, E[ĝ²] = (1/B) E[g²] + (1 − 1/B) (E[g])². The
    diagonal empirical Fisher E[g²] is thus about B times as large, and what a rescaling leaves is (B − 1) (E[g])²,
    little where a model is trained until its mean gradient is small. Besides, it is averaged over the last 1 / (1 − β₂)
    steps and their weights, in train mode, with the loss's own regularisers and as clipped as the gradients were.

    Args:
        optimizer: one that keeps ``exp_avg_sq``, such as `torch.optim.Adam`, AdamW, NAdam or RAdam. Only read.
        parameters: the model, or its names and parameters. Covered are those that the optimizer changes.
        batch_size: B, the examples of whose mean loss each step's gradient was, with accumulation and all processes
            counted. The result is multiplied by it. None leaves it as the optimizer has it.

    Returns:
        A `DiagonalOperator` over the model's names, float32 for parameters in half precision; a copy. Its ``metadata``
        has the kind "second-moment", the optimizer, the fewest steps of any parameter, the batch size and the weights
        that the model has now.

    Raises:
        InvalidTypeError: no optimizer, or no named parameters.
        InvalidArgumentError: the optimizer keeps no second moment, has made no step, changes none of the parameters or
            adds weight decay to gradients before it squares them.
        NonFiniteError: NaN or infinity in a second moment.
    """
    advice = "fk.from_optimizer(optimizer, model)"
    check_type(CALL, "optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer", try_=advice)
    check_count(CALL, "batch_size", batch_size, optional=True)
    known = _named(parameters)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    own = {name: parameter for name, parameter in known.items() if id(parameter) in groups}
    if not own:
        raise InvalidArgumentError(
            CALL, f"{type(optimizer).__name__} and parameters of which it changes none", "the model that it trains",
            why="parameters are recognised by identity, not by their values",
            try_="the very model that the optimizer was made for",
        )  # fmt: skip
    moments, steps = [], []
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in own.items()}
    _check_states(optimizer, states)
    for name, parameter in own.items():
        group, state = groups[id(parameter)], states[name]
        if (decay := group.get("weight_decay", 0)) and not group.get("decoupled_weight_decay", False):
            raise InvalidArgumentError(
                CALL, f"{type(optimizer).__name__} with weight_decay={decay}", "none, or a decoupled one as AdamW's",
                why="the gradients that it has squared have weight_decay · θ in them", try_="torch.optim.AdamW",
            )  # fmt: skip
        step = float(state["step"])
        moment = state["exp_avg_sq"].detach().to(at_least_single(parameter.dtype)) / (1 - group["betas"][1] ** step)
        if not bool(moment.isfinite().all()):
            raise NonFiniteError(
                CALL, f"a second moment of {name!r} with NaN or infinity", "finite ones",
                why="a gradient was not finite, and the running mean keeps that", try_="an earlier checkpoint",
            )  # fmt: skip
        moments.append(moment.reshape(-1))
        steps.append(step)
    if len({(moment.device, moment.dtype) for moment in moments}) > 1:
        raise InvalidArgumentError(
            CALL, "parameters of several dtypes or on several devices", "one dtype and device",
            try_="a call for each part of the parameters, such as those whose names begin alike",
        )  # fmt: skip
    space = ParameterSpace(tuple(own), tuple(tuple(parameter.shape) for parameter in own.values()))
    fisher = DiagonalOperator(space, torch.cat(moments) * (batch_size or 1))
    fisher.metadata = {
        "kind": KIND, "structure": "diagonal", "normalization": "mean",
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}", "steps": f"{min(steps):.0f}",
        "measures": "running mean of squared mini-batch gradients, no Fisher of single examples"
        + (f", times the batch size {batch_size}" if batch_size else ""),
        **({"batch_size": str(batch_size)} if batch_size else {}),
        **_hashes(parameters, own), "fisherkit": __version__, "torch": torch.__version__,
    }  # fmt: skip
    return fisher


def _named(parameters: Parameters) -> dict[str, Tensor]:
    """Names and parameters, by the names inside of wrappers."""
    if isinstance(parameters, nn.Module):
        return dict(unwrapped(parameters).named_parameters())
    pairs = parameters.items() if isinstance(parameters, Mapping) else parameters
    try:
        found = {plain(name): parameter for name, parameter in pairs}
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidTypeError(
            CALL, f"parameters of type {type(parameters).__name__}", "a module, or names with parameters",
            try_="fk.from_optimizer(optimizer, model)",
        ) from error  # fmt: skip
    return found


def _check_states(optimizer: torch.optim.Optimizer, states: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse what has no second moment: of any parameter, of some, or not yet."""
    name, without = type(optimizer).__name__, [key for key, state in states.items() if "exp_avg_sq" not in state]
    kept = sorted({key for state in states.values() for key in state})
    needed = all({"exp_avg_sq", "step"} <= state.keys() for state in states.values() if state)
    if (kept and not needed) or not all("betas" in group for group in optimizer.param_groups):
        raise InvalidArgumentError(
            CALL, f"{name}, which keeps {', '.join(kept) or 'nothing that it was asked for'}",
            "an optimizer that keeps step and exp_avg_sq with betas, as torch.optim.Adam, AdamW, NAdam, RAdam",
            why="there is no second moment with a known bias in it",
            try_='fk.EmpiricalFisher(model, data, structure="diagonal"), one pass over data',
        )  # fmt: skip
    if len(without) == len(states):
        raise InvalidArgumentError(
            CALL, f"{name} before its first step", "one that has seen gradients",
            try_="after optimizer.step(), or after load_state_dict of a trained optimizer's state",
        )  # fmt: skip
    if without:
        raise InvalidArgumentError(
            CALL, f"{name} without a second moment of {listed(map(repr, without), 8)}",
            "gradients of all parameters that it changes", why="these have had no gradient in any step",
            try_="the named parameters without them",
        )  # fmt: skip


def _hashes(parameters: Parameters, own: Mapping[str, Tensor]) -> dict[str, str]:
    """Which weights these are, for whoever checks; of the whole model only if it was given."""
    dtype = str(next(iter(own.values())).dtype).removeprefix("torch.")
    if not isinstance(parameters, nn.Module):
        return {"covered_hash": f"{dtype}:{tensors_hash(own)}"}
    whole, covered = weight_hashes(unwrapped(parameters), tuple(own))[0]()
    return {
        "model": type(unwrapped(parameters)).__name__,
        "parameters_hash": whole,
        "covered_hash": f"{dtype}:{covered}",
    }
