"""How good a preconditioned update is, judged by the exact Fisher.

γ takes built operators and plain vectors; `compare` builds every kind on a batch. Knows no other application.
"""

from fisherkit.evaluation.compare import compare
from fisherkit.evaluation.gradient import loss_gradient
from fisherkit.evaluation.quality import approximation_quality, quality_floor
from fisherkit.evaluation.table import QualityRow, QualityTable

__all__ = ["QualityRow", "QualityTable", "approximation_quality", "compare", "loss_gradient", "quality_floor"]
