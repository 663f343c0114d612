"""Rows of a batch that a model takes only together, as the nodes of a graph: what to do instead, in words.

A graph's nodes are the positions of one example and no examples themselves: each one's outputs depend on its
neighbours. Looked at only where a model fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fisherkit.data import Batch
from fisherkit.errors import DataError, FisherkitError
from fisherkit.randomness import untouched_rng

GRAPHS = 'a graph as one element of the batch, inputs (1, nodes, ...) and labels (1, nodes), with example="token"'


@contextmanager
def needing_each_other(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Around a model's first pass over two examples of a batch.

    Args:
        model: the model.
        batch: the whole batch, on the model's device.

    Raises:
        DataError: the model fails for two of the batch's examples and works for all of them.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FisherkitError) or batch.size < 3 or not _works(model, batch):
            raise
        raise DataError(
            call="data, batch 0",
            got=f"a batch of {batch.size} examples that the model takes together and not two at a time",
            expected="examples along axis 0 that need no others",
            why=f"for the first two it fails with: {(str(error) or type(error).__name__).splitlines()[0]}",
            try_=f"{GRAPHS}, if they are the nodes of a graph",
        ) from error


def _works(model: nn.Module, batch: Batch) -> bool:
    devices = [next(model.parameters()).device]
    with untouched_rng(devices), torch.no_grad(), contextlib.suppress(Exception):  # models raise what they like
        return batch.call(model).shape[:1] == (batch.size,)
    return False
