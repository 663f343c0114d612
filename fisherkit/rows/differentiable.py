"""Around the package's own calls of a model: differentiable, and told apart from the user's.

Owns flags that are put back afterwards. Knows no rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

OWN_PASS: ContextVar[bool] = ContextVar("OWN_PASS", default=False)
"""Whether the package itself is calling the model, so that who watches the user's calls can tell."""


@contextmanager
def differentiable(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradients on, frozen parameters differentiable, attention's fused inference kernel off; all put back after."""
    token = OWN_PASS.set(True)
    flags = [p.requires_grad for p in parameters]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for p in parameters:
            p.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        OWN_PASS.reset(token)
        torch.backends.mha.set_fastpath_enabled(fast)
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
