"""How F is kept: one object a structure, for builds and optimizers alike; a subclass with a name is registered."""

from fisherkit.structures.base import (
    LayerStructure,
    LayerSums,
    Names,
    Part,
    Parts,
    Structure,
    Sums,
    UnitSums,
    record_class,
    structure_named,
    structures,
)
from fisherkit.structures.block import Block
from fisherkit.structures.diagonal import Diagonal
from fisherkit.structures.full import Full, RowStructure
from fisherkit.structures.kronecker import EKFAC, KFAC
from fisherkit.structures.nkp import NKP

__all__ = [
    "EKFAC", "KFAC", "NKP", "Block", "Diagonal", "Full", "LayerStructure", "LayerSums", "Names", "Part", "Parts",
    "RowStructure", "Structure", "Sums", "UnitSums", "record_class", "structure_named", "structures",
]  # fmt: skip
