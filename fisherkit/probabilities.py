"""Outputs that look like probabilities where a likelihood wants logits: said once, with the layer that made them.

Owns what gives such outputs away. A model that ends in a log-softmax is right as it is under a softmax likelihood: the
softmax of log-probabilities are the probabilities.
"""

from __future__ import annotations

from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fisherkit.errors import warn

ENOUGH = 16
"""Numbers that are all between 0 and 1 by no accident; logits of a few outputs may well be."""

_TO_PROBABILITIES = (nn.Softmax, nn.Softmax2d, nn.Sigmoid, nn.Hardsigmoid)
_SAID: WeakSet[nn.Module] = WeakSet()


def warn_of_probabilities(model: nn.Module, z: Float[Tensor, "k C"], link: str, likelihood: str) -> bool:
    """Warn, once a model, of outputs z that went through a softmax or sigmoid already, naming the layer that may be it.

    ``link`` is what the likelihood makes probabilities of them with, "softmax" or "sigmoid"; "" for none.
    Returns whether this settles it, so that other outputs of the model need not be looked at.
    """
    if not link or model in _SAID or not z.numel():
        return bool(not link or model in _SAID)
    within = bool(((z >= 0) & (z <= 1)).all()) and bool((z > 0).any())
    if link == "softmax" and not within:
        return True
    leaves = [(name, m) for name, m in model.named_modules() if not any(m.children())]
    name, last = leaves[-1] if leaves else ("", model)
    whole = z.shape[-1] > 1 and within and bool(((z.sum(-1) - 1).abs() < 1e-3).all())
    if link == "softmax":
        found = (whole and len(z) > 1) or (within and isinstance(last, _TO_PROBABILITIES))
    else:
        found = within and ((whole and len(z) > 1) or z.numel() >= ENOUGH or isinstance(last, _TO_PROBABILITIES))
        found = found or (z.shape[-1] > 1 and bool((torch.logsumexp(z, -1).abs() < 1e-3).all()))
    if not found:
        return not within
    _SAID.add(model)
    kinds = (*_TO_PROBABILITIES, nn.LogSoftmax) if link == "sigmoid" else _TO_PROBABILITIES
    makers = [(name, m) for name, m in leaves if isinstance(m, kinds)]
    name, last = makers[-1] if makers else ("", model)
    where = f"; the layer {name!r}, a {type(last).__name__}, makes them" if makers else ""
    advice = "nn.CrossEntropyLoss()" if link == "softmax" else "nn.BCEWithLogitsLoss()"
    warn(
        f"the outputs look like probabilities{where}, and the {likelihood} likelihood takes logits: it would put a "
        f"{link} on them once more, and the Fisher would be another loss's. Try: the model without it, trained with "
        f"{advice}, or its logits in a small nn.Module around the model"
        + (", or log-probabilities" if link == "softmax" else "") + "."
        + ("" if makers else " No layer was found that makes them: if they are logits, all is well.")
    )  # fmt: skip
    return True
