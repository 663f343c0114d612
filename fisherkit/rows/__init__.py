"""How output vectors become rows, and how rows are kept.

`record` watches a forward pass; `rules` know what each function's parameter gradient is made of; `plan` verifies them
against autograd and chooses representations; `linearized` makes the rows of one batch and `problem` loops over the
data. `base` (written out), `factored`, `sparse`, `sliced` and `summed` keep rows; `collection` puts the units side by
side; `streamed` remakes them on demand. Nothing here knows a kind, a structure or a normalization.
"""

from collections.abc import Sequence

from fisherkit.io import State
from fisherkit.rows.base import StoredRows, UnitRows
from fisherkit.rows.collection import Rows, UnitSlot
from fisherkit.rows.factored import FactoredRows
from fisherkit.rows.sliced import SlicedRows
from fisherkit.rows.sparse import SparseRows
from fisherkit.rows.summed import SumRows
from fisherkit.space import ParameterSpace

REPRESENTATIONS: dict[str, type[UnitRows]] = {
    c.form: c for c in (FactoredRows, SlicedRows, SparseRows, StoredRows, SumRows)
}


def restore_rows(space: ParameterSpace, states: Sequence[State]) -> Rows:
    """Rows from what a file holds of each unit."""
    slots = [UnitSlot(s.names, REPRESENTATIONS[s.tag].from_tensors(s.tensors, s.options)) for s in states]
    return Rows(space, slots)
