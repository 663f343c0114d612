"""What a loader says of itself: where its order comes from, its random generators, how many examples it loads.

Reads attributes; iterates over nothing. Knows no batches.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


def generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The loader's own generators: its own, its sampler's, its batch sampler's."""
    batch_sampler = loader.batch_sampler
    owners = [loader, loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)}
    return list(found.values())


def _sampler(loader: DataLoader[Any]) -> object:
    """What a loader takes its order from."""
    found: object = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while type(found) is BatchSampler:
        found = found.sampler
    return found


def disorder(data: object) -> str:
    """What is wrong with the order of a loader; nothing if it is fixed, or if the data are no loader of a data set."""
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return ""
    sampler = _sampler(data)
    drawn = isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler))
    if isinstance(sampler, DistributedSampler):
        drawn, fixed = sampler.shuffle, not sampler.shuffle and sampler.num_replicas == 1
    else:
        written_down = isinstance(sampler, (list, tuple, range, Tensor, np.ndarray))
        fixed = type(sampler) is SequentialSampler or written_down
    if drawn:
        return "a DataLoader that shuffles"
    if not fixed:
        return f"a DataLoader with a {type(sampler).__name__}, whose order is not known,"
    return "a DataLoader with in_order=False" if data.num_workers and not getattr(data, "in_order", True) else ""


def in_order(data: object) -> bool:
    """Whether data that `disorder` allows have an order that nothing can change."""
    loader = isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset)
    return loader or isinstance(data, (list, tuple))


def loaded(data: object) -> int | None:
    """How many examples a loader loads; None if it does not say."""
    if not isinstance(data, DataLoader) or data.batch_sampler is None:
        return None
    batches = data.batch_sampler
    if isinstance(batches, (list, tuple)):
        return sum(map(len, batches))
    chosen: object = data.dataset if isinstance(data.dataset, IterableDataset) else getattr(batches, "sampler", None)
    if type(batches) is not BatchSampler or not isinstance(chosen, Sized):
        return None
    return len(chosen) - (len(chosen) % batches.batch_size if batches.drop_last else 0)
