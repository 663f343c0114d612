"""Wrappers that give the parameters of a model other names: `torch.compile`, data parallelism, averaged weights.

Owns which wrappers there are and what they put before names. A model goes by the names that it has without them. And
models of which each process has a shard, by `torch.distributed.fsdp.fully_shard`: how to have them whole.
"""

from __future__ import annotations

import copy
import functools
import re
import sys
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fisherkit.errors import ModelError

_INNER: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.DataParallel, "module"), (nn.parallel.DistributedDataParallel, "module"), (AveragedModel, "module"),
)  # fmt: skip

COMPILED = "_orig_mod"
"""What torch.compile calls the module that it wraps; no module of one's own has this name."""

PARALLEL = "module."
"""What data parallelism puts before all names; a module of one's own may have this name too."""


def wrapped_in(model: nn.Module) -> str:
    """What the wrappers around a whole model put before every name; "" for a model that is not wrapped."""
    inner = next((name for cls, name in _INNER if isinstance(model, cls)), None)
    if inner is None and COMPILED in model._modules:
        inner = COMPILED
    return "" if inner is None else f"{inner}.{wrapped_in(getattr(model, inner))}"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers around it: the same parameters, by their own names."""
    return functools.reduce(getattr, wrapped_in(model).split(".")[:-1], model)


def without_prefix(params: Any, prefix: str) -> Any:
    """Names, or one name, without what wrappers put before them; any other choice of parameters as it is."""
    if isinstance(params, str):
        return params.removeprefix(prefix)
    if not isinstance(params, Iterable):
        return params
    return [name.removeprefix(prefix) if isinstance(name, str) else name for name in params]


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` has been applied to any part of a model."""
    return bool(_sharded_modules(model))


def _sharded_modules(model: nn.Module) -> list[Any]:
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)  # its import takes long
    if cls is None or not cls.__subclasses__():  # of which every sharded module is one
        return []
    return [module for module in model.modules() if isinstance(module, cls)]


def reshard(model: nn.Module) -> list[Any]:
    """Free weights that `fully_shard` has gathered, so that a model's parameters are shards; the sharded modules."""
    sharded = _sharded_modules(model)
    for module in sharded:
        module.reshard()
    return sharded


def full(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process has a shard, differentiably; every process must ask. Others as they are."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # what DTensors have
    return whole


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Of a tensor that every process has whole, the shard of another one's form; the inverse of `full`."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None or hasattr(tensor, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # where shards come from, it is there already

    placements: Any = getattr(like, "placements", None)
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This process's memory of a tensor, outside of graphs: of a shard, a plain tensor; others as they are."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # what DTensors have
    return own


def with_full_weights(model: nn.Module) -> nn.Module:
    """The same model with all weights in this process, if `fully_shard` has left it a shard of them; else itself.

    Every process must ask. The copy is of the modules' own classes, with their attributes and the user's hooks, and
    without those of `fully_shard`; buffers are shared. It is in the dtype of the sharded parameters, whatever
    ``MixedPrecisionPolicy`` says. Weights that were gathered for a pass and not freed are freed, as `reshard` does.

    Raises:
        ModelError: parameters that are sharded otherwise too, or attributes that cannot be copied.

    Cost: memory for all weights; each is sent to every process once.
    """
    sharded = reshard(model)
    if not sharded:
        return model
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        placements: Any = getattr(parameter, "placements", ())
        if len(placements) > 1 and not placements[0].is_replicate():
            raise ModelError(
                "fully_shard", f"{name!r} with the placements {placements}", "shards of data "
                "parallelism alone", why="a layer of tensor parallelism does not compute with whole weights",
                try_="a model of the full weights, without tensor parallelism",
            )  # fmt: skip
        memo[id(parameter)] = nn.Parameter(full(parameter.detach()).clone(), parameter.requires_grad)
    # All of them before any is filled, as they may refer to each other.
    copies = [object.__new__(type(module).__mro__[type(module)._orig_cls_mro_index]) for module in sharded]
    memo |= {id(module): one for module, one in zip(sharded, copies, strict=True)}
    try:
        for module, one in zip(sharded, copies, strict=True):
            one.__dict__.update(copy.deepcopy(_own_attributes(vars(module)), memo))
        found: nn.Module = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(
            "fully_shard", f"a module that cannot be copied ({error})", "one that can",
            why="a Fisher is measured on a copy of the model with all weights",
            try_="attributes that can be copied, or a model of the full weights",
        ) from error  # fmt: skip
    return found


def in_its_precision(model: nn.Module) -> nn.Module:
    """As `with_full_weights`, in the dtype in which ``MixedPrecisionPolicy`` has the sharded model compute, if in one.

    Raises:
        ModelError: as `with_full_weights`, or other dtypes for some modules than for others.
    """
    found = with_full_weights(model)
    dtypes = {module._get_fsdp_state()._mp_policy.param_dtype for module in _sharded_modules(model)}
    if len(dtypes) > 1:
        raise ModelError(
            "fully_shard", f"MixedPrecisionPolicy with param_dtype of {sorted(map(str, dtypes))}",
            "the same for all modules", why="a copy of the model with all weights does not cast between them",
            try_="one mp_policy for all calls of fully_shard",
        )  # fmt: skip
    for dtype in dtypes - {None}:
        for parameter in found.parameters():
            parameter.data = parameter.data.to(dtype)
    return found


def _own_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """All but the hooks and the state of `fully_shard`."""
    own = {name: value for name, value in attributes.items() if not name.startswith("__composable_api")}
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        own[name] = type(own[name])((key, hook) for key, hook in own[name].items() if not _is_of_fsdp(hook))
    return own


def _is_of_fsdp(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def plain(name: str) -> str:
    """A name without what torch.compile puts into it, at any depth."""
    return name if COMPILED not in name else re.sub(rf"(?:^|(?<=\.)){COMPILED}\.", "", name)


def matching(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Names of a model's parameters, wrapped or not, to those that they have among known names, or themselves.

    ``module.`` is taken off only if all names have it.
    """
    names = list(names)
    if all(name in known for name in names):
        return {name: name for name in names}
    bare = {plain(name): name for name in known}
    found = {name: plain(name) for name in names}
    if all(name.startswith(PARALLEL) for name in found.values()) and not any(n.startswith(PARALLEL) for n in bare):
        found = {name: short.removeprefix(PARALLEL) for name, short in found.items()}
    return {name: bare.get(short, name) for name, short in found.items()}
