"""Where the batch lies in a layer's tensors.

Layers see their examples first ``[B, T…, c]``, second ``[T, B, c]`` (attention and recurrent code), or flattened with
the positions either way round. The four cases are tried on two examples and the one that autograd confirms is used;
this file only moves axes.
"""

from __future__ import annotations

from jaxtyping import Shaped
from torch import Tensor

BATCH_FIRST = "batch first"
BATCH_SECOND = "batch second"
FLAT_BATCH_MAJOR = "flattened, batch major"
FLAT_POSITION_MAJOR = "flattened, position major"
LAYOUTS = (BATCH_FIRST, BATCH_SECOND, FLAT_BATCH_MAJOR, FLAT_POSITION_MAJOR)


def fits(shape: tuple[int, ...], features: int, layout: str, batch: int) -> bool:
    """Whether a tensor with that many trailing feature axes can have the layout."""
    lead = shape[: len(shape) - features]
    if layout == BATCH_FIRST:
        return len(lead) >= 1 and lead[0] == batch
    if layout == BATCH_SECOND:
        return len(lead) >= 2 and lead[1] == batch
    return len(lead) == 1 and lead[0] % batch == 0 and lead[0] > batch


def batch_first(x: Shaped[Tensor, "..."], features: int, layout: str, batch: int) -> Shaped[Tensor, "B T c"]:
    """Bring a tensor to ``[B, T, c]``: positions and features each flattened.

    Args:
        x: the tensor, with ``features`` trailing feature axes.
        features: number of trailing axes that are features; 0 for token ids.
        layout: one of `LAYOUTS`.
        batch: B.
    """
    return all_batch_first(x.unsqueeze(0), features, layout, batch).squeeze(0)


def all_batch_first(x: Shaped[Tensor, "k ..."], features: int, layout: str, batch: int) -> Shaped[Tensor, "k B T c"]:
    """The same for k tensors, without a copy where the layout allows it."""
    k, width = x.shape[0], x.shape[x.ndim - features :].numel()
    if layout == BATCH_SECOND:
        x = x.transpose(1, 2)
    elif layout == FLAT_POSITION_MAJOR:
        x = x.reshape(k, x.shape[1] // batch, batch, width).transpose(1, 2)
    return x.reshape(k, batch, -1, width)
