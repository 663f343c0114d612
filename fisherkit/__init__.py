"""Fisher information for PyTorch: five kinds, six structures, one list of exact operations.

    import fisherkit as fk

    fisher = fk.ImprovedEmpiricalFisher(model, data, likelihood="categorical", structure="full")
    fisher @ v, fisher.diagonal(), fisher.solve(v, damping=1e-3), fisher.coverage()

Kinds differ only in output space, structures only in how the same rows are kept; `fisherkit.fisher` states the
conventions, `fisherkit.operators` the operations.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fisherkit import adapters, errors, likelihoods, structures
from fisherkit._version import __version__
from fisherkit.build import BuildPlan
from fisherkit.errors import (
    DataError,
    FileFormatError,
    FisherkitError,
    InvalidArgumentError,
    InvalidTypeError,
    MemoryBudgetError,
    MissingFileError,
    MissingPackageError,
    ModelError,
    NoClosedFormError,
    NonFiniteError,
    NotConvergedWarning,
    ProcessError,
    SingularMatrixError,
    UnknownParameterError,
)
from fisherkit.fisher import FisherApproximation, build_file, plan
from fisherkit.kinds import KINDS, EmpiricalFisher, ExactFisher, ImprovedEmpiricalFisher, SampledFisher, TruncatedFisher
from fisherkit.model_state import parameters_hash
from fisherkit.operators import FisherOperator, RelativeDamping, load
from fisherkit.outputs import OutputRule, Outputs, OutputVectors
from fisherkit.space import ParameterSpace

if TYPE_CHECKING:
    from fisherkit import continual, estimators, evaluation, influence, merging, optim, testing
    from fisherkit.merging import from_optimizer

__all__ = [
    "KINDS", "BuildPlan", "DataError", "EmpiricalFisher", "ExactFisher", "FileFormatError", "FisherApproximation",
    "FisherOperator", "FisherkitError", "ImprovedEmpiricalFisher", "InvalidArgumentError", "InvalidTypeError",
    "MemoryBudgetError", "MissingFileError", "MissingPackageError", "ModelError", "NoClosedFormError", "NonFiniteError",
    "NotConvergedWarning", "OutputRule", "OutputVectors", "Outputs", "ParameterSpace",
    "ProcessError", "RelativeDamping", "SampledFisher", "SingularMatrixError", "TruncatedFisher",
    "UnknownParameterError", "__version__", "adapters", "build_file", "continual", "errors", "estimators", "evaluation",
    "from_optimizer", "influence", "likelihoods", "load", "merging", "optim", "parameters_hash", "plan", "structures",
    "testing",
]  # fmt: skip

_WHEN_ASKED = frozenset({"continual", "estimators", "evaluation", "influence", "merging", "optim", "testing"})
"""What a Fisher itself does not need is imported at its first use: most of the package, and of the import's time."""


def __getattr__(name: str) -> Any:
    """A part of the package that is imported when it is asked for."""
    if name in _WHEN_ASKED:
        return importlib.import_module(f"fisherkit.{name}")
    if name == "from_optimizer":
        return importlib.import_module("fisherkit.merging").from_optimizer
    raise AttributeError(f"module 'fisherkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
