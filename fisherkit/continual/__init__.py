"""Learning one task after another without forgetting: elastic weight consolidation with any Fisher.

`EWC` holds the penalty. `hf_trainer`, `lightning` and `avalanche` beside it are adapters for other libraries' loops;
none of them is imported until you import it.
"""

from fisherkit.continual.conversion import convert_strength
from fisherkit.continual.ewc import EWC

__all__ = ["EWC", "convert_strength"]
