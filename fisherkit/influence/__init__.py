"""Which training examples a prediction hangs on: influence scores by any Fisher, in any structure.

`InfluenceScores` takes a built Fisher, its model and two sets of data. Knows no other application.
"""

from fisherkit.influence import evaluation
from fisherkit.influence.approximations import ApproximateScores, Approximation, LowRankQueries, RandomProjection
from fisherkit.influence.blocks import RowBlocks
from fisherkit.influence.scores import InfluenceScores
from fisherkit.influence.top import TopScores

__all__ = [
    "ApproximateScores",
    "Approximation",
    "InfluenceScores",
    "LowRankQueries",
    "RandomProjection",
    "RowBlocks",
    "TopScores",
    "evaluation",
]
