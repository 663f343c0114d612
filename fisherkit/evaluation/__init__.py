"""How good a preconditioned update is, and how right a Fisher, judged by the exact Fisher.

γ takes built operators and plain vectors, `audit` a Fisher of any origin; `compare` builds every kind on a batch. Knows
no other application.
"""

from fisherkit.evaluation.audit import Audit, Likeness, audit
from fisherkit.evaluation.compare import QualityRow, QualityTable, average, compare, plot_damping
from fisherkit.evaluation.quality import approximation_quality, loss_gradient, quality_floor

__all__ = [
    "Audit", "Likeness", "QualityRow", "QualityTable", "approximation_quality", "audit", "average", "compare",
    "loss_gradient", "plot_damping", "quality_floor",
]  # fmt: skip
