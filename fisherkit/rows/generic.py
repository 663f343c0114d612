"""Rows of parameters that no rule covers, by automatic differentiation of one example at a time.

Two ways, both exact: ``torch.func`` vectorised over examples, and a loop of ordinary backward passes on the model
itself. The plan finds out whether the first one works; `loop_is_cheaper` whether it pays.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import vjp, vmap

from fisherkit.data import Batch
from fisherkit.rows.base import TILE, spans
from fisherkit.rows.differentiable import kept_whole, pulled_back, with_values

QUICK = 4e-3
"""Seconds of an example's loop below which calls and not arithmetic are what it takes: vectorising always pays."""

SEVERAL = 8
"""Examples beside the plan's two that tell what a batch costs from what an example does."""


def generic_rows(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, v: Float[Tensor, "k B ..."],
    *, idle: Collection[str], vectorised: bool, numbers: int,
) -> Float[Tensor, "k B d"]:  # fmt: skip
    """Rows over the model's own parameters, d entries in all, some examples at a time: by ``torch.func`` or the loop.

    No output depends on ``idle`` ones; ``numbers`` are the entries that one example takes on the way, beside its rows.
    """
    live = {name: p for name, p in parameters.items() if name not in idle}
    own = sum(p.numel() for p in live.values())
    parts = [v.new_zeros(v.shape[0], batch.size, 0)]
    if live and vectorised:
        detached = {name: p.detach() for name, p in live.items()}
        found = [
            vectorised_rows(model, detached, batch.take(span), v[:, span])
            for span in spans(batch.size, numbers + v.shape[0] * own)
        ]
        parts = [found[0] if len(found) == 1 else torch.cat(found, 1)]
    elif live:
        parts = [looped_rows(model, live, batch, v)]
    if len(live) == len(parameters):
        return parts[0]
    columns = dict(zip(live, parts[0].split([p.numel() for p in live.values()], 2), strict=True)) if live else {}
    return torch.cat([columns.get(n, v.new_zeros(*v.shape[:2], p.numel())) for n, p in parameters.items()], 2)


def unreached(z: Tensor, parameters: Mapping[str, Tensor]) -> set[str]:
    """Names of the parameters that outputs do not depend on; none of outputs that have no graph."""
    if not parameters or not z.requires_grad:
        return set()
    found = pulled_back(z, list(parameters.values()), torch.zeros_like(z))
    return {name for name, g in zip(parameters, found, strict=True) if g is None}


def vectorised_rows(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, v: Float[Tensor, "k B ..."]
) -> Float[Tensor, "k B d"]:
    """Rows by ``vmap`` over examples and output vectors."""
    # Constants here: a graph of the rest of the model would be kept for nothing.
    rest = {name: p.detach() for name, p in model.named_parameters()}

    def one(example: list[Tensor], vectors: Float[Tensor, "k ..."]) -> Float[Tensor, "k d"]:
        single = batch.rebuilt([leaf.unsqueeze(0) for leaf in example])

        def forward(values: Mapping[str, Tensor]) -> Tensor:
            return single.call(with_values(model, {**rest, **values}))[0]

        pull = vjp(forward, dict(parameters))[1]
        (gradients,) = vmap(pull)(vectors)
        flat = [gradients[name].reshape(-1, p.numel()) for name, p in parameters.items()]
        # A parameter that the outputs do not depend on has one zero gradient, whatever the number of vectors.
        return torch.cat([g.expand(len(vectors), -1) for g in flat], 1)

    with warnings.catch_warnings(), kept_whole(model):
        # torch asks for reports on operations that it does not vectorise; `coverage` says what matters to the user.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        # Zeros that no example has a part in are expanded along axis 0, whatever axis is asked for.
        found = vmap(one)(batch.batched, v.transpose(0, 1)).transpose(0, 1)
    return found.detach()


def looped_rows(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, v: Float[Tensor, "k B ..."]
) -> Float[Tensor, "k B d"]:
    """Rows by one forward pass an example and one backward pass a row; the parameters are the model's own."""
    own = list(parameters.values())
    rows = v.new_empty(*v.shape[:2], sum(p.numel() for p in own), dtype=own[0].dtype)
    for n in range(batch.size):
        z = batch.take(slice(n, n + 1)).call(model)[0]
        for k, vector in enumerate(v[:, n]):
            found = pulled_back(z, own, vector) if z.requires_grad else [None] * len(own)
            flat = [dense_gradient(p, g).flatten() for p, g in zip(own, found, strict=True)]
            torch.cat(flat, out=rows[k, n])
    return rows


def dense_gradient(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    """A gradient as autograd found it, with its zeros: sparse embeddings leave them out, and unused parameters all."""
    if gradient is None:
        return torch.zeros_like(parameter)
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def kept_numbers(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Outputs of a forward pass, and how many entries beside the parameters its graph keeps for one example."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = max(kept.get(place, 0), tensor.numel())
        return tensor

    try:
        with saved_tensors_hooks(note, lambda tensor: tensor):
            z = batch.call(model)
    except RuntimeError:  # torch.func inside forward takes no hooks, and nested tensors have no address
        z = batch.call(model)
    return z, sum(kept.values()) // batch.size


def recurrent(model: nn.Module) -> bool:
    """Whether a model has layers whose kernels ``torch.func`` takes apart into steps, each with tensors of its own."""
    return any(isinstance(module, nn.RNNBase) for module in model.modules())


def loop_is_cheaper(
    model: nn.Module, parameters: Mapping[str, Tensor], two: Batch, v: Float[Tensor, "1 2 ..."], size: int, numbers: int
) -> bool:
    """Whether the loop takes less time than ``torch.func`` on a batch, measured on some examples."""
    device, detached = v.device, {name: p.detach() for name, p in parameters.items()}
    first = two.take(slice(0, 1))

    def vectorised(batch: Batch, vectors: Tensor) -> float:
        # The other units need a pass of their own, which the loop's brings too.
        return _seconds(lambda: (batch.call(model), vectorised_rows(model, detached, batch, vectors)), device)

    # The shorter of two, because a first call may wait for much.
    loop = min(_seconds(lambda: looped_rows(model, parameters, first, v[:, :1]), device) for _ in range(2))
    if loop < QUICK:
        return False
    pair = vectorised(two, v)
    each, fixed = pair / 2, 0.0
    several = min(SEVERAL, size, TILE // max(1, numbers))
    if several > 2 and each > loop and pair < several * loop:
        # Two examples do not pay for the fixed part of a vectorised pass; more may.
        index = torch.arange(several, device=device) % 2
        try:
            more = vectorised(two.take(index), v[:, index])
        except RuntimeError:  # a kernel that takes two and not three
            return True
        each = max(more - pair, 0.0) / (several - 2)
        fixed = max(pair - 2 * each, 0.0)
    return fixed + each * size > loop * size


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    start = now(device)
    function()
    return now(device) - start


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
