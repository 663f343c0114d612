"""Optimizers that see gradients through a Fisher of the same examples, in any training loop.

`NaturalGradient` is an optimizer by itself, `Preconditioner` stands before any other's step. `RowDamped` is a
kind for both.
"""

from fisherkit.optim.averages import LayerDamping
from fisherkit.optim.natural_gradient import NaturalGradient
from fisherkit.optim.preconditioner import Preconditioner
from fisherkit.optim.row_damping import RowDamped

__all__ = ["LayerDamping", "NaturalGradient", "Preconditioner", "RowDamped"]
