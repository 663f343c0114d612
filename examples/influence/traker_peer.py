"""Scores by traker. Knows its interface, no other library and no Fisher of this package."""

from __future__ import annotations

import copy
import importlib
import itertools
import logging
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.influence.scorer import Scorer, seed_of
from examples.influence.settings import Pair


def traker(dimensions: int | None, model: nn.Module, train: Pair) -> Scorer:
    """traker's TRAK of the margin in single precision, the scores those of the loss.

    Args:
        dimensions: of its projection on a processor, then without damping; None: no projection.
        model: a trained one.
        train: its data.
    """
    library = importlib.import_module("trak")
    own = copy.deepcopy(model).eval()
    options: dict[str, Any] = {"proj_dim": dimensions, "projector_seed": seed_of(own)}
    if dimensions is None:
        options = {"projector": importlib.import_module("trak.projectors").NoOpProjector(device="cpu")}
    folder = tempfile.TemporaryDirectory()
    found = library.TRAKer(
        model=own, task="image_classification", train_set_size=len(train[1]), save_dir=folder.name, device="cpu",
        use_half_precision=False, logging_level=logging.ERROR, **options,
    )  # fmt: skip
    found.load_checkpoint(own.state_dict(), model_id=0)
    found.featurize(train, num_samples=len(train[1]))
    features = torch.as_tensor(found.saver.current_store["grads"])
    mean = float(features.square().sum()) / features.shape[1]
    numbers = itertools.count()

    def scores(queries: Pair, damping: float | None) -> Tensor:
        if (damping is None) != (dimensions is not None):
            raise ValueError("a damping without a projection, and only there")
        if damping is not None:
            found.score_computer.lambda_reg = damping * mean
        # What was finalized before had another damping.
        found.saver.model_ids[0]["is_finalized"] = 0
        found.finalize_features()
        name = f"queries-{next(numbers)}"
        found.start_scoring_checkpoint(name, own.state_dict(), model_id=0, num_targets=len(queries[1]))
        found.score(queries, num_samples=len(queries[1]))
        margins = torch.tensor(found.finalize_scores(exp_name=name)).mT
        # A loss's gradient is the margin's times p − 1.
        with torch.no_grad():
            wrong = -torch.expm1(-F.cross_entropy(own(queries[0]), queries[1], reduction="none"))
        return margins * wrong.unsqueeze(1)

    # The features lie in the folder: it lives as long as the scorer.
    scores.folder = folder  # type: ignore[attr-defined]
    return scores
