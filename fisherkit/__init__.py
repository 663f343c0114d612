"""Fisher information for PyTorch: five kinds, five structures, one list of exact operations."""

from fisherkit import estimators, likelihoods
from fisherkit._version import __version__
from fisherkit.errors import *  # noqa: F403  (the errors are the package's own public names)
from fisherkit.fisher import FisherApproximation
from fisherkit.kinds import (
    EmpiricalFisher,
    ExactFisher,
    ImprovedEmpiricalFisher,
    SampledFisher,
    TruncatedFisher,
)
from fisherkit.operators import FisherOperator, RelativeDamping, load
from fisherkit.outputs import Outputs, OutputVectors
