"""What is inside an operator, for those who must look: the structure behind a Fisher, and all that a file would hold.

The hooks that answer are private to operators; these functions are what other packages call.
"""

from __future__ import annotations

from fisherkit import io
from fisherkit.operators.base import FisherOperator


def unwrap(operator: FisherOperator) -> FisherOperator:
    """The operator that does the algebra: of a Fisher of a model the structure that was built, else itself.

    Args:
        operator: F.

    Returns:
        One of the structures of `fisherkit.operators`, or of a user's own; shared, not copied.
    """
    return operator._unwrap()


def state_of(operator: FisherOperator) -> io.State:
    """All that a file of the operator would hold, from which `fisherkit.operators.persistence.restore` makes it again.

    Args:
        operator: F.

    Returns:
        A tree of named tensors, which are the operator's own and not copies.

    Raises:
        NoClosedFormError: the rows are streamed from the data and lie nowhere.
    """
    return operator._state()
