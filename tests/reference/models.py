"""The zoo: every model family by name, in the order in which they were registered."""

from tests.reference import models_conv, models_dense, models_sequence
from tests.reference.zoo import FAMILIES, Family

__all__ = ["FAMILIES", "Family", "models_conv", "models_dense", "models_sequence"]
