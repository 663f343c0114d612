"""Wrappers that give the parameters of a model other names: `torch.compile`, data parallelism, averaged weights.

Owns which wrappers there are and what they put before names. A model goes by the names that it has without them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable

from torch import nn
from torch.optim.swa_utils import AveragedModel

_INNER: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.DataParallel, "module"), (nn.parallel.DistributedDataParallel, "module"), (AveragedModel, "module"),
)  # fmt: skip

COMPILED = "_orig_mod"
"""What torch.compile calls the module that it wraps; no module of one's own has this name."""

PARALLEL = "module."
"""What data parallelism puts before all names; a module of one's own may have this name too."""


def wrapped_in(model: nn.Module) -> str:
    """What the wrappers around a whole model put before every name; "" for a model that is not wrapped."""
    inner = next((name for kind, name in _INNER if isinstance(model, kind)), None)
    if inner is None and COMPILED in model._modules:
        inner = COMPILED
    return "" if inner is None else f"{inner}.{wrapped_in(getattr(model, inner))}"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers around it: the same parameters, by their own names."""
    return functools.reduce(getattr, wrapped_in(model).split(".")[:-1], model)


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
