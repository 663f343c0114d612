"""Around the package's own calls of a model: differentiable, whole afterwards, and told apart from the user's.

Owns flags that are put back afterwards. Knows no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from fisherkit.rows.whole import kept_whole

OWN_PASS: ContextVar[bool] = ContextVar("OWN_PASS", default=False)
"""Whether the package itself is calling the model, so that who watches the user's calls can tell."""


@contextmanager
def differentiable(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients on, frozen parameters differentiable, attention's fused inference kernel off; all put back after.

    Reentrant checkpoints run plainly: their graph hides the parameters inside.

    Args:
        model: comes back as it was.
        parameters: made differentiable.
    """
    token = OWN_PASS.set(True)
    flags = [p.requires_grad for p in parameters]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for p in parameters:
            p.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad(), kept_whole(model), _plain_checkpoints():
            yield
    finally:
        OWN_PASS.reset(token)
        torch.backends.mha.set_fastpath_enabled(fast)
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)


def pulled_back(z: Tensor, inputs: Sequence[Any], v: Tensor, *, keep: bool = True) -> tuple[Tensor | None, ...]:
    """Gradients of Σ v · z; None for inputs that z does not depend on.

    Of a number and not of z itself, which would import a computer algebra system to compare two shapes.

    Args:
        z: outputs with their graph.
        inputs: tensors or edges of it.
        v: as large as z.
        keep: whether the graph is needed again.
    """
    v = v.clone() if v.is_inference() else v  # what inference mode made, a graph does not take
    with torch.enable_grad():  # hooks of a backward pass run without
        total = (z * v.to(z.dtype)).sum()
    return torch.autograd.grad(total, inputs, retain_graph=keep, allow_unused=True)


@contextmanager
def _plain_checkpoints() -> Iterator[None]:
    """Checkpoints with use_reentrant=True call their function, on the class itself, whoever imported it from where."""
    before = vars(CheckpointFunction).get("apply")

    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)

    CheckpointFunction.apply = staticmethod(apply)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del CheckpointFunction.apply
        else:
            CheckpointFunction.apply = before  # type: ignore[method-assign]
