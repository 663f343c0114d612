"""Scores by dattri. Knows its interface, no other library and no Fisher of this package."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from examples.influence.scorer import Scorer, needed, seed_of
from examples.influence.settings import Pair


def dattri_ekfac(model: nn.Module, train: Pair) -> Scorer:
    """dattri's EKFAC, from the observed labels; of linear layers alone.

    Args:
        model: a trained one.
        train: its data.
    """
    own = copy.deepcopy(model).eval()

    def loss(parameters: dict[str, Tensor], data: Pair) -> Tensor:
        return F.cross_entropy(functional_call(own, parameters, (data[0],)), data[1])

    kind = importlib.import_module("dattri.algorithm.influence_function").IFAttributorEKFAC
    attributor = kind(_task(own, loss, None))
    attributor.cache(_loader(train))
    mean = float(torch.cat([v.flatten() for v in attributor.cached_lambdas.values()]).mean())

    def scores(queries: Pair, damping: float | None) -> Tensor:
        attributor.damping = needed(damping) * mean
        found: Tensor = attributor.attribute(_loader(train), _loader(queries))
        return found.detach().mT / len(train[1])

    return scores


def dattri_trak(dimensions: int | None, model: nn.Module, train: Pair) -> Scorer:
    """dattri's TRAK of the margin, the scores those of the loss.

    Args:
        dimensions: of the normal projection, then without damping; None: no projection.
        model: a trained one.
        train: its data.
    """
    own = copy.deepcopy(model).eval()

    def log_probability(parameters: dict[str, Tensor], example: Pair) -> Tensor:
        outputs = functional_call(own, parameters, (example[0].unsqueeze(0),))
        return -F.cross_entropy(outputs, example[1].unsqueeze(0))

    def margin(parameters: dict[str, Tensor], example: Pair) -> Tensor:
        outputs = functional_call(own, parameters, (example[0].unsqueeze(0),))[0]
        others = outputs.masked_fill(torch.arange(len(outputs)) == example[1], -torch.inf)
        return log_probability(parameters, example) - (others.logsumexp(0) - outputs.logsumexp(0))

    def probability(parameters: dict[str, Tensor], example: Pair) -> Tensor:
        return log_probability(parameters, example).exp()

    kind = importlib.import_module("dattri.algorithm.trak").TRAKAttributor
    size = sum(p.numel() for p in own.parameters())
    # All of them: what one attributor is given becomes the next one's default.
    options = {
        "proj_dim": dimensions or size, "proj_type": "normal" if dimensions else "identity",
        "proj_max_batch_size": 32, "proj_seed": seed_of(own), "device": "cpu",
    }  # fmt: skip
    task = _task(own, margin, log_probability)
    attributor = kind(task, probability, projector_kwargs=options)
    if dimensions:
        attributor.cache(_loader(train))
        return lambda queries, damping: _attributed(attributor, queries)
    features = task.get_grad_loss_func(in_dims=(None, 0))(task.get_param()[0], train) / attributor.norm_scaler
    mean = float(features.square().sum()) / size

    def scores(queries: Pair, damping: float | None) -> Tensor:
        attributor.regularization = needed(damping) * mean
        attributor.cache(_loader(train))
        return _attributed(attributor, queries)

    return scores


def _attributed(attributor: Any, queries: Pair) -> Tensor:
    found: Tensor = attributor.attribute(_loader(queries))
    return found.detach().mT


def _task(model: nn.Module, loss: Callable[..., Tensor], target: Callable[..., Tensor] | None) -> Any:
    kind = importlib.import_module("dattri.task").AttributionTask
    return kind(loss_func=loss, model=model, checkpoints=model.state_dict(), target_func=target)


def _loader(data: Pair) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*data), batch_size=len(data[1]))
