"""Fisher information for PyTorch: five kinds, five structures, one list of exact operations."""

from fisherkit import estimators as estimators
from fisherkit import likelihoods as likelihoods
from fisherkit._version import __version__ as __version__
from fisherkit.errors import *  # noqa: F403  (the errors are the package's own public names)
from fisherkit.fisher import FisherApproximation as FisherApproximation
from fisherkit.kinds import (
    EmpiricalFisher as EmpiricalFisher,
)
from fisherkit.kinds import (
    ExactFisher as ExactFisher,
)
from fisherkit.kinds import (
    ImprovedEmpiricalFisher as ImprovedEmpiricalFisher,
)
from fisherkit.kinds import (
    SampledFisher as SampledFisher,
)
from fisherkit.kinds import (
    TruncatedFisher as TruncatedFisher,
)
from fisherkit.operators import FisherOperator as FisherOperator
from fisherkit.operators import RelativeDamping as RelativeDamping
from fisherkit.operators import load as load
from fisherkit.outputs import Outputs as Outputs
from fisherkit.outputs import OutputVectors as OutputVectors
