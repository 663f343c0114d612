"""Optimizers that see gradients through a Fisher of the same examples, in any training loop.

`NaturalGradient` is an optimizer by itself, `Preconditioner` stands before any other's step.
"""

from fisherkit.optim.natural_gradient import NaturalGradient
from fisherkit.optim.preconditioner import Preconditioner

__all__ = ["NaturalGradient", "Preconditioner"]
