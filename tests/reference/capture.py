"""Naive capture of what a layer sees: its inputs per example, its output gradients per row.

Owns which layers have a Kronecker rule here (Linear, the convolutions, and the transposed Conv1D of transformers) and
their shared positions. It must not know what is made of them.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from tests.reference.fisher import Problem, elements, forward_one, layout
from tests.reference.outputs import Kind

CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d


@dataclass(frozen=True)
class Captured:
    """What one layer saw.

    Attributes:
        index: Flat place of every entry of the layer's [weight | bias] matrix.
        inputs: Per counted example, the inputs with a last column of ones where the layer's bias is chosen.
        gradients: Per row, the gradients in the layer's outputs.
    """

    index: Int[Tensor, "O I"]
    inputs: list[Float[Tensor, "T I"]]
    gradients: list[Float[Tensor, "T O"]]


def is_transposed(module: nn.Module) -> bool:
    """Whether the module is the Conv1D of transformers, a Linear whose weight is [I, O]."""
    return type(module).__name__ == "Conv1D"


def kronecker_layers(problem: Problem) -> list[str]:
    """Names of the layers with a Kronecker rule: plain type, called once, weight chosen and not shared."""
    chosen = problem.chosen()
    held = Counter(id(p) for module in problem.model.modules() for p in module._parameters.values() if p is not None)
    candidates = {}
    for name, module in problem.model.named_modules():
        plain = type(module) in (nn.Linear, *CONVOLUTIONS) or is_transposed(module)
        own = [p for p in module._parameters.values() if p is not None]
        grouped = isinstance(module, CONVOLUTIONS) and module.groups != 1
        if plain and not grouped and f"{name}.weight".lstrip(".") in chosen and all(held[id(p)] == 1 for p in own):
            candidates[name] = module
    with _recording(candidates) as seen:
        forward_one(problem, 0)
    return [name for name in candidates if len(seen[name]) == 1]


def patches(module: nn.Module, x: Float[Tensor, "..."]) -> Float[Tensor, "T I"]:
    """The input of every shared position of a layer, from a batch of one, one output position at a time."""
    if not isinstance(module, CONVOLUTIONS):
        return x.reshape(-1, x.shape[-1])
    pads = []
    for axis, (kernel, dilation) in enumerate(zip(module.kernel_size, module.dilation, strict=True)):
        if isinstance(module.padding, str):
            total = dilation * (kernel - 1) if module.padding == "same" else 0
            pads.append((total // 2, total - total // 2))
        else:
            pads.append((module.padding[axis], module.padding[axis]))
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, [side for pair in reversed(pads) for side in pair], mode=mode)[0]
    spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    sizes = [(n - s) // step + 1 for n, s, step in zip(padded.shape[1:], spans, module.stride, strict=True)]
    found = []
    for position in itertools.product(*map(range, sizes)):
        window: list[slice] = [slice(None)]
        for at, step, span, dilation in zip(position, module.stride, spans, module.dilation, strict=True):
            window.append(slice(at * step, at * step + span, dilation))
        found.append(padded[tuple(window)].reshape(-1))
    return torch.stack(found)


def capture(
    problem: Problem, kind: Kind, layers: list[str] | None = None, draws: Shaped[Tensor, "M B *Y"] | None = None
) -> dict[str, Captured]:
    """Inputs per counted example and output gradients per row of each layer (default: :func:`kronecker_layers`).

    The calls of a layer that is called several times are shared positions, one call after the other.
    """
    names = kronecker_layers(problem) if layers is None else layers
    if not names:
        return {}
    modules = {name: problem.model.get_submodule(name) for name in names}
    captured = {name: Captured(_matrix_index(problem, name), [], []) for name in names}
    with _recording(modules) as seen:
        for _, z, examples in elements(problem, kind, draws):
            for name, calls in seen.items():
                a = torch.cat([patches(modules[name], x) for x, _ in calls])
                ones = a.new_ones(len(a), captured[name].index.shape[1] - a.shape[1])
                captured[name].inputs.extend([torch.cat([a, ones], dim=1)] * len(examples))
            for row in (row for v in examples for row in v):
                for name, calls in seen.items():
                    found = torch.autograd.grad(z, [output for _, output in calls], row, retain_graph=True)
                    conv = isinstance(modules[name], CONVOLUTIONS)
                    flat = [g[0].flatten(1).T if conv else g.reshape(-1, g.shape[-1]) for g in found]
                    captured[name].gradients.append(torch.cat(flat))
            for calls in seen.values():
                calls.clear()
    return captured


@contextmanager
def _recording(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[tuple[Tensor, Tensor]]]]:
    """Record (input, output) of every call of the modules while the context is open."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    def recorder(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen[name].append((args[0].detach().clone(), output))
            # An in-place operation downstream would turn the recorded output into its own result.
            return output.clone()

        return hook

    handles = [module.register_forward_hook(recorder(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _matrix_index(problem: Problem, name: str) -> Int[Tensor, "O I"]:
    """Flat place of every entry of a layer's [weight | bias] matrix, without the bias where it is not chosen."""
    places, module = layout(problem), problem.model.get_submodule(name)
    weight, bias = f"{name}.weight".lstrip("."), f"{name}.bias".lstrip(".")
    flat = torch.arange(places[weight].start, places[weight].stop)
    shape = problem.chosen()[weight].shape
    index = flat.reshape(shape).T if is_transposed(module) else flat.reshape(shape[0], -1)
    if bias not in places:
        return index
    return torch.cat([index, torch.arange(places[bias].start, places[bias].stop)[:, None]], dim=1)
