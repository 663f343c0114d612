"""How good a preconditioned update is, judged by the exact Fisher.

Takes built operators and plain vectors; knows neither kinds nor structures, and no other application.
"""

from fisherkit.evaluation.gradient import loss_gradient
from fisherkit.evaluation.quality import approximation_quality, quality_floor

__all__ = ["approximation_quality", "loss_gradient", "quality_floor"]
