"""How good influence scores are, whichever library they come from.

Scores are a ``[Q, N]`` tensor, positive = the training example helps the query. Measured outputs are oriented so that
larger is better. Nothing here takes a Fisher or makes scores.
"""

from examples.influence.evaluation.datamodeling import (
    NoiseCeiling,
    RankCorrelation,
    average_scores,
    linear_datamodeling_score,
    noise_ceiling,
)
from examples.influence.evaluation.leave_one_out import LeaveOneOut, leave_one_out
from examples.influence.evaluation.mislabelled import Detection, flip_labels, mislabel_detection, plain_rankings
from examples.influence.evaluation.retraining import Retraining, random_subsets, retrain, train_models
from examples.influence.evaluation.training import TrainingRecipe

__all__ = [
    "Detection",
    "LeaveOneOut",
    "NoiseCeiling",
    "RankCorrelation",
    "Retraining",
    "TrainingRecipe",
    "average_scores",
    "flip_labels",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabel_detection",
    "noise_ceiling",
    "plain_rankings",
    "random_subsets",
    "retrain",
    "train_models",
]
