"""Powers of two that keep gradients of models in half precision away from underflow and overflow.

A float16 gradient below 6e-8 is 0, and one above 65,504 infinite. A backward pass is linear and examples do not
influence each other, so each example's output vector may go through it times a power of two, which changes no digit,
and its row be divided by that in float32 (loss scaling, Micikevicius et al., arXiv 1710.03740, one factor an example).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from fisherkit.arithmetic import at_least_single

TARGETS = (8, 0, -8)
"""Binary exponents of the largest entry that a vector goes with, in the order in which they are tried."""


def scales(v: Float[Tensor, "k B ..."]) -> Iterator[Float[Tensor, "k B"]]:
    """What to divide each example's vectors by, powers of two in float32 at least, for one try after the other."""
    largest = v.reshape(*v.shape[:2], -1).abs().amax(2).to(at_least_single(v.dtype))
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)
    for target in TARGETS:
        yield torch.ldexp(torch.ones_like(largest), exponent - target)
