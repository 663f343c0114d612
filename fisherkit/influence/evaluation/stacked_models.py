"""Many models of one architecture as one: their parameters stacked, their outputs by one vectorised call.

Owns what is stacked, what all models share, and the memory one model takes. Knows no loss, subset or optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import vmap

from fisherkit.data import Batch
from fisherkit.errors import InvalidArgumentError, InvalidTypeError, ModelError
from fisherkit.randomness import untouched_rng
from fisherkit.rows.whole import functional_call, kept_whole

Build = Callable[[int], nn.Module]
Named = dict[str, Tensor]

_COUPLED = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class Stack:
    """M models.

    Args:
        trained: stacked parameters ``[M, …]``, leaves that require grad.
        frozen: stacked tensors that are not trained and differ between models.
    """

    trained: Named
    frozen: Named


class StackedModels:
    """The models that a function builds, one for each seed, to be stacked as often as asked for.

    Args:
        build: a seed to a model; called with torch's global generators seeded by it and put back afterwards.
        seeds: one model each.
        call: for errors.

    Raises:
        InvalidTypeError: what is built is not a module.
        InvalidArgumentError: models that differ in their parameters' names or shapes, or have none to train.
        ModelError: dropout or batch norm in train mode.
    """

    def __init__(self, build: Build, seeds: Sequence[int], call: str) -> None:
        models = [_built(build, seed, call) for seed in seeds]
        self.template = models[0]
        named = [{n: p for n, p in m.named_parameters() if p.requires_grad} for m in models]
        rest = [
            dict(m.named_buffers()) | {n: p for n, p in m.named_parameters() if not p.requires_grad} for m in models
        ]
        if not named[0]:
            raise InvalidArgumentError(call=call, got="a model without parameters that require grad", expected="some")
        for kind in (named, rest):
            shapes = [{n: (t.shape, t.dtype, t.device) for n, t in tensors.items()} for tensors in kind]
            if any(s != shapes[0] for s in shapes):
                raise InvalidArgumentError(
                    call=call, got="models that differ in names, shapes or dtypes from seed to seed",
                    expected="one architecture for all seeds", why="their parameters are stacked",
                )  # fmt: skip
        self.initial = {n: torch.stack([t[n].detach() for t in named]) for n in named[0]}
        same = {n for n in rest[0] if all(torch.equal(t[n], rest[0][n]) for t in rest)}
        self.shared = {n: t.detach() for n, t in rest[0].items() if n in same}
        self.frozen = {n: torch.stack([t[n].detach() for t in rest]) for n in rest[0] if n not in same}
        self.device = next(iter(self.initial.values())).device

    def start(self, which: Int[Tensor, " M"]) -> Stack:
        """Untrained models.

        Args:
            which: the place of each model's seed among the seeds.
        """
        which = which.to(self.device)
        return Stack(
            {n: t[which].requires_grad_() for n, t in self.initial.items()},
            {n: t[which] for n, t in self.frozen.items()},
        )

    def outputs(self, stack: Stack, batch: Batch, *, shared: bool) -> Tensor:
        """What every model says of its batch, ``[M, B, …]``.

        Args:
            stack: the models.
            batch: inputs ``[M, B, …]``, or ``[B, …]`` if all models see the same.
            shared: whether they do.
        """
        leaves, rebuild = batch.leaves()

        def one(trained: Named, frozen: Named, *own: Tensor) -> Tensor:
            def model(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self.template, {**trained, **frozen, **self.shared}, args, kwargs)

            return rebuild(list(own)).call(model)

        axes = (0, 0 if stack.frozen else None, *([None if shared else 0] * len(leaves)))
        with kept_whole(self.template):
            return vmap(one, in_dims=axes)(stack.trained, stack.frozen, *leaves)

    @staticmethod
    def module(build: Build, seed: int, stack: Stack, place: int, call: str) -> nn.Module:
        """One of the models by itself.

        Args:
            build: what built it.
            seed: of it.
            stack: the models.
            place: its place among them.
            call: for errors.
        """
        model = copy.deepcopy(_built(build, seed, call))  # what a function returns may be the caller's own
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in stack.trained:
                    parameter.copy_(stack.trained[name][place])
        return model

    def bytes_per_model(self, batch: Batch, call: str) -> int:
        """Memory that training one more model takes: parameters, gradients, moments, and what autograd keeps.

        Args:
            batch: of one model, ``[B, …]``.
            call: for errors.

        Raises:
            ModelError: the model has an operation that cannot be vectorised.
        """
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        try:
            with saved_tensors_hooks(note, lambda tensor: tensor):
                self.outputs(self.start(torch.zeros(2, dtype=torch.long)), batch, shared=True)
        except RuntimeError as error:
            if isinstance(error, ModelError):
                raise error.at(call) from error
            raise ModelError(
                call=call, got=f"a model that torch.func.vmap cannot take ({str(error).splitlines()[0]})",
                expected="one whose forward pass has no data-dependent control flow, random numbers or changed buffers",
                try_="model.eval(), or train one model at a time and pass the outputs to the score",
            ) from error  # fmt: skip
        own = sum(t[0].nbytes for t in (*self.initial.values(), *self.frozen.values()))
        # Value, gradient, two moments, and the optimizer's temporaries; activations once more for their gradients.
        return 6 * own + sum(kept.values()) + sum(leaf.nbytes for leaf in batch.leaves()[0])


def _built(build: Build, seed: int, call: str) -> nn.Module:
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    with untouched_rng(devices):
        torch.manual_seed(seed)
        model = build(seed)
    if not isinstance(model, nn.Module):
        raise InvalidTypeError(
            call=call, got=f"build({seed}) that returns a {type(model).__name__}", expected="a torch.nn.Module",
            try_="lambda seed: nn.Sequential(...)",
        )  # fmt: skip
    for name, module in model.named_modules():
        if module.training and isinstance(module, _COUPLED) and getattr(module, "p", 1.0) > 0:
            raise ModelError(
                call=call, got=f"{name or 'the model'}, a {type(module).__name__}, in train mode",
                expected="eval mode", why="random masks or batch statistics do not vectorise over models",
                try_="build(seed).eval(); dropout and running statistics are then constants",
            )  # fmt: skip
    return model
