"""Which training examples a prediction depends on: influence scores by any Fisher, in any structure.

`InfluenceScores` takes a built Fisher, its model and two sets of data. Knows no other application.
"""

from fisherkit.influence.approximations import ApproximateScores, LowRankQueries
from fisherkit.influence.blocks import RowBlocks
from fisherkit.influence.compression import Compression
from fisherkit.influence.scores import InfluenceScores, TopScores

__all__ = [
    "ApproximateScores", "Compression", "InfluenceScores", "LowRankQueries", "RowBlocks", "TopScores",
]  # fmt: skip
