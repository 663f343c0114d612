"""How good influence scores are, whichever library they come from.

Scores are a ``[Q, N]`` tensor, positive = the training example helps the query. Measured outputs are oriented so that
larger is better. Nothing here takes a Fisher or makes scores.
"""

from fisherkit.influence.evaluation.ceiling import NoiseCeiling, noise_ceiling
from fisherkit.influence.evaluation.correlated import RankCorrelation
from fisherkit.influence.evaluation.datamodeling import average_scores, linear_datamodeling_score
from fisherkit.influence.evaluation.leave_one_out import LeaveOneOut, leave_one_out
from fisherkit.influence.evaluation.mislabelled import Detection, flip_labels, mislabel_detection, plain_rankings
from fisherkit.influence.evaluation.recipe import TrainingRecipe
from fisherkit.influence.evaluation.removal import RemovalCurve, removal_curve
from fisherkit.influence.evaluation.retraining import retrain
from fisherkit.influence.evaluation.runs_file import Retraining
from fisherkit.influence.evaluation.subsets import leave_one_out_masks, random_subsets, removal_masks
from fisherkit.influence.evaluation.trained_models import train_models

__all__ = [
    "Detection",
    "LeaveOneOut",
    "NoiseCeiling",
    "RankCorrelation",
    "RemovalCurve",
    "Retraining",
    "TrainingRecipe",
    "average_scores",
    "flip_labels",
    "leave_one_out",
    "leave_one_out_masks",
    "linear_datamodeling_score",
    "mislabel_detection",
    "noise_ceiling",
    "plain_rankings",
    "random_subsets",
    "removal_curve",
    "removal_masks",
    "retrain",
    "train_models",
]
