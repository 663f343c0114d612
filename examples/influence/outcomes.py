"""What retraining shows and the models that are scored, kept in files that a later run goes on from.

Owns file names and what is trained. Knows no scores.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from examples.influence.evaluation import Retraining, random_subsets, retrain, train_models
from examples.influence.settings import Setting

SCORED = 3
"""Models whose scores are averaged."""


def outcomes(setting: Setting, folder: Path, *, subsets: int, seeds: int, progress: bool) -> Retraining:
    """Models trained on random halves; goes on from its file if there is one.

    Args:
        setting: what.
        folder: for the file, named by setting and sizes.
        subsets: S.
        seeds: R.
        progress: show a bar.
    """
    masks = random_subsets(len(setting.train[1]), subsets)
    path = folder / f"{setting.name}-{subsets}x{seeds}.safetensors"
    return retrain(
        setting.build, setting.train, setting.queries, masks, setting.recipe, seeds=range(seeds),
        measurements=("loss", "margin"), path=path, progress=progress,
    )  # fmt: skip


def scored_models(setting: Setting) -> list[nn.Module]:
    """Models trained on everything, from seeds that no retraining used."""
    models = train_models(setting.build, setting.train, setting.recipe, seeds=[1000 + i for i in range(SCORED)])
    return [model.eval() for model in models]


def accuracy(setting: Setting, models: list[nn.Module]) -> float:
    """Share of the queries that the models get right."""
    inputs, labels = setting.queries
    with torch.no_grad():
        return float(torch.stack([(model(inputs).argmax(1) == labels).float().mean() for model in models]).mean())
