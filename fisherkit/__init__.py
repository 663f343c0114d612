"""Fisher information for PyTorch: five kinds, five structures, one list of exact operations.

    import fisherkit as fk

    fisher = fk.ImprovedEmpiricalFisher(model, data, likelihood="categorical", structure="full")
    fisher @ v, fisher.diagonal(), fisher.solve(v, damping=1e-3), fisher.coverage()

Kinds differ only in output space, structures only in how the same rows are kept; `fisherkit.fisher` states the
conventions, `fisherkit.operators` the operations.
"""

from fisherkit import continual, errors, estimators, evaluation, influence, likelihoods, merging, optim, testing
from fisherkit._version import __version__
from fisherkit.errors import (
    DataError,
    FileFormatError,
    FisherkitError,
    InvalidArgumentError,
    InvalidTypeError,
    MemoryBudgetError,
    MissingPackageError,
    ModelError,
    NoClosedFormError,
    NonFiniteError,
    NotConvergedError,
    NotConvergedWarning,
    SingularMatrixError,
    UnknownParameterError,
)
from fisherkit.fisher import FisherApproximation
from fisherkit.kinds import (
    KINDS,
    EmpiricalFisher,
    ExactFisher,
    ImprovedEmpiricalFisher,
    SampledFisher,
    TruncatedFisher,
)
from fisherkit.model_state import parameters_hash
from fisherkit.operators import FisherOperator, RelativeDamping, load
from fisherkit.outputs import OutputRule, Outputs, OutputVectors
from fisherkit.space import ParameterSpace

__all__ = [
    "KINDS",
    "DataError",
    "EmpiricalFisher",
    "ExactFisher",
    "FileFormatError",
    "FisherApproximation",
    "FisherOperator",
    "FisherkitError",
    "ImprovedEmpiricalFisher",
    "InvalidArgumentError",
    "InvalidTypeError",
    "MemoryBudgetError",
    "MissingPackageError",
    "ModelError",
    "NoClosedFormError",
    "NonFiniteError",
    "NotConvergedError",
    "NotConvergedWarning",
    "OutputRule",
    "OutputVectors",
    "Outputs",
    "ParameterSpace",
    "RelativeDamping",
    "SampledFisher",
    "SingularMatrixError",
    "TruncatedFisher",
    "UnknownParameterError",
    "__version__",
    "continual",
    "errors",
    "estimators",
    "evaluation",
    "influence",
    "likelihoods",
    "load",
    "merging",
    "optim",
    "parameters_hash",
    "testing",
]
