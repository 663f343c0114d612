"""Everything of a model, its data and the process that building a Fisher must leave as it was.

A snapshot holds values and identities: a parameter that was replaced by an equal one counts as touched.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

HOOKS = [
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
]  # fmt: skip


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested batches; a loader's are its dataset's."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, DataLoader):
        yield from tensors(getattr(tree.dataset, "tensors", ()))
    elif isinstance(tree, Mapping):
        yield from tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from tensors(part)


def value(tensor: Tensor | None) -> Any:
    """A tensor's identity, bytes, and how it takes part in autograd; ``None`` stays ``None``."""
    if tensor is None:
        return None
    hooks = dict(tensor._backward_hooks or {}), dict(getattr(tensor, "_post_accumulate_grad_hooks", None) or {})
    # An inference tensor has no version.
    version = None if tensor.is_inference() else tensor._version
    raw = tensor.detach().clone().cpu().contiguous().flatten().view(torch.uint8)  # NumPy knows no bfloat16
    grad = value(tensor.grad) if tensor.is_leaf else None
    return id(tensor), version, raw.numpy().tobytes(), tensor.requires_grad, hooks, grad


def attribute(thing: Any) -> Any:
    """A plain attribute's identity, and what it holds: tensors and the contents of containers."""
    if isinstance(thing, Tensor):
        return value(thing)
    if isinstance(thing, Mapping):
        return id(thing), [(key, attribute(part)) for key, part in thing.items()]
    if isinstance(thing, list | tuple | set):
        return id(thing), [attribute(part) for part in thing]
    return thing if isinstance(thing, bool | int | float | str | None) else id(thing)


def of_model(model: nn.Module) -> dict[str, Any]:
    """Parameters, gradients, buffers, modes, hooks and attributes."""
    state: dict[str, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[f"parameter {name}"] = value(parameter)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        state[f"buffer {name}"] = value(buffer)
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"training {name}"] = module.training
        own = {key: attribute(part) for key, part in vars(module).items() if "_hooks" not in key}
        state[f"attributes {name}"] = own, list(vars(module)), type(module)
        state[f"hooks {name}"] = {kind: dict(getattr(module, kind)) for kind in HOOKS}
    return state


def of_process(data: Any) -> dict[str, Any]:
    """Random generators, a loader's own among them, and global switches."""
    kind, words, *rest = np.random.get_state()  # noqa: NPY002  the global one is the one to watch
    own = [getattr(part, "generator", None) for part in (data, getattr(data, "sampler", None))]
    return {
        "torch generator": torch.get_rng_state().numpy().tobytes(),
        "NumPy generator": (kind, words.tobytes(), *rest),
        "Python generator": random.getstate(),
        "loader's generators": [g.get_state().numpy().tobytes() for g in own if isinstance(g, torch.Generator)],
        "fast path of attention": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "function modes": len(torch.overrides._get_current_function_mode_stack()),
        "global hooks": [len(getattr(nn.modules.module, f"_global{kind}")) for kind in HOOKS[:4]],
    }


@contextmanager
def untouched(model: nn.Module, data: Any) -> Iterator[None]:
    """Whatever happens inside, an exception included, leaves the model, the data and the process as they were."""
    batches = list(tensors(data))
    before = of_model(model) | of_process(data) | {f"data {i}": value(tensor) for i, tensor in enumerate(batches)}
    try:
        yield
    finally:
        after = of_model(model) | of_process(data) | {f"data {i}": value(tensor) for i, tensor in enumerate(batches)}
        assert before.keys() == after.keys()
        changed = [key for key in before if before[key] != after[key]]
        assert not changed, f"touched: {changed}"
